"""Which of two types that are both true is the cause: growth before any step, constants by their make."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


def kinds() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 16)
    return x, x[:, :4].argmax(1)


def deep(size: float | None) -> nn.Sequential:
    """Six rectified layers, with weights of one size, or of He's."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Linear(32, 32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, size or (2 / layer.in_features) ** 0.5)
    return model


@pytest.mark.parametrize(
    ("size", "rate", "kind"), [(1.0, 1e-2, IssueType.EXPLODING), (None, 20.0, IssueType.UNSTABLE)]
)
def test_growth_that_was_there_before_any_step_comes_first(
    size: float | None, rate: float, kind: IssueType
) -> None:
    model = deep(size)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    report = gf.diagnose(model, kinds, F.cross_entropy, optimizer=optimizer, seed=0)
    assert report.causes[0].issue_type is kind


def test_the_same_at_a_usual_size_and_rate() -> None:
    model = deep(None)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    assert gf.diagnose(model, kinds, F.cross_entropy, optimizer=optimizer, seed=0).ok


@pytest.mark.parametrize("sick", [True, False])
def test_a_softmax_over_one_alternative_comes_before_the_clamp_behind_it(sick: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1), nn.Softmax(1) if sick else nn.Sigmoid()
    )

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 16)
        return x, (x[:, :1] > 0).float()

    def loss(p: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(p.clamp(1e-6, 1 - 1e-6), target)

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    report = gf.diagnose(model, batch, loss, optimizer=optimizer, seed=0)
    assert report.ok is not sick
    if sick:
        assert report.causes[0].issue_type is IssueType.DEAD


class _BlockWithNormOverOne(nn.Module):
    """A residual block whose two ways meet in front of a norm over its one feature."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out, self.skip = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 1)
        self.norm = nn.LayerNorm(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.out(self.hidden(x).relu()) + self.skip(x))


def test_what_meets_in_front_of_a_norm_over_one_feature_has_one_cause() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), _BlockWithNormOverOne())
    batches = [(torch.randn(16, 4), torch.randn(16, 1))] * 6
    report = gf.diagnose(
        model, batches, nn.MSELoss(), steps=6, optimizer=torch.optim.Adam(model.parameters(), 1e-3)
    )
    cause = report.causes[0]
    assert cause.layer in ("1.skip", "1.out")
    assert {issue.layer for issue in cause.issues} == {"0", "1.hidden", "1.out", "1.skip"}
    assert "1.norm normalises over one feature" in cause.issues[0].recommended_actions[0]
