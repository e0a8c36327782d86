"""Kinds that no norm of a gradient shows by itself, sick and healthy: heads and targets that are off from the
start, signals that grow or end, losses that leave, first steps that are not cured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import detect, unstable
from gradflow.detect.updates.readings import has_undone, runs_off
from gradflow.records import FlowRecord, IssueSeverity, KnowledgeRecord
from tests.detect.builders import Layer, flow_record

SERIOUS = {"CRITICAL", "HIGH", "MEDIUM"}
STEPS = 20
NOISE = 1.0 + 0.3 * np.sin(np.arange(STEPS) * 2.7)
SEEDS = pytest.mark.parametrize("seed", [0, 1])


def report(model: nn.Module, batches: Any, loss: Any, optimizer: Any = None) -> gf.Report:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 1e-3)
    return gf.diagnose(model, batches, loss, optimizer=optimizer, seed=0)


def serious(found: gf.Report) -> set[tuple[str, str]]:
    return {(i.issue_type.value, i.layer) for i in found.issues if i.severity.value in SERIOUS}


def cause(found: gf.Report) -> tuple[str, str]:
    return found.causes[0].issue_type.value, found.causes[0].layer


def classes(seed: int, width: int = 16, number: int = 4, spread: float = 1.0) -> Callable[[], Any]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(number, width, generator=g)

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(number, (32,), generator=g)
        return centres[y] + spread * torch.randn(32, width, generator=g), y

    return batch


# ------------------------------------------------------------------------- off from the start


class Tied(nn.Module):
    def __init__(self, std: float, words: int = 16, width: int = 64) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(words, width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.embed.weight, std=std)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = 8 * self.embed(words)
        return self.head(x + self.body(x))


@SEEDS
@pytest.mark.parametrize(("std", "expected"), [(1.0, {("EXPLODING", "head")}), (1 / 64, set())])
def test_a_head_that_has_the_weight_of_the_embeddings(seed: int, std: float, expected: set[object]) -> None:
    torch.manual_seed(seed)
    follows = torch.randperm(16)

    def batch() -> tuple[Tensor, Tensor]:
        words = torch.randint(16, (64,))
        return words, follows[words]

    assert serious(report(Tied(std), batch, nn.CrossEntropyLoss())) == expected


def marked(low: float, high: float) -> Callable[[], tuple[Tensor, Tensor]]:
    draw = classes(0, number=2)

    def batch() -> tuple[Tensor, Tensor]:
        x, y = draw()
        return x, torch.where(y[:, None] == 1, high, low)

    return batch


def known_ones(output: Tensor, target: Tensor) -> Tensor:
    """The loss of those that are not marked as unknown by -1."""
    each = F.binary_cross_entropy_with_logits(output, target, reduction="none")
    return each[target >= 0].mean()


@pytest.mark.parametrize(
    ("low", "high", "loss", "sick"),
    [
        (0.0, 255.0, nn.BCEWithLogitsLoss(), True),
        (-1.0, 1.0, nn.BCEWithLogitsLoss(), True),
        (0.0, 1.0, nn.BCEWithLogitsLoss(), False),
        (0.05, 0.95, nn.BCEWithLogitsLoss(), False),
        (-1.0, 1.0, known_ones, False),
    ],
)
def test_targets_that_are_no_probabilities(low: float, high: float, loss: Any, sick: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    found = report(model, marked(low, high), loss, torch.optim.Adam(model.parameters(), 1e-2))
    assert (("EXPLODING", "2") in serious(found)) is sick
    assert sick or not serious(found)


@SEEDS
@pytest.mark.parametrize("scaled", [False, True])
def test_a_signal_that_grows_from_layer_to_layer_is_there_before_the_steps(seed: int, scaled: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential()
    for i in range(4):
        model.add_module(f"fc{i}", nn.Linear(64, 64))
        model.add_module(f"act{i}", nn.ReLU())
        nn.init.normal_(model[2 * i].weight, std=(2 / 64) ** 0.5 if scaled else 1.0)  # type: ignore[arg-type]
    model.add_module("head", nn.Linear(64, 4))
    found = report(
        model, classes(seed, 64), nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.01, 0.9)
    )
    if scaled:
        assert not serious(found)
    else:
        assert cause(found)[0] == "EXPLODING"
        assert cause(found)[1].startswith("fc")


# --------------------------------------------------------------------- what passes, and what does not


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return grad / (1 + (3 * x).square())


class Neurons(nn.Module):
    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return Fire.apply(x - self.threshold)


@SEEDS
@pytest.mark.parametrize(("threshold", "sick"), [(20.0, True), (0.3, False)])
def test_the_first_module_that_says_nothing_is_named(seed: int, threshold: float, sick: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(16, 32), Neurons(0.1), nn.Linear(32, 32), Neurons(threshold), nn.Linear(32, 32, bias=False),
        Neurons(0.3 if not sick else threshold), nn.Linear(32, 4),
    )  # fmt: skip
    found = report(model, classes(seed), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 3e-3))
    if sick:
        assert cause(found) == ("DEAD", "3")
    else:
        assert not serious(found)


class Interval(nn.Module):
    """Draws an interval: how far a point is inside of it, over the width of its edge, decides."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.place, self.cover, self.edge = nn.Linear(64, 2), nn.Sigmoid(), edge

    def forward(self, x: Tensor) -> Tensor:
        centre, half = self.place(x).chunk(2, -1)
        inside = 0.4 + 0.3 * half.tanh() - (torch.linspace(-1, 1, 64) - centre).abs()
        return self.cover(inside / self.edge)


