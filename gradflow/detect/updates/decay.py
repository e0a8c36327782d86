"""VANISHING: weights that a decay takes to zero faster than the loss can teach them anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.updates.readings import held
from gradflow.records import Floats, FlowRecord, Issue, IssueSeverity, IssueType


def decaying_weights(
    inward: float = 0.4, *, least: float = 5e-3, severe: float = 0.03
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of weights whose updates lead to zero, and hardly anywhere else.

    Measured, at every look at the updates of all matrices that the optimizer holds: how much of an update u
    lies along −p, the cosine of the two, and the part of p that it takes away, −p·u / p·p. What starts at
    zero weighs as little in both as it is large.

    Why this is evidence: in a space of so many directions, what a loss asks for has nothing to do with where
    a weight has come to by chance: the cosine is within 0.15 of nothing in healthy runs. Whatever adds the
    weights themselves to a step (a decay, a penalty on their squares) makes it large, and where it is the
    larger part of the step in every look, inwards from the first on, the weights fall by that part again and
    again, and what comes through the layers falls as their product.

    Looks alike and is not: decays as they are used, a hundred-thousandth of a weight at a step; weights that
    were drawn too large and that the loss makes smaller, which point elsewhere after some steps; a loss that
    is the same whichever sample an output belongs to (one class, a density): small weights may be what it is
    for.

    Args:
        inward: cosine of update and −weight, the least in all looks.
        least: part of the weights that the first steps take: at 5e-3 they are halved within 140.
        severe: from which it is HIGH: halved within 23.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        taken, cosine = _inward(record)
        known = record.knowledge
        if known is not None and math.isclose(known.shuffled, known.loss, rel_tol=1e-6):
            return []
        if len(taken) < 3 or not np.isfinite(taken).all() or not np.abs(cosine).min() >= inward:
            return []
        part = float(taken[:2].min())  # with momentum, weights swing past zero, and back outwards
        return [_issue(record, part, float(np.abs(cosine).min()), part >= severe)] if part >= least else []

    return detector


def _inward(record: FlowRecord) -> tuple[Floats, Floats]:
    """Return, by look, the part of the matrices that an update takes away, and its cosine with minus them."""
    # A bias to each of some rows is drawn at random, and the loss itself makes it smaller.
    pairs = [(u, p) for u, p in held(record) if len(p.shape) > 1 and min(p.shape[:2]) > 1]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    sizes = np.array([[p.num_elements] for _, p in pairs], dtype=float)
    weight = np.stack([u.weight_rms for u, _ in pairs]) ** 2 * sizes
    moved = (np.stack([u.rms for u, _ in pairs]) ** 2 * sizes).sum(axis=0)
    along = (np.nan_to_num(np.stack([u.shrink for u, _ in pairs])) * weight).sum(axis=0)
    with np.errstate(all="ignore"):
        return along / weight.sum(axis=0), along / np.sqrt(weight.sum(axis=0) * moved)


def _issue(record: FlowRecord, part: float, cosine: float, severe: bool) -> Issue:
    name = record.provenance.optimizer
    return Issue(
        layer="",
        layer_type=record.provenance.model or "model",
        issue_type=IssueType.VANISHING,
        severity=IssueSeverity.HIGH if severe else IssueSeverity.MEDIUM,
        description=f"Every update takes {part:.2g} of the weights away, and leads to zero more than "
        f"anywhere else (cosine {cosine:.2f} with minus the weights, at the least; what a loss asks for has "
        f"next to none): in {np.log(2) / part:.0f} steps half of them is gone, and of what comes through the "
        "layers a half for each. A decay or a penalty on the weights outweighs the loss.",
        magnitude=part,
        recommended_actions=(
            f"Lower the weight decay of {name}: rate times decay is the part of a weight that a step takes, "
            "and 1e-6 to 1e-4 is usual (AdamW: a rate of 1e-3 with a decay of 0.01 to 0.1).",
            "Adam(weight_decay=...) adds it to the gradient and then makes all steps one size, so that it "
            "outweighs small gradients: use AdamW.",
            "If the loss has a penalty on the weights, weigh it less: its gradient beside that of the rest.",
        ),
        metrics={"shrink": part, "cosine": cosine},
    )
