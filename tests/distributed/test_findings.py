"""What differs between processes is a finding; their healthy twins have none."""

from __future__ import annotations

import pytest

from tests.distributed.findings import FEW
from tests.distributed.worlds import World

# scenario: (type, severity, words of the description)
SICK: dict[str, tuple[str, str, str]] = {
    "unequal_parameter": (
        "UNEQUAL",
        "CRITICAL",
        "module.2.weight is not equal on all processes: process {last} has",
    ),
    "unequal_buffer": ("UNEQUAL", "MEDIUM", "module.scale is not equal on all processes"),
    "torn_data": ("ODD_PROCESS", "CRITICAL", "The data of process 1 is not finite in step 1"),
    "torn_loss": ("ODD_PROCESS", "CRITICAL", "The loss of process 1 is not finite in step 0"),
    "other_scale": ("ODD_PROCESS", "MEDIUM", "Process 1 is unlike the others in every step: its data is"),
    "partly_used": ("PARTLY_USED", "CRITICAL", "Only some processes reach module.branches.0.weight"),
    "never_used": ("PARTLY_USED", "HIGH", "no gradient arrives at module.branches.1.weight"),
    "same_data": ("SAME_DATA", "HIGH", "got the same batch at every look"),
    "plain_norms": (
        "UNSYNCHRONISED",
        "MEDIUM",
        "5 batch norms take mean and variance of the {samples} samples",
    ),
    "unfed_expert": ("UNFED", "MEDIUM", "1 of the 4 experts of module.layers.0.feed.experts (2) get none"),
}
HEALTHY = ("broadcast_buffer", "found_unused", "synchronised_norms", "fed_experts", "words")


@pytest.mark.parametrize("name", SICK)
def test_what_differs_is_found_and_named_on_every_process(name: str, two: World) -> None:
    check(name, two)


@pytest.mark.parametrize("name", FEW)
def test_so_it_is_on_four(name: str, four: World) -> None:
    check(name, four)


def check(name: str, world: World) -> None:
    kind, severity, words = SICK[name]
    first, *others = world.results(name)
    assert [issue[:2] for issue in first] == [(kind, severity)] * len(first)
    assert len(first) >= 1
    expected = words.format(last=world.size - 1, samples=8 // world.size)
    assert expected in first[0][3]
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_twins_have_none(name: str, two: World) -> None:
    assert two.results(name) == [[], []]
