"""Codes that a model never picks, of a table that no gradient teaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradflow.detect.parts.peers import type_of
from gradflow.records import ChoiceRecord, Evidence, FlowRecord, Issue, IssueSeverity, IssueType


def idle_codes(
    few: float = 2, *, codes: float = 16, picks: float = 2.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of codes that are buffers and that nothing picks.

    Measured: which rows of a table without gradient (codes that moving averages update, frozen ones) the
    model picks by an argmin or its like, in the steps that are looked at, and among how many choices.

    Why this is evidence: a code that is not picked is not moved towards what the encoder gives, so it will
    not be. With one or two codes next to nothing can be said.

    Looks alike and is not: tables that the batch picks from (tokens); tables with a gradient, of which the
    account of reach tells; so few choices that chance leaves codes out; codes just drawn, of which a tenth
    and less are picked at first, and more by and by.

    Args:
        few: so many codes or fewer are picked in the last step. Tables of 64 that learn begin with four.
        codes: the least number of codes in the table.
        picks: how often each must have been picked on average for that to be no chance.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for found in record.parts.choices:
            enough = found.num_choices >= picks * found.num_codes and found.num_codes >= codes
            if enough and found.by_step and found.by_step[-1] <= few:
                yield _issue(record, found)

    return detector


def _issue(record: FlowRecord, found: ChoiceRecord) -> Issue:
    now, idle = found.by_step[-1], 1.0 - found.num_picked / found.num_codes
    return Issue(
        layer=found.layer,
        layer_type=type_of(record, found.layer),
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description=f"Of the {found.num_codes} codes of its table, {now} are picked in the last step, and "
        f"{found.num_picked} ever, in {found.num_choices:,} choices. No gradient teaches the table, and what "
        "is never picked is not moved either: all that passes is said with these few.",
        magnitude=idle,
        recommended_actions=(
            "Start codes that are not picked anew, at what the encoder gives for random samples of a batch, "
            "every few hundred steps; and start all of them so (k-means on the first batch), for a table far "
            "from what the encoder gives is never reached.",
            "Or normalise both sides before the distance, or pick from fewer, smaller codes.",
        ),
        metrics={"num_codes": found.num_codes, "num_picked": found.num_picked, "idle": idle},
        evidence=Evidence(origin=found.layer),
    )
