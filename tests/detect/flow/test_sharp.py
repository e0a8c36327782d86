"""SATURATION inside the loss, and at outputs on their way to their ends; a clamp that the loss leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

MEDIUM = IssueSeverity.MEDIUM


def saturated(
    model: nn.Module, batches: Any, loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer
) -> set[str]:
    report = gf.diagnose(model, batches, loss, optimizer=optimizer, seed=0)
    return {i.layer for i in report.issues if i.issue_type is IssueType.SATURATION and i.severity >= MEDIUM}


class Twins(nn.Module):
    """Two views of a sample as unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.net(a), dim=1), F.normalize(self.net(b), dim=1)


def views() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 16)
    return x + 0.7 * torch.randn(32, 16), x + 0.7 * torch.randn(32, 16)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize(("temperature", "sick"), [(2e-4, True), (0.07, False)])
def test_a_temperature_that_makes_similarities_one_hot(temperature: float, sick: bool, scale: float) -> None:
    torch.manual_seed(0)
    model = Twins()

    def loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
        return scale * F.cross_entropy(outputs[0] @ outputs[1].T / temperature, torch.arange(32))

    found = saturated(model, views, loss, torch.optim.Adam(model.parameters(), 3e-3))
    assert found == ({"net.2", "net.2@1"} if sick else set())


class Factors(nn.Module):
    """What a user thinks of an item: the product of their rows in two tables."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(30, 256), nn.Embedding(30, 256)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, 0.0, size)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(1)


def ratings() -> tuple[tuple[Tensor, Tensor], Tensor]:
    user, item = torch.randint(30, (64,)), torch.randint(30, (64,))
    return (user, item), ((user + item) % 2).float()


@pytest.mark.parametrize(("size", "sick"), [(1.4, True), (0.1, False)])
def test_a_product_of_tables_that_are_too_large_for_their_width(size: float, sick: bool) -> None:
    torch.manual_seed(0)
    model = Factors(size)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    found = saturated(model, ratings, F.binary_cross_entropy_with_logits, optimizer)
    assert found == ({"user", "item"} if sick else set())


class Level(nn.Module):
    """A regression whose output goes through a sigmoid, or not."""

    def __init__(self, bounded: bool, start: float) -> None:
        super().__init__()
        self.hidden, self.out, self.bounded = nn.Linear(8, 32), nn.Linear(32, 1), bounded
        nn.init.constant_(self.out.bias, start)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(torch.relu(self.hidden(x)))
        return torch.sigmoid(y) if self.bounded else y


@pytest.mark.parametrize(
    ("bounded", "level", "start"), [(True, 30.0, 0.0), (False, 30.0, 30.0), (True, 0.5, 0.0)]
)
def test_targets_out_of_the_reach_of_a_sigmoid(bounded: bool, level: float, start: float) -> None:
    torch.manual_seed(0)
    model = Level(bounded, start)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 8)
        return x, level + (0.3 if level < 1 else 5.0) * torch.tanh(x[:, :1])

    found = saturated(model, batch, F.mse_loss, torch.optim.SGD(model.parameters(), 0.06))
    assert bool(found) is (bounded and level > 1)


@pytest.mark.parametrize("taken", [True, False])
def test_a_clamp_is_told_where_the_loss_takes_what_it_gives(taken: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 6)
        return x, x[:, :1] + 5.0

    def loss(value: Tensor, target: Tensor) -> Tensor:
        clipped = 40.0 + (value - 40.0).clamp(-0.2, 0.2)
        return F.smooth_l1_loss(clipped if taken else value, target)

    found = saturated(model, batch, loss, torch.optim.Adam(model.parameters(), 1e-3))
    assert bool(found) is taken


class Centres(nn.Module):
    """Scores of classes that are squared distances to a centre of each, by way of a layer without weights."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 256), nn.LayerNorm(256))
        self.centres = nn.Parameter(torch.randn(10, 256))
        self.scores, self.factor = nn.Identity(), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(-self.factor * (self.net(x)[:, None] - self.centres).square().sum(2))


@pytest.mark.parametrize(("factor", "sick"), [(1.0, True), (1 / 256, False)])
def test_squared_distances_over_many_features(factor: float, sick: bool) -> None:
    torch.manual_seed(0)
    model, kinds = Centres(factor), torch.randn(10, 16)

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(10, (64,))
        return kinds[y] + 2 * torch.randn(64, 16), y

    found = saturated(model, batch, F.cross_entropy, torch.optim.Adam(model.parameters(), 1e-3))
    assert found == ({"net.3"} if sick else set())


class Gaps(nn.Module):
    """By how much the first of two is liked more."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a) - self.net(b)


@pytest.mark.parametrize(
    ("loss", "sick"),
    [
        (lambda gap: -F.logsigmoid(gap.sum()), True),
        (lambda gap: F.softplus(-2 * gap.sum()), True),
        (lambda gap: 1 - torch.sigmoid(gap.sum()), True),
        (lambda gap: -torch.tanh(gap.sum() / 2), True),
        (lambda gap: F.binary_cross_entropy_with_logits(gap.sum(), torch.ones(())), True),
        (lambda gap: -F.logsigmoid(gap).mean(), False),
        (lambda gap: -F.logsigmoid(gap.sum()) + (gap - 1).square().mean(), False),
    ],
)
def test_a_sum_over_all_samples_that_is_squashed(loss: Callable[[Tensor], Tensor], sick: bool) -> None:
    torch.manual_seed(0)
    model = Gaps()

    def pairs() -> tuple[Tensor, Tensor]:
        a, b = torch.randn(64, 8), torch.randn(64, 8)
        better = (a - b)[:, :1] + 2 * torch.randn(64, 1) > 0
        return torch.where(better, a, b), torch.where(better, b, a)

    found = saturated(model, pairs, loss, torch.optim.Adam(model.parameters(), 1e-2))
    assert found == ({"net.2@1"} if sick else set())
