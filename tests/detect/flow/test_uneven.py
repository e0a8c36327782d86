"""A network that is given real and made pictures, in one unit or in two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType

Loss = Callable[[tuple[Tensor, Tensor], Tensor], Tensor]


class Normed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:])


class Critic(nn.Module):
    """A critic of convolutions or of linear layers, that is called on what is real and on what is made."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        if kind == "linear":
            layers = [nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            self.body = nn.Sequential(*layers, nn.Linear(width, 1))
        else:
            norm = Normed() if kind == "normed" else nn.Identity()
            layers = [nn.Conv2d(3, width, 4, 2, 1), norm, nn.LeakyReLU(0.2), nn.Flatten()]
            self.body = nn.Sequential(*layers, nn.Linear(16 * width, 1))

    def forward(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(real), self.body(made)


def wasserstein(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    return output[1].mean() - output[0].mean()


def hinge(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    return F.relu(1 - output[0]).mean() + F.relu(1 + output[1]).mean()


def entropy(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    return F.softplus(-output[0]).mean() + F.softplus(output[1]).mean()


@pytest.mark.parametrize(
    ("kind", "width", "loss", "real", "made", "sick"),
    [
        ("conv", 24, wasserstein, 127.5, 1.0, True),
        ("linear", 48, hinge, 127.5, 1.0, True),
        ("conv", 16, entropy, 1.0, 127.5, True),
        ("conv", 24, wasserstein, 1.0, 1.0, False),
        ("linear", 48, entropy, 127.5, 127.5, False),
        ("conv", 24, hinge, 3.0, 1.0, False),
        ("conv", 24, hinge, 1.0, 1e-3, False),
        ("conv", 24, hinge, 127.5, 0.0, False),
        ("normed", 24, hinge, 127.5, 1.0, False),
    ],
)
def test_inputs_of_two_scales(
    kind: str, width: int, loss: Loss, real: float, made: float, sick: bool
) -> None:
    torch.manual_seed(0)
    model = Critic(kind, width)

    def sample() -> tuple[tuple[Tensor, Tensor], Tensor]:
        pictures = torch.tanh(0.6 * torch.randn(16, 3, 8, 8) + 0.3 * torch.randn(16, 1, 1, 1)) + 1
        return (real * pictures, made * torch.tanh(torch.randn(16, 3, 8, 8))), torch.zeros(1)

    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    report = gf.diagnose(model, sample, loss, steps=8, optimizer=optimizer)
    found = [i for i in report.issues if i.issue_type is IssueType.EXPLODING and i.severity.is_serious]
    assert {i.layer for i in found} == ({"body.1" if kind == "linear" else "body.0"} if sick else set())
    if sick:
        assert "127.5" in found[0].recommended_actions[0]
        assert report.causes[0].issue_type is IssueType.EXPLODING


class Decay(nn.Module):
    """A network for what decays over a long time, by its equation and by its start."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        layers = [nn.Linear(2, 32), activation(), nn.Linear(32, 32), activation()]
        self.net = nn.Sequential(*layers, nn.Linear(32, 1))

    def forward(self, inside: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        inside = inside.clone().requires_grad_(True)
        value = self.net(inside)
        slope = torch.autograd.grad(value.sum(), inside, create_graph=True)[0]
        return slope[:, :1] + value / 100, self.net(start)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Tanh])
def test_the_edge_of_a_long_domain(activation: type[nn.Module]) -> None:
    """At its start all times are zero, and what enters there is small; the biases tell what comes of it."""
    torch.manual_seed(0)
    model = Decay(activation)

    def sample() -> tuple[tuple[Tensor, Tensor], Tensor]:
        start = torch.stack([torch.zeros(16), torch.rand(16)], 1)
        return (torch.rand(32, 2) * torch.tensor([100.0, 1.0]), start), torch.zeros(1)

    def loss(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        return output[0].square().mean() + (output[1] - 1).square().mean()

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, sample, loss, steps=8, optimizer=optimizer)
    assert not [i for i in report.issues if "ratio" in i.metrics and "largest_input" in i.metrics]
