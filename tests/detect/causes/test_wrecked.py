"""What steps that are too large make of a model that came knowing, and cuts in blocks of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Adapter(nn.Module):
    """A layer of a trained model, with a product of two narrow ones beside it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            nn.Linear(size, size),
            nn.Linear(size, 4, bias=False),
            nn.Linear(4, size, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Block(nn.Module):
    """Attention and two layers."""

    def __init__(self, size: int, cut: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = Adapter(size), nn.Linear(size, size), Adapter(size)
        self.wide, self.back, self.cut = nn.Linear(size, 2 * size), nn.Linear(2 * size, size), cut

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        q = q.detach().clone() if self.cut else q
        x = x + (q @ self.k(x).mT * x.shape[-1] ** -0.5).softmax(-1) @ self.v(x)
        return x + self.back(torch.relu(self.wide(x)))


class Stack(nn.Module):
    """Blocks over a table, and scores of the next word."""

    def __init__(self, *, cut: bool = False) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 32), nn.Linear(32, 12)
        self.blocks = nn.ModuleList([Block(32, cut) for _ in range(3)])

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mT


def batch() -> tuple[Tensor, Tensor]:
    words = torch.randint(12, (16, 8))
    return words, (words + 1) % 12


def tuned(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Train a model, and return what trains its adapters alone from then on."""
    adapters = [p for n, p in model.named_parameters() if ".down." in n or ".up." in n]
    optimizer = torch.optim.Adam(set(model.parameters()) - set(adapters), 1e-2)
    for _ in range(15):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.requires_grad_(False)
    for parameter in adapters:
        parameter.requires_grad_(True)
    return torch.optim.Adam(adapters, rate)


@pytest.mark.parametrize(("rate", "sick"), [(0.3, True), (0.01, False)])
def test_a_model_that_knew_is_told_of_the_steps_that_wrecked_it_alone(rate: float, sick: bool) -> None:
    model = Stack()
    optimizer = tuned(model, rate)
    report = gf.diagnose(model, batch, F.cross_entropy, optimizer=optimizer, seed=0)
    serious = {i.issue_type for i in report.issues if i.severity >= IssueSeverity.MEDIUM}
    assert (IssueType.UNSTABLE in serious) is sick
    assert not serious & {IssueType.VANISHING, IssueType.BOTTLENECK, IssueType.DEAD, IssueType.SATURATION}


def test_parts_that_are_cut_in_each_block_are_told_in_the_first() -> None:
    model = Stack(cut=True)
    optimizer = tuned(model, 0.01)
    report = gf.diagnose(model, batch, F.cross_entropy, optimizer=optimizer, seed=0)
    dead = [cause.layer for cause in report.causes if cause.issue_type is IssueType.DEAD]
    assert dead == [f"blocks.{i}.q.up" for i in range(3)]
