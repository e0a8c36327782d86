"""Terms of a loss in units of their own, of which one alone steers what both share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf


class Shared(nn.Module):
    """A trunk, and heads for a class and for a way."""

    def __init__(self, squash: type[nn.Module]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 32), squash(), nn.Linear(32, 32), squash())
        self.near, self.way = nn.Linear(32, 5), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.near(x), self.way(x)


def told(
    scale: float,
    *,
    weight: float = 1.0,
    mean: float = 0.0,
    rate: float = 2e-3,
    squash: type[nn.Module] = nn.ReLU,
) -> list[tuple[str, bool]]:
    """Return the layers of which EXPLODING is told, and whether it is serious."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    kinds, ways = torch.randn(12, 5, generator=g), torch.randn(12, 2, generator=g)

    def batch() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = torch.randn(32, 12, generator=g)
        return x, ((x @ kinds).argmax(1), mean + scale * (x @ ways))

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        return weight * F.cross_entropy(output[0], target[0]) + F.mse_loss(output[1], target[1])

    model = Shared(squash)
    adam = torch.optim.Adam(model.parameters(), rate)
    found = gf.diagnose(model, batch, loss, steps=20, optimizer=adam)
    return [(i.layer, i.severity.is_serious) for i in found.issues if i.issue_type is gf.IssueType.EXPLODING]


@pytest.mark.parametrize("squash", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_ways_in_small_units_leave_nothing_to_the_class(scale: float, squash: type[nn.Module]) -> None:
    assert told(scale, squash=squash) == [("way", True)]


@pytest.mark.parametrize("weight", [1.0, 0.01])
def test_ways_in_units_of_their_spread(weight: float) -> None:
    """A term of a small weight is meant to be weak."""
    assert not any(serious for _, serious in told(1.0, weight=weight))


def test_far_targets_that_the_steps_come_up_to() -> None:
    assert not any(serious for _, serious in told(1.0, mean=10.0, rate=1e-2))
