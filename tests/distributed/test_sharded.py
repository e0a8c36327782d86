"""The record of a model that is spread over processes is that of the whole one in one process."""

from __future__ import annotations

from typing import Any

import pytest

from gradflow.records import Reason
from tests.distributed.scenarios import diagnosed
from tests.distributed.sharded import CASES, ON_FOUR, ON_TWO
from tests.distributed.test_same_record import differences
from tests.distributed.worlds import World

ILL = ("CRITICAL", "HIGH", "MEDIUM")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, World]:
    """All scenarios, on as many processes as each wants."""
    found = {}
    for size, wanted in ((2, ON_TWO), (4, ON_FOUR)):
        names = [f"{how} {name}" for how, name in wanted]
        folder = tmp_path_factory.mktemp("spread")
        found[size] = World.started(
            size,
            [*names, *(("refused", "viewed", "penalised", "raises") if size == 2 else ())],
            folder,
            "tests.distributed.sharded",
        )
    for world in found.values():
        world.joined()
    return found


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for (_, name), (moves, options) in {**ON_TWO, **ON_FOUR}.items():
        key = name, moves, "detail" in options
        if key not in found:
            model, batches, loss_fn = CASES[name.partition("-")[0]](name.partition("-")[2] or "healthy")
            found[key] = diagnosed(model, batches, loss_fn, moves=moves, **options)
    return found


@pytest.mark.parametrize(
    ("size", "how", "name"), [(2, *key) for key in ON_TWO] + [(4, *key) for key in ON_FOUR]
)
def test_the_record_is_that_of_the_whole_model(
    size: int, how: str, name: str, worlds: dict[int, World], alone: dict[Any, Any]
) -> None:
    moves, options = (ON_TWO if size == 2 else ON_FOUR)[how, name]
    expected, verdicts = alone[name, moves, "detail" in options]
    first, *others = worlds[size].results(f"{how} {name}")
    wrong = differences(first["record"], expected)
    assert not wrong, "\n".join(wrong[:40])
    odd = [verdict for verdict in first["verdicts"] if verdict[1] == "ODD_PROCESS"]
    assert bool(odd) == (name == "born" and how == "sharded")  # a NaN of one part of the batch
    assert sorted(v for v in first["verdicts"] if v not in odd) == sorted(verdicts)
    assert ("sick" in name or name == "born") == any(severity in ILL for _, _, severity in verdicts)
    assert all(result["changed"] == [] for result in (first, *others))
    for other in others:
        assert other["record"] == first["record"]
        assert other["verdicts"] == first["verdicts"]


def test_calls_that_do_not_take_it_say_what_to_do(worlds: dict[int, World]) -> None:
    for said in worlds[2].results("refused"):
        assert "is spread over processes, and no process has a model of its own" in said["alone"]
        assert "Pass transform='fused'" in said["vjp"]
        assert "'0.weight' of the loss is spread over processes" in said["loss"]
        assert "take such models, when they are called on every process" in said["jacobian"]


def test_reasons_are_told_past_where_a_part_is_entered(worlds: dict[int, World]) -> None:
    first, second = worlds[2].results("viewed")
    assert first == second
    assert first[:2] == [(f"0.{name}", Reason.OFF, "relu", ((2, 3),)) for name in ("weight", "bias")]


def test_a_loss_may_hold_the_model(worlds: dict[int, World]) -> None:
    assert worlds[2].results("penalised") == [{"same": True, "kept": True}] * 2


def test_a_process_that_raises_while_others_gather(worlds: dict[int, World]) -> None:
    first, second = worlds[2].results("raises")
    assert second["said"].startswith("ValueError: too large for me")
    assert "process 1 raised ValueError: too large for me" in first["said"]
    assert first["changed"] == second["changed"] == []
    assert max(first["seconds"], second["seconds"]) < 30
