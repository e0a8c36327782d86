"""Whether the rate fits: what one update does to the weights, and to the loss of its own batch.

NOTE [What a rate does]
An update that trains is some tenths of a percent of the weights: 1e-3 is usual, from 1e-4 late in training to
some percent in the first steps. From a tenth on, a network is not the same network after one step. Where the
loss of the batch was followed along the very update, that tells more: at what length it is lowest, and
whether the step that was made climbs the other side (curvature along it over its slope above 2).
"""

from __future__ import annotations

import math

import attrs
import numpy as np

from gradflow.detect.evidence import late, total_gradient
from gradflow.detect.knowledge import calm, guesses, informed
from gradflow.detect.updates.readings import (
    has_flattened,
    has_stranded,
    has_undone,
    has_worsened,
    held,
    is_adaptive,
    is_rising,
    largest_ratio,
    rates,
    stands_still,
    typical,
    whole_ratio,
)
from gradflow.records import CurvatureRecord, FlowRecord

USUAL = 1e-2  # the largest update over weight that is usual
_FAR = 0.1  # update over weight from which it is no small step any more
_USUAL_EPSILON = 1e-8  # of Adam and its kin
_TINY = 3e-5  # at which weights take a hundred thousand steps to become others
_LONGER = 64.0  # by what factor a longer step must be the better one
_GAIN = 0.01  # of the loss, that it must gain
_SLOW = 1e-3  # the least rate of plain descent that is usual; below it, it may be at fault
_OFF = 20.0  # times the loss, for each matrix, that it may promise to fall over one size of the weights
_FLAT = 0.01  # of the loss, that it must promise


@attrs.frozen(kw_only=True)
class Misfit:
    """A rate that does not fit.

    Args:
        factor: by how much, about.
        ratio: update over weight.
        rate: the learning rate.
        cold: whether the optimizer knew nothing yet of a model that knows.
        curve: how the loss bends along the update; None where that is not known.
    """

    factor: float
    ratio: float
    rate: float
    cold: bool = False
    curve: CurvatureRecord | None = None


def asks_for_curves(record: FlowRecord) -> bool:
    """Whether a run looks as if its rate did not fit, so that the loss along an update is worth following."""
    if record.updates is None or not record.updates.steps:
        return False
    return (has_worsened(record) and not calm(record)) or _seems_slow(record)


def too_high(record: FlowRecord, *, jumps: bool) -> Misfit | None:
    """Return by how much the rate is too high, where the updates make things worse; else None.

    Args:
        record: the record.
        jumps: whether loss or gradient were seen to jump.
    """
    updates = record.updates
    flattened = has_flattened(record)
    worse = jumps or has_worsened(record) or has_undone(record) or has_stranded(record) or flattened
    if updates is None or not updates.steps or calm(record) or not worse:
        return None
    ratios = whole_ratio(record)
    ratio = next(
        (float(r) for r in ratios if _FAR <= r < math.inf), typical(ratios)
    )  # later ones are of its ruins
    rate = max(rates(record), default=math.nan)
    cold = _is_cold(record)
    curve = next((c for c in updates.curves if c.actual > 0 and c.best <= 0.25), None)
    if _is_off_scale(record, each=flattened):
        return None
    if ratio >= _FAR:
        return Misfit(factor=ratio / USUAL, ratio=ratio, rate=rate, cold=cold, curve=curve)
    if (
        has_worsened(record)
        and curve is not None
        and curve.sharpness > 2
        and curve.actual >= 0.1 * abs(curve.loss)
    ):
        factor = 1 / (curve.best or min(curve.factors, default=1.0))
        return Misfit(factor=factor, ratio=ratio, rate=rate, cold=cold, curve=curve)
    # Ignorance is asked of one batch: where the run stays far below it, that was one of a heavy tail.
    known = record.knowledge
    if cold and (jumps or known is None or late(record.losses) > 0.25 * known.ignorance):
        return Misfit(factor=math.nan, ratio=ratio, rate=rate, cold=True)
    return None


