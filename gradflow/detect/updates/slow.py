"""Updates that are next to nothing, or nothing at all.

UNSTABLE where it is the rate that does not fit, VANISHING where the gradient is what is too small for it, or
is not applied, NUMERICAL where rounding swallows the updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.evidence import late, loss_fell
from gradflow.detect.knowledge import falls, guesses
from gradflow.detect.updates.rate import (
    Misfit,
    has_usual_rate,
    is_clipped_away,
    is_held_by_epsilon,
    too_low,
)
from gradflow.detect.updates.readings import (
    held,
    is_adaptive,
    is_rising,
    rates,
    trained_part,
    typical,
    unchanged,
)
from gradflow.detect.updates.undone import taken_back
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType

_T = IssueType
_HIGHEST = 10.0  # a rate of plain descent above which it is the gradient that is small
_SHORT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # what a dtype rounds away of a weight, at most

_FLAT_TOP = (
    "Give it a loss that is steep where it is worst: where a judge that is sure judges it, "
    "F.softplus(-score), which is -log D, in the place of log(1 - D).",
    "Or train the judge less, with labels of 0.9 or a penalty on its slope: one that is perfect teaches "
    "nothing.",
)


def slow_updates(swallowed: float = 0.9, *, idle: float = 0.5) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of updates that change next to nothing, or nothing at all.

    Measured: the update as applied over the weight; the share of entries that it left as they were although
    their gradient is not zero; and, where the loss stands still, the loss of a batch along its update, from
    a fraction of it to many thousand times its length.

    Why this is evidence: a step that is some ten thousand times shorter than the one that would lower the
    loss of its own batch most does not train, whatever the gradient is. A number of eight bits, as bfloat16
    has, keeps a change of a quarter percent or more: smaller ones are rounded away each time anew, and do not
    add up. The steps of an adaptive optimizer are as long as its rate: where that is below what the dtype
    keeps of most weights, it is the rate and the dtype that do not go together, and no lack of gradient.

    What the model's own forward pass puts back, to the bit, the optimizer has changed for nothing: see
    `taken_back`.

    Looks alike and is not: a warm-up (the rate rises, or is set by a scheduler below its own; from an
    optimizer alone nobody can tell whether that is advanced with every step or once an epoch, so that a rate
    of zero is LOW, unless no scheduler is left that could raise it); fine-tuning
    with a small rate (the model knows already); a gradient that vanishes (plain descent at a usual rate, and
    updates that differ from layer to layer: where all are alike, it is the loss that is small); a trained
    model (it knows, and an optimizer may stop there); short dtypes that train all the same (the loss
    falls: LOW).

    Args:
        swallowed: share of unchanged entries from which rounding swallows the updates, and of entries that
            are put back.
        idle: the same in a run of an adaptive optimizer that comes to nothing, and the share of weights of
            which the dtype keeps no change as large as the rate. Healthy runs in bfloat16 leave up to three
            quarters as they were, and their loss falls.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        if record.updates is None or not record.updates.steps or not held(record):
            return []
        found = _nothing(record) or taken_back(record, swallowed) or _swallowed(record, swallowed, idle)
        if found is None and (misfit := too_low(record)) is not None:
            found = _slow(record, misfit)
        return [] if found is None else [found]

    return detector


def _issue(
    record: FlowRecord,
    severity: IssueSeverity,
    text: str,
    actions: tuple[str, ...],
    kind: IssueType = IssueType.VANISHING,
    **of: float,
) -> Issue:
    place, module = trained_part(record)
    return Issue(
        layer=place,
        layer_type=module,
        issue_type=kind,
        severity=severity,
        description=text,
        magnitude=next(iter(of.values())),
        recommended_actions=actions,
        metrics=of,
    )


def _nothing(record: FlowRecord) -> Issue | None:
    """No update changes any number, although there is a gradient."""
    pairs = [(u, p) for u, p in held(record) if np.nanmax(np.nan_to_num(u.gradient_rms)) > 0]
    if not pairs or any(np.nanmax(np.nan_to_num(u.rms)) > 0 for u, _ in pairs):
        return None
    rate = max(rates(record), default=math.nan)
    if rate == 0 and record.updates is not None and record.updates.left_alone:
        return _issue(
            record, IssueSeverity.HIGH,
            "The learning rate is 0 in all of these steps, as a scheduler has set it, and no scheduler that "
            "holds the optimizer is left to raise it: no step changes anything.",
            ("Keep the scheduler, and advance it with every step: scheduler.step() behind optimizer.step().",
             "Pass it as `scheduler=` too."), _T.UNSTABLE, rate=rate,
        )  # fmt: skip
    if rate == 0 and is_rising(record):
        return _issue(
            record, IssueSeverity.LOW,
            "The learning rate is 0 in all of these steps, as a scheduler has set it: nothing changes yet.",
            ("Pass `scheduler=` too, or diagnose later in the warm-up.",
             "See that it is advanced with every step: a warm-up from 0 that is advanced once an epoch has "
             "the rate 0 for all of the first."), _T.UNSTABLE, rate=rate,
        )  # fmt: skip
    if rate == 0:
        return _issue(
            record, IssueSeverity.HIGH,
            "The learning rate is 0: gradients arrive, and no step changes anything.",
            ("Give the optimizer a rate; 1e-3 is usual for Adam.",), _T.UNSTABLE, rate=rate,
        )  # fmt: skip
    if not guesses(record):  # an optimizer that stops where the gradient is small enough has done its work
        return None
    check = "Check that the step is made with this very optimizer and model, and that its rate is not tiny."
    return _issue(
        record, IssueSeverity.HIGH,
        "Gradients arrive, and no step changes a single number: they are never applied, or each update is "
        f"rounded away (learning rate {rate:.3g}).{_of_the_top(record)}",
        (*_FLAT_TOP, check) if _is_at_its_top(record) else (check,),
        rate=rate,
    )  # fmt: skip


def _swallowed(record: FlowRecord, least: float, idle: float) -> Issue | None:
    """Most updates are smaller than what the dtype of the weights rounds away."""
    short = [p for _, p in held(record) if p.dtype in _SHORT]
    if sum(p.num_elements for p in short) < 0.5 * sum(p.num_elements for _, p in held(record)):
        return None
    share = typical(unchanged(record))
    stands = _stands(record) and share >= idle and _short_of_rate(record) >= idle
    if not (share >= least or stands):
        return None
    dtype, rate = short[0].dtype, max(rates(record), default=math.nan)
    calm = loss_fell(record) or (share < 0.99 and not stands)
    severity = IssueSeverity.LOW if calm else IssueSeverity.MEDIUM
    return _issue(
        record, severity,
        f"Of the weights, which are {dtype}, an update leaves {share:.1%} as they were although their "
        f"gradient is not zero: it is less than what {dtype} rounds away ({_SHORT[dtype]:.1g} of a weight), "
        f"so it is lost and does not add up. Learning rate {rate:.3g}.",
        (
            "Keep the weights in float32 and compute in the short dtype: torch.autocast(...).",
            "Or use an optimizer with stochastic rounding or a float32 copy of the weights.",
        ),
        IssueType.NUMERICAL, unchanged=share, rate=rate,
    )  # fmt: skip


def _stands(record: FlowRecord) -> bool:
    """Whether a model guesses to the end and its loss does not fall, under a rate that does not rise."""
    return guesses(record) and not falls(record) and not is_rising(record)


def _short_of_rate(record: FlowRecord) -> float:
    """The share of the weights of which the dtype keeps no change as large as the rate of adaptive steps."""
    if not is_adaptive(record):
        return 0.0
    pairs = held(record)
    lost = (
        p.num_elements
        for u, p in pairs
        if p.dtype in _SHORT and late(u.rate) < _SHORT[p.dtype] * late(u.weight_rms)
    )
    return sum(lost) / max(sum(p.num_elements for _, p in pairs), 1)


def _is_at_its_top(record: FlowRecord, part: float = 0.01) -> bool:
    """Whether the loss is below zero by next to nothing of what outputs of zero bring it to: a logarithm of
    one minus a probability, where that is next to zero. What it could fall by is all before it, and its slope
    is as small as it is itself."""
    known = record.knowledge
    return known is not None and known.silent < 0 and part * known.silent <= known.loss < 0


def _of_the_top(record: FlowRecord) -> str:
    known = record.knowledge
    if known is None or not _is_at_its_top(record):
        return ""
    return (
        f" The loss, {known.loss:.1e}, is next to the most that it can be, where it is flat: outputs of zero "
        f"would bring it to {known.silent:.2g}."
    )


def _slow(record: FlowRecord, misfit: Misfit) -> Issue:
    curve = misfit.curve
    assert curve is not None
    gain, own = -min(curve.changes) / abs(curve.loss), -curve.actual / abs(curve.loss)
    name, kind = record.provenance.optimizer, _T.VANISHING
    text = (
        f"One update moves the weights by {misfit.ratio:.1e} of their size, and the loss stands still. Along "
        f"the update of step {curve.step}, the loss of its batch is lowest {curve.best:.0f} times as far "
        f"({gain:.2g} of it gained, {own:.1g} by the update as it is)."
    )
    if _is_at_its_top(record):
        text += _of_the_top(record)
        actions = _FLAT_TOP
    elif is_clipped_away(record):
        share = typical(np.array(record.updates.clipping if record.updates is not None else ()))
        text += f" Clipping leaves {share:.1g} of the gradient."
        actions = (f"Clip to a norm about {misfit.factor:.1g} times as large, or raise the rate by as much.",)
    elif is_held_by_epsilon(record):
        epsilon = max(u.epsilon for u, _ in held(record) if math.isfinite(u.epsilon))
        text += (
            f" The ε of {name}, {epsilon:.3g}, is larger than the root mean square of nearly every gradient, "
            "so that it sets the steps, and they are as small as the gradients are."
        )
        actions = (f"Lower ε: eps=1e-8 is usual; or raise the rate by about {misfit.factor:.1g}.",)
    elif not is_adaptive(record) and (has_usual_rate(record) or misfit.rate * misfit.factor > _HIGHEST):
        usual = f"The learning rate, {misfit.rate:.3g}, is a usual one"
        if not has_usual_rate(record):
            usual = f"A rate of {misfit.rate * misfit.factor:.1g}, which would make up for it, is none"
        text += (
            f" {usual}: it is the gradient of the whole model that is too small, by about "
            f"{misfit.factor:.1g}, as the loss is, and the steps are of its size."
        )
        actions = (
            f"Multiply the loss by about {misfit.factor:.1g}: look for what makes it small (a mean over more "
            "than the samples, a temperature whose square is left out, a weight of its only term).",
            "Or use Adam, whose steps do not depend on it"
            + (f"; or a rate of {misfit.rate * misfit.factor:.1g}." if has_usual_rate(record) else "."),
        )
    else:
        kind = _T.UNSTABLE
        text += f" The learning rate, {misfit.rate:.3g}, is too low by a factor of about {misfit.factor:.1g}."
        actions = (
            f"Raise the learning rate of {name}: {misfit.rate:.3g} to about "
            f"{misfit.rate * misfit.factor:.1g}.",
            "If this is the start of a warm-up, pass its `scheduler=`, or diagnose behind it.",
        )
    return _issue(
        record, IssueSeverity.MEDIUM, text, actions, kind, factor=misfit.factor, ratio=misfit.ratio,
        rate=misfit.rate, best=curve.best, slope=curve.slope, sharpness=curve.sharpness,
    )  # fmt: skip
