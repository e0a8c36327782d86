"""Codes that a model never picks, of a table that no gradient teaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradflow.detect.parts.peers import type_of
from gradflow.detect.reach.unreached import MANY_CODES, MOST_CODES
from gradflow.records import ChoiceRecord, Evidence, FlowRecord, Issue, IssueSeverity, IssueType


def idle_codes(
    many: float = MANY_CODES, *, most: float = MOST_CODES, picks: float = 2.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of codes that are buffers and that nothing picks.

    Measured: which rows of a table without gradient (codes that moving averages update, frozen ones) the
    model picks by an argmin or its like, in the steps that are looked at, and among how many choices.

    Why this is evidence: a code that is not picked is not moved towards what the encoder gives, so it will
    not be. What is said with a few codes of many is no more than those.

    Looks alike and is not: tables that the batch picks from (tokens); tables with a gradient, of which the
    account of reach tells; so few choices that chance leaves codes out.

    Args:
        many: share of the codes that are never picked from which it is MEDIUM.
        most: from which it is HIGH: what is left is no table.
        picks: how often each must have been picked on average for that to be no chance.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for found in record.parts.choices:
            idle = 1.0 - found.num_picked / found.num_codes if found.num_codes >= 4 else 0.0
            if idle >= many and found.num_choices >= picks * found.num_codes:
                yield _issue(record, found, idle, most)

    return detector


def _issue(record: FlowRecord, found: ChoiceRecord, idle: float, most: float) -> Issue:
    return Issue(
        layer=found.layer,
        layer_type=type_of(record, found.layer),
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH if idle >= most else IssueSeverity.MEDIUM,
        description=f"Of the {found.num_codes} codes of its table, {found.num_picked} are ever picked, in "
        f"{found.num_choices:,} choices. No gradient teaches the table, and what is never picked is not "
        "moved either: all that passes is said with these few.",
        magnitude=idle,
        recommended_actions=(
            "Start codes that are not picked anew, at what the encoder gives for random samples of a batch, "
            "every few hundred steps; and start all of them so (k-means on the first batch), for a table far "
            "from what the encoder gives is never reached.",
            "Or normalise both sides before the distance, or pick from fewer, smaller codes.",
        ),
        metrics={"num_codes": found.num_codes, "num_picked": found.num_picked, "idle": idle},
        evidence=Evidence(),
    )
