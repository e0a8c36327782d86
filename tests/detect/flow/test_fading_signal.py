"""Deep stacks at the usual initialisation: signal and gradient fade alike, or a way round keeps both;
and stacks whose weights a norm holds at their size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import gradflow as gf
from gradflow.records import IssueType


class Stack(nn.Module):
    """Layers with a rectifier, each added to what enters it or not."""

    def __init__(self, depth: int, skip: bool) -> None:
        super().__init__()
        self.embed, self.head, self.skip = nn.Linear(5, 32), nn.Linear(32, 1), skip
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            new = F.relu(layer(x))
            x = x + new / len(self.layers) ** 0.5 if self.skip else new
        return self.head(x)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize(("depth", "skip", "sick"), [(13, False, True), (13, True, False), (4, False, False)])
def test_a_stack_that_tells_nothing_apart(depth: int, skip: bool, sick: bool, scale: float) -> None:
    torch.manual_seed(1)
    model = Stack(depth, skip)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 5)
        return x, 3 * x[:, :1].tanh()

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return scale * F.mse_loss(y, target)

    report = gf.diagnose(model, batch, loss, optimizer=torch.optim.Adam(model.parameters(), 1e-4), seed=0)
    told = {i.layer for i in report.issues if i.issue_type is IssueType.VANISHING}
    assert ("layers.0" in told) == sick
    assert report.ok != sick


class Critic(nn.Module):
    """Layers with a rectifier that leaks, all of them under a norm on their weights."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module], *, depth: int, width: int, skip: bool) -> None:
        super().__init__()
        self.embed, self.head, self.skip = norm(nn.Linear(8, width)), norm(nn.Linear(width, 1)), skip
        self.layers = nn.ModuleList(norm(nn.Linear(width, width)) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.leaky_relu(self.embed(x), 0.2)
        for layer in self.layers:
            new = F.leaky_relu(layer(x), 0.2)
            x = x + new if self.skip else new
        return self.head(x).chunk(2)


@pytest.mark.parametrize(
    ("norm", "depth", "width", "skip", "sick"),
    [
        (spectral_norm, 13, 16, False, True),
        (torch.nn.utils.spectral_norm, 13, 16, False, True),
        (spectral_norm, 5, 32, False, False),
        (spectral_norm, 11, 32, True, False),
        (weight_norm, 7, 32, False, False),
        (nn.Identity, 11, 32, False, False),
    ],
)
def test_a_stack_whose_weights_cannot_grow(
    norm: Callable[[nn.Module], nn.Module], depth: int, width: int, skip: bool, sick: bool
) -> None:
    torch.manual_seed(0)
    held = (lambda layer: layer) if norm is nn.Identity else norm
    model = Critic(held, depth=depth, width=width, skip=skip)

    def batch() -> Tensor:
        return torch.cat([0.5 * torch.randn(32, 8) + 1, torch.randn(32, 8)])

    def loss(scores: tuple[Tensor, Tensor]) -> Tensor:
        return scores[1].mean() - scores[0].mean()

    report = gf.diagnose(model, batch, loss, optimizer=torch.optim.Adam(model.parameters(), 1e-3), seed=0)
    told = {i.layer for i in report.issues if i.issue_type is IssueType.VANISHING}
    assert ("embed" in told) == sick
