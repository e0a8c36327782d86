"""Networks of differential equations: residuals that swamp the data, first layers that start steep."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType


class Spring(nn.Module):
    """A motion: its values at some times, and the residual of its equation at others."""

    def __init__(
        self, *, stiff: float, unit: float, steep: float, span: float, bent: type[nn.Module]
    ) -> None:
        super().__init__()
        first = nn.Linear(1, 32)
        first.weight.data *= steep
        first.bias.data *= steep
        self.net = nn.Sequential(first, bent(), nn.Linear(32, 32), bent(), nn.Linear(32, 1))
        self.stiff, self.unit, self.span = stiff, unit, span

    def forward(self, seen: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        times = times.detach().requires_grad_()
        y = self.net(times)
        (slope,) = torch.autograd.grad(y.sum(), times, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), times, create_graph=True)
        return self.net(seen), (bend + self.stiff * y) / self.unit


def found(model: Spring, weight: float = 1.0, scale: float = 1.0) -> dict[IssueType, IssueSeverity]:
    def sample() -> tuple[tuple[Tensor, Tensor], Tensor]:
        seen = torch.linspace(0, 0.36, 10)[:, None]
        return (seen * model.span, torch.rand(30, 1) * model.span), torch.cos(20 * seen)

    def loss(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return scale * (F.mse_loss(outputs[0], target) + weight * outputs[1].square().mean())

    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    report = gf.diagnose(model, sample, loss, steps=12, optimizer=optimizer, seed=0)
    return {IssueType(i.issue_type): i.severity for i in report.issues}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(
    ("stiff", "unit", "steep", "bent", "sick"),
    [
        (900.0, 1.0, 1.0, nn.SiLU, True),
        (800.0, 1.0, 20.0, nn.Tanh, True),
        (400.0, 400.0, 8.0, nn.Tanh, False),
        (5.0, 1.0, 1.0, nn.Tanh, False),
    ],
)
def test_a_residual_in_another_unit_than_the_data(
    stiff: float, unit: float, steep: float, bent: type[nn.Module], sick: bool, scale: float
) -> None:
    torch.manual_seed(0)
    model = Spring(stiff=stiff, unit=unit, steep=steep, span=1.0, bent=bent)
    told = {kind for kind, severity in found(model, scale=scale).items() if severity >= IssueSeverity.MEDIUM}
    assert told == ({IssueType.EXPLODING} if sick else set())


@pytest.mark.parametrize(
    ("steep", "span", "sick"),
    [(20.0, 1.0, False), (1.0, 300.0, True), (20.0, 30.0, True), (300.0, 1.0, True)],
)
def test_a_first_layer_that_starts_steep(steep: float, span: float, sick: bool) -> None:
    """Weights that are large for inputs of usual size are a design; inputs that are large are none, nor is a
    layer of which no unit bends between any two samples."""
    torch.manual_seed(0)
    model = Spring(stiff=400.0, unit=400.0, steep=steep, span=span, bent=nn.Tanh)
    severity = found(model, weight=0.1)[IssueType.SATURATION]
    assert (severity >= IssueSeverity.MEDIUM) == sick


class Poisson(nn.Module):
    """The residual of -u'' = f inside, and the error of u at both ends, each with a weight."""

    def __init__(self, bent: type[nn.Module], steep: float, waves: float, inside: float, edge: float) -> None:
        super().__init__()
        first = nn.Linear(1, 32)
        first.weight.data *= steep
        self.net = nn.Sequential(first, bent(), nn.Linear(32, 32), bent(), nn.Linear(32, 1))
        self.wave, self.inside, self.edge = math.pi * waves, inside, edge

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        residual = bend + self.wave**2 * torch.sin(self.wave * x)
        ends = self.net(torch.tensor([[0.0], [1.0]])) - torch.tensor([[0.5], [-0.5]])
        return self.inside * residual, self.edge * ends


@pytest.mark.parametrize(
    ("bent", "steep", "waves", "inside", "edge", "sick"),
    [
        (nn.Tanh, 4.0, 3.0, 1.0, 1.0, True),
        (nn.Tanh, 4.0, 5.0, 1.0, 1.0, True),
        (nn.Tanh, 4.0, 3.0, 1 / 16, 2.0, False),
        (nn.SiLU, 4.0, 5.0, 1 / 200, 2.0, False),
        (nn.Tanh, 4.0, 1.0, 1.0, 1.0, False),
        (nn.Tanh, 1.0, 2.0, 1.0, 1.0, False),  # slow, and solved all the same
    ],
)
def test_a_residual_far_above_what_zeros_cost(
    bent: type[nn.Module], steep: float, waves: float, inside: float, edge: float, sick: bool
) -> None:
    """Zeros solve the equation, so that what they cost is no measure: the border is."""
    torch.manual_seed(0)
    model = Poisson(bent, steep, waves, inside, edge)

    def loss(terms: tuple[Tensor, Tensor]) -> Tensor:
        return terms[0].square().mean() + terms[1].square().mean()

    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    report = gf.diagnose(model, lambda: torch.rand(64, 1), loss, optimizer=optimizer, seed=0)
    told = [i for i in report.issues if i.severity.is_serious]
    assert [i.issue_type for i in told] == ([IssueType.EXPLODING] if sick else [])
    assert all("made of its derivatives" in i.description for i in told)
