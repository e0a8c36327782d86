"""A parameter that a module adds in front of a tanh, which another layer drives to its ends."""

from __future__ import annotations

import pytest
import torch
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
