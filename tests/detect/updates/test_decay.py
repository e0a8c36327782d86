"""A decay that outweighs the loss is told, whichever way it comes in; decays as they are used are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType

Make = Callable[[nn.Module], torch.optim.Optimizer]


def net(norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    between = nn.LayerNorm(64) if norm else nn.Identity()
    return nn.Sequential(
        nn.Linear(16, 64), between, nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)
    )


def sample() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 16)
    return x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()


def faded(model: nn.Module, make: Make, penalty: float = 0.0) -> list[str]:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        weights = sum(p.square().sum() for p in model.parameters()) if penalty else 0.0
        return F.cross_entropy(output, target) + penalty * weights

    report = gf.diagnose(model, sample, loss, optimizer=make(model), seed=0)
    return [i.layer for i in report.issues if i.issue_type is IssueType.VANISHING and i.severity.is_serious]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("make", "penalty"),
    [
        (lambda m: torch.optim.AdamW(m.parameters(), 3e-3, weight_decay=30.0), 0.0),
        (lambda m: torch.optim.Adam(m.parameters(), 3e-3, weight_decay=1.0), 0.0),
        (lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=1.0), 0.0),
        (lambda m: torch.optim.Adam(m.parameters(), 3e-3), 1.0),
    ],
)
def test_a_decay_that_is_more_than_the_loss(make: Make, penalty: float, norm: bool) -> None:
    assert "" in faded(net(norm), make, penalty)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("make", "penalty"),
    [
        (lambda m: torch.optim.AdamW(m.parameters(), 3e-3, weight_decay=0.1), 0.0),
        (lambda m: torch.optim.Adam(m.parameters(), 3e-3, weight_decay=1e-3), 0.0),
        (lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=5e-4), 0.0),
        (lambda m: torch.optim.Adam(m.parameters(), 3e-3), 1e-4),
        (lambda m: torch.optim.AdamW(m.parameters(), 1e-5, weight_decay=0.1), 0.0),
    ],
)
def test_decays_as_they_are_used(make: Make, penalty: float, norm: bool) -> None:
    assert faded(net(norm), make, penalty) == []


class Recommender(nn.Module):
    """Scores the next of many items by the state of a recurrent net after those before it."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.lstm = nn.Embedding(items, width), nn.LSTM(width, width, batch_first=True)
        nn.init.normal_(self.items.weight, std=1 / width)

    def forward(self, past: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
        user = self.lstm(self.items(past))[0]
        return (user * (self.items(right) - self.items(wrong))).sum(-1)


@pytest.mark.parametrize("width", [16, 48])
@pytest.mark.parametrize(("decay", "sick"), [(1e-2, True), (1e-3, True), (1e-7, False), (0.0, False)])
def test_a_decay_that_is_more_than_the_gradient_of_one_layer(width: int, decay: float, sick: bool) -> None:
    def draw() -> tuple[Tensor, Tensor, Tensor]:
        kind = torch.randint(6, (8, 1))
        seen = kind + 6 * torch.randint(100, (8, 11))
        return seen[:, :-1], seen[:, 1:], torch.randint(600, (8, 10))

    model = Recommender(600, width)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=decay)
    report = gf.diagnose(
        model, draw, lambda gap: (1 - torch.sigmoid(gap)).mean(), optimizer=optimizer, seed=0, steps=20
    )
    found = {i.layer for i in report.issues if i.issue_type is IssueType.VANISHING and "shrink" in i.metrics}
    assert bool(found) == sick
    assert found <= {"lstm", "items", ""}


def test_weights_that_are_drawn_too_large_and_made_smaller_by_the_loss() -> None:
    model = net(norm=False)
    with torch.no_grad():
        model[5].weight.mul_(20)
    assert "" not in faded(model, lambda m: torch.optim.Adam(m.parameters(), 1e-2))


def test_a_loss_without_targets_that_asks_for_small_weights() -> None:
    model = net(norm=False)

    def one_class(output: Tensor) -> Tensor:
        weights = 0.5 * sum(p.square().sum() for p in model.parameters())
        return weights + F.relu(1.0 - output[:, 0]).mean() / 0.1 - 1.0

    report = gf.diagnose(
        model,
        lambda: sample()[0],
        one_class,
        optimizer=torch.optim.Adam(model.parameters(), 3e-3),
        seed=0,
    )
    assert "" not in [i.layer for i in report.issues if i.severity.is_serious]


def test_a_table_of_numbers_that_start_at_random() -> None:
    torch.manual_seed(0)
    model = nn.EmbeddingBag(20, 1, mode="sum")
    rates = torch.randint(20, (64, 3))

    def draw() -> tuple[Tensor, Tensor]:
        return rates, torch.zeros(64, 1)

    report = gf.diagnose(model, draw, F.mse_loss, optimizer=torch.optim.Adam(model.parameters(), 0.02))
    assert "" not in [i.layer for i in report.issues if i.issue_type is IssueType.VANISHING]
