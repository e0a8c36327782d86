"""A process that raises, dies or never comes ends the analysis on all others, in bounded time."""

from __future__ import annotations

import pytest

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
    names = ("killed", "killed_in_exchange")
    worlds = {
        name: World.started(size, [name], tmp_path_factory.mktemp(name))
        for name, size in zip(names, (3, 2), strict=True)
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


def test_the_bounds_leave_half_a_minute() -> None:
    assert line.SILENCE + 2 * line.BEAT + 1 < 30
    assert line.BOUND.total_seconds() < 30
