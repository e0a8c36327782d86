"""What an observer knows between two calls: an immutable record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

from gradflow.functional.inside.look import InsideLook
from gradflow.functional.weights import WeightSample
from gradflow.records import EventRecord, HistoryRecord, Issue

Key = tuple[str, str]  # layer, and the value of the type: what tells one issue from another


def key_of(issue: Issue) -> Key:
    """Return what tells an issue from others."""
    return issue.layer, issue.issue_type.value


@attrs.frozen(kw_only=True)
class Certain:
    """An issue that was told and lasts.

    Args:
        issue: as the last look that showed it had it.
        event: since when, and when it was told.
        missed: looks in a row that have not shown it.
    """

    issue: Issue
    event: EventRecord
    missed: int = 0


@attrs.frozen(kw_only=True, eq=False)
class Suspicion:
    """What one look has shown and is not certain yet.

    Args:
        step: of that look.
        keys: of its issues.
        batches: that look's, and those of the steps since: what the closer look is taken on.
        inside: the closer look, where it is taken from inside the steps since.
    """

    step: int
    keys: frozenset[Key]
    batches: tuple[Any, ...] = ()
    inside: InsideLook | None = None


@attrs.frozen(kw_only=True)
class Doubt:
    """A suspicion that a closer look has not borne out.

    Args:
        times: how often.
        until: the step before which it is not looked into again.
    """

    times: int
    until: int


@attrs.frozen(kw_only=True, eq=False)
class ObserverState:
    """What an observer knows of a training between two calls.

    Args:
        history: everything measured so far.
        looks: how many it has seen; a history that was taken up, or thinned, has others.
        absent: measurements of which the last close look has found nothing in the model.
        due: the next step that is looked at; until then `update` does nothing.
        since: the step after which looks are frequent: the beginning, or the last jump.
        ceiling: a loss above it is looked at, whatever the step.
        sample: the weights at the last look, until the next call has seen what became of them.
        suspicion: what the last look has shown and is not certain.
        doubts: suspicions that were not borne out, by issue.
        certain: the issues that were told and last.
    """

    history: HistoryRecord = attrs.field(factory=HistoryRecord.empty)
    looks: int = 0
    absent: frozenset[type] = frozenset()
    due: int = 0
    since: int = 0
    ceiling: float = math.inf
    sample: WeightSample | None = None
    suspicion: Suspicion | None = None
    doubts: Mapping[Key, Doubt] = attrs.field(factory=dict)
    certain: Mapping[Key, Certain] = attrs.field(factory=dict)
