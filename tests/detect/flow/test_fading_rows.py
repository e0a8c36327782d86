"""BOTTLENECK: rows that mixing makes too alike to learn by, embeddings on their way to one point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

NODES = 40


def narrow(model: nn.Module, batches: Any, loss: Any, rate: float) -> list[str]:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    report = gf.diagnose(model, batches, loss, optimizer=optimizer, seed=0)
    serious = [i for i in report.issues if i.severity >= IssueSeverity.MEDIUM]
    assert {i.issue_type for i in serious} <= {IssueType.BOTTLENECK}
    return [i.layer for i in serious]


class Averages(nn.Module):
    """Layers that average over neighbours, nearly all nodes being some, with a way round or without."""

    def __init__(self, depth: int, *, skip: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        near = (torch.rand(NODES, NODES, generator=generator) < 0.1).float() + torch.eye(NODES)
        self.near = 0.9 * near / near.sum(1, keepdim=True) + 0.1 / NODES
        self.enter, self.leave, self.skip = nn.Linear(8, 16), nn.Linear(16, 3), skip
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        for layer in self.layers:
            mixed = torch.relu(layer(self.near @ x))
            x = 0.3 * mixed + x if self.skip else mixed
        return self.leave(x)


def nodes() -> tuple[Tensor, Tensor]:
    x = torch.randn(NODES, 8)
    return x, x[:, :3].argmax(1)


@pytest.mark.parametrize(("depth", "skip", "sick"), [(12, False, True), (12, True, False), (2, False, False)])
def test_nodes_that_many_averages_have_made_alike(depth: int, skip: bool, sick: bool) -> None:
    torch.manual_seed(0)
    found = narrow(Averages(depth, skip=skip), nodes, F.cross_entropy, 3e-3)
    assert [name.partition(".")[0] for name in found] == (["layers"] if sick else [])


class Twins(nn.Module):
    """The embeddings of two views of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(a), self.net(b)


def views() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 16)
    return x + 0.1 * torch.randn(32, 16), x + 0.1 * torch.randn(32, 16)


def pulled(views: tuple[Tensor, Tensor]) -> Tensor:
    a, b = views
    return F.mse_loss(a, b) + 0.05 * (a - a.mean(0)).square().mean()


def spread(views: tuple[Tensor, Tensor]) -> Tensor:
    a, b = views
    apart = sum((1 - (z.var(0) + 1e-4).sqrt()).relu().mean() for z in views)
    return F.mse_loss(a, b) + apart


@pytest.mark.parametrize(("loss", "sick"), [(pulled, True), (spread, False)])
def test_embeddings_on_their_way_to_one_point(loss: Any, sick: bool) -> None:
    torch.manual_seed(0)
    assert bool(narrow(Twins(), views, loss, 3e-2 if sick else 3e-3)) is sick


class Predicted(Twins):
    """The same, where one embedding is predicted from the other, which is held (Grill et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = super().forward(a, b)
        return self.predict(first), second.detach()


def likeness(views: tuple[Tensor, Tensor]) -> Tensor:
    return 2 - 2 * F.cosine_similarity(*views).mean()


@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize(("model", "sick"), [(Twins, True), (Predicted, False)])
def test_a_likeness_that_nothing_holds_is_met_by_one_direction(model: Any, sick: bool, noise: float) -> None:
    torch.manual_seed(0)
    samples = torch.randn(64, 16)

    def drawn() -> tuple[Tensor, Tensor]:
        x = samples[torch.randint(64, (32,))]
        return x + noise * torch.randn(32, 16), x + noise * torch.randn(32, 16)

    assert bool(narrow(model(), drawn, likeness, 1e-2)) is sick
