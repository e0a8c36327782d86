"""Divisions by next to nothing: by small numbers among others, and by a sum that cancels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.parts.peers import type_of
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType, QuotientRecord


def tiny_divisors(
    excess: float = 1e4, *, weight: float = 1e3, by_chance: float = 2.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of divisions by numbers some of which are next to nothing beside the others, and of
    those by a sum whose parts cancel.

    Measured: divisions of what a model computes by numbers without gradient (targets, their size, a spread
    taken from the batch); which of those are below 1e-4 of the largest one, and how much larger what they
    give is in the mean than what the others give.

    Why this is evidence: each element's gradient is divided as it is itself, and a loss is their sum, so it
    is the mean that counts, a few of the smallest divisors included. What is 1e5 times larger at a hundredth
    of the elements is all that a step sees; whatever the scale of the loss, the others are as good as absent,
    and a new batch with other such elements throws the model about. A sum of numbers with either sign that
    is no larger than chance leaves of them (weights, or an indicator of events, that were standardised) has a
    new sign with every few batches: with the one a step leads uphill, and near zero it is without bound. Told
    where the losses have come with both signs too (UNSTABLE).

    Looks alike and is not: divisors of many sizes where what is divided has the same sizes (outputs in the
    units of the data over its spread); zeros over next to nothing (a constant feature less its mean); one
    divisor for all, which is a matter of scale alone; one that cancels inside of a square or a magnitude,
    after which losses are above zero.

    Args:
        excess: how many times as much the small divisors must give. Targets that spread evenly over four or
            five orders of magnitude are common in percentage errors, give 1e3 at most, and can be learned.
        weight: that, times the share of the small ones: how much more they weigh than all the others.
        by_chance: size of a sum over √(Σ d²) up to which its sign is by chance: two standard deviations.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        worst: dict[str, QuotientRecord] = {}
        for found in record.parts.quotients:
            over = found.excess >= excess and found.excess * found.small_share >= weight
            if over and not (found.layer in worst and worst[found.layer].excess >= found.excess):
                worst[found.layer] = found
        losses = record.losses[np.isfinite(record.losses)]
        turns = bool(len(losses)) and losses.min() < 0 < losses.max()
        cancelled = {q.layer: q for q in record.parts.quotients if turns and q.cancelled <= by_chance}
        return [
            *(_issue(record, found) for found in worst.values()),
            *(_cancelled_issue(record, found) for found in cancelled.values()),
        ]

    return detector


def _cancelled_issue(record: FlowRecord, found: QuotientRecord) -> Issue:
    below = float(np.mean(record.losses < 0))
    return Issue(
        layer=found.layer,
        layer_type=type_of(record, found.layer.partition("@")[0]),
        issue_type=IssueType.UNSTABLE,
        severity=IssueSeverity.HIGH,
        description="What becomes of its output is divided by a sum of numbers with either sign, which "
        f"cancel: it is {found.cancelled:.2g} times what chance leaves of them, so near zero, now above it "
        f"and now below, and so is the loss ({below:.0%} of the losses are below zero). With the one sign a "
        "step leads uphill, and near zero it is without bound.",
        magnitude=1.0 / max(found.cancelled, 1e-30),
        recommended_actions=(
            "Divide by a count, or by a sum of weights that are all above zero: was an indicator of 0 and 1 "
            "standardised with the other columns?",
            "Or divide by the number of samples.",
        ),
        metrics={"cancelled": found.cancelled, "below_zero": below, "op": "div"},
        evidence=Evidence(op="div"),
    )


def _issue(record: FlowRecord, found: QuotientRecord) -> Issue:
    module = found.layer.partition("@")[0]
    finite = math.isfinite(found.excess)
    return Issue(
        layer=found.layer,
        layer_type=type_of(record, module),
        issue_type=IssueType.EXPLODING,
        severity=IssueSeverity.HIGH,
        description=f"What becomes of its output is divided by numbers of which {found.small_share:.1%} are "
        f"next to nothing beside the others, down to {found.smallest:.1e}. There it gives "
        + (f"{found.excess:.1e} times as much, and so does" if finite else "infinitely more, and so does")
        + " its gradient: a step sees these elements alone.",
        magnitude=found.excess,
        recommended_actions=(
            "Bound the divisor from below at the scale of the data, and not at 1e-8, on its absolute value: "
            "target.abs().clamp_min(0.1 * target.abs().mean()).",
            "Or divide by one number for all (a weighted percentage error: |error|.sum() / |target|.sum(); a "
            "scale taken from the training data), or leave out elements that are near zero.",
        ),
        metrics={
            "small_share": found.small_share,
            "smallest": found.smallest,
            "excess": found.excess,
            "op": "div",
        },
        evidence=Evidence(growth=found.excess, op="div"),
    )
