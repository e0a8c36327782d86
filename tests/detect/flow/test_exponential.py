"""Outputs that go to the loss through an exponential, bounded or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType


class Sizes(nn.Module):
    """Sizes above zero of what is seen, as an anchor times a form of what the last layer gives."""

    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.LeakyReLU(0.5), nn.Linear(64, 64), nn.LeakyReLU(0.5))
        self.head, self.form = nn.Linear(64, 4), form
        for layer in (self.body[0], self.body[2], self.head):
            nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * self.form(self.head(self.body(x)))


def bounded(x: Tensor) -> Tensor:
    return 4.0 * x.sigmoid() ** 2


def clamped(x: Tensor) -> Tensor:
    return x.clamp(-8.0, 3.0).exp()


def shares(x: Tensor) -> Tensor:
    return x.exp() / x.exp().mean(-1, keepdim=True)


def causes(form: Callable[[Tensor], Tensor], scale: float = 1.0) -> list[tuple[object, str]]:
    torch.manual_seed(0)
    model = Sizes(form)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 16)
        return x, 2.0 + x[:, :4].tanh()

    optimizer = torch.optim.SGD(model.parameters(), 0.005 / scale, momentum=0.9)
    report = gf.diagnose(model, batch, lambda y, t: scale * F.mse_loss(y, t), optimizer=optimizer)
    serious = (cause for cause in report.causes if cause.issues[0].severity > IssueSeverity.LOW)
    return [(cause.issue_type, cause.layer) for cause in serious]


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_layer_in_front_of_an_exponential_that_runs_away(scale: float) -> None:
    assert causes(torch.exp, scale)[0] == (IssueType.EXPLODING, "head")


@pytest.mark.parametrize("form", [bounded, clamped, shares])
def test_forms_that_are_bounded(form: Callable[[Tensor], Tensor]) -> None:
    assert causes(form) == []
