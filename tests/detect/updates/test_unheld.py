"""Parameters that get a gradient and that no optimizer holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf

LOSS = nn.CrossEntropyLoss()


class Net(nn.Module):
    """A stem, a stack and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(32, 8, generator=g) for _ in range(6)]
    return [(x, x[:, :4].argmax(1)) for x in xs]


def told(model: nn.Module, optimizer: Any) -> list[gf.Issue]:
    found = gf.diagnose(model, batches(), LOSS, optimizer=optimizer)
    return [i for i in found.issues if "elements" in i.metrics]


def test_a_head_that_was_replaced_after_the_optimizer_was_built() -> None:
    model = Net()
    adam = torch.optim.Adam(model.parameters())
    model.head = nn.Linear(32, 4)
    (issue,) = told(model, adam)
    assert (issue.layer, issue.severity) == ("head", gf.IssueSeverity.HIGH)
    assert issue.metrics["parameters"] == ("head.weight", "head.bias")
    assert issue.metrics["stale"] == 2
    assert "built before a part of the model was replaced" in issue.description


def test_a_part_of_a_stack_behind_one_that_is_held() -> None:
    model = Net()
    adam = torch.optim.Adam([p for n, p in model.named_parameters() if not n.startswith("blocks.2")])
    (issue,) = told(model, adam)
    assert (issue.layer, issue.severity) == ("blocks.2", gf.IssueSeverity.MEDIUM)


CHOSEN: dict[str, Callable[[Net], Any]] = {
    "the head alone": lambda m: m.head.parameters(),
    "the last block and the head": lambda m: [*m.blocks[2].parameters(), *m.head.parameters()],
    "the biases": lambda m: [p for n, p in m.named_parameters() if n.endswith("bias")],
    "one player of two": lambda m: m.stem.parameters(),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_part_that_is_chosen_is_a_remark(name: str) -> None:
    model = Net()
    (issue,) = told(model, torch.optim.Adam(CHOSEN[name](model)))
    assert issue.severity is gf.IssueSeverity.LOW


class Cosine(nn.Module):
    """The cosines between a feature and the prototypes of the classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(classes, width))

    def forward(self, x: Tensor) -> Tensor:
        return 8 * nn.functional.normalize(x) @ nn.functional.normalize(self.prototypes).T


@pytest.mark.parametrize("head", [lambda: nn.Linear(32, 4), lambda: Cosine(32, 4)])
def test_what_gives_the_answers_stays_as_random_as_it_started(head: Callable[[], nn.Module]) -> None:
    model = Net()
    model.add_module("head", head())
    (issue,) = told(model, torch.optim.SGD([*model.stem.parameters(), *model.blocks.parameters()], 0.1))
    assert (issue.layer, issue.severity) == ("head", gf.IssueSeverity.MEDIUM)
    assert "stays as it was drawn" in issue.description


def test_a_judge_that_gives_one_number_and_a_head_that_came_trained_are_remarks() -> None:
    torch.manual_seed(0)
    game, maker = nn.Sequential(), nn.Linear(8, 32)
    for name, part in (("maker", maker), ("bend", nn.Tanh()), ("judge", nn.Linear(32, 1))):
        game.add_module(name, part)
    real = nn.BCEWithLogitsLoss()
    found = gf.diagnose(
        game,
        [x for x, _ in batches()],
        lambda out: real(out, torch.ones_like(out)),
        optimizer=torch.optim.SGD(maker.parameters(), 0.1),
    )
    assert [i.severity for i in found.issues if "elements" in i.metrics] == [gf.IssueSeverity.LOW]
    model = Net()
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for x, kind in batches() * 60:
        adam.zero_grad()
        LOSS(model(x), kind).backward()
        adam.step()
    body = torch.optim.SGD([*model.stem.parameters(), *model.blocks.parameters()], 1e-3)
    assert [i.severity for i in told(model, body)] == [gf.IssueSeverity.LOW]


def test_nothing_is_said_of_what_is_held_frozen_or_not_stepped() -> None:
    model = Net()
    assert told(model, torch.optim.Adam(model.parameters())) == []
    both = {"body": torch.optim.SGD(model.blocks.parameters(), 0.1), "ends": torch.optim.Adam(
        [*model.stem.parameters(), *model.head.parameters()])}  # fmt: skip
    assert told(model, both) == []
    assert told(model, None) == []
    model.stem.requires_grad_(False)
    assert told(model, torch.optim.Adam(p for p in model.parameters() if p.requires_grad)) == []


class Gated(nn.Module):
    """A layer and a path past it, with learned gains between them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))
        self.full, self.norm = nn.Linear(size, size), nn.BatchNorm1d(size)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain.softmax(0)
        return self.norm(gain[0] * x + gain[1] * torch.relu(self.full(x)))


