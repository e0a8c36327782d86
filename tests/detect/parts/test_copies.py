"""Parts that are copies of one another, side by side, and those that only begin so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import copied_parts
from gradflow.records import Issue, IssueSeverity, IssueType


def mlp(norm: bool = False) -> nn.Module:
    between = [nn.LayerNorm(12)] if norm else []
    return nn.Sequential(nn.Linear(8, 12), *between, nn.ReLU(), nn.Linear(12, 3))


class Members(nn.Module):
    """The mean of several members, or each of them weighed by a gate."""

    def __init__(self, number: int, *, copied: bool, norm: bool = False, gated: bool = False) -> None:
        super().__init__()
        first = mlp(norm)
        self.members = nn.ModuleList(copy.deepcopy(first) if copied else mlp(norm) for _ in range(number))
        self.gate = nn.Linear(8, number) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        given = torch.stack([member(x) for member in self.members], 1)
        if self.gate is None:
            return given.mean(1)
        return (given * self.gate(x).softmax(-1)[..., None]).sum(1)


class Pair(nn.Module):
    """Two critics of one target, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 3)
        self.second = copy.deepcopy(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(self.first(x), self.second(x))


class Stack(nn.Module):
    """Copies one behind the other, as the layers of an encoder are."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(8, 8)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x[:, :3]


def issues(make: Callable[[], nn.Module], seed: int = 0) -> list[Issue]:
    torch.manual_seed(seed)
    model = make()

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 8)
        return x, x[:, :3].argmax(1)

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    report = gf.diagnose(model, batch, F.cross_entropy, steps=8, optimizer=optimizer, seed=seed)
    return list(gf.detect(report.record, copied_parts()))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("norm", [False, True])
def test_copied_members_are_worth_one(norm: bool, seed: int) -> None:
    found = issues(lambda: Members(4, copied=True, norm=norm), seed)
    assert [(i.layer, i.issue_type, i.severity) for i in found] == [
        ("members.1", IssueType.BOTTLENECK, IssueSeverity.HIGH)
    ]
    assert found[0].metrics["copies"] == ("members.0", "members.1", "members.2", "members.3")


def test_two_copied_critics_are_told_too() -> None:
    (issue,) = issues(Pair)
    assert (issue.layer, issue.severity) == ("second", IssueSeverity.MEDIUM)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Members(4, copied=False),
        lambda: Members(4, copied=True, gated=True),
        Stack,
        lambda: nn.Sequential(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2),
            nn.Linear(8, 3),
        ),
    ],
    ids=["drawn apart", "weighed by a gate", "stacked", "encoder"],
)
def test_what_gradients_tell_apart_is_left_alone(make: Callable[[], nn.Module]) -> None:
    assert issues(make) == []
