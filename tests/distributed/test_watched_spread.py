"""Looks beside the training of a model that is spread over processes are those of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.test_same_record import differences
from tests.distributed.watched_spread import CASES_ON_TWO, OTHERS, case, trained
from tests.distributed.worlds import World


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> World:
    """All scenarios on two processes."""
    folder, names = tmp_path_factory.mktemp("watching"), [*CASES_ON_TWO, *OTHERS]
    return World.started(2, names, folder, "tests.distributed.watched_spread").joined()


def series(history: Any) -> dict[str, Any]:
    return {name: history[name] for name in history.names}


@pytest.mark.parametrize("name", CASES_ON_TWO)
def test_the_history_is_that_of_one_process(name: str, watching: World) -> None:
    expected = trained(*case(name.partition(" ")[2]), processes="alone")
    first, second = watching.results(name)
    wrong = differences(first["record"], expected["record"])
    assert not wrong, "\n".join(wrong[:40])
    assert first["history"].steps.tolist() == expected["history"].steps.tolist()
    found, known = series(first["history"]), series(expected["history"])
    assert found.keys() == known.keys()
    assert any("update_ratio/" in key for key in found)
    off = [
        key
        for key in found
        if not np.allclose(found[key], known[key], rtol=1e-5, atol=1e-9, equal_nan=True)
        and not key.endswith("output_variation")  # the root of a difference
        and not key.startswith(("attention_", "loss_share"))  # means of what each process finds
    ]
    assert off == []
    assert first["issues"] == expected["issues"]
    assert first["lines"] == expected["lines"]
    assert any(severity in ("CRITICAL", "HIGH") for _, _, severity in first["issues"]) == CASES_ON_TWO[name]
    for key in ("record", "history", "issues", "lines"):
        assert first[key] == second[key]


@pytest.mark.parametrize("name", CASES_ON_TWO)
def test_nothing_of_the_training_is_changed(name: str, watching: World) -> None:
    for found in watching.results(name):
        assert found["changed"] == []
        assert found["same"]


def test_other_looks_say_what_to_do(watching: World) -> None:
    for said in watching.results("refused"):
        assert "'0.weight' is spread over processes, and passes in which these gather" in said["inside"]
        assert "of a monitor with processes='auto'" in said["inside"]
        assert "Pass processes='auto', and call gradflow on every process" in said["alone"]


def test_samples_are_named_of_the_joined_batch(watching: World) -> None:
    (first,), (second,) = watching.results("jumped")
    assert first == second
    assert "Sample 14 of the batch's 16 carries 100% of what its loss has in excess" in first


def test_the_first_process_writes_the_history(watching: World) -> None:
    for steps, again, heads in watching.results("written"):
        assert steps == again == [0, 1, 2, 3, 4]
        assert heads == 1
