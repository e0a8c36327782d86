"""EXPLODING over the calls of a loop that overshoots for some batches, and holds for others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1)


class Relaxed(nn.Module):
    """A state that a layer moves again and again, by a gain that comes with the batch."""

    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self.update, self.read, self.bounded = nn.Linear(16, 16), nn.Linear(16, 1), bounded

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        for _ in range(16):
            moved = gain[:, None] * self.update(x)
            x = x + (0.2 * torch.tanh(moved) if self.bounded else moved)
        return self.read(x)


class Adapted(nn.Module):
    """A net that is adapted to some points of a task by descent, and asked at others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        self.rate = rate

    def forward(self, x: Tensor, y: Tensor, asked: Tensor) -> Tensor:
        outputs = []
        for task in range(len(x)):
            weights: dict[str, Tensor] = dict(self.net.named_parameters())
            for _ in range(5):
                loss = F.mse_loss(functional_call(self.net, weights, (x[task],)), y[task])
                slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                weights = {n: w - self.rate * s for (n, w), s in zip(weights.items(), slopes, strict=True)}
            outputs.append(functional_call(self.net, weights, (asked[task],)))
        return torch.stack(outputs)


def exploding(model: nn.Module, batch: object, rate: float) -> set[str]:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    report = gf.diagnose(model, batch, F.mse_loss, optimizer=optimizer, seed=0)
    serious = [i for i in report.issues if i.severity >= IssueSeverity.MEDIUM]
    return {i.layer for i in serious if i.issue_type is IssueType.EXPLODING}


@pytest.mark.parametrize(
    ("rare", "bounded", "sick"), [(3.0, False, True), (3.0, True, False), (0.05, False, False)]
)
def test_a_state_that_some_batches_multiply(rare: float, bounded: bool, sick: bool) -> None:
    drawn = [0]

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        drawn[0] += 1
        gain = torch.full((32,), 0.05)
        gain[0] = rare if drawn[0] % 5 == 0 else 0.05
        x = torch.randn(32, 16)
        return (x, gain), x[:, :1]

    assert exploding(Relaxed(bounded), batch, 1e-3) == ({"update"} if sick else set())


@pytest.mark.parametrize(("rate", "sick"), [(0.02, True), (0.0005, False)])
def test_descent_within_the_model(rate: float, sick: bool) -> None:
    def batch() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        size, phase = 10 + 30 * torch.rand(4, 1, 1), 0.6 * torch.rand(4, 1, 1)
        x, asked = 6 * torch.rand(4, 8, 1) - 3, 6 * torch.rand(4, 8, 1) - 3
        return (x, size * torch.sin(x + phase), asked), size * torch.sin(asked + phase)

    assert bool(exploding(Adapted(rate), batch, 1e-2)) is sick
