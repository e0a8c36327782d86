"""What is not finite and gone again before the loss, with the gradient; and what is merely left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow
from gradflow.records import IssueSeverity, IssueType
from gradflow.report import Report


def diagnosed(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], steps: int = 8, rate: float = 3e-3
) -> Report:
    generator = torch.Generator().manual_seed(1)
    mix, target = torch.randn(12, 1, generator=generator), [torch.empty(0)]

    def batch() -> Tensor:
        x = torch.randn(64, 12, generator=generator)
        target[0] = x @ mix
        return x

    adam = torch.optim.Adam(model.parameters(), rate)
    return gradflow.diagnose(model, batch, lambda out: loss(out, target[0]), steps=steps, optimizer=adam)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 1))


class Inside(nn.Module):
    """A layer, a function of what it gives, and a head."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(12, 32), nn.Linear(32, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.body(x)))


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "count": (
        lambda o, t: (o - t).square().half().sum() / torch.tensor(7e4, dtype=torch.half),
        "tensor",
        "div",
    ),
    "whole count": (lambda o, t: (o - t).square().half().sum() / torch.tensor(70000).half(), "half", "div"),
    "kernel": (lambda o, t: 1 - (-((o - t + 300).half().square())).exp().float().mean(), "square", "exp"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_in_the_loss(name: str) -> None:
    loss, op, by = LOSSES[name]
    report = diagnosed(plain(), loss)
    first = report.issues[0]
    assert first.issue_type is IssueType.NUMERICAL
    assert first.severity is IssueSeverity.CRITICAL
    assert (first.metrics["op"], first.metrics["swallowed_by"]) == (op, by)
    assert "test_swallowed.py" in first.description
    assert report.causes[0].issue_type is IssueType.NUMERICAL
    assert not report.causes[1:]


INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "reciprocal": lambda h: (1 / (1 + (1e3 + h.half()).square())).float(),
    "nan_to_num": lambda h: torch.nan_to_num((h * 0 - 1).log(), nan=0.0),
    "where": lambda h: torch.where(
        (s := (h.half() * 0 + 300).square()).isinf(), torch.zeros_like(s), s
    ).float(),
}


@pytest.mark.parametrize("name", INSIDE)
def test_in_the_model(name: str) -> None:
    report = diagnosed(Inside(INSIDE[name]), F.mse_loss)
    (issue,) = [i for i in report.issues if i.issue_type is IssueType.NUMERICAL]
    assert issue.layer == "body"
    assert issue.severity is IssueSeverity.HIGH
    assert report.causes[0].issue_type is IssueType.NUMERICAL


def normalised(x: Tensor) -> Tensor:
    """A graph's convolution: the inverse degree of a node without neighbours is infinite, and set to zero."""
    graph = torch.zeros(len(x), len(x))
    graph[:40, :40] = 1
    scale = graph.sum(1).pow(-0.5)
    scale = scale.masked_fill(scale == float("inf"), 0)[:, None]
    return x + scale * (graph @ (scale * x))


def in_place(x: Tensor) -> Tensor:
    scale = torch.zeros(len(x), 1).reciprocal()
    scale[scale == float("inf")] = 1.0
    return scale * x


@pytest.mark.parametrize("function", [normalised, in_place])
@pytest.mark.parametrize("dead", [False, True])
def test_of_the_data_alone(function: Callable[[Tensor], Tensor], dead: bool) -> None:
    report = diagnosed(Inside(lambda h: function(h) * (0.0 if dead else 1.0)), F.mse_loss)
    assert not [i for i in report.issues if i.issue_type is IssueType.NUMERICAL]
    assert dead or report.ok


def kernel(output: Tensor) -> Tensor:
    """Zero, as what is squared is beyond half precision."""
    return (-((output + 300).half().square())).exp().float().mean()


def test_where_gradient_arrives() -> None:
    report = diagnosed(plain(), lambda o, t: F.mse_loss(o, t) + kernel(o))
    assert report.ok
    assert not report.record.numerics


def test_a_mask_by_logarithm() -> None:
    mask = torch.tensor([1.0, 0.0] * 16).log()
    report = diagnosed(Inside(lambda h: (h + mask).softmax(-1)), F.mse_loss)
    assert not [i for i in report.issues if i.issue_type is IssueType.NUMERICAL]


def test_a_loss_that_is_met() -> None:
    report = diagnosed(plain(), lambda o, t: F.relu(F.mse_loss(o, t) - 4) + kernel(o), steps=40, rate=0.03)
    assert report.record.losses[-1] == 0
    assert report.record.numerics
    assert report.ok
