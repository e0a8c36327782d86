"""What saturates first: of a layer and a parameter in front of a tanh, of an activation and a probability."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


class Actor(nn.Module):
    """Gives actions between -1 and 1, with noise of a size that it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
        self.log_std = nn.Parameter(torch.full((2,), -1.5))

    def forward(self, x: Tensor) -> Tensor:
        loc = self.loc(x)
        return torch.tanh(loc + self.log_std.exp() * torch.randn_like(loc))


@pytest.mark.parametrize(("scale", "causes"), [(1e4, [(IssueType.SATURATION, "loc.2")]), (1.0, [])])
def test_the_layer_that_saturates_explains_the_parameter_that_gets_nothing(
    scale: float, causes: list[object]
) -> None:
    torch.manual_seed(0)
    model = Actor()

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 6)
        return scale * (x + 1), 0.7 * torch.tanh(x[:, :2])

    report = gf.diagnose(model, batch, nn.MSELoss(), optimizer=torch.optim.Adam(model.parameters(), 1e-3))
    assert [(cause.issue_type, cause.layer) for cause in report.causes] == causes
    assert report.ok == (not causes)


class Twice(nn.Module):
    """Two layers of tanh whose weights are far too large, in front of probabilities that are as sure."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.squash, self.end = nn.Tanh(), nn.Softmax(-1)
        with torch.no_grad():
            self.two.weight.mul_(60)
            self.three.weight.mul_(60)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.three(self.squash(self.two(torch.relu(self.one(x))))))


@pytest.mark.parametrize(("logarithm", "first"), [(True, "squash"), (False, "end")])
def test_what_a_logarithm_makes_up_for_is_not_the_first_cause(logarithm: bool, first: str) -> None:
    """The squared error of a sure probability has no slope left; its logarithm has the more."""
    torch.manual_seed(0)
    w, xs = torch.randn(8, 4), torch.randn(12, 64, 8)
    batches = [(x, (x @ w).argmax(-1)) for x in xs]

    def loss_fn(given: Tensor, target: Tensor) -> Tensor:
        if logarithm:
            return F.nll_loss((given + 1e-30).log(), target)
        return F.mse_loss(given, F.one_hot(target, 4).float())

    model = Twice()
    sgd = torch.optim.SGD(model.parameters(), 1e-6)
    report = gf.diagnose(model, batches, loss_fn, optimizer=sgd)
    saturated = {i.layer: i.severity.value for i in report.issues if i.issue_type is IssueType.SATURATION}
    assert saturated == {"squash": "HIGH", "end": "HIGH"}
    assert report.causes[0].layer == first
