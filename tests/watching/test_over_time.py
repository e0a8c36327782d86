"""Trainings that go bad are told when they do, with layer and step; their healthy twins are left alone."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from gradflow.records import EventRecord, IssueSeverity
from tests.watching.trainings import (
    Training,
    Watched,
    cart_pole,
    digits_network,
    language_model,
    variational,
)


class Trouble(NamedTuple):
    """What goes wrong in a training.

    Args:
        training: the training.
        begins: the step at which something is done to it.
        below: plain number below which it has gone bad (above which, if negative).
        types: of an issue that tells it.
        layers: where that issue may be: prefixes of names.
    """

    training: Training
    begins: int
    below: float
    types: tuple[str, ...]
    layers: tuple[str, ...]


TROUBLES = {
    "attention collapses": Trouble(language_model, 250, 0.3, ("SATURATION",), ("blocks.",)),
    "rectifiers die": Trouble(digits_network, 500, -0.6, ("DEAD",), ("7", "6", "3")),
    "policy collapses": Trouble(cart_pole, 12 * 16, 0.05, ("SATURATION",), ("policy",)),
    "posterior collapses": Trouble(variational, 500, 0.05, ("BOTTLENECK",), ("mean", "log_variance")),
}


@pytest.fixture(params=TROUBLES, scope="module")
def trouble(request: pytest.FixtureRequest) -> Trouble:
    return TROUBLES[request.param]


def moment(trouble: Trouble, watched: Watched) -> int:
    """Return the step from which on the plain number shows the trouble at three steps in a row."""
    bad = [(x < trouble.below if trouble.below > 0 else x > -trouble.below) for x in watched.plain]
    return next(step for step in range(len(bad)) if all(bad[step : step + 3]))


def test_trouble_is_told_within_two_looks(trouble: Trouble) -> None:
    watched = trouble.training(sick=True)
    shown = moment(trouble, watched)
    assert shown >= trouble.begins, "nothing is wrong before"
    looks = [int(step) for step in watched.monitor.history.steps if step >= shown]

    def tells(event: EventRecord) -> bool:
        return event.issue_type.value in trouble.types and event.layer.startswith(trouble.layers)

    events = [event for event in watched.monitor.history.events if tells(event)]
    assert events, watched.monitor.history.events
    first = min(events, key=lambda event: event.told)
    assert first.severity >= IssueSeverity.MEDIUM
    assert trouble.begins <= first.since <= first.told
    assert first.told <= looks[1] + 3, (shown, looks[:3], first)  # a closer look takes three steps more
    told = [step for step, report in watched.reports.items() if not report.ok]
    assert min(told) >= trouble.begins, "no false alarm before"
    assert any(f"since step {first.since}" in line for line in watched.reports[first.told].lines)


def test_the_healthy_twin_is_left_alone(trouble: Trouble) -> None:
    watched = trouble.training(sick=False)
    grave = {
        step: [str(issue) for issue in report.issues if issue.severity >= IssueSeverity.MEDIUM]
        for step, report in watched.reports.items()
        if not report.ok
    }
    assert not grave
    assert not [e for e in watched.monitor.history.events if e.severity >= IssueSeverity.MEDIUM]
