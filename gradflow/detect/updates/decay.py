"""VANISHING: weights that a decay takes to zero faster than the loss can teach them anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.actions import Actions
from gradflow.detect.knowledge import falls, guesses
from gradflow.detect.updates.readings import held
from gradflow.records import (
    Floats,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    ParameterRecord,
    UpdateRecord,
)

_NOTHING_ELSE = 0.7  # cosine: what Adam makes of a normal weight itself has 0.8 with it
_NEXT_TO_NONE = 0.2


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

    Of one layer alone it is told where the first looks show it beyond doubt: its updates lead to zero and
    nowhere else, not along its gradient either, its weights are half gone within the run, and the loss does
    not fall. What is left of them then trembles about zero, so that later looks show no direction.

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
        if len(taken) < 3:
            return []
        if known is not None and math.isclose(known.shuffled, known.loss, rel_tol=1e-6):
            return _of_layers(record, severe) if not falls(record) else []
        part = float(taken[:2].min())  # with momentum, weights swing past zero, and back outwards
        if np.isfinite(taken).all() and np.abs(cosine).min() >= inward and part >= least:
            return [_issue(record, part, float(np.abs(cosine).min()), part >= severe)]
        return _of_layers(record, severe) if guesses(record) and not falls(record) else []

    return detector


def _of_layers(record: FlowRecord, severe: float) -> list[Issue]:
    """Tell of the layers all of whose matrices a decay has shrunk against next to no gradient."""
    matrices: dict[str, list[tuple[UpdateRecord, ParameterRecord]]] = {}
    for update, parameter in held(record):
        if len(parameter.shape) > 1 and min(parameter.shape[:2]) > 1:
            matrices.setdefault(parameter.layer, []).append((update, parameter))
    shrunk = {layer: pairs for layer, pairs in matrices.items() if all(_shrinks(u, p) for u, p in pairs)}
    if not shrunk:
        return []
    every = [u for pairs in shrunk.values() for u, _ in pairs]
    part = float(min(u.shrink[:2].min() for u in every))
    left = max(float(u.weight_rms[-1] / u.weight_rms[0]) for u in every)
    both = [_directions(u, p) for pairs in shrunk.values() for u, p in pairs]
    inward = float(min(i[:2].min() for i, _ in both))
    along = float(max(np.abs(a[:2]).max() for _, a in both))
    name, (layer, *others) = record.provenance.optimizer, shrunk
    found = next((x for x in record.layers if x.module == layer), None)
    also = f" So are those of {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}." if others else ""
    return [
        Issue(
            layer=layer,
            layer_type=found.type if found is not None else "Module",
            issue_type=IssueType.VANISHING,
            severity=IssueSeverity.HIGH if part >= severe else IssueSeverity.MEDIUM,
            description=f"In {record.steps} steps its weights have fallen to {left:.0%} of their size, and "
            f"the loss has not. Its first updates lead to zero and nowhere else (cosine {inward:.2f} with "
            f"minus the weights, at the least, and {along:.2f} with minus the gradient, at the most): the "
            f"weight decay of {name} outweighs the gradient, and what comes through falls until nothing "
            f"depends on the input.{also}",
            magnitude=part,
            recommended_actions=_actions(name),
            metrics={"shrink": part, "left": left, "layers": (layer, *others)},
        )
    ]


def _shrinks(update: UpdateRecord, parameter: ParameterRecord) -> bool:
    """Whether the first two looks show updates that lead to zero and not along the gradient, and at the last
    one half of the weights is gone."""
    inward, along = _directions(update, parameter)
    sizes = update.weight_rms
    return bool(
        len(sizes) >= 3
        and (inward[:2] >= _NOTHING_ELSE).all()
        and (np.abs(along[:2]) <= _NEXT_TO_NONE).all()
        and sizes[-1] <= 0.5 * sizes[0]
    )


def _directions(update: UpdateRecord, parameter: ParameterRecord) -> tuple[Floats, Floats]:
    """Return the cosines of a parameter's updates with minus its weights, and with minus its gradient."""
    with np.errstate(all="ignore"):
        inward = update.shrink * update.weight_rms / update.rms
        return inward, -update.slope / (update.gradient_rms * update.rms * parameter.num_elements)


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
        recommended_actions=_actions(name),
        metrics={"shrink": part, "cosine": cosine},
    )


def _actions(optimizer: str) -> Actions:
    """For weights that a decay takes to zero."""
    return (
        f"Lower the weight decay of {optimizer}: rate times decay is the part of a weight that a step takes, "
        "and 1e-6 to 1e-4 is usual (AdamW: a rate of 1e-3 with a decay of 0.01 to 0.1).",
        "Adam(weight_decay=...) adds it to the gradient and then makes all steps one size, so that it "
        "outweighs small gradients: use AdamW.",
        "If the loss has a penalty on the weights, weigh it less: its gradient beside that of the rest.",
    )
