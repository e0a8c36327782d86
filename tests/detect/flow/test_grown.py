"""Signals that grow before the head that is too loud: the place where that begins is told first."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


class Squaring(nn.Module):
    """Multiplies by the size where it should divide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return 40 * self.gain * x * x.square().mean(-1, keepdim=True).sqrt()


class Loop(nn.Module):
    """A state that every step multiplies."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.lift, self.factor = nn.Linear(width, width), factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for _ in range(12):
            x = x * self.factor
        return x


class Summed(nn.Module):
    """The sum of what many positions give, or their mean."""

    def __init__(self, width: int, mean: bool) -> None:
        super().__init__()
        self.each, self.mean = nn.Linear(width, width), mean
        with torch.no_grad():
            self.each.bias.add_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.each(x)[:, None].expand(-1, 500, -1)
        return h.mean(1) if self.mean else h.sum(1)


def scaled(factor: float) -> nn.Module:
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.mul_(factor)
    return layer


def classes() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 16)
    return x, x[:, :4].argmax(1)


def growths(model: nn.Module) -> tuple[str, list[str]]:
    """Return the place of the first cause, and all that is told of growth."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, classes, F.cross_entropy, steps=8, optimizer=optimizer)
    found = [i.layer for i in report.issues if i.severity.is_serious and i.issue_type is IssueType.EXPLODING]
    return (report.causes[0].layer if report.causes else ""), found


def built(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), *middle, nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("middle", "place"),
    [
        ((nn.LayerNorm(16), Squaring(16)), "2"),
        ((nn.ReLU(), Loop(16, 2.0)), "2.lift"),
        ((nn.ReLU(), Summed(16, mean=False)), "2.each"),
        ((nn.ReLU(), scaled(300.0), nn.ReLU()), "2"),
        ((nn.LayerNorm(16), Loop(16, 1.8), nn.Tanhshrink()), "2.lift"),
    ],
)
def test_growth_is_told_where_it_begins(middle: tuple[nn.Module, ...], place: str) -> None:
    first, found = growths(built(*middle))
    assert first == place, found


@pytest.mark.parametrize(
    "middle",
    [
        (nn.RMSNorm(16), nn.RMSNorm(16)),
        (nn.ReLU(), Loop(16, 1.0)),
        (nn.ReLU(), Summed(16, mean=True)),
        (scaled(0.01), nn.LayerNorm(16)),
        (nn.ReLU(), Loop(16, 2.0), nn.LayerNorm(16)),
    ],
)
def test_what_does_not_grow_is_not_told(middle: tuple[nn.Module, ...]) -> None:
    assert growths(built(*middle))[1] == []


def test_a_head_that_is_loud_by_its_own_weights_is_told_itself() -> None:
    model = built(scaled(0.01), nn.LayerNorm(16))
    with torch.no_grad():
        model[-1].weight.mul_(60)
    assert growths(model) == ("3", ["3"])


class Neighbours(nn.Module):
    """Layers that each take what a node and its neighbours give: their sum or mean, or a norm of the sum."""

    def __init__(self, how: str, depth: int = 3) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32 if i else 8, 32), nn.ReLU(), nn.Linear(32, 32)) for i in range(depth)
        )
        if how == "normed":
            self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(depth))
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            near = edges @ x
            near = near / edges.sum(2, keepdim=True).clamp_min(1) if self.how == "mean" else near
            x = self.norms[i](layer(x + near)) if self.how == "normed" else layer(x + near)
        return self.out(x.mean(1))


def graphs(share: float) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Return batches of graphs in which a share of all pairs of 64 nodes are neighbours."""
    g = torch.Generator().manual_seed(0)
    kinds, found = torch.randn(3, 8, generator=g), []
    for _ in range(20):
        kind = torch.randint(3, (8,), generator=g)
        x = kinds[kind][:, None] + torch.randn(8, 64, 8, generator=g)
        edges = (torch.rand(8, 64, 64, generator=g) < share).float().triu(1)
        found.append(((x, edges + edges.mT), kind))
    return found


def of_graphs(how: str, rate: float, share: float, depth: int = 3) -> gf.Report:
    torch.manual_seed(0)
    model = Neighbours(how, depth)
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9)
    return gf.diagnose(model, graphs(share), F.cross_entropy, optimizer=optimizer)


@pytest.mark.parametrize(("rate", "share", "depth"), [(0.03, 0.8, 3), (1e-3, 0.9, 3), (0.1, 0.4, 4)])
def test_sums_over_many_neighbours_are_told_before_the_steps_that_they_blow_up(
    rate: float, share: float, depth: int
) -> None:
    report = of_graphs("sum", rate, share, depth)
    cause = report.causes[0]
    assert (cause.issue_type, cause.layer.startswith("layers.")) == (IssueType.EXPLODING, True)
    (first, *_) = [i for i in report.issues if "num_places" in i.metrics]
    assert first.metrics["num_places"] == depth - 1
    # What a node and its neighbours give together is about as many times as large as they are many.
    assert 0.5 < first.metrics["growth"] / (1 + 63 * share) < 2


@pytest.mark.parametrize(("how", "share"), [("mean", 0.8), ("normed", 0.8)])
def test_neighbours_that_keep_their_scale_are_not_told(how: str, share: float) -> None:
    assert of_graphs(how, 0.03, share).ok


def test_a_rate_that_is_too_high_stays_the_cause_where_nothing_grows_at_first() -> None:
    report = of_graphs("mean", 100.0, 0.8)
    assert report.causes[0].issue_type is IssueType.UNSTABLE
