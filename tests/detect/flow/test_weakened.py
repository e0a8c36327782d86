"""Stacks whose layers apply less of their weights than they hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf


class Masked(nn.Linear):
    """A layer whose units have a few inputs each, of weights drawn at the size for all, or for those few."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, few: int, own_size: bool, factor: float) -> None:
        super().__init__(inputs, outputs)
        self.factor, few = factor, min(few, inputs)
        chosen = torch.rand(outputs, inputs).argsort(1)[:, :few]
        self.register_buffer("mask", torch.zeros(outputs, inputs).scatter_(1, chosen, 1.0))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (few if own_size else inputs)))
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.factor * self.weight * self.mask, self.bias)


def told(
    *,
    depth: int = 8,
    few: int = 6,
    own_size: bool = False,
    factor: float = 1.0,
    norm: bool = False,
    rate: float = 0.02,
) -> list[str]:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 24, generator=g)

    def batch() -> tuple[Tensor, Tensor]:
        kind = torch.randint(8, (32,), generator=g)
        return centres[kind] + 0.5 * torch.randn(32, 24, generator=g), kind

    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [Masked(64 if i else 24, 64, few, own_size, factor), nn.ReLU()]
        layers += [nn.BatchNorm1d(64)] if norm else []
    model = nn.Sequential(*layers, nn.Linear(64, 8))
    sgd = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    found = gf.diagnose(model, batch, F.cross_entropy, steps=16, optimizer=sgd)
    vanishing = [i for i in found.issues if i.issue_type is gf.IssueType.VANISHING and i.severity.is_serious]
    return [i.layer for i in vanishing if "applied" in i.metrics]


@pytest.mark.parametrize(("few", "factor"), [(6, 1.0), (64, 0.3)])
def test_weights_that_a_mask_or_a_factor_makes_too_small(few: int, factor: float) -> None:
    assert told(few=few, factor=factor, depth=8 if few == 6 else 7) in (["0"], ["2"])


def test_weights_that_are_applied_at_the_size_they_need() -> None:
    assert told(own_size=True) == []
    assert told(norm=True) == []
    assert told(few=64, factor=1.0) == []


def test_a_stack_of_few_layers() -> None:
    assert told(depth=3) == []