class Fused(nn.Module):
    """Two gated layers; if idle, with a bias in front of a norm, and a running mean that it writes itself."""

    def __init__(self, *, idle: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.one, self.two = Gated(32), Gated(32)
        self.idle = idle
        if idle:
            self.mean = nn.Parameter(torch.zeros(32))
            self.norm, self.shift = nn.BatchNorm1d(32), nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.idle:
            self.mean.data.lerp_(x.detach().mean(0), 0.1)
            x = self.norm(torch.relu(x - self.mean) + self.shift)
        return self.head(self.two(self.one(x)))


def of_kinds(model: nn.Module, *kinds: type[nn.Module]) -> list[Tensor]:
    return [p for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)]


@pytest.mark.parametrize("kinds", [(nn.Linear,), (nn.Linear, nn.BatchNorm1d)])
def test_what_modules_own_beside_the_layers_that_are_gathered(kinds: tuple[type[nn.Module], ...]) -> None:
    model = Fused()
    (issue,) = told(model, torch.optim.Adam(of_kinds(model, *kinds)))
    assert (issue.layer, issue.severity) == ("one", gf.IssueSeverity.MEDIUM)
    assert {"one.gain", "two.gain"} <= set(issue.metrics["parameters"])
    assert "gathered from layers" in issue.description


GATHERED: dict[str, Callable[[Fused], Any]] = {
    "all but the norms": lambda m: [*of_kinds(m, nn.Linear), m.one.gain, m.two.gain],
    "the matrices": lambda m: [p for p in m.parameters() if p.dim() > 1],
    "all but one layer": lambda m: of_kinds(m.one, nn.Linear),
    "the gains": lambda m: [m.one.gain, m.two.gain],
}


@pytest.mark.parametrize("name", GATHERED)
def test_layers_that_are_chosen_by_something_else_than_their_kind_are_a_remark(name: str) -> None:
    model = Fused()
    (issue,) = told(model, torch.optim.Adam(GATHERED[name](model)))
    assert issue.severity is gf.IssueSeverity.LOW


def test_what_is_written_to_and_what_gets_next_to_no_gradient_is_a_remark() -> None:
    model = Fused(idle=True)
    held = [p for n, p in model.named_parameters() if n not in ("mean", "shift")]
    (issue,) = told(model, torch.optim.Adam(held))
    assert issue.severity is gf.IssueSeverity.LOW


class Heads(nn.Module):
    """A body and two heads beside one another, with or without a trunk of their own."""

    def __init__(self, trunk: bool = False, wide: tuple[int, int] = (4, 3)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.trunk = nn.Sequential(nn.Linear(32, 32), nn.ReLU()) if trunk else nn.Identity()
        self.kind, self.box = (nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, n)) for n in wide)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(self.body(x))
        return self.kind(x), self.box(x)


def both(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """The cross entropy of one head, and the distance of the other one's outputs."""
    wanted = nn.functional.one_hot(target, 4)[:, : outputs[1].shape[1]].float()
    return LOSS(outputs[0], target) + nn.functional.mse_loss(outputs[1], wanted)


def of_heads(model: Heads, *held: str) -> list[gf.Issue]:
    kept = [p for n, p in model.named_parameters() if n.startswith(held)]
    found = gf.diagnose(model, batches(), both, optimizer=torch.optim.Adam(kept, 1e-2))
    return [i for i in found.issues if "elements" in i.metrics]


def test_all_of_several_heads_are_left_out() -> None:
    (issue,) = of_heads(Heads(), "body")
    assert (issue.layer, issue.severity) == ("kind.0", gf.IssueSeverity.MEDIUM)
    assert "it stays as it was drawn" in issue.description
    assert of_heads(Heads(), "body", "kind", "box") == []


@pytest.mark.parametrize(
    ("trunk", "held"),
    [
        (True, ("body",)),  # another player, or what only measures
        (False, ("body", "kind")),
        (False, ("kind", "box")),
    ],
)
def test_heads_of_which_something_else_may_have_charge(trunk: bool, held: tuple[str, ...]) -> None:
    (issue,) = of_heads(Heads(trunk), *held)
    assert issue.severity is gf.IssueSeverity.LOW


def test_two_judges_of_what_the_body_makes() -> None:
    model = Heads(wide=(1, 1))
    adam = torch.optim.Adam(model.body.parameters())
    found = gf.diagnose(model, batches(), lambda y, _: -torch.minimum(*y).mean(), optimizer=adam)
    (issue,) = (i for i in found.issues if "elements" in i.metrics)
    assert issue.severity is gf.IssueSeverity.LOW
