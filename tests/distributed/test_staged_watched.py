"""Looks beside the training of a pipeline are those of one process with the whole model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradflow as gf
from tests.distributed.staged import own
from tests.distributed.staged_watched import CASES_ON_TWO, ON_FOUR, OTHERS, Training, case, trained
from tests.distributed.test_same_record import differences
from tests.distributed.worlds import World

MODULE = "tests.distributed.staged_watched"


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> World:
    """All scenarios on two processes."""
    folder, names = tmp_path_factory.mktemp("watching"), [*(f"watched {n}" for n in CASES_ON_TWO), *OTHERS]
    return World.started(2, names, folder, MODULE).joined()


def off(found: Any, expected: Any) -> list[str]:
    """Return the series of two histories that differ."""
    a, b = ({own(name): history[name] for name in history.names} for history in (found, expected))
    assert a.keys() == b.keys()
    return [key for key in a if not np.allclose(a[key], b[key], rtol=1e-5, atol=1e-9, equal_nan=True)]


@pytest.mark.parametrize("name", CASES_ON_TWO)
def test_the_history_is_that_of_one_process(name: str, watching: World) -> None:
    expected = trained(name, options={})
    first, second = watching.results(f"watched {name}")
    wrong = differences(first["record"], expected["record"])
    assert not wrong, "\n".join(wrong[:40])
    assert first["history"].steps.tolist() == expected["history"].steps.tolist()
    assert any("update_ratio/" in key for key in first["history"].names)
    assert [key for key in off(first["history"], expected["history"]) if is_joined(key)] == []
    assert first["issues"] == expected["issues"]
    assert first["lines"] == expected["lines"]
    assert any(severity in ("CRITICAL", "HIGH") for _, _, severity in first["issues"]) == CASES_ON_TWO[name]
    for key in ("record", "history", "issues", "lines"):
        assert first[key] == second[key]


@pytest.mark.parametrize("name", CASES_ON_TWO)
def test_nothing_of_the_training_is_changed(name: str, watching: World) -> None:
    for found in watching.results(f"watched {name}"):
        assert found["changed"] == []
        assert found["same"]


def test_a_jump_that_the_last_stage_knows_makes_all_look_two_steps_later(watching: World) -> None:
    first, second = watching.results("jumped")
    assert first == second
    assert first[0] == [0, 1, 4, 16, 22, 24, 30, 36, 47, 49]


def test_a_training_is_taken_up_again(watching: World) -> None:
    for found in watching.results("resumed"):
        assert found["steps"] == [0, 1, 4]
        assert found["again"] == [0, 1, 4, 5, 8]
        assert found["same"]
        assert found["loaded"]
        assert found["heads"] == 1
        assert "is of a model with layers" in found["said"]


def test_a_stage_that_raises_in_a_look(watching: World) -> None:
    first, second = watching.results("raising")
    assert second[0].startswith("ValueError: too large for me")
    expected = "process 1 raised ValueError: too large for me; so the analysis ends on all processes"
    assert first[0].startswith(f"ProcessError: {expected}")
    for _, unchanged, notes, steps in (first, second):
        assert unchanged
        assert steps == [0, 1, 2, 6]
        assert len(notes) == 1
        assert notes[0].startswith("Step 4 could not be looked at: ")
    assert expected in first[2][0]


def test_other_looks_say_what_to_do(watching: World) -> None:
    for said in watching.results("refused"):
        assert "are not listened to. Look beside them, on the process of every stage" in said["inside"]
        for name in ("alone", "observer"):
            assert "Pass processes='auto', and call the monitor on the process of every stage." in said[name]
        assert "ScheduleInterleaved1F1B is of a pipeline of 4 stages on 2 processes" in said["several"]
        assert "forward_fn was passed, but each stage takes what the one before" in said["forward"]


def test_an_observer_looks_as_well(watching: World) -> None:
    (first, reports), (second, _) = watching.results("observed")
    assert first == second
    model, batches, loss_fn = case("mlp")
    init, update = gf.observer(every=4)
    state = init()
    for step, batch in enumerate(batches):
        state, _ = update(state, model, batch, loss_fn, None, step)
    assert [key for key in off(first, state.history) if is_joined(key)] == []
    assert reports == len(first)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Stages that two processes have each, and four stages."""
    names = [*(f"shared {name}" for name in ON_FOUR), "jumped_apart"]
    return World.started(4, names, tmp_path_factory.mktemp("four"), MODULE).joined()


@pytest.mark.parametrize("name", ON_FOUR)
def test_stages_that_several_processes_have(name: str, on_four: World) -> None:
    model, batches, loss_fn = case(name.partition(" ")[2])
    training = Training(None, model, loss_fn, {})
    if ON_FOUR[name]["trains"]:
        training.run(batches)
    else:
        for x, y in batches:
            training.look(x, y)
    expected = training.found()
    first, *others = on_four.results(f"shared {name}")
    wrong = differences(first["record"], expected["record"])
    assert not wrong, "\n".join(wrong[:40])
    assert first["history"].steps.tolist() == expected["history"].steps.tolist()
    assert [key for key in off(first["history"], expected["history"]) if is_joined(key)] == []
    assert [(own(layer), *rest) for layer, *rest in first["issues"]] == expected["issues"]
    for found in (first, *others):
        assert found["changed"] == []
        assert found["same"]
        assert found["history"] == first["history"]
        assert found["record"] == first["record"]


def is_joined(key: str) -> bool:
    """Whether a series is of the joined batch, and no mean of what each process finds, and no difference."""
    return not key.startswith("output_variation") and not key.startswith(("attention_", "loss_share"))


def test_a_jump_that_one_of_several_knows(on_four: World) -> None:
    for steps in on_four.results("jumped_apart"):
        assert steps == [0, 1, 4, 16, 20, 22]
