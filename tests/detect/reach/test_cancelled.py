"""DEAD where the gradient of a matrix cancels by mathematics; healthy where only what is added cancels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity


def told(model: nn.Module, x: Tensor, *, scale: float = 1.0) -> dict[str, IssueSeverity]:
    def loss(y: Tensor) -> Tensor:
        return scale * (y - 1).square().mean()

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    record = gf.analyze(model, lambda: x, loss, steps=5, optimizer=optimizer)
    return {i.layer: i.severity for i in gf.detect(record, gf.dead()) if i.severity >= IssueSeverity.MEDIUM}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Router(nn.Module):
    """Experts, of which each sample goes to the likeliest ones, weighed by what the gate says of them."""

    def __init__(self, weigh: Callable[[Tensor], Tensor], kept: int = 1) -> None:
        super().__init__()
        self.weigh, self.kept = weigh, kept
        self.hidden, self.gate = nn.Linear(8, 8), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        top, chosen = self.gate(self.hidden(x).tanh()).softmax(-1).topk(self.kept)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        taken = every.gather(1, chosen[..., None].expand(-1, -1, 8))
        return x + (self.weigh(top)[..., None] * taken).sum(1)


def divided(top: Tensor) -> Tensor:
    return top / (top.sum(-1, keepdim=True) + 1e-20)


def normalized(top: Tensor) -> Tensor:
    return F.normalize(top, dim=-1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("weigh", [divided, normalized])
def test_a_single_number_that_is_normalised_by_itself(
    weigh: Callable[[Tensor], Tensor], scale: float
) -> None:
    assert told(Router(weigh), X, scale=scale) == {"gate": IssueSeverity.HIGH}


@pytest.mark.parametrize(("weigh", "kept"), [(divided, 2), (normalized, 2), (lambda top: top, 1)])
def test_several_numbers_or_none_that_is_normalised(weigh: Callable[[Tensor], Tensor], kept: int) -> None:
    assert told(Router(weigh, kept), X) == {}


class Neighbours(nn.Module):
    """Each sample weighs its neighbours of two kinds by a key of each kind."""

    def __init__(self, second: int) -> None:
        super().__init__()
        self.numbers = {"near": 3, "far": second}
        self.key = nn.ModuleDict({kind: nn.Linear(8, 8) for kind in self.numbers})
        self.value = nn.ModuleDict({kind: nn.Linear(8, 8) for kind in self.numbers})

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for kind, number in self.numbers.items():
            beside = torch.stack([x.roll(i, 0) for i in range(number)], 1)
            scores = ((self.key[kind](beside) * x[:, None]).sum(-1)).exp()
            weights = scores / scores.sum(1, keepdim=True)
            found = found + (weights[..., None] * self.value[kind](beside)).sum(1)
        return found


def test_a_kind_of_which_the_data_have_one_each_beside_one_that_learns() -> None:
    model = Neighbours(1)
    assert told(model, X) == {}
    model.numbers["near"] = 1  # there is no kind left that learns, so it is the make
    assert set(told(model, X)) == {"key.near", "key.far"}


class Bottom(nn.Module):
    """A convolution to a single voxel, normalised in groups, beside a way on which gradient arrives."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 2), nn.GroupNorm(groups, 8)
        self.side, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x.view(-1, 2, 2, 2))).flatten(1) + self.side(x).tanh())


@pytest.mark.parametrize(("groups", "sick"), [(8, True), (2, False)])
def test_a_group_of_one_channel_on_one_voxel(groups: int, sick: bool) -> None:
    assert told(Bottom(groups), X) == ({"conv": IssueSeverity.HIGH} if sick else {})


class One(nn.Module):
    """A gate for each sample that goes through a layer norm."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gate, self.norm, self.out = nn.Linear(8, features), nn.LayerNorm(features), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.norm(self.gate(x)).sigmoid()


@pytest.mark.parametrize(("features", "sick"), [(1, True), (8, False)])
def test_a_layer_norm_over_one_number(features: int, sick: bool) -> None:
    assert (told(One(features), X).keys() == {"gate"}) is sick


class Added(nn.Module):
    """Biases that cancel: before a batch norm, and of the keys under the softmax of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).view(8, 4, 8)
        return h + self.attention(h, h, h, need_weights=False)[0]


def test_what_is_only_added_may_cancel() -> None:
    assert told(Added(), X) == {}


class Scored(nn.Module):
    """Several branches, mixed by scores that a small net makes of their sum."""

    def __init__(self, branches: int, own: bool, *, calls: bool = True) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(8, 12) for _ in range(branches))
        self.squeeze, self.score = nn.Linear(12, 6), nn.Linear(6, 12 * (branches if own else 1))
        self.head, self.own, self.calls = nn.Linear(12, 8), own, calls

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.stack([branch(x).relu() for branch in self.branches], 1)
        told, number = self.squeeze(parts.sum(1)).tanh(), len(self.branches)
        if self.own:
            scores = self.score(told).unflatten(1, (number, -1))
        else:
            one = self.score(told)
            scores = torch.stack([self.score(told) if self.calls else one for _ in range(number)], 1)
        return self.head((scores.softmax(1) * parts).sum(1))


@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("branches", [2, 3, 5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scores_of_alternatives_that_are_one_and_the_same(branches: int, calls: bool, scale: float) -> None:
    model = Scored(branches, own=False, calls=calls)
    assert told(model, X, scale=scale) == {"score": IssueSeverity.HIGH}


@pytest.mark.parametrize("branches", [2, 3])
def test_scores_of_their_own(branches: int) -> None:
    assert told(Scored(branches, own=True), X) == {}


class Between(nn.Module):
    """What `make` makes of a layer beside another way."""

    def __init__(self, layer: nn.Module, make: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.make, self.side, self.head = layer, make, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.side(x).tanh() + self.make(self.layer, x))


def shifted(layer: nn.Module, x: Tensor) -> Tensor:
    """Return weights over features that one score for all of them does not change."""
    return (x + layer(x).mean(1, keepdim=True)).softmax(1)


def unlike(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) - layer(x.roll(1, 1))


def alike(layer: nn.Module, x: Tensor) -> Tensor:
    return (layer(x).tanh() + 1) * 2 - (layer(x).tanh() + 1) * 2


@pytest.mark.parametrize(("make", "sick"), [(shifted, True), (alike, True), (unlike, False)])
def test_what_is_taken_off_again(make: Callable[[nn.Module, Tensor], Tensor], sick: bool) -> None:
    found = told(Between(nn.Linear(8, 8), make), X)
    assert found == ({"layer": IssueSeverity.HIGH} if sick else {})


def test_the_direction_of_a_weight_that_is_one_number() -> None:
    def twice(layer: nn.Module, x: Tensor) -> Tensor:
        return (layer(x[..., None]) + layer(2 * x[..., None])).tanh().sum(-1)

    weight = nn.utils.parametrizations.weight_norm(nn.Linear(1, 4))
    assert told(Between(weight, twice), X) == {}


def test_gradients_that_are_faint_and_there() -> None:
    deep = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(8, 8), nn.Sigmoid())), nn.Linear(8, 8))
    record = gf.analyze(deep, lambda: X, lambda y: (y - 1).square().mean(), steps=5)
    assert record.parameters[0].grad_norm.max() < 1e-6 * record.parameters[-1].grad_norm.max()
    assert record.reach is not None
    assert not record.reach.unreached