def _is_off_scale(record: FlowRecord, *, each: bool) -> bool:
    """Whether inputs, weights or targets are off scale from the first step on, and the rate is not at fault.

    What the loss would lose over one size of the weights, |g|·|p| / L, is at most some multiples of the depth
    in a network of usual scale, whatever the loss is multiplied by. Far targets make it next to nothing. If
    `each`, it is over one size of each parameter: what divides by the size of its weights is the steeper the
    smaller they are.
    """
    gradient = total_gradient(record)
    trained = [p for p in record.parameters if p.trainable and p.optimized and len(p.norm)]
    depth = max(sum(len(p.shape) >= 2 for p in trained), 1)
    size, loss = math.hypot(*(p.norm[0] for p in trained)), abs(float(record.losses[0]))
    if not len(gradient) or not loss > 0:
        return False
    known, fall = record.knowledge, float(gradient[0]) * size
    if each:
        fall = float(sum(p.grad_norm[0] * p.norm[0] for p in trained))
    # A trained model's own loss is next to nothing, so what ignorance costs counts where it is more.
    most = max(loss, known.ignorance) if known is not None and math.isfinite(known.ignorance) else loss
    return fall > _OFF * depth * most or fall < _FLAT * loss


def _is_cold(record: FlowRecord) -> bool:
    """Whether the optimizer's state is new while the model is not: its first loss is that of who knows."""
    known, updates = record.knowledge, record.updates
    if known is None or updates is None or not is_adaptive(record) or not np.isfinite(record.losses).all():
        return False
    if not math.isfinite(known.ignorance):
        return False
    ages = [u.age[0] for u in updates.parameters if u.held and len(u.age)]
    return bool(ages) and not any(ages) and float(record.losses[0]) <= 0.25 * known.ignorance


def too_low(record: FlowRecord) -> Misfit | None:
    """Return by how much the rate is too low, where the loss stands still for it; else None."""
    updates = record.updates
    if updates is None or not _seems_slow(record):
        return None
    curves = [c for c in updates.curves if c.best >= _LONGER and min(c.changes) <= -_GAIN * abs(c.loss)]
    if not curves:  # one batch of several may have it: where noise comes in, the next asks for something else
        return None
    curve = curves[-1]
    if abs(curve.slope) * record.steps > _GAIN * abs(curve.loss) and not is_held_by_epsilon(record):
        return None  # as many steps get there
    ratio = largest_ratio(record)
    factor = min(curve.best, USUAL / ratio)
    return Misfit(factor=factor, ratio=ratio, rate=max(rates(record), default=math.nan), curve=curve)


def _seems_slow(record: FlowRecord) -> bool:
    """Whether the loss stands still, the model knows nothing, and the updates are next to nothing."""
    ratio = largest_ratio(record)
    most = USUAL / 3 if is_held_by_epsilon(record) else _TINY
    if not 0 < ratio < most or is_rising(record) or not guesses(record) or informed(record):
        return False
    slow = is_adaptive(record) or not has_usual_rate(record) or is_clipped_away(record)
    return (slow or _is_even(record)) and stands_still(record)


def is_held_by_epsilon(record: FlowRecord, share: float = 0.99, part: float = 0.05) -> bool:
    """Whether ε sets the steps of an optimizer that divides by the root of squares, as it is larger than
    nearly all of these: steps are a twentieth of the rate and less, and proportional to the gradient.

    Not where ε is the usual 1e-8: then it is the loss that is small.

    Args:
        record: the record.
        share: of entries whose √v̂ is below ε.
        part: of its rate that a step usually is, at most; 1 without an ε.
    """
    found = [(u, p.num_elements) for u, p in held(record) if np.isfinite(u.under_epsilon).any()]
    if not found or not max(rates(record), default=0.0) > 0:
        return False
    if not max(u.epsilon for u, _ in found) > _USUAL_EPSILON:
        return False
    total = sum(size for _, size in found)
    under = sum(typical(u.under_epsilon) * size for u, size in found) / total
    step = math.sqrt(sum(typical(u.rms) ** 2 * size for u, size in found) / total)
    return under >= share and step <= part * max(rates(record))


def has_usual_rate(record: FlowRecord) -> bool:
    """Whether the rate is one that is usual for plain descent, whose steps are as small as the loss is."""
    return max(rates(record), default=math.inf) >= _SLOW


def _is_even(record: FlowRecord, within: float = 100.0) -> bool:
    """Whether the updates of all matrices are alike beside their weights, so that it is not on its way back
    from the loss that the gradient became small, but there: a gradient that vanishes falls layer by layer."""
    found = [typical(u.ratio) for u, p in held(record) if len(p.shape) >= 2]
    return len(found) > 1 and 0 < max(found) <= within * min(found)


def is_clipped_away(record: FlowRecord) -> bool:
    """Whether clipping leaves next to nothing of the gradient, and the steps are proportional to it."""
    updates = record.updates
    if updates is None or is_adaptive(record):
        return False
    return typical(np.array(updates.clipping)) < 0.01
