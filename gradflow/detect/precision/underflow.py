"""VANISHING by underflow: gradient that becomes zero since it is too small for the format of its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs
import numpy as np

from gradflow.detect.knowledge import at_level, came_knowing
from gradflow.detect.view import Flow, flow_of
from gradflow.detect.wiring import node_name
from gradflow.records import (
    Evidence,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    LayerPrecision,
    ParameterPrecision,
    PrecisionRecord,
    Role,
)
from gradflow.records.formats import FORMATS, exponent_of

_WIDE = ("bfloat16", "float32", "float64")  # hold what is smaller than the loss by 1e-38 and less
_DECAYED = 1e-9  # of the gradient at the loss, as in `readings.zeros`: a long way, not a short format
_HELD = 0.1  # of a layer's gradient that a scale may still lose


@attrs.frozen(kw_only=True)
class _Loss:
    """What one layer lost of the gradient of its parameters.

    Args:
        layer: the numbers of its last call.
        order: of that call.
        share: ‖g − g*‖ / ‖g*‖ over all its parameters together, at most 1.
    """

    layer: LayerPrecision
    order: int
    share: float


def underflowing(share: float = 0.1, *, severe: float = 0.5) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of gradients that are lost to underflow in the format they are computed in.

    Measured: the gradient of every parameter twice, under the loss scale that is in use and under one as
    large as the format takes; and of a layer's parameters together, by how much the first differs from the
    second, over the norm of the second. Told once, at the layer nearest the loss from which on it does.

    Why this is evidence: the two passes differ in nothing but a power of two, so what differs is what became
    zero or lost digits at the lower end of the format. Counts of entries say less: half of them may be lost,
    and hardly anything of the gradient with them.

    Looks alike and is not: entries that are lost and carry nothing; a gradient that is zero by mathematics,
    of which rounding noise is all there is (a bias before a norm layer), beside the weights of its layer; in
    float32 and bfloat16 a gradient that has decayed on a long way, which `vanishing` tells; the gradient of a
    model that has learned what there is to learn (LOW).

    Args:
        share: of a layer's gradient that is lost, from which on it is told. 0.1: a batch's noise is larger
            than what is less.
        severe: share from which on it is HIGH; where all is lost, to within a thousandth, it is CRITICAL.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        known = record.precision
        if known is None or not known.steps:
            return []
        flow = flow_of(record)
        lost = [loss for loss in _losses(flow, known) if loss.share >= share]
        if not lost or _is_decay(known, lost):
            return []
        issue = _issue(known, lost, severe)
        if came_knowing(record) or at_level(record):  # there is little gradient left to lose
            issue = attrs.evolve(issue, severity=min(issue.severity, IssueSeverity.LOW))
        return [issue]

    return detector


def _losses(flow: Flow, known: PrecisionRecord) -> list[_Loss]:
    """Return what each layer lost at the last look, in the order of execution."""
    by_layer: dict[str, list[ParameterPrecision]] = {}
    for part in known.parameters:
        parameter = flow.parameters.get(part.name)
        if parameter is None or (parameter.trainable and parameter.optimized):
            by_layer.setdefault(part.layer, []).append(part)
    found = []
    for layer in known.layers:
        seen = flow.layers.get(node_name(layer.name))
        parts = by_layer.get(seen.module, []) if seen is not None else []
        share = _share(parts)
        if seen is not None and share == share:
            found.append(_Loss(layer=layer, order=seen.order, share=share))
    return sorted(found, key=lambda loss: loss.order)


def _share(parts: Sequence[ParameterPrecision]) -> float:
    """Return the share of the gradient of some parameters that was lost at the last look; NaN if unknown."""
    errors = np.array([part.error[-1] for part in parts])
    norms = np.array([part.norm[-1] for part in parts])
    known = np.isfinite(errors) & np.isfinite(norms)
    if not known.any() or not (total := norms[known].max()) > 0:
        return math.nan
    weights = norms[known] / total  # of 1e-200 the square would be zero
    off = np.sqrt(np.sum((errors[known] * weights) ** 2) / np.sum(weights**2))
    return float(min(off, 1.0))


def _is_decay(known: PrecisionRecord, lost: Sequence[_Loss]) -> bool:
    """Whether a wide format ends only because the gradient has decayed on its way from the loss."""
    begins = lost[-1].layer
    if begins.computed is None or begins.computed.dtype not in _WIDE:
        return False
    sizes = [layer.gradient.largest for layer in known.layers if layer.gradient is not None]
    here = begins.gradient.largest if begins.gradient is not None else 0.0
    return not here > _DECAYED * max((size for size in sizes if size == size), default=0.0)


def _issue(known: PrecisionRecord, lost: Sequence[_Loss], severe: float) -> Issue:
    begins, worst = lost[-1], max(lost, key=lambda loss: loss.share)
    computed = begins.layer.computed
    dtype = computed.dtype if computed is not None else "float16"
    scale = "" if known.loss_scale == 1 else f" under a loss scale of {scale_text(known.loss_scale)}"
    best = known.best_scale(dtype) if dtype in FORMATS else math.nan
    many = ""
    if len(lost) > 1:
        more = f"most in {worst.layer.name}, {_percent(worst.share)}"
        many = f" That begins here, and is so in {len(lost)} layers, {more}."
    return Issue(
        layer=begins.layer.name,
        layer_type=begins.layer.type,
        issue_type=IssueType.VANISHING,
        severity=_severity(worst.share, severe),
        description=f"The gradient of its parameters is off by {_percent(begins.share)} of its size: it is "
        f"too small for {dtype}{scale}.{many}",
        magnitude=worst.share,
        recommended_actions=_actions(dtype, known, worst.layer, best),
        metrics=_metrics(known, lost, worst, best),
        evidence=Evidence(roles=Role.UNDERFLOWING, origin=begins.layer.name),
    )


def scale_text(scale: float) -> str:
    """Return a loss scale as one writes it.

    >>> scale_text(65536.0), scale_text(2.0**31)
    ('65536', '2.0**31')
    """
    return f"{scale:g}" if 1 <= scale < 1e6 else f"2.0**{exponent_of(scale)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _severity(share: float, severe: float) -> IssueSeverity:
    if share >= 0.999:
        return IssueSeverity.CRITICAL
    return IssueSeverity.HIGH if share >= severe else IssueSeverity.MEDIUM


def _metrics(
    known: PrecisionRecord, lost: Sequence[_Loss], worst: _Loss, best: float
) -> Mapping[str, object]:
    return {
        "lost": lost[-1].share,
        "worst": worst.share,
        "worst_layer": worst.layer.name,
        "num_layers": len(lost),
        "loss_scale": known.loss_scale,
        "best_scale": best,
        "entries_lost": lost[-1].layer.lost(),
    }


def _actions(dtype: str, known: PrecisionRecord, worst: LayerPrecision, best: float) -> tuple[str, ...]:
    """Return cures for what was measured: a loss scale if one holds it, else a format with more range."""
    if dtype in _WIDE:
        return (
            f"The loss hands back gradients near the smallest number of {dtype}: take the factor out of the "
            "loss that makes them so.",
        )
    wide = (
        "ompute in bfloat16, which has the range of float32 and needs no scale: "
        "torch.autocast(device, dtype=torch.bfloat16)."
    )
    if worst.gradient is None or worst.gradient.norm_lost(dtype, scale=best) > _HELD:
        return (f"C{wide}", f"No loss scale holds it: the gradients span more than {dtype} does.")
    if known.loss_scale > 1:
        use = f"Raise the loss scale to {scale_text(best)}"
    else:
        use = f"Scale the loss, torch.amp.GradScaler(init_scale={scale_text(best)})"
    return (f"{use}: there the measured gradients lose least, and none overflows.", f"Or c{wide}")
