"""SATURATION: a bounded activation is driven into its flat ends, where its derivative is as good as zero."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

import attrs
import numpy as np

from gradflow.detect.evidence import early, late, loss_fell, middle, row_gain
from gradflow.detect.flow.ends.misgiven import misgiven_losses, out_of_reach, pooled_before_squashed
from gradflow.detect.flow.ends.sharp import sharp_scores, shifted_scores
from gradflow.detect.flow.readings.recurrent_weights import gate_drive
from gradflow.detect.flow.signal.bounded import bounded_scores, squashed_odds
from gradflow.detect.knowledge import at_level, came_knowing, falls, guesses, has_learned, learns, no_better
from gradflow.detect.squashed import (
    MADE_UP,
    STEEP,
    WANTED,
    gate_actions,
    is_right,
    is_steep,
    is_wanted,
    passed_by,
    saturation_actions,
    still_heard,
)
from gradflow.detect.view import Flow, flow_of
from gradflow.detect.wiring import MOST_NEIGHBOURS, node_name
from gradflow.records import (
    ActivationRecord,
    Evidence,
    Floats,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
)


def saturation(
    share: float = 0.5, *, severe_share: float = 0.8, stuck_share: float = 0.5, sharp: float = 10.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of saturated activations: sigmoid, tanh, softmax, hard bounds.

    Measured: for every use of a bounded activation, as a module or as a function, the share of its elements
    (of a softmax: of its rows) whose local derivative is below 1 percent of the largest it can have; at the
    end of the run, as a median over its last third; and the share of units that are saturated for every
    sample. What feeds it: the rms of what enters, and the layer before it.

    Why this is evidence: it is the derivative itself that is seen to be gone, element by element. A small
    gradient alone could have many reasons, and a large weight gradient in front may hide it: inputs of 0 to
    255 saturate a sigmoid and enlarge the gradient of the weights before it.

    The softmax or sigmoid inside a cross entropy is seen by the loss itself: that of the first step over what
    zeros cost, where it is still above that at the end (`gradflow.detect.flow.ends.sharp`). One
    that the loss applies to the sum over all samples, by the samples that are on its other side.

    The gates of a fused recurrent layer are out of sight; there the rms of its input times that of the rows
    of its input weights tells what enters them (`gradflow.detect.flow.readings.recurrent_weights`).

    Looks alike and is not: the few percent of any healthy tanh; a clamp that some samples pass, which hands
    their gradient back whole (`severe_share` counts there); a soft edge, flat nearly everywhere, through
    which no less comes back than goes in, and a choice that becomes sure while what comes back does not
    fall (LOW); a clamp that keeps probabilities off 0 and 1, which follows what they come from; a few of
    many calls; gates that are closed for part of their units; a softmax over many alternatives that gives
    each of them little; an output that is confident because it has learned to be (its loss has fallen by
    more than half within the run: LOW); ends that the loss asks for, as nine tenths of its pull lead further
    out (an action whose best value is the bound, a mask: LOW), but before another sigmoid or softmax, which
    asks for scores without bound; a first layer of a differential equation's network whose weights start
    large (LOW: see `is_steep`); a softmax over one alternative, which is `dead`'s; a sigmoid of
    scores of which those not chosen were set to minus infinity, which is off for them by intent (an
    infinity that was not meant is `numerical`'s); a weight inside the loss, where what it is made of goes
    into the loss past it too, and the loss falls (LOW).

    Args:
        share: saturated share from which the verdict is MEDIUM. With inputs of unit variance a tanh has 0.3
            percent and a sigmoid none; one half takes an input five to ten times too large.
        severe_share: from which it is HIGH; at 0.8 hardly any sample teaches hardly any unit.
        stuck_share: share of units saturated for every sample, from which the verdict is MEDIUM too: those
            cannot come back, whatever the batch.
        sharp: how many times what zeros cost the first cross entropy must be. Similarities of random unit
            vectors over a temperature of 0.07, and tables drawn with variance one, cost two to seven times.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        found: dict[str, list[Issue]] = {}
        uses: dict[str, int] = {}
        for activation in record.activations:
            name = re.sub(r"@\d+", "", activation.name)
            uses[name] = uses.get(name, 0) + 1
            if issue := _issue(flow, activation, share, severe_share, stuck_share):
                found.setdefault(name, []).append(issue)
        worst = [_worst(calls, uses[name]) for name, calls in found.items()]
        given = misgiven_losses(flow, IssueType.SATURATION) or out_of_reach(flow, IssueType.SATURATION)
        given = given or squashed_odds(flow) or bounded_scores(flow) or pooled_before_squashed(flow)
        return [
            *worst,
            *_driven_gates(flow, share),
            *(given or shifted_scores(flow) or sharp_scores(flow, sharp)),
        ]

    return detector


_STRAIGHT = ("clamp", "hardtanh", "hardsigmoid", "relu6")
_LEARNED = " The loss has fallen by more than half meanwhile: it may simply be sure."
_PASSES = (
    " But few of its units are so for all samples, what passes is enough to learn by, and the loss falls."
)
_PASSED_BY = " But the loss takes the same numbers past it as well, and falls by what comes back from there."
_KNOWS = " The loss is far below that of guesses: the model is sure, and right."


def _issue(
    flow: Flow, activation: ActivationRecord, share: float, severe_share: float, stuck_share: float
) -> Issue | None:
    if activation.kind not in ("bounded", "softmax") or (
        activation.kind == "softmax" and activation.width == 1
    ):
        return None
    if _is_aside(flow, activation):
        return None
    layer = flow.layers.get(node_name(activation.layer))
    if layer and layer.type == "ReLU6":  # a rectifier with a ceiling: zeros are what it is for
        return None
    if activation.kind == "bounded" and not np.isfinite(activation.input_rms).any():
        return None
    seen, record = _seen(flow, activation), flow.record
    if activation.op in _STRAIGHT and _guards(flow, activation, seen):
        return None
    stuck = activation.always_saturated
    if activation.op in _STRAIGHT:  # it passes whole what it passes, in whatever units
        share = severe_share
    if not (seen >= share or stuck >= stuck_share):
        return None
    severity = IssueSeverity.HIGH if seen >= severe_share else IssueSeverity.MEDIUM
    first = early(activation.saturated_share)
    learned = _has_learned(flow, activation, first, seen)
    if learned:
        severity = IssueSeverity.LOW
    unit = "rows" if activation.kind == "softmax" else "elements"
    stuck_text = f", {stuck:.0%} of its units for every sample" if stuck >= stuck_share else ""
    trend = f" It was {first:.0%} in the first steps." if seen > first + 0.2 else ""
    calm = _LEARNED if learned else ""
    if not learned and (came_knowing(record) or has_learned(record) or at_level(record)):
        severity, calm = IssueSeverity.LOW, _KNOWS
    feeder = _feeder(flow, activation)
    fed_by = node_name(feeder)
    if severity.is_serious and _passes_enough(flow, activation, fed_by, seen, first, severe_share):
        severity, calm = IssueSeverity.LOW, _PASSES
    if severity.is_serious and is_wanted(flow, activation):
        severity, calm = IssueSeverity.LOW, WANTED
    if severity.is_serious and is_right(flow, activation):
        severity, calm = IssueSeverity.LOW, _KNOWS
    if severity.is_serious and is_steep(flow, activation, fed_by):
        severity, calm = IssueSeverity.LOW, STEEP
    if severity.is_serious and passed_by(flow, activation):
        severity, calm = IssueSeverity.LOW, _PASSED_BY
    if severity.is_serious and _is_made_up_for(flow, activation, fed_by):
        severity, calm = IssueSeverity.LOW, MADE_UP
    return Issue(
        layer=activation.layer,
        layer_type=layer.type if layer else activation.op,
        issue_type=IssueType.SATURATION,
        severity=severity,
        description=f"{seen:.0%} of the {unit} of its {activation.op} are saturated{stuck_text}: their "
        f"derivative is below 1% of its largest value. What enters has rms "
        f"{middle(activation.input_rms):.3g}.{trend}{calm}",
        magnitude=seen,
        recommended_actions=saturation_actions(flow, activation, feeder),
        metrics={
            "saturated_share": seen,
            "always_saturated": stuck,
            "first_steps": first,
            "input_rms": middle(activation.input_rms),
            "op": activation.op,
            "fed_by": feeder,
            "feeder_row_gain": row_gain(flow, fed_by) if fed_by in flow.layers else math.nan,
        },
        evidence=Evidence(developed=seen > first + 0.2),
    )


def _is_made_up_for(flow: Flow, activation: ActivationRecord, feeder: str) -> bool:
    """Whether the loss takes the logarithm of a sigmoid at its end, and teaches by it: as the many classes of
    a detector start, which are rare, and each as sure as its prior."""
    entering = late(activation.input_rms)
    heard = still_heard(flow, node_name(activation.layer), activation.op, feeder, entering)
    return activation.op == "sigmoid" and heard and learns(flow.record)


def _seen(flow: Flow, activation: ActivationRecord) -> float:
    """The saturated share at the end: a median over the last third of the run, or the last one seen where an
    output has been on its way to its ends in a run that taught the model nothing, as one whose targets are
    out of its reach is. Of a squashed length the share of the first steps counts too, while the run has only
    undone what such a start costs."""
    shares = activation.saturated_share[np.isfinite(activation.saturated_share)]
    seen, losses = late(activation.saturated_share), flow.record.losses
    if activation.op == "squash" and no_better(flow.record):
        seen = max(seen, early(activation.saturated_share))
    if len(shares) < 2 or not shares[-1] > seen or activation.kind != "bounded":
        return seen
    ends = flow.wiring.known and flow.ends_weightless(node_name(activation.layer))
    idle = guesses(flow.record) and late(losses) >= 0.9 * early(losses) > 0
    return float(shares[-1]) if ends and idle and np.all(np.diff(shares) >= 0) else seen


def _is_aside(flow: Flow, activation: ActivationRecord) -> bool:
    """Whether a clamp was called on a layer's output and the loss does not take what it gave."""
    behind = flow.wiring.ops_after(node_name(activation.layer))
    clamp = activation.functional and activation.op == "clamp" and flow.wiring.known
    return (
        clamp
        and len(behind) < MOST_NEIGHBOURS
        and not any(op.startswith(("clamp", "clip", "hardtanh", "minimum", "maximum")) for op in behind)
    )


