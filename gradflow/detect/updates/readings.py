"""What is read off the account of updates for the whole model: sizes, shares, and whether the loss moves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np

from gradflow.detect.evidence import early, heads, late, middle, total_gradient
from gradflow.detect.knowledge import differing, guesses
from gradflow.detect.view import flow_of
from gradflow.records import Floats, FlowRecord, ParameterRecord, UpdateRecord

_OPENING = 5.0  # times its least, that the response of the loss ends at where a gate opens


def held(record: FlowRecord) -> list[tuple[UpdateRecord, ParameterRecord]]:
    """Return the updates of the model's parameters that an optimizer holds, with the parameters."""
    known = {p.name: p for p in record.parameters}
    updates = () if record.updates is None else record.updates.parameters
    return [(u, known[u.name]) for u in updates if u.held and u.name in known]


def whole_ratio(record: FlowRecord) -> Floats:
    """Return, by look, the size of the update of all that is held over that of the weights: ‖u‖ / ‖p‖."""
    pairs = held(record)
    moved = _total((u.rms, p.num_elements) for u, p in pairs)
    weight = _total((u.weight_rms, p.num_elements) for u, p in pairs)
    with np.errstate(all="ignore"):
        return np.where(weight > 0, moved / weight, np.nan)


def _total(parts: Iterable[tuple[Floats, int]]) -> Floats:
    """Return the norm of several parameters together, of their root mean squares."""
    squares = [np.nan_to_num(rms, posinf=math.inf) ** 2 * size for rms, size in parts]
    with np.errstate(all="ignore"):
        return np.sqrt(np.sum(squares, axis=0)) if squares else np.zeros(0)


def unchanged(record: FlowRecord) -> Floats:
    """Return, by look, the share of all entries with a gradient that the update left as they were.

    Of parameters in whose gradients some entries are zero, all are counted.
    """
    pairs = [(u, p) for u, p in held(record) if np.isfinite(u.unchanged).any()]
    if not pairs:
        return np.zeros(0)
    sizes = np.array([p.num_elements for _, p in pairs], dtype=float)
    shares = np.stack([np.nan_to_num(u.unchanged, nan=1.0) for u, _ in pairs])
    return (sizes @ shares) / sizes.sum()


def is_adaptive(record: FlowRecord) -> bool:
    """Whether the steps have a size of their own: the optimizer divides by a running mean of squares."""
    return any(np.isfinite(u.second_moment).any() for u, _ in held(record))


def rates(record: FlowRecord) -> list[float]:
    """Return the learning rates of the run's updates."""
    found = () if record.updates is None else record.updates.rates
    return [rate for rate in found if math.isfinite(rate)]


def is_rising(record: FlowRecord) -> bool:
    """Whether the rate is on its way up, or a scheduler keeps it below what it was built with."""
    seen = rates(record)
    scheduled = record.updates is not None and record.updates.scheduled
    return scheduled or (len(seen) > 1 and seen[-1] > 1.01 * seen[0])


def has_worsened(record: FlowRecord, times: float = 1.5) -> bool:
    """Whether the updates have made things worse: the loss ends above where it started, or nowhere."""
    losses = record.losses
    if len(losses) < 3 or not np.isfinite(losses[0]):
        return False
    if not np.isfinite(losses[1:]).all():
        return True
    return losses.min() > 0 and late(losses) >= times * losses[0]


def runs_off(record: FlowRecord, times: float = 3.0) -> bool:
    """Whether the loss leaves for good in the last steps: three in a row higher than any before, each above
    the one before it, to `times` what it began with and what ignorance costs.

    A median over the last third of a run does not see that yet. That the last three of n steps are the three
    largest, in order, comes by chance once in n (n - 1) (n - 2) runs, and batches do not differ so much.
    """
    losses, known = record.losses, record.knowledge
    if (
        known is None
        or not math.isfinite(known.ignorance)
        or len(losses) < 6
        or not np.isfinite(losses).all()
    ):
        return False
    before, last = float(losses[:-3].max()), losses[-3:]
    rises = bool(before < last[0] < last[1] < last[2]) and losses.min() > 0
    return rises and float(last[2]) >= times * max(float(losses[0]), known.ignorance)


