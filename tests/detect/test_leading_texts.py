"""The first action of a report is the one that mends the model, where what was measured tells it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf


def first_action(model: nn.Module, x: Tensor, loss: object) -> str:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, [x] * 6, loss, optimizer=optimizer, steps=6, seed=0)  # type: ignore[arg-type]
    return report.issues[0].recommended_actions[0]


@pytest.mark.parametrize(("largest", "words"), [(20.0, "torch.where(valid, x, 1).log()"), (1.0, "logits")])
def test_zeros_in_a_logarithm(largest: float, words: str) -> None:
    """Of depths, which are missing, or of probabilities."""
    torch.manual_seed(0)
    known = largest * torch.rand(16, 1)
    known[::4], known[1] = 0, largest

    def loss(y: Tensor) -> Tensor:
        return ((known.log() - y) * (known > 0)).square().mean()

    assert words in first_action(nn.Linear(3, 1), torch.randn(16, 3), loss)


class Flow(nn.Module):
    """A velocity: the slope of a network at its inputs."""

    def __init__(self, bend: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), bend, nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def test_a_rectifier_under_a_derivative() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(32, 2), torch.randn(32, 2)
    loss = lambda y: F.mse_loss(y, target)  # noqa: E731
    assert "in the place of every ReLU: nn.Tanh()" in first_action(Flow(nn.ReLU()), x, loss)


@pytest.mark.parametrize("logarithm", [False, True])
def test_a_sigmoid_for_a_loss(logarithm: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    nn.init.normal_(model[2].weight, std=60)

    def loss(y: Tensor) -> Tensor:
        gap = y[::2] - y[1::2]
        return -(F.logsigmoid(gap) if logarithm else gap.sigmoid()).mean()

    found = first_action(model, torch.randn(64, 4), loss)
    assert ("take its logarithm" in found) is not logarithm


def test_a_head_whose_weight_is_read_without_a_call() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(6, 4).requires_grad_(False)
            self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), Adapted()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) @ self.head.base.weight.T

    torch.manual_seed(0)
    target = torch.randint(4, (16,))
    found = first_action(Model(), torch.randn(16, 6), lambda y: F.cross_entropy(y, target))
    assert "reads a weight of head" in found


@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_a_factor_of_zero_in_the_loss_is_named(factor: float) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(32, 4)

    def preference(y: Tensor) -> Tensor:
        return -F.logsigmoid(factor * (y[:, 0] - y[:, 1])).mean()

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    report = gf.diagnose(model, lambda: x, preference, optimizer=optimizer)
    issues = [issue for issue in report.issues if issue.issue_type is gf.IssueType.DEAD]
    assert bool(issues) == (factor == 0)
    for issue in issues:
        assert "in mul, behind 2, it is multiplied by exactly zero" in issue.description
        assert "a factor of exactly zero" in issue.recommended_actions[0]
