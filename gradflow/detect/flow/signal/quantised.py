"""BOTTLENECK: what a quantiser gives is the same for all samples, and gradient passes as if it told."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradflow.detect.evidence import row_gain
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Floats, Issue, IssueSeverity, IssueType


def quantised_away(flow: Flow, alike: float = 1e-3, varied: float = 0.1) -> list[Issue]:
    """Places behind which all samples are the same, though what is in front of them differs.

    Measured: the part of a layer's output that differs between samples and positions, at every look. A layer
    with a matrix that gives the same for all to rounding, while its weights are no zeros, is fed a constant;
    where the layers that feed it vary and get gradient through it, a function between them rounds what they
    say away, and its derivative is a stand-in (straight through): a sign behind what is never negative, a
    step that all are above. Told at the module that gives the constant, or at the layer that feeds such a
    function.

    Alike and not: a sigmoid at its ends, which hands next to nothing back; weights that are next to zero
    beside a bias; outputs of zero, which is `dead`'s; a constant that enters (a time for the whole batch, a
    table of queries); gates that are all open, which are multiplied by what varies; a single row, or rows
    that are picked (one token for all); recurrent layers, which forget for reasons of their own; a part that
    comes to it only in the run.

    Args:
        flow: the record along its wiring.
        alike: the part that differs up to which all samples are the same: the root of what float32 rounds.
        varied: and from which what feeds the place varies.
    """
    found: dict[str, Issue] = {}
    for node, layer in flow.layers.items():
        gain = row_gain(flow, node, at=lambda norms: float(norms[0])) if flow.has_matrix(node) else math.nan
        made = gain * float(layer.input_rms[0]) if len(layer.input_rms) else math.nan
        plain = not layer.composite and sum(len(p.shape) > 1 for p in flow.parameters_of(node)) == 1
        if not plain or not _is_constant(flow, node, alike) or not made >= 0.1 * layer.output_rms[0]:
            continue
        place = _place(flow, node, alike, varied)
        if place is not None:
            found.setdefault(place, _issue(flow, place, node, alike))
    return list(found.values())


def _seen(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _is_constant(flow: Flow, node: str, alike: float) -> bool:
    """Whether a layer gives one and the same number row at every look, and not zeros."""
    layer = flow.layers[node]
    seen, sizes = _seen(layer.output_variation), _seen(layer.output_rms)
    rows = math.prod(layer.shape[:-1]) if len(layer.shape) > 1 else 0
    return bool(rows > 1 and len(seen) and (seen <= alike).all() and len(sizes) and sizes.min() > 0)


def _place(flow: Flow, node: str, alike: float, varied: float) -> str | None:
    """The place in front of a constant layer where what varies is lost; None where nothing varied."""
    here = node
    for _ in range(len(flow.layers)):
        feeding = [n for n in flow.wiring.before(here) if n in flow.layers and not flow.layers[n].composite]
        if not feeding:
            return None
        if any(_rows(flow, n) != _rows(flow, here) for n in feeding):  # some are picked: a token for all
            return None
        if all(_varies(flow, n, varied) for n in feeding):
            passed = _passed(flow, here, feeding) >= _STAND_IN
            return (here if here != node else feeding[-1]) if passed else None
        if len(feeding) > 1 or not _is_constant(flow, feeding[0], alike):
            return None
        here = feeding[0]
        if flow.has_matrix(here):  # told from there
            return None
    return None


_STAND_IN = 0.05  # of the gradient: what a stand-in for a derivative hands back, and flat ends do not


def _passed(flow: Flow, here: str, feeding: Sequence[str]) -> float:
    """What comes back to the layers that feed a place, over the gradient behind the rounding."""
    gain = row_gain(flow, here) if flow.has_matrix(here) else 1.0
    with np.errstate(all="ignore"):
        shares = np.fmax.reduce([flow.grad[n] for n in feeding]) / (gain * flow.grad[here])
    seen = _seen(shares)
    return float(np.median(seen)) if len(seen) else 0.0


def _rows(flow: Flow, node: str) -> tuple[int, ...]:
    """The shape of a layer's output without its features."""
    shape = flow.layers[node].shape
    return shape[:1] + shape[2:] if len(shape) > 3 else shape[:-1]


def _varies(flow: Flow, node: str, varied: float) -> bool:
    seen, gradient = _seen(flow.layers[node].output_variation), _seen(flow.grad[node])
    return bool(len(seen) and (seen >= varied).all() and len(gradient) and gradient.min() > 0)


def _issue(flow: Flow, place: str, node: str, alike: float) -> Issue:
    layer, behind = flow.layers[place], flow.layers[node]
    here = "What it gives" if _is_constant(flow, place, alike) else f"What it hands to {behind.name}"
    source = flow.wiring.before(place) if here == "What it gives" else (place,)
    differs = min(float(_seen(flow.layers[n].output_variation).min()) for n in source if n in flow.layers)
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description=f"{here} is the same for all samples, at every look: a function rounds it to a "
        f"constant, though {differs:.0%} of what enters differs between samples. {behind.name} is "
        "told nothing, and the gradient that passes as if it were (straight through) follows no signal.",
        magnitude=1.0,
        recommended_actions=(
            "Bring what enters the rounding to both sides of its thresholds: a sign behind a rectifier or a "
            "square is always plus (keep the sign, x * x.abs(), or centre it with a norm layer in front).",
            "Or leave the rounding out at this place.",
        ),
        metrics={"variation_before": differs, "behind": behind.name},
        evidence=Evidence(origin=layer.name),
    )