def intervals(seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    g, line = torch.Generator().manual_seed(seed), torch.linspace(-1, 1, 64)

    def batch() -> tuple[Tensor, Tensor]:
        centre, half = torch.rand(32, 1, generator=g) - 0.5, 0.3 + 0.2 * torch.rand(32, 1, generator=g)
        drawn = ((line - centre).abs() < half).float()
        return drawn, drawn

    return batch


@SEEDS
@pytest.mark.parametrize(("edge", "sick"), [(0.02, False), (1e-6, True)])
def test_an_edge_through_which_enough_comes_back(seed: int, edge: float, sick: bool) -> None:
    torch.manual_seed(seed)
    model = Interval(edge)
    found = report(model, intervals(seed), nn.MSELoss(), torch.optim.Adam(model.parameters(), 1e-2))
    told = {i.severity for i in found.issues if i.issue_type.value == "SATURATION" and i.layer == "cover"}
    assert told == ({IssueSeverity.HIGH} if sick else {IssueSeverity.LOW})


@SEEDS
@pytest.mark.parametrize(("std", "sick"), [(0.01, True), (0.35, False)])
def test_a_first_step_that_own_step_sizes_hide_but_do_not_cure(seed: int, std: float, sick: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential()
    for _ in range(7):
        model.append(nn.Linear(16, 16))
        model.append(nn.Tanh())
        nn.init.normal_(model[-2].weight, std=std)  # type: ignore[arg-type]
        nn.init.zeros_(model[-2].bias)  # type: ignore[arg-type]
    model.append(nn.Linear(16, 4))
    found = report(model, classes(seed), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 2e-3))
    assert (("VANISHING", "0") in serious(found)) is sick


# ------------------------------------------------------------------------------- two views


class Views(nn.Module):
    def __init__(self, stopped: bool) -> None:
        super().__init__()
        self.stopped = stopped
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
        self.predictor = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        a, b = self.encoder(one), self.encoder(other)
        p, q = self.predictor(a), self.predictor(b)
        return (p, q, a.detach(), b.detach()) if self.stopped else (p, q, a, b)


def unlike(out: tuple[Tensor, ...]) -> Tensor:
    p, q, a, b = out
    return 1 - (F.cosine_similarity(p, b).mean() + F.cosine_similarity(q, a).mean()) / 2


@SEEDS
@pytest.mark.parametrize("stopped", [False, True])
def test_outputs_that_have_all_one_direction(seed: int, stopped: bool) -> None:
    torch.manual_seed(seed)
    draw, model = classes(seed, number=8, spread=0.3), Views(stopped)

    def batch() -> tuple[Tensor, Tensor]:
        x, _ = draw()
        return x + 0.2 * torch.randn_like(x), x + 0.2 * torch.randn_like(x)

    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for _ in range(120):
        optimizer.zero_grad()
        unlike(model(*batch())).backward()
        optimizer.step()
    found = report(model, batch, unlike, optimizer)
    assert ("BOTTLENECK" in {kind for kind, _ in serious(found)}) is not stopped


# ------------------------------------------------------------------------- losses over the run


def run(losses: Any, grad: Any = NOISE, **known: Any) -> FlowRecord:
    fields = {"step": STEPS - 1, "loss": losses[-1], "shuffled": 2.5, "averaged": 2.3, "silent": 2.3, **known}
    layers = (Layer(name="a", grad=grad), Layer(name="b", grad=grad))
    knowledge = KnowledgeRecord(**fields)
    return flow_record(*layers, steps=STEPS, optimizer="Adam", losses=np.array(losses), knowledge=knowledge)


FLAT = [2.3, *(2.2 + 0.1 * np.sin(np.arange(STEPS - 4)))]


@pytest.mark.parametrize(
    ("end", "known", "leaves"),
    [
        ([6.0, 10.0, 38.0], {}, True),
        ([6.0, 38.0, 10.0], {}, False),  # a leap
        ([2.4, 2.5, 2.6], {}, False),  # no more than batches differ
        (
            [6.0, 10.0, 38.0],
            {"averaged": 30.0, "silent": 30.0, "shuffled": 60.0},
            False,
        ),  # so have its targets
    ],
)
def test_a_loss_that_leaves_in_the_last_steps(
    end: list[float], known: dict[str, float], leaves: bool
) -> None:
    record = run([*FLAT, *end], **known)
    assert runs_off(record) is leaves
    assert [i.severity for i in detect(record, unstable())] == ([IssueSeverity.HIGH] if leaves else [])


@pytest.mark.parametrize(
    ("left", "first", "severity"),
    [(0.05, 1.0, IssueSeverity.LOW), (1.0, 1.0, IssueSeverity.LOW), (1.0, 0.15, IssueSeverity.MEDIUM)],
)
def test_a_lucky_batch_early_in_a_run_that_learns(left: float, first: float, severity: IssueSeverity) -> None:
    losses = np.array([first, 0.002, 0.7, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, *np.full(STEPS - 10, 0.02)])
    found = detect(run(losses, shuffled=0.02 / left, averaged=0.03), unstable())
    assert [i.severity for i in found] == [severity]


@pytest.mark.parametrize(("scale", "severity"), [(1e-20, IssueSeverity.LOW), (1.0, IssueSeverity.HIGH)])
def test_a_jump_of_nothing(scale: float, severity: IssueSeverity) -> None:
    grad = scale * np.where(np.isin(np.arange(STEPS), [7, 13]), 1e4, NOISE)
    assert {i.severity for i in detect(run(np.full(STEPS, 2.3), grad), unstable())} == {severity}


@pytest.mark.parametrize(
    ("first", "last", "peak", "undone"),
    [(0.9, 1e-3, 3.5, True), (0.9, 0.5, 3.5, False), (1e-3, 1e-3, 3.5, False), (0.9, 1e-3, 2.3, False)],
)
def test_steps_that_undo_a_model(first: float, last: float, peak: float, undone: bool) -> None:
    variation = np.geomspace(first, last, STEPS)
    losses = np.array([2.3, peak, *np.full(STEPS - 2, 2.31)])
    record = flow_record(
        Layer(name="a"), Layer(name="b", fields={"output_variation": variation}),
        steps=STEPS, optimizer="Adam", losses=losses,
        knowledge=KnowledgeRecord(
            step=19, loss=2.31, shuffled=2.31, averaged=2.31, silent=2.3,
            shapes=((32, 16),), variations=(last,), scales=(1.0,),
        ),
    )  # fmt: skip
    assert has_undone(record) is undone


@pytest.mark.parametrize(("rate", "sick"), [(0.3, True), (1e-3, False)])
def test_a_rate_that_throws_a_deep_model_where_all_samples_are_one(rate: float, sick: bool) -> None:
    torch.manual_seed(1)
    blocks = [m for _ in range(8) for m in (nn.Linear(16, 16), nn.Tanh(), nn.LayerNorm(16))]
    model = nn.Sequential(*blocks, nn.Linear(16, 4))
    found = report(model, classes(1), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), rate))
    assert cause(found)[0] == "UNSTABLE" if sick else not serious(found)
