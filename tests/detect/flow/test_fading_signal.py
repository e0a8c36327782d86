"""Deep stacks at the usual initialisation: signal and gradient fade alike, or a way round keeps both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


class Stack(nn.Module):
    """Layers with a rectifier, each added to what enters it or not."""

    def __init__(self, depth: int, skip: bool) -> None:
        super().__init__()
        self.embed, self.head, self.skip = nn.Linear(5, 32), nn.Linear(32, 1), skip
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            new = F.relu(layer(x))
            x = x + new / len(self.layers) ** 0.5 if self.skip else new
        return self.head(x)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize(("depth", "skip", "sick"), [(13, False, True), (13, True, False), (4, False, False)])
def test_a_stack_that_tells_nothing_apart(depth: int, skip: bool, sick: bool, scale: float) -> None:
    torch.manual_seed(1)
    model = Stack(depth, skip)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 5)
        return x, 3 * x[:, :1].tanh()

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return scale * F.mse_loss(y, target)

    report = gf.diagnose(model, batch, loss, optimizer=torch.optim.Adam(model.parameters(), 1e-4), seed=0)
    told = {i.layer for i in report.issues if i.issue_type is IssueType.VANISHING}
    assert ("layers.0" in told) == sick
    assert report.ok != sick
