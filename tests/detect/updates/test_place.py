"""Where updates that are next to nothing are told: at the part that is trained, if that is not the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.records import Issue, IssueType


class Judged(nn.Module):
    """A generator, and a judge of what it makes that is sure and frozen."""

    def __init__(self, sure: float, frozen: bool = True) -> None:
        super().__init__()
        self.make = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.judge = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        with torch.no_grad():
            self.judge[0].weight.mul_(4)
            self.judge[2].weight.mul_(4)
            self.judge[2].bias.sub_(sure)
        self.judge.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.make(x))


def flat(score: Tensor, _: Tensor) -> Tensor:
    """The logarithm of one minus a probability: flat where the judge is sure."""
    return F.logsigmoid(-score).mean()


def steep(score: Tensor, _: Tensor) -> Tensor:
    return -F.logsigmoid(score).mean()


def told(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], rate: float) -> list[Issue]:
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(32, 4, generator=g), torch.zeros(1)) for _ in range(20)]
    trained = [p for p in model.parameters() if p.requires_grad]
    report = gf.diagnose(model, batches, loss, optimizer=torch.optim.SGD(trained, rate, 0.9))
    return [issue for issue in report.issues if issue.severity.is_serious]


@pytest.mark.parametrize("sure", [12.0, 20.0])
def test_a_part_before_a_judge_that_is_sure(sure: float) -> None:
    torch.manual_seed(0)
    (issue, *_) = told(Judged(sure), flat, 1e-4)
    assert (issue.issue_type, issue.layer) == (IssueType.VANISHING, "make")
    assert "F.softplus(-score)" in issue.recommended_actions[0]


@pytest.mark.parametrize("sure", [0.0, 12.0])
def test_a_loss_that_is_steep_there(sure: float) -> None:
    torch.manual_seed(0)
    assert not told(Judged(sure), steep, 1e-3)


def fitted(score: Tensor, _: Tensor) -> Tensor:
    return (score - 1).square().mean()


@pytest.mark.parametrize(("part", "place"), [("make", "make"), ("judge", "judge")])
def test_a_rate_that_is_too_low_for_a_part(part: str, place: str) -> None:
    torch.manual_seed(0)
    model = Judged(0.0)
    model.requires_grad_(False)
    model.get_submodule(part).requires_grad_(True)
    assert {issue.layer for issue in told(model, fitted, 1e-9)} == {place}


def test_and_for_the_whole() -> None:
    torch.manual_seed(0)
    assert {issue.layer for issue in told(Judged(0.0, frozen=False), fitted, 1e-9)} == {""}
