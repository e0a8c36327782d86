"""A loss that is nothing but the sum or mean of the model's output: which are told from others, the note."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.functional import analyze, analyze_custom

X = torch.linspace(-1.0, 1.0, 20).reshape(5, 4)
Y = torch.linspace(0.0, 1.0, 15).reshape(5, 3)
NOTE = "The loss is the plain sum or mean of an output of shape "


class Net(nn.Module):
    """Two layers; `last` is what the forward does at its end."""

    def __init__(self, last: Callable[[Tensor], Any] = lambda y: y, features: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 4), nn.Linear(4, features), last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.b(torch.tanh(self.a(x))))


def total(y: Tensor) -> Tensor:
    return y.sum()


def average(y: Tensor) -> Tensor:
    return y.mean()


def noted(record: gf.FlowRecord) -> str:
    """Return the shape that the note tells, or nothing."""
    found = [note for note in record.provenance.notes if note.startswith(NOTE)]
    assert len(found) < 2
    return found[0].removeprefix(NOTE).partition(":")[0] if found else ""


def even(loss: Tensor, output: Tensor) -> bool:
    """Whether a loss hands all elements of an output the same gradient, by that gradient itself."""
    gradient = torch.autograd.grad(loss, output)[0]
    return bool((gradient == gradient.flatten()[0]).all())


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "sum": (total, True),
    "mean": (average, True),
    "negated": (lambda y: (-y).mean(), True),
    "scaled": (lambda y: y.sum() * 0.1 / 5, True),
    "by a number that is a tensor": (lambda y: y.sum() * torch.tensor(0.1), True),
    "axis by axis": (lambda y: y.sum(1).mean(0), True),
    "reshaped": (lambda y: y.t().flatten().unsqueeze(0).squeeze().sum(), True),
    "to a plain target": (lambda y: (y - Y).mean(), True),
    "from a constant": (lambda y: 1 - y.mean(), True),
    "in another precision": (lambda y: y.double().mean(), True),
    "with itself": (lambda y: y.sum() + y.mean(), True),
    "squares": (lambda y: y.square().mean(), False),
    "distance": (lambda y: F.mse_loss(y, Y), False),
    "classes": (lambda y: F.cross_entropy(y, torch.zeros(5, dtype=torch.long)), False),
    "weighed by a gradient": (lambda y: (y * Y).sum(), False),
    "weighed by rows": (lambda y: (y.sum(1) * Y[:, 0]).sum(), False),
    "by itself": (lambda y: y.sum() / y.norm(), False),
    "one feature": (lambda y: y[:, 0].mean(), False),
    "one more term": (lambda y: y.sum() + y.square().sum(), False),
    "hinge": (lambda y: torch.relu(y - y.detach().median()).mean(), False),
    "greatest": (lambda y: y.amax(1).mean(), False),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_losses(name: str, transform: Any) -> None:
    loss, expected = LOSSES[name]
    model = Net()
    y = model(X)
    assert even(loss(y), y) is expected
    record = analyze(model, [X], loss, steps=1, transform=transform)
    assert noted(record) == ("(5, 3)" if expected else "")


OUTPUTS: dict[str, tuple[Net, Callable[[Any], Tensor], str]] = {
    "of a function": (Net(torch.relu), total, "(5, 3)"),
    "of a skip connection": (Net(lambda y: y + y.detach()), average, "(5, 3)"),
    "positions": (Net(lambda y: y.reshape(5, 3, 1).expand(5, 3, 2)), average, "(5, 3, 2)"),
    "two": (Net(lambda y: (y, y.tanh())), lambda o: o[0].sum() + o[1].sum(), "(5, 3)"),
    "two, one of them judged": (Net(lambda y: (y, y.tanh())), lambda o: o[0].sum() + o[1].norm(), ""),
    "one number per sample": (Net(features=1), average, ""),
    "one number per sample, flat": (Net(lambda y: y.square().sum(1)), average, ""),
    "the loss": (Net(lambda y: y.sum()), lambda y: y, ""),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str) -> None:
    model, loss, shape = OUTPUTS[name]
    assert noted(analyze(model, [X], loss, steps=1)) == shape


def test_a_critic_is_rightly_averaged() -> None:
    critic = Net(features=1)
    record = analyze_custom(
        critic, lambda m, step: (m(X), m(-X)), lambda o: o[0].mean() - o[1].mean(), steps=1
    )
    assert noted(record) == ""


def test_what_a_custom_forward_does_is_no_part_of_the_model() -> None:
    plain = analyze_custom(Net(), lambda m, step: m(X).t(), total, steps=1)
    squared = analyze_custom(Net(), lambda m, step: m(X).square(), total, steps=1)
    assert (noted(plain), noted(squared)) == ("(5, 3)", "")


def test_the_report_says_that_its_verdicts_are_not_on_training() -> None:
    report = gf.diagnose(Net(), [X], total, steps=1)
    assert NOTE in report.text("full")
    assert "no verdict here is on training" in report.text("full")
