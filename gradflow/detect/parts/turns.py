"""Sinusoids that do not turn: an embedding of a number whose features all move together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from gradflow.detect.knowledge import came_knowing, has_learned
from gradflow.detect.parts.peers import type_of
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType, TurnsRecord


def still_sinusoids(quarter: float = 1.5, *, different: float = 4) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of sinusoidal embeddings made for other numbers than they are given.

    Measured: sines and cosines of angles that carry no gradient, eight features and more; over the samples
    and positions of the last batch that was looked at, how far the angle of the fastest one runs, and how
    many different angles it takes.

    Why this is evidence: over less than a quarter of a turn a sine is as good as straight. If that holds of
    the fastest feature, it holds of all: they are one straight line in the space of the embedding, and most
    of them are the same for every sample. Times from 0 to 1 in an embedding made for a thousand whole steps
    give that: the layers behind it cannot tell a time from the next.

    Looks alike and is not: one number for all of a batch; two or three positions; a few features of a clock
    or of a body's angles; angles that the model computes; a model that has learned all the same (LOW).

    Args:
        quarter: of a turn, in radians, which is π / 2 rounded down. Positions of a sequence turn their
            fastest feature by one radian for each.
        different: so many numbers at least must have been embedded.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        knows = came_knowing(record) or has_learned(record)
        for found in record.parts.turns:
            if found.num_different >= different and 0 < found.span < quarter:
                yield _issue(record, found, IssueSeverity.LOW if knows else IssueSeverity.MEDIUM)

    return detector


def _issue(record: FlowRecord, found: TurnsRecord, severity: IssueSeverity) -> Issue:
    return Issue(
        layer=found.layer,
        layer_type=type_of(record, found.layer),
        issue_type=IssueType.BOTTLENECK,
        severity=severity,
        description=f"Of its {found.num_features} sinusoids the fastest turns by {found.span:.2g} radians "
        f"over the {found.num_different} different numbers of the batch, where a whole turn is "
        f"{math.tau:.3g}: they are as good as straight lines, most of them constants, and all they tell is "
        "one feature.",
        magnitude=found.span,
        recommended_actions=(
            "Multiply what is embedded by the range that its frequencies are made for: times from 0 to 1 by "
            "1000 (timestep_embedding(1000 * t)).",
            "Or choose frequencies for the numbers that come: from 2π over their range up to the finest "
            "difference that matters.",
        ),
        metrics={
            "span": found.span,
            "num_features": found.num_features,
            "num_different": found.num_different,
        },
        evidence=Evidence(),
    )
