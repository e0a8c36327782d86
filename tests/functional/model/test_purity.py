"""The purity contract: whatever is run and whatever fails, everything of the user's is as it was.

The property test builds a model out of habits, each of which leaves another trace (a counter, a kept
activation, a generator that moves on, ...), and compares everything that is reachable from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradflow.errors import GradflowError
from gradflow.functional import analyze
from tests.functional.model.habits import HABITS, Boom, Creature, make_optimizer
from tests.functional.snapshots import difference, snapshot

# torch.func refuses to write to captured tensors and to freeze; the run raises, and must be pure all the same
RAISES_IN_VJP = {name for name in HABITS if name.startswith("write")} | {
    "resizes a plain tensor", "updates an object", "freezes itself", "freezes a parameter that it holds",
    "joins a plain tensor to the graph", "asks a plain tensor for a gradient",
}  # fmt: skip


WRITES_ORIGINALS = {"writes a parameter that it holds", "writes a buffer that it holds"}


FAILURES = (None, "draw", "model", "loss", "loss of a number", "progress", "deepen")


@contextlib.contextmanager
def surroundings(kind: str) -> Iterator[None]:
    """Run under another grad mode or default dtype."""
    if kind == "no_grad":
        with torch.no_grad():
            yield
    elif kind == "double":
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        yield


runs = st.fixed_dictionaries(
    {
        "habits": st.lists(st.sampled_from(sorted(HABITS)), unique=True, max_size=6).map(tuple),
        "failure": st.sampled_from(FAILURES),
        "optimizer": st.sampled_from([None, "sgd", "adam"]),
        "transform": st.sampled_from(["auto", "fused", "vjp"]),
        "detail": st.sampled_from(["cheap", "full"]),
        "mode": st.sampled_from(["train", "eval", "keep"]),
        "seed": st.sampled_from([None, 5]),
        "around": st.sampled_from(["", "no_grad", "double"]),
        "graded": st.booleans(),
        "frozen": st.booleans(),
        "evaluated": st.sets(st.sampled_from(["", "bn", "drop", "fc2"]), max_size=3),
        "detached": st.booleans(),
    }
)


def run(
    *,
    habits: tuple[str, ...],
    failure: str | None,
    optimizer: str | None,
    transform: Any,
    detail: Any,
    mode: Any,
    seed: int | None,
    around: str,
    graded: bool,
    frozen: bool,
    evaluated: set[str],
    detached: bool,
) -> None:
    torch.manual_seed(0)
    model = Creature(habits)
    if graded:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    model.fc2.bias.requires_grad_(not frozen)
    for name in evaluated:
        model.get_submodule(name).training = False
    made = make_optimizer(optimizer, model)
    model.fails_at = 2 if failure == "model" else -1
    batch, steps = torch.randn(6, 4), 0
    dtype = torch.float32

    def draw() -> Tensor:
        nonlocal steps
        steps += 1
        if failure == "draw" and steps == 3:
            raise Boom("in the draw")
        return batch

    def loss(y: Tensor) -> Any:
        torch.rand(1)
        if failure == "loss" and steps == 3:
            raise Boom("in the loss")
        value = (y.detach() if detached else y).square().mean()
        return float(value.detach()) if failure == "loss of a number" else value

    def progress(done: int, of: int) -> None:
        if failure == "progress" and done == 3:
            raise Boom("in the progress")

    def deepen(record: Any) -> bool:
        if failure == "deepen":
            raise Boom("in the judgement")
        return True

    with surroundings(around):
        before, drawn = snapshot(model, made), batch.clone()
        error: Exception | None = None
        try:
            record = analyze(
                model, draw, loss, steps=4, optimizer=made, transform=transform, detail=detail, mode=mode,
                seed=seed, progress=progress, deepen=deepen,
            )  # fmt: skip
        except Exception as found:
            error = found
        after = snapshot(model, made)
    if WRITES_ORIGINALS & set(habits):  # the values are put back; a version counter never goes back
        before, after = ({k: v for k, v in found.items() if "version" not in k} for found in (before, after))
    assert difference(before, after) == ""
    assert torch.equal(batch, drawn)
    assert batch.dtype == dtype
    if failure == "deepen" and detail == "full":
        failure = None  # not asked then
    if failure == "loss of a number":
        expected: Any = GradflowError
    elif transform == "vjp" and RAISES_IN_VJP & set(habits):
        expected = (Boom, RuntimeError)
    else:
        expected = Boom if failure else type(None)
    if not (transform == "vjp" and error is None):
        assert isinstance(error, expected), repr(error)
    if error is None:
        assert record.steps == 4
        assert np.isfinite(record.losses).all()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs)
def test_everything_is_as_before(options: dict[str, Any]) -> None:
    run(**options)


PLAIN: dict[str, Any] = {
    "failure": None, "optimizer": None, "transform": "fused", "detail": "cheap", "mode": "train",
    "seed": None, "around": "", "graded": True, "frozen": False, "evaluated": set(), "detached": False,
}  # fmt: skip


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("failure", [None, "loss"])
def test_every_habit_leaves_no_trace(habit: str, failure: str | None) -> None:
    run(**{**PLAIN, "habits": (habit,), "failure": failure, "optimizer": "adam"})


@pytest.mark.parametrize("habit", HABITS)
def test_a_snapshot_sees_every_habit(habit: str) -> None:
    """The check itself: a plain call leaves a trace with the habit, and none without it."""
    for habits in ((), (habit,)):
        model = Creature(habits)
        model.drop.training = model.bn.training = False
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        batch = torch.randn(6, 4)
        before, drawn = snapshot(model), batch.clone()
        try:
            model(batch)
            model.fails_at += 1  # which every call takes one from
            changed = difference(before, snapshot(model)) != "" or not torch.equal(batch, drawn)
        finally:
            torch.set_default_dtype(torch.float32)
        assert changed == bool(habits)


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_a_loss_without_a_graph_leaves_no_trace(transform: str) -> None:
    habits = ("counts", "keeps activations", "fills a nested dict", "draws global random numbers")
    run(**{**PLAIN, "habits": habits, "transform": transform, "optimizer": "sgd", "detached": True})


@pytest.mark.parametrize("failure", [f for f in FAILURES if f])
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_every_failure_leaves_no_trace(failure: str, transform: str) -> None:
    habits = ("counts", "keeps activations", "fills a nested dict", "draws global random numbers")
    run(**{**PLAIN, "habits": habits, "failure": failure, "transform": transform, "optimizer": "sgd"})
