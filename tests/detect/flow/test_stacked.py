"""Stacks of recurrent layers that do not learn at the start, and one or two that do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU}


class Fused(nn.Module):
    """All layers in one module."""

    def __init__(self, kind: str, depth: int) -> None:
        super().__init__()
        self.rnn, self.out = KINDS[kind](8, 32, depth, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Chain(nn.Module):
    """A module for each layer, with a way past it or not."""

    def __init__(self, kind: str, depth: int, skips: bool = False) -> None:
        super().__init__()
        self.start, self.out, self.skips = nn.Linear(8, 32), nn.Linear(32, 4), skips
        self.layers = nn.ModuleList(KINDS[kind](32, 32, batch_first=True) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for layer in self.layers:
            x = x + layer(x)[0] if self.skips else layer(x)[0]
        return self.out(x[:, -1])


def vanishing(model: nn.Module) -> set[str]:
    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 12, 8)
        return x, x[:, -3:, :4].sum(1).argmax(1)

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, batch, F.cross_entropy, steps=15, optimizer=optimizer, seed=0)
    return {i.layer for i in report.issues if i.issue_type is IssueType.VANISHING and i.severity.is_serious}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "depth", "told"), [("LSTM", 6, True), ("GRU", 8, True), ("LSTM", 2, False),
                                                     ("GRU", 2, False)])  # fmt: skip
def test_layers_of_one_module(kind: str, depth: int, told: bool, seed: int) -> None:
    torch.manual_seed(seed)
    assert vanishing(Fused(kind, depth)) == ({"rnn"} if told else set())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("depth", "skips"), [(7, False), (7, True), (2, False)])
def test_a_module_for_each_layer(depth: int, skips: bool, seed: int) -> None:
    torch.manual_seed(seed)
    found = vanishing(Chain("LSTM", depth, skips))
    assert ("layers.0" in found) == (depth == 7 and not skips)
