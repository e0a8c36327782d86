"""Models that own parameters themselves: what they hold is seen past them, up to the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect.evidence import heads
from gradflow.detect.view import flow_of
from gradflow.records import IssueSeverity, IssueType

MEDIUM = IssueSeverity.MEDIUM


class Shifted(nn.Module):
    """A classifier with a table of its own, which it adds to what enters."""

    def __init__(self, size: float, end: nn.Module | None = None) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(16))
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5))
        self.end = end
        with torch.no_grad():
            self.net.get_parameter("2.weight").mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x + self.shift)
        return scores if self.end is None else self.end(scores)


def classes() -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 16)
    return x, x[:, :5].argmax(1)


def odds() -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 16)
    return x, (x[:, :5] > 0).float()


@pytest.mark.parametrize(("size", "sick"), [(1.0, False), (80.0, True)])
def test_loud_scores_of_a_model_with_its_own_parameters(size: float, sick: bool) -> None:
    torch.manual_seed(0)
    model = Shifted(size)
    report = gf.diagnose(
        model, classes, F.cross_entropy, steps=8, optimizer=torch.optim.Adam(model.parameters(), 1e-3)
    )
    flow = flow_of(report.record)
    assert "(model)" in flow.wiring.holders
    assert flow.wiring.is_last("net.2")
    assert "nll_loss" in flow.wiring.ops_after("net.2")
    assert heads(flow) == ("net.2",)
    found = {(i.layer, i.issue_type) for i in report.issues if i.severity >= MEDIUM}
    assert ({("net.2", IssueType.EXPLODING), ("net.2", IssueType.SATURATION)} & found != set()) is sick


def test_an_activation_at_the_end_of_a_model_with_its_own_parameters_ends_weightless() -> None:
    torch.manual_seed(0)
    model = Shifted(1.0, nn.Sigmoid())
    report = gf.diagnose(
        model, odds, F.binary_cross_entropy, steps=8, optimizer=torch.optim.Adam(model.parameters(), 1e-3)
    )
    assert flow_of(report.record).ends_weightless("net.2")
    assert not flow_of(report.record).ends_weightless("net.0")
    assert not [i for i in report.issues if i.severity >= MEDIUM]


class Coupling(nn.Module):
    """Half of the data as they are, the other half scaled and shifted by what a net makes of the first."""

    def __init__(self, *, kept: bool) -> None:
        super().__init__()
        self.kept = kept
        self.first, self.second = self.net(1), self.net(2)
        self.last = nn.Linear(8, 24)

    @staticmethod
    def net(taken: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(taken, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 2 if taken == 1 else 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.first(x[:, :1]).chunk(2, 1)
        other = x[:, 1:] if self.kept else torch.ones(len(x), 1)
        moved = other * scale.tanh().exp() + shift
        held = x[:, :1] if self.kept else moved
        return self.last(self.second(torch.cat([held, moved], 1)))


@pytest.mark.parametrize("kept", [True, False])
def test_data_that_pass_a_narrow_net_by_are_not_throttled_by_it(kept: bool) -> None:
    torch.manual_seed(0)
    model, targets = Coupling(kept=kept), torch.randn(128, 24)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    x = torch.randn(128, 2)
    report = gf.diagnose(
        model, [(x, targets)], loss, steps=8, optimizer=torch.optim.Adam(model.parameters(), 1e-3)
    )
    (waist,) = [i for i in report.issues if i.issue_type is IssueType.BOTTLENECK and i.layer == "first.4"]
    assert (waist.severity >= MEDIUM) is not kept
