"""Graph convolutions that make all nodes alike, and the gradient that cancels before them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType

NODES = 24


class Convolutions(nn.Module):
    """Each node takes the mean of its neighbours, again and again."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        near = (torch.rand(NODES, NODES, generator=torch.Generator().manual_seed(0)) < 0.2).float()
        near = ((near + near.T) > 0).float() + torch.eye(NODES)
        self.mean = near / near.sum(1, keepdim=True)
        self.convs = nn.ModuleList(nn.Linear(8 if i == 0 else 32, 32) for i in range(depth))
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(self.mean @ conv(x))
        return self.out(x)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("depth", [2, 16])
def test_what_does_not_reach_the_first_layers_is_told_with_it(depth: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Convolutions(depth)
    x = torch.randn(NODES, 8)
    y = x[:, :4].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    report = gf.diagnose(model, lambda: (x, y), F.cross_entropy, steps=12, optimizer=optimizer, seed=0)
    kinds = {i.issue_type: i for i in report.issues if i.severity.is_serious}
    assert (IssueType.BOTTLENECK in kinds) == (depth == 16)
    assert (IssueType.VANISHING in kinds) == (depth == 16)
    if depth == 16:
        assert any(i.layer == "convs.0" for i in report.issues if i.issue_type is IssueType.VANISHING)