def _passes_enough(
    flow: Flow, activation: ActivationRecord, feeder: str, seen: float, first: float, severe_share: float
) -> bool:
    """Whether an activation lets enough through its edges before it to learn.

    An indicator made soft, such as the cover of a pixel by a shape, is flat nearly everywhere by its meaning;
    what passes at its edges is multiplied by how steep they are. So the gradient before it is no small part
    of that behind it, few units are at their ends for all samples, and the loss of the run falls by a tenth
    while the outputs come to tell samples apart. A tanh that is at its ends by bad scale hands back an
    eighth. Of one that comes to its ends within such a run (a choice that becomes sure), and of a softmax
    that is sharp by design (a look-up at low temperature) in a model that `learns`, what passes must be no
    less than what passed before. One that no layer feeds, but data and the model's own parameters, starves
    no layer: there, below `severe_share`, it is enough that the loss falls so, or that no unit is stuck.
    """
    record, stuck = flow.record, activation.always_saturated
    if activation.op in _STRAIGHT or stuck > _FEW_STUCK:
        return False
    taught = falls(record) and record.knowledge is not None and not guesses(record)
    taught = taught and not (activation.op == "squash" and no_better(record))
    if activation.functional and not activation.layer:
        return activation.kind == "bounded" and seen < severe_share and (taught or not stuck)
    if not taught or feeder not in flow.grad:
        return False
    behind = _gradient_behind(flow, activation)
    with np.errstate(all="ignore"):
        passed = flow.grad[feeder] / np.where(behind > 0, behind, np.nan)
    if activation.kind == "bounded" and late(passed) >= 0.5:
        return True
    calm = seen > first + 0.2 or (activation.kind == "softmax" and seen < severe_share and learns(record))
    return calm and late(passed) >= early(passed)


