"""UNSTABLE runs whose loss does not rise: too steep for their steps, or paid for errors; and healthy ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

MEDIUM, HIGH = IssueSeverity.MEDIUM, IssueSeverity.HIGH


def unstable(
    model: nn.Module, batches: Any, loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer
) -> list[IssueSeverity]:
    report = gf.diagnose(model, batches, loss, optimizer=optimizer, seed=0)
    return [i.severity for i in report.issues if i.issue_type is IssueType.UNSTABLE and i.severity >= MEDIUM]


# ------------------------------------------------------------------------------------- too steep


class Waves(nn.Module):
    """Sines of sines, of one coordinate in any unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 48), nn.Linear(48, 48), nn.Linear(48, 1)])

    def forward(self, t: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            t = torch.sin(20 * layer(t))
        return self.layers[-1](t)


def sound(unit: float) -> Callable[[], tuple[Tensor, Tensor]]:
    def batch() -> tuple[Tensor, Tensor]:
        t = torch.rand(128, 1)
        return unit * t, torch.sin(8 * t)

    return batch


def test_a_bounded_loss_that_its_steps_make_ever_steeper() -> None:
    torch.manual_seed(0)
    model = Waves()
    nn.init.normal_(model.get_parameter("layers.2.weight"), std=1e-4)
    assert unstable(model, sound(400.0), F.mse_loss, torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9))


def test_the_same_in_a_unit_that_fits() -> None:
    torch.manual_seed(0)
    model = Waves()
    nn.init.normal_(model.get_parameter("layers.2.weight"), std=1e-4)
    assert not unstable(
        model, sound(0.05), F.mse_loss, torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    )


def test_a_gradient_that_climbs_from_a_flat_start() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(3)])
    for layer in model:
        nn.init.normal_(layer.get_parameter("weight"), std=0.03)
    x = torch.randn(64, 16)
    told = gf.diagnose(
        model, lambda: (x, 3 * x), F.mse_loss, optimizer=torch.optim.Adam(model.parameters(), 1e-2), seed=0
    )
    norms = [sum(p.grad_norm[i] ** 2 for p in told.record.parameters) ** 0.5 for i in (0, -1)]
    assert norms[1] > 10 * norms[0]
    assert not [i for i in told.issues if i.issue_type is IssueType.UNSTABLE and i.severity >= MEDIUM]


# ------------------------------------------------------------------------------------- paid for errors


def tables() -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 10)
    return x, x[:, :3].tanh()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 3))


PAID: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the wrong sign": lambda y, t: -F.mse_loss(y, t),
    "a weight below zero": lambda y, t: ((y - t).square() * torch.tensor([1.0, 1.0, -3.0])).mean(),
}


@pytest.mark.parametrize("name", PAID)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_errors_that_are_paid_for(name: str, scale: float) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    assert unstable(model, tables, lambda y, t: scale * PAID[name](y, t), optimizer) == [HIGH]


class Critic(nn.Module):
    """Tells two clouds apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), self.net(x + 2)


BELOW_ZERO: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Tensor]]] = {
    "a critic": (Critic, lambda: torch.randn(64, 4), lambda out: out[0].mean() - out[1].mean()),
    "a density": (
        lambda: nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 6)),
        lambda: (tables()[0], 1e-2 * tables()[1]),
        lambda y, t: F.gaussian_nll_loss(y[:, :3], t, y[:, 3:].exp()),
    ),
    "decibels": (
        net, tables,
        lambda y, t: 10 * ((y - t).square().sum() / t.square().sum()).log10(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BELOW_ZERO)
@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_losses_that_fall_below_zero_as_they_should(name: str, rate: float) -> None:
    torch.manual_seed(0)
    make, batches, loss = BELOW_ZERO[name]
    model = make()
    assert not unstable(model, batches, loss, torch.optim.Adam(model.parameters(), rate))