def has_undone(record: FlowRecord, kept: float = 0.02, apart: float = 0.1) -> bool:
    """Whether the steps have undone a model: its outputs told samples apart, and do so no more, while the
    loss has risen above its start and not come below it.

    Cross entropy has little room above its start, so that it need not end far above it.

    Args:
        record: the record.
        kept: part of the variation between samples at the first step that may be left.
        apart: what that was, at least.
    """
    losses, known = record.losses, record.knowledge
    if known is None or len(losses) < 6 or not np.isfinite(losses).all() or not known.share_left >= 0.98:
        return False
    if not (losses.max() >= 1.1 * losses[0] > 0 and late(losses) >= losses[0]):
        return False
    ends = [x for x in record.layers if x.shape in known.shapes and x.parameters and not x.composite]
    seen = [x.output_variation for x in ends[-1:] if len(x.output_variation)]
    return any(float(v[0]) >= apart and float(v[-1]) <= kept * float(v[0]) for v in seen)


def has_flattened(record: FlowRecord, kept: float = 0.15, apart: float = 0.1, flung: float = 0.5) -> bool:
    """Whether a step of the size of all the weights has thrown a model to where it gives much the same for
    all samples, and from where the loss has come down to what ignorance costs, and no further.

    Outputs that start too large cost more than to know nothing, so that a loss which ends below its start may
    have come to nothing all the same. Weights that begin at next to nothing are as large as PyTorch would
    have drawn them, for this: steps that make them so throw nothing away. Scale-invariant weights bear such a
    step, so it is no illness by itself; a model that comes to one answer for all by smaller steps may leave
    it.

    Args:
        record: the record.
        kept: part of the variation between samples at the first step that may be left in the outputs.
        apart: what that was, at least.
        flung: size of one update over that of the weights.
    """
    losses, known = record.losses, record.knowledge
    if known is None or len(losses) < 6 or not np.isfinite(losses).all() or not known.share_left >= 0.98:
        return False
    if not late(losses) >= 0.98 * known.ignorance > 0:
        return False
    if not float(np.fmax.reduce(_step_size(record), initial=0.0)) >= flung:
        return False
    flow = flow_of(record)
    seen = [v for node in heads(flow) if len(v := flow.layers[node].output_variation)]
    began, ended = (max((float(v[at]) for v in seen), default=math.nan) for at in (0, -1))
    return began >= apart and ended <= 0.1 * began and differing(known) <= kept * began


def _step_size(record: FlowRecord) -> Floats:
    """Return, by look, the size of the update of all matrices over that of the weights, each of which is
    taken to be no smaller than PyTorch would have drawn it, 1 / √(3 · inputs)."""
    pairs = [(u, p) for u, p in held(record) if len(p.shape) >= 2 and len(u.rms)]
    drawn = [1.0 / math.sqrt(3.0 * max(math.prod(p.shape[1:]), 1)) for _, p in pairs]
    moved = _total((u.rms, p.num_elements) for u, p in pairs)
    weight = _total(
        (np.fmax(u.weight_rms, least), p.num_elements) for (u, p), least in zip(pairs, drawn, strict=True)
    )
    with np.errstate(all="ignore"):
        return moved / weight