_FEW_STUCK = 1 / 3


def _gradient_behind(flow: Flow, activation: ActivationRecord) -> Floats:
    """The gradient of what an activation gives, by step: its own, or what the layers behind a function hand
    back, a plain one by the rms of its rows."""
    node = node_name(activation.layer)
    if not activation.functional:
        return flow.grad[node]
    handed = [
        flow.grad[n] * (row_gain(flow, n) if flow.has_matrix(n) else 1.0)
        for n in flow.wiring.after(node)
        if n in flow.grad
    ]
    return np.fmax.reduce(handed) if handed else np.full(flow.record.steps, np.nan)


def _guards(flow: Flow, activation: ActivationRecord, seen: float) -> bool:
    """Whether a clamp keeps the probabilities of a softmax or sigmoid, at their ends themselves, off 0 and 1.

    `Categorical(probs=...)` and careful logarithms have one: what it cuts off is lost already.
    """
    return any(
        other.op in ("softmax", "sigmoid") and late(other.saturated_share) >= seen
        for other in flow.functions.get(activation.layer, ())
    )


def _worst(calls: Sequence[Issue], uses: int) -> Issue:
    """Of several calls of one module, the worst, which speaks for all: LOW where most are not saturated."""
    worst = max(calls, key=lambda issue: issue.magnitude)
    if 2 * len(calls) < uses:
        text = f"{worst.description} So are {len(calls)} of its {uses} calls."
        worst = attrs.evolve(worst, severity=IssueSeverity.LOW, description=text)
    evidence = attrs.evolve(worst.evidence, num_calls=len(calls))
    return attrs.evolve(worst, metrics={**worst.metrics, "num_calls": len(calls)}, evidence=evidence)


def _driven_gates(flow: Flow, share: float) -> list[Issue]:
    """Fused recurrent layers, whose gates are out of sight: by what must enter them."""
    issues = []
    for node, layer in flow.layers.items():
        drive = gate_drive(flow, node)
        if drive is None or drive.saturated < share or not flow.trainable(node):
            continue
        issues.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.SATURATION,
                severity=IssueSeverity.HIGH,
                description=f"Its input of rms {drive.entering:.3g} drives its gates with rms "
                f"{drive.rms:.3g}, so that about {drive.saturated:.0%} of them are saturated.",
                magnitude=drive.saturated,
                recommended_actions=gate_actions(layer.name, drive.entering),
                metrics={"saturated_share": drive.saturated, "input_rms": drive.entering, "drive": drive.rms},
            )
        )
    return issues


def _has_learned(flow: Flow, activation: ActivationRecord, first: float, seen: float) -> bool:
    """Whether an output has become sure within the run while its loss fell by half."""
    if not seen > first + 0.2 or not loss_fell(flow.record):
        return False
    return flow.ends_weightless(node_name(activation.layer))


def _feeder(flow: Flow, activation: ActivationRecord) -> str:
    """The layer whose output enters the activation."""
    if activation.functional:
        return activation.layer
    before = flow.wiring.before(node_name(activation.layer))
    return flow.layers[before[0]].name if before and before[0] in flow.layers else ""
