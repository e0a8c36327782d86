"""What loops do beside plain updates is done to all stages of a pipeline, as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.records import FlowRecord
from tests.distributed.pieces import Chain, pieces
from tests.distributed.staged import own, whole
from tests.distributed.staged_loops import KINDS, OTHERS, SHARED, loop_of, small
from tests.distributed.staged_watched import case
from tests.distributed.test_same_record import differences
from tests.distributed.worlds import World

MODULE = "tests.distributed.staged_loops"


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> World:
    """All scenarios on two processes; the last one leaves a group that exchanges nothing more."""
    names = [*(f"loop {kind}" for kind in KINDS), *OTHERS, "step_raises"]
    return World.started(2, names, tmp_path_factory.mktemp("loops"), MODULE).joined()


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_is_that_of_the_whole_model(kind: str, loops: World) -> None:
    model, batches, loss_fn = whole(kind.split()[-1]) if "whole" in kind else small(kind)
    options = loop_of(kind, model, loss_fn)
    expected = gf.diagnose(model, batches, loss_fn, steps=len(batches), seed=0, **options)
    first, second = loops.results(f"loop {kind}")
    wrong = differences(first["record"], expected.record)
    if "overflowing" in kind:  # in single precision, little is left of differences
        wrong = [line for line in wrong if "output_variation" not in line and " bend: " not in line]
    assert not wrong, "\n".join(wrong[:40])
    verdicts = [(i.layer, i.issue_type.value, i.severity.value) for i in expected.issues]
    assert sorted(first["verdicts"]) == sorted(verdicts)
    assert updates(first["record"]) == pytest.approx(updates(expected.record), rel=1e-5, nan_ok=True)
    assert first["record"] == second["record"]
    assert first["changed"] == second["changed"] == []
    assert expected.record.updates is not None
    assert ("overflowing" in kind) <= (expected.record.updates.num_skipped > 0)


def updates(record: FlowRecord) -> dict[str, Any]:
    """Return what is told of the updates of a run, beside those of single parameters."""
    found = record.updates
    assert found is not None
    numbers = {"made": found.num_updates, "skipped": found.num_skipped}
    for name in ("clipping", "rates", "loss_scale"):
        numbers |= {f"{name} {i}": number for i, number in enumerate(getattr(found, name))}
    return numbers


def test_a_stage_without_gradients_has_its_scale_grow(loops: World) -> None:
    model, (_, batches) = Chain(pieces("frozen")[0]), pieces("frozen")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = gf.analyze(
        model, batches, nn.CrossEntropyLoss(), optimizer=optimizer, seed=0,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1),
    )  # fmt: skip
    first, second = loops.results("frozen")
    assert not differences(first, expected)
    assert first == second
    assert first.updates.loss_scale == pytest.approx(expected.updates.loss_scale, nan_ok=True)  # type: ignore[union-attr]


def test_what_stages_were_not_told_alike(loops: World) -> None:
    first, second = loops.results("unlike")
    assert first == second
    assert "clip: 1.0 was passed on process 0, and 2.0 on process 1, but a loop does that" in first["clip"]
    assert "accumulate: 1 was passed on process 0, and 2 on process 1" in first["accumulate"]
    assert "a scaler with the scale: 16.0 was passed on process 0, and 32.0 on" in first["scale"]
    assert "step_fn: None was passed on process 0, and one on process 1" in first["function"]
    assert "optimizer: one was passed on process 0, and None on process 1" in first["idle"]


def test_a_step_that_raises_ends_the_others(loops: World) -> None:
    first, second = loops.results("step_raises")
    assert second[0].startswith("ValueError: too large for me")
    assert first[0].startswith("ProcessError: process 1 raised ValueError: too large for me")
    for _, seconds, unchanged in (first, second):
        assert seconds < 40
        assert unchanged


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two stages, each on two of four processes."""
    names = ["replicated", *(f"shared {how}" for how in SHARED)]
    return World.started(4, names, tmp_path_factory.mktemp("four"), MODULE).joined()


@pytest.mark.parametrize("how", SHARED)
def test_loops_of_stages_that_are_spread(how: str, on_four: World) -> None:
    kind, name = SHARED[how]
    model, batches, loss_fn = case(name)
    expected = gf.analyze(model, batches, loss_fn, steps=6, seed=0, **loop_of(kind, model, loss_fn))
    first, *others = on_four.results(f"shared {how}")
    wrong = differences(first[0], expected)
    assert not wrong, "\n".join(wrong[:40])
    assert updates(first[0]) == pytest.approx(updates(expected), rel=1e-5, nan_ok=True)
    assert all(record == first[0] for record, _ in others)
    assert all(changed == [] for _, changed in (first, *others))


def test_stages_that_are_replicated(on_four: World) -> None:
    (said, record), *others = on_four.results("replicated")
    assert "stage 0 of the pipeline is on several processes that average its gradients" in said
    model, (_, batches) = Chain(pieces("plain")[0]), pieces("plain")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = gf.analyze(
        model, batches, nn.CrossEntropyLoss(), optimizer=optimizer, seed=0,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1),
    )  # fmt: skip
    wrong = differences(record, expected)
    assert not wrong, "\n".join(wrong[:40])
    assert all(other == record for _, other in others)
    assert [own(layer.name) for layer in record] == [layer.name for layer in expected]
