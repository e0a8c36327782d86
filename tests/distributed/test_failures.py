"""A process that raises, dies or never comes ends the analysis on all others, in bounded time."""

from __future__ import annotations

import pytest
import torch

import gradflow as gf
from gradflow.errors import ModelInputError, ProcessError
from gradflow.functional.processes import line
from tests.distributed.worlds import World


def test_a_process_that_raises_is_named_and_its_message_told(world: World) -> None:
    *others, (own, seconds, pure, losses) = world.results("raises")
    assert own == ("ValueError", "the data of this process is torn")
    assert seconds < 30
    assert pure
    for said, seconds, pure, again in others:
        assert said[0] == "ProcessError"
        expected = (
            f"process {world.size - 1} raised ValueError: the data of this process is torn; so the analysis"
        )
        assert said[1].startswith(expected)
        assert seconds < 30
        assert pure
        assert list(again) == list(losses)  # the same processes go on


def test_who_never_comes_is_named(world: World) -> None:
    said, *_ = world.results("absent")
    assert f"of {world.size} processes, 1" in said
    assert "did not begin the analysis within 1 seconds" in said
    assert "processes='alone'" in said


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    names = {"killed": 3, "killed_in_exchange": 2, "killed_with_store": 2}
    worlds = {
        name: World.started(size, [name], tmp_path_factory.mktemp(name)) for name, size in names.items()
    }
    return {name: world.joined() for name, world in worlds.items()}


@pytest.mark.parametrize("name", ["killed", "killed_in_exchange"])
def test_a_process_that_is_killed_ends_the_others(name: str, torn: dict[str, World]) -> None:
    world = torn[name]
    for rank in range(world.size - 1):
        kind, said, seconds = world.result(name, rank)
        assert kind == "ProcessError", said
        assert said.startswith(f"process {world.size - 1} of the analysis is gone")
        assert "\n" not in said
        assert seconds < 30


def test_the_end_of_the_store_ends_the_others(torn: dict[str, World]) -> None:
    kind, said, seconds = torn["killed_with_store"].result("killed_with_store", 1)
    assert kind == "ProcessError"
    assert said.startswith("the store through which the processes of the analysis find one another does not")
    assert "\n" not in said
    assert seconds < 30


def test_an_exchange_that_fails_for_no_known_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "SILENCE", -10.0)

    def fail() -> None:
        raise RuntimeError("no route to host")

    with pytest.raises(ProcessError, match="an exchange between the processes .* failed: no route to host"):
        line.Line()._run(fail)


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(ModelInputError, match="processes is 'all': expected 'auto', 'alone', or a process"):
        gf.analyze(torch.nn.Linear(1, 1), [torch.ones(1, 1)], lambda y: y.sum(), processes="all")


def test_the_bounds_leave_half_a_minute() -> None:
    assert line.SILENCE + 2 * line.BEAT + line.FAREWELL + 1 < 30
    assert line.BOUND.total_seconds() < 30