def has_stranded(record: FlowRecord, left: float = 1e-3) -> bool:
    """Whether the steps have carried a model to where its loss is flat: it guesses, the gradient ends at
    `left` of what it was on the way, or less, and the loss no lower than it has been.

    Exact zeros have reasons of their own.
    """
    gradient, losses = total_gradient(record), record.losses
    if len(losses) < 6 or not (np.isfinite(losses).all() and np.isfinite(gradient).all()):
        return False
    flat = 0 < late(gradient) <= left * float(gradient.max())
    return flat and late(losses) > float(losses[: len(losses) // 2].min()) and guesses(record)


def response(record: FlowRecord) -> Floats:
    """Return, by look, by how much of itself the loss changes at most as all that is held moves by its size.

    Σ ‖g‖‖u‖ / |L| is what an update u can do to first order, and ‖u‖ / ‖p‖ its length in sizes of the
    weights. Their ratio depends neither on the rate nor on the scale of the loss. Plain and deep networks
    have 0.3 to 100.
    """
    updates, pairs = record.updates, held(record)
    if updates is None or not pairs or not updates.steps:
        return np.zeros(0)
    with np.errstate(all="ignore"):
        most = np.sum([np.nan_to_num(u.gradient_rms * u.rms) * p.num_elements for u, p in pairs], axis=0)
        looks = np.array([step for step in updates.steps if step < len(record.losses)])
        size = min(len(most), len(looks))
        return most[:size] / np.abs(record.losses[looks[:size]]) / whole_ratio(record)[:size]


def is_unmoved(record: FlowRecord, least: float = 0.25, usual: float = 1e-4, apart: float = 0.1) -> bool:
    """Whether a model guesses, and its loss stands still or is no better than ignorance costs, as the loss
    hardly hears steps of a usual size.

    Not where it hears more and more of them, as behind a gate that starts at zero and opens; nor where its
    outputs are alike for all samples, so that a loss that compares them has no slope there, nor
    where the loss holds no sample against its own target, so that what they ask for cancels.

    Args:
        record: the record.
        least: the response of the loss, in all looks, from which it hears them; see `response`. Healthy runs
            have more than 0.35, those of them that guess and stand still more than 0.7.
        usual: the least size of an update beside the weights that is a usual one.
        apart: part of the outputs that must differ between samples.
    """
    heard, known = response(record), record.knowledge
    if (
        known is None
        or known.crossed
        or known.by_mean
        or not max(known.variations, default=math.nan) >= apart
    ):
        return False
    if not len(heard) or not np.isfinite(heard).all() or not 0 < heard.max() < least:
        return False
    if heard[-1] >= _OPENING * heard.min():
        return False
    if not typical(whole_ratio(record)) >= usual or not guesses(record):
        return False
    return stands_still(record) or late(record.losses) >= 0.98 * known.ignorance > 0


def stands_still(record: FlowRecord, share: float = 0.02) -> bool:
    """Whether the loss has not fallen, by `share` of it or by the usual change from batch to batch."""
    known = record.losses[np.isfinite(record.losses)]
    if len(known) < 5:
        return False
    fall = early(known) - late(known)
    return fall <= max(share * abs(early(known)), float(np.median(np.abs(np.diff(known)))))


def largest(record: FlowRecord) -> tuple[str, float]:
    """Return the matrix whose update was largest against its size, and that ratio."""
    found = [
        (float(np.nanmax(u.ratio)), u.name)
        for u, p in held(record)
        if len(p.shape) >= 2 and np.isfinite(u.ratio).any()
    ]
    ratio, name = max(found, default=(math.nan, ""))
    return name, ratio


def largest_ratio(record: FlowRecord) -> float:
    """Return the usual update over weight of the matrix in which it is largest; of all, without matrices.

    A matrix that begins at zero has no size that an update could be set against: after two steps it is the
    last update that it is as large as, whatever the rate. Until it is larger, what PyTorch would have drawn
    it with counts, 1 / √(3 · inputs).
    """
    found = [typical(_size_ratio(u, p)) for u, p in held(record) if len(p.shape) >= 2]
    known = [ratio for ratio in found if math.isfinite(ratio)]
    return max(known, default=typical(whole_ratio(record)))


def _size_ratio(u: UpdateRecord, p: ParameterRecord) -> Floats:
    if not (len(u.weight_rms) and u.weight_rms[0] == 0):
        return u.ratio
    drawn = 1.0 / math.sqrt(3.0 * max(math.prod(p.shape[1:]), 1))
    return u.rms / np.fmax(u.weight_rms, drawn)


def trained_part(record: FlowRecord) -> tuple[str, str]:
    """Return the name and type of the deepest module that holds all that is trained, where more of the model
    is not: a generator before a judge that is frozen, a new head. The model's own, if it is trained whole."""
    held_names = {p.name for u, p in held(record) if p.trainable}
    owners = zip(*(name.split(".")[:-1] for name in held_names), strict=False)
    place = ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, owners))
    others = [p.name for p in record.parameters if p.name not in held_names]
    if not place or not any(not name.startswith(f"{place}.") for name in others):
        return "", record.provenance.model or "model"
    return place, next((layer.type for layer in record.layers if layer.name == place), "Module")


def layer_of(record: FlowRecord, parameter: str) -> tuple[str, str]:
    """Return the name and type of the first layer call that owns a parameter; the model, where none does."""
    for layer in record.layers:
        if parameter in layer.parameters:
            return layer.name, layer.type
    return "", record.provenance.model or "model"


def typical(values: Floats) -> float:
    """Return the median of the known values; NaN without any."""
    return middle(values)
