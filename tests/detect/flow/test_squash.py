"""SATURATION of lengths that capsules squash, and quotients that look like such a squashing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType


class Capsules(nn.Module):
    """Classes told by the lengths of vectors, which are squashed to below one."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 64), nn.Linear(64, 32, bias=False)
        with torch.no_grad():
            self.last.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        s = self.last(F.relu(self.first(x))).unflatten(-1, (4, 8))
        square = s.pow(2).sum(-1, keepdim=True)
        v = square / (1 + square) * s / (square + 1e-8).sqrt()
        return (v.square().sum(-1) + 1e-8).sqrt()


def margins(length: Tensor, kind: Tensor) -> Tensor:
    right = F.one_hot(kind, 4)
    return (right * F.relu(0.9 - length) ** 2 + 0.5 * (1 - right) * F.relu(length - 0.1) ** 2).sum(1).mean()


def kinds() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 12)
    return x, x[:, :4].argmax(1)


def report(model: nn.Module, loss: Callable[..., Tensor], rate: float = 1e-3) -> gf.Report:
    return gf.diagnose(model, kinds, loss, steps=20, optimizer=torch.optim.Adam(model.parameters(), rate))


@pytest.mark.parametrize(("scale", "sick"), [(60.0, True), (1.0, False), (0.1, False)])
def test_lengths_that_are_one_whatever_the_vectors_say(scale: float, sick: bool) -> None:
    torch.manual_seed(0)
    found = report(Capsules(scale), margins)
    told = [i for i in found.issues if i.severity >= IssueSeverity.MEDIUM]
    assert [(i.issue_type, i.layer) for i in told if i.issue_type is IssueType.SATURATION] == (
        [(IssueType.SATURATION, "last")] if sick else []
    )
    assert sick or not told


def test_the_share_of_squashed_lengths() -> None:
    torch.manual_seed(0)
    model, (x, _) = Capsules(8.0), kinds()
    (found,) = [a for a in gf.analyze(model, [x], lambda y: y.mean()).activations if a.op == "squash"]
    square = model.last(F.relu(model.first(x))).unflatten(-1, (4, 8)).square().sum(-1)
    slope = 1 / (1 + square) ** 2  # of its largest, which is one
    assert 0.1 < found.saturated_share[0] < 1
    assert found.saturated_share[0] == pytest.approx(float((slope < 0.01).float().mean()))


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, _: (y / (1 + y.abs())).mean(),
        lambda y, _: (y.square() / (y.square() + y.square().mean())).mean(),
        lambda y, _: (y / (y.square().sum(1, keepdim=True) + 1e-8).sqrt()).mean(),
    ],
)
def test_other_quotients_are_no_squashed_lengths(loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    record = gf.analyze(nn.Linear(12, 4), [kinds()[0]], lambda y: loss(y, None))
    assert not [a for a in record.activations if a.op == "squash"]
