"""UNSTABLE: the loss or the gradient jumps by orders of magnitude from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import attrs
import numpy as np

from gradflow.detect.actions import batch_norm_actions, unstable_actions
from gradflow.detect.evidence import beginnings, late, total_gradient
from gradflow.detect.flow.ends.misgiven import misgiven_losses
from gradflow.detect.flow.runaway import (
    blown_up,
    drifting,
    follows_itself,
    layer_of_jump,
    of_the_run,
    paid_for_errors,
)
from gradflow.detect.flow.steps import flung, thrown
from gradflow.detect.knowledge import calm, guesses, has_learned, no_worse
from gradflow.detect.updates.fast import overshooting, with_rate
from gradflow.detect.updates.rate import too_high
from gradflow.detect.updates.readings import runs_off
from gradflow.detect.view import Flow, flow_of
from gradflow.records import Evidence, Floats, FlowRecord, Issue, IssueSeverity, IssueType, Role


def unstable(
    cv_threshold: float = 3.0,
    *,
    jump: float = 30.0,
    restless: float = 3.0,
    restless_jump: float = 10.0,
    risen: float = 3.0,
    climb: float = 10.0,
    steep: float = 1e3,
    few_values: int = 2,
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of training that jumps.

    Measured: at each step the norm of the gradient of all parameters together, over a reference: what the run
    was used to, the geometric mean of the median of the steps before and of the whole run's, and no less
    than the former. From these ratios the largest, and a coefficient of variation that counts only what is
    above the reference: the root mean square of (ratio - 1). The same for the loss where it is positive
    throughout, but of any two steps in a row the smaller one counts: a loss that has jumped away stays there,
    one bad batch does not. With an optimizer, where loss and gradient end, over where they started; and a
    parameter that one step threw to `restless_jump` times its size while its own gradient was `jump` times
    what it is used to, in a run that has come to nothing; or, of one number, a step to several times its
    size by which its gradient would have the loss fall by more than it is; and whether the loss leaves in the
    last steps of all, beyond what ignorance costs. Where the loss stays, the
    gradient's end over its start and ‖gradient‖ ‖parameters‖ / |loss|; where it falls below zero, what it is
    of outputs four times as large: a critic's is four times as low, one that pays for errors sixteen times.
    Apart from this, how many values each channel of a batch norm averages over in training.

    Where it jumps, or ends above its start, or the outputs end alike for all samples and did not begin so,
    the account of updates tells whether the rate is too high, and by about how much: see
    `gradflow.detect.updates.rate`.

    Why this is evidence: a step of plain or of momentum descent is proportional to the gradient, so a jump
    by an order of magnitude undoes many steps at once. The reference is the run's own, so the scale of the
    loss cancels.

    Looks alike and is not: a fast fall of the loss (only what rises counts); the noise of small batches, a
    factor of a few; a batch that is harder than a nearly solved run is used to (it stays below the start);
    a solved run, next to whose loss every hard sample is a jump (no loss of it comes near what ignorance
    costs, or none from the jump on is above the first and the run has taught the model what it knows: LOW;
    but where targets are the model's own outputs, and run away with them, they tell nothing of that);
    a jump after which the run is no worse off: its loss falls, and comes at no time far above the start, or
    is far below it all the second half (see `no_worse`: LOW);
    a jump of next to nothing, behind an activation that is flat (even then the gradient moves nothing: LOW);
    an outlier that a robust loss tames (the loss jumps, its gradient does not); steps in which the loss is
    exactly zero (a margin that is met), which are left out.

    Args:
        cv_threshold: coefficient of variation from which the verdict is MEDIUM. Gradient norms of batches of
            four vary by a factor of 2 to 4, which gives less than 1.
        jump: ratio that at least one step must reach. Single batches reach ten times the usual gradient in
            healthy runs, recurrent ones above all, and the loss does not notice; 30 is beyond that. HIGH
            from ten times as much.
        restless: usual change from one step to the next, as a factor, from which a run is restless: healthy
            noise changes the gradient by a factor of 1.5 to 2.5 (the median), heavy tails by more.
        restless_jump: what `jump` is for a restless run: one order of magnitude.
        risen: how far above its start both loss and gradient must end, over their usual change from one step
            to the next. Training lowers the loss; batches vary by less, unless they are few or heavy-tailed,
            and then as much from step to step.
        climb: how far above its start the gradient must end where the loss does not rise, as it is bounded,
            or falls below zero without end. In healthy runs it climbs by less, but for those that leave a
            flat start, which are not steep.
        steep: ‖gradient‖ ‖parameters‖ / |loss| from which the loss is steep: parameters that change by a
            thousandth of their size change it by as much as it is. Fresh models have 1 to 100.
        few_values: values per channel up to which a batch norm is unstable by itself. Over two values its
            output is their sign, +1 and -1, whatever they are, and its gradient a spike where they are close.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        if upside_down := misgiven_losses(flow, IssueType.UNSTABLE):
            return [*upside_down, *_small_batch_norms(flow, few_values)]
        found = _jumps(flow, cv_threshold, jump, restless, restless_jump)
        if not any(issue.severity.is_serious for issue in found):
            found = _risen(flow, risen) or _leaving(flow) or thrown(flow, jump, restless_jump) or found
        found = _at_the_number(found, flung(flow, risen))
        found = found or _climbing(flow, climb, steep) or paid_for_errors(flow, climb)
        misfit = too_high(record, jumps=bool(found))
        if misfit is not None:
            found = [with_rate(issue, misfit, record) for issue in found] or [overshooting(record, misfit)]
        found = found or drifting(flow)
        return [*found, *blown_up(flow, found), *_small_batch_norms(flow, few_values)]

    return detector


def _at_the_number(found: list[Issue], flung: list[Issue]) -> list[Issue]:
    """What jumps is told at the number whose steps bring it about, where that is known."""
    gravest = max((issue.severity for issue in found), default=IssueSeverity.INFO)
    return [attrs.evolve(one, severity=max(one.severity, gravest)) for one in flung] or found


@attrs.frozen(kw_only=True)
class _Jump:
    """The rises of one series: the largest, its step, the coefficient of variation, and the usual change from
    one step to the next, as a factor."""

    ratio: float
    step: int
    variation: float
    change: float


def rises(values: Floats) -> _Jump | None:
    """Return the rises of a series over its own reference; None if there is too little of it.

    >>> rises(np.array([1.0, 1.0, 1.0, 1.0, 100.0, 1.0])).ratio
    100.0
    """
    known = np.flatnonzero(np.isfinite(values) & (values > 0))
    if len(known) < 2:
        return None
    x = values[known]
    whole = float(np.median(x))
    used_to = beginnings(x)[:-1]
    # Ten times the run's median caps the ratio: where the first steps were low by chance, nothing has jumped.
    ratios = np.array(
        [
            min(y / max(u, math.sqrt(u * whole)), 10 * y / whole)
            for y, u in zip(x.tolist()[1:], used_to, strict=True)
        ]
    )
    at = int(np.argmax(ratios))
    over = np.maximum(ratios - 1.0, 0.0)
    return _Jump(
        ratio=float(ratios[at]),
        step=int(known[at + 1]),
        variation=float(np.sqrt(np.mean(over * over))),
        change=float(np.exp(np.median(np.abs(np.diff(np.log(x)))))),
    )


def _jumps(
    flow: Flow, cv_threshold: float, jump: float, restless: float, restless_jump: float
) -> list[Issue]:
    record = flow.record
    series = {"gradient": rises(total_gradient(record))}
    if np.all(record.losses[np.isfinite(record.losses)] >= 0):
        series["loss"] = rises(np.minimum(record.losses[1:], record.losses[:-1]))
    seen = {name: r for name, r in series.items() if r}
    if not seen:
        return []
    name = max(seen, key=lambda key: (seen[key].variation, key))
    found = seen[name]
    needed = restless_jump if found.change >= restless else jump
    if found.variation < cv_threshold or found.ratio < needed:
        return []
    severity = IssueSeverity.HIGH if found.ratio >= 10 * jump else IssueSeverity.MEDIUM
    settled = calm(record) and not (_rises_at_last(record) and follows_itself(flow))
    below = has_learned(record) and _below_the_start(record, name, found.step)
    unharmed = no_worse(record)
    if settled or below or unharmed or _slope(flow, found.step) <= _LEVEL:
        severity = IssueSeverity.LOW
    node = layer_of_jump(flow, found.step)
    layer = flow.layers[node] if node else None
    stepped = bool(record.provenance.optimizer)
    return [
        Issue(
            layer=layer.name if layer else "",
            layer_type=layer.type if layer else record.provenance.model or "model",
            issue_type=IssueType.UNSTABLE,
            severity=severity,
            description=f"At step {found.step} the {name} is {found.ratio:.3g} times what this run is used "
            f"to; "
            f"over the run, the rises above it have a coefficient of variation of {found.variation:.2g}. "
            + ("The steps of the optimizer bring it about or fail to damp it." if stepped else
               "The parameters were held fixed, so it is the batches that differ.")
            + (" No loss of the run comes near that of a model which knows nothing." if settled else
               " The loss falls all the same, and what the jump cost it is made up." if unharmed else ""),
            magnitude=found.ratio,
            recommended_actions=unstable_actions(flow, node, found.ratio),
            metrics={
                "ratio": found.ratio,
                "variation": found.variation,
                "usual_change": found.change,
                "step": found.step,
                "series": name,
                "optimizer": record.provenance.optimizer,
            },
            evidence=Evidence(roles=Role.JUMPING if stepped else ()),
        )
    ]  # fmt: skip


def _rises_at_last(record: FlowRecord, times: float = 1.5) -> bool:
    """Whether the loss ends above its start, and its last value of all further still."""
    losses = record.losses
    return bool(np.isfinite(losses).all() and losses[-1] > late(losses) >= times * losses[0] > 0)


def _slope(flow: Flow, step: int) -> float:
    """By how much of the loss its gradient at a step says that it changes over one size of the weights."""
    record = flow.record
    size = math.sqrt(
        sum(p.norm[step] ** 2 for node in flow.layers for p in flow.trainable(node) if len(p.norm))
    )
    with np.errstate(all="ignore"):
        return float(total_gradient(record)[step] * size / np.abs(record.losses[step]))


_LEVEL = 1e-6  # of the loss: what is no larger even where it jumps moves nothing


def _below_the_start(record: FlowRecord, series: str, step: int) -> bool:
    """Whether a jump brings loss or gradient to no more than what the run began with: it is one after a lucky
    batch, or next to a loss that is nearly met."""
    values = record.losses if series == "loss" else total_gradient(record)
    return bool(np.nanmax(values[step:]) <= values[0])


def _risen(flow: Flow, risen: float) -> list[Issue]:
    """A run whose steps have made things worse: loss and gradient end far above where they started."""
    record, gradient = flow.record, total_gradient(flow.record)
    known = np.isfinite(record.losses) & np.isfinite(gradient)
    losses, norms = record.losses[known], gradient[known]
    if not record.provenance.optimizer or len(losses) < 5 or losses.min() <= 0 or norms[0] <= 0:
        return []
    ratio = float(late(losses) / losses[0])
    # One lucky batch at the start is no start: what batches differ by from step to step is no rise.
    usual, usual_norm = rises(losses), rises(norms)
    noise, noise_of_norm = (seen.change if seen else 1.0 for seen in (usual, usual_norm))
    if ratio < risen * noise or late(norms) < risen * noise_of_norm * norms[0] or calm(record):
        return []
    told = (
        f"The loss ends {ratio:.3g} times above where it started, and the gradient "
        f"{late(norms) / norms[0]:.3g} times: the steps of the optimizer are too large."
    )
    issue = of_the_run(flow, int(np.flatnonzero(known)[-1]), IssueSeverity.MEDIUM, told, ratio)
    return [attrs.evolve(issue, metrics={**issue.metrics, "series": "loss", "step": 1})]


def _leaving(flow: Flow) -> list[Issue]:
    """A run whose loss leaves in its last steps, beyond what it costs to know nothing."""
    record = flow.record
    if not record.provenance.optimizer or not runs_off(record):
        return []
    losses, known = record.losses, record.knowledge
    assert known is not None
    ratio, step = float(losses[-1] / losses[0]), len(losses) - 1
    told = (
        f"In the last steps the loss leaves, from {losses[-4]:.3g} over {losses[-3]:.3g} and "
        f"{losses[-2]:.3g} to {losses[-1]:.3g}, {ratio:.3g} times where it started; to know nothing costs "
        f"{known.ignorance:.3g}. The steps of the optimizer are too large, or grow."
    )
    issue = of_the_run(flow, step, IssueSeverity.HIGH, told, ratio)
    return [attrs.evolve(issue, metrics={**issue.metrics, "series": "loss"})]


def _climbing(flow: Flow, climb: float, steep: float) -> list[Issue]:
    """A run whose steps only make its loss steeper: the gradient climbs, and the model learns nothing."""
    record, gradient = flow.record, total_gradient(flow.record)
    if not record.provenance.optimizer or not guesses(record) or not np.isfinite(gradient).all():
        return []
    size = math.sqrt(sum(late(p.norm) ** 2 for node in flow.layers for p in flow.trainable(node)))
    ratio = late(gradient) / max(float(gradient[0]), 1e-300)
    slope = late(gradient) * size / max(abs(late(record.losses)), 1e-300)
    if len(gradient) < 5 or not (ratio >= climb and slope >= steep) or calm(record):
        return []
    told = (
        f"The gradient ends {ratio:.3g} times above where it started, while the model still guesses: the "
        f"loss is so steep that parameters which change by {1 / slope:.0e} of their size change it by as "
        "much as it is. The steps of the optimizer pass over what they are to find."
    )
    return [of_the_run(flow, len(gradient) - 1, IssueSeverity.MEDIUM, told, ratio, slope=slope)]


def _small_batch_norms(flow: Flow, few_values: int) -> list[Issue]:
    if flow.record.provenance.mode != "train":
        return []
    issues = []
    for node, layer in flow.layers.items():
        if "batchnorm" not in layer.type.lower() or len(layer.shape) < 2 or not flow.trainable(node):
            continue
        values = late(np.where(layer.called, layer.num_elements, 0) / max(layer.shape[1], 1))
        if not 1 <= values <= max(few_values, 4) or not np.isfinite(layer.output_rms).any():
            continue
        few = values <= few_values
        issues.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.UNSTABLE,
                severity=IssueSeverity.HIGH if few else IssueSeverity.LOW,
                description=f"Each channel is normalised over {values:.0f} values in training: "
                + ("its output is little more than the sign of their difference, and its gradient a spike "
                   "where they are close." if few else "its statistics are noisy."),
                magnitude=values if math.isfinite(values) else 0.0,
                recommended_actions=batch_norm_actions(values),
                metrics={"values_per_channel": values},
            )
        )  # fmt: skip
    return issues
