"""DEAD: a part that is meant to train gets no gradient at all, by its wiring or by exact zeros."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gradflow.detect.actions import rectifier_actions, zero_actions
from gradflow.detect.evidence import RECTIFIERS, activations_of, late, typical_zero
from gradflow.detect.flow.ends.alike import silenced
from gradflow.detect.flow.ends.constants import constant_outputs
from gradflow.detect.flow.ends.misgiven import choiceless, has_no_choice, out_of_reach
from gradflow.detect.flow.readings.alternatives import is_resting, last_third
from gradflow.detect.flow.readings.dropped import dropped
from gradflow.detect.flow.readings.fallen import fallen_silent
from gradflow.detect.flow.readings.zeros import zeros_of
from gradflow.detect.knowledge import came_knowing, has_learned
from gradflow.detect.reach.unreached import loss_is_empty, sole_reason, unreached_parts
from gradflow.detect.reach.unwired import cut_off, never_called
from gradflow.detect.view import Flow, flow_of
from gradflow.detect.wiring import layer_name, node_name
from gradflow.records import (
    ActivationRecord,
    Evidence,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    LayerRecord,
    ParameterRecord,
    ReachRecord,
    Reason,
    Role,
)


def dead(
    threshold: float = 0.9, *, some: float = 0.5, few: float = 0.25, min_updates: int = 3
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of parts that get no gradient.

    Measured, for parameters that require a gradient and that the optimizer, where one is given, steps:

    1. Wiring: modules that no step calls or uses, and layers that run while no path leads from the loss to
       any of their parameters in any step.
    2. Exact zeros: layers all of whose parameters have a gradient of exactly zero, at the end of the run
       where an optimizer steps, in every step where none does; and what blocks it.
    3. Rectifiers: the share of units that fired in no batch of the run; and of those that did, and in none
       of its last quarter, see `fallen_silent`.
    4. Parts, by the account of reach: rows, columns, blocks and single parameters that no gradient reached
       in any step, and why; terms of the loss without a graph; tensors that no module has registered.

    Why this is evidence: wiring is read off the graph, and an exact zero is no rounding. Whether a zero is an
    illness depends on what makes it. Where the weight behind is zero, as many initialisations want it, one
    step of the optimizer ends it, two in a row of such take two; so after `min_updates` steps it is dead,
    and without an optimizer nobody can know: INFO. A rectifier of which no unit ever fires, or a softmax
    over one alternative, which is the constant 1, or a norm over one feature, which is its bias, is never
    by design.

    A module that no step runs is HIGH where it is forgotten: nothing that ran names it. Where the code that
    ran would call it on a branch not taken, it may belong to another kind of batch, such as a vision tower
    without images, and only an optimizer that holds it says that it is meant to train on these: LOW without.
    Where no parameter of the whole model is reached, as the loss has no graph, it is CRITICAL.

    Looks alike and is not: a gradient that has become too small for its format on a long way, which is
    VANISHING; frozen parameters, and those of another optimizer; units of a frozen layer, up to `threshold`
    of them (LOW); a head or an expert that other
    batches use; an expert that the router drops within the run while most of the others learn (LOW); rows of
    an embedding that no token asked for; a bias under a softmax or before a batch norm, whose gradient is
    zero but for rounding; a bounded loss that is met by most samples; a rectifier in the loss (a hinge),
    which is meant to be off; half of the units off at a time, which is what a rectifier does.

    Args:
        threshold: share of never firing units from which the verdict is HIGH: what is left is no layer.
        some: from which it is MEDIUM. At He's initialisation a unit fires for half of the samples, so next to
            none is silent over a run. Only where all samples look alike to the layer (less than half of what
            feeds it differs between them) does chance decide, and switches half of its units off; there
            four standard deviations of as many coins are added.
        few: from which it is LOW.
        min_updates: steps of the optimizer after which a zero by design has ended: LoRA takes one, an adaLN
            gate behind a zero last layer two.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        zero = _all_zero(flow, min_updates)
        # A layer whose gradient is zero because none of its units fires is reported once.
        told = {issue.layer for issue in zero if issue.evidence.plays(Role.BLOCKING)}
        silent = [i for i in _silent_units(flow, threshold, some, few) if i.layer not in told]
        found = [*never_called(flow), *cut_off(flow), *zero, *silent]
        found += [*_silent_modules(flow, zero), *dropped(flow), *choiceless(flow, IssueType.DEAD)]
        if not any(i.severity > IssueSeverity.MEDIUM for i in found):
            found += (
                silenced(flow) or out_of_reach(flow, IssueType.DEAD) or constant_outputs(flow, min_updates)
            )
        return [*found, *unreached_parts(flow, {issue.layer for issue in found}, min_updates)]

    return detector


# ----------------------------------------------------------------------------- 2. exact zeros


def _all_zero(flow: Flow, min_updates: int) -> list[Issue]:
    issues = []
    told: set[str] = set()
    updates = flow.record.steps - 1 if flow.record.provenance.optimizer else 0
    if has_no_choice(flow) or _is_met(flow):  # the former is told once, where it comes of
        return []
    zeros = zeros_of(flow)
    for node, layer in flow.layers.items():
        wanted = [p for p in flow.trainable(node) if p.reached.any()]
        if not wanted or layer.module in told:
            continue
        if not all(
            typical_zero(p.grad_norm, zeros.scale, at_end=updates >= min_updates, muted=node in zeros.muted)
            for p in wanted
        ):
            continue
        told.add(layer.module)
        why, at = zeros.blocked_by(flow, node)
        if why == "underflow":  # the end of a long decay, which is VANISHING
            continue
        if why == "loss" and (came_knowing(flow.record) or _is_right_at_zero(flow)):  # it is met
            continue
        if why in ("rectifier", "one alternative", "one feature"):
            severity = IssueSeverity.CRITICAL
        else:
            lasting = updates >= min_updates or loss_is_empty(flow)
            severity = IssueSeverity.HIGH if lasting else IssueSeverity.INFO
            if _gets_no_rows(layer):
                why = "no rows"
            if lasting and why in ("operation", "loss", "no rows") and is_resting(flow, node):
                severity = IssueSeverity.LOW
        issues.append(_zero_issue(flow, node, wanted, why, at, severity, updates))
    return issues


def _gets_no_rows(layer: LayerRecord) -> bool:
    """Whether a layer is called with nothing in most of the last steps."""
    return float(np.median(last_third(np.where(layer.called, layer.num_elements, 0)))) == 0


def _is_met(flow: Flow) -> bool:
    """Whether the loss is exactly zero at the end and the model knows: every margin is kept.

    Or it has fallen there, and outputs of zero would cost something: a loss of pairs whose order is their
    target costs others' outputs the same.
    """
    record, known = flow.record, flow.record.knowledge
    if late(record.losses) != 0:
        return False
    fallen = known is not None and known.silent > 0 and record.losses[0] > 0 and record.losses.min() >= 0
    return fallen or came_knowing(record) or has_learned(record)


def _is_right_at_zero(flow: Flow) -> bool:
    """Whether the model gives zeros, and zeros are what is asked for: a table of values before any reward."""
    known = flow.record.knowledge
    return known is not None and known.loss == 0 and bool(known.scales) and max(known.scales) == 0


_WHY = {
    "rectifier": "the rectifier behind {at} lets nothing through: no unit of it fires",
    "one alternative": "the softmax behind {at} is over one alternative, so it is the constant 1",
    "one feature": "the norm layer behind {at} is over one feature, so what it gives does not depend on its "
    "input",
    "zero weight": "the weights of {at}, which would hand it back, are zero",
    "zero input": "its own output gets a gradient, but what enters it is zero",
    "no rows": "nothing at all enters it: no row of the batch is sent there",
    "operation": "it is lost between here and {at}, in a functional operation",
    "loss": "the loss hands back exactly zero",
}


def _zero_issue(
    flow: Flow,
    node: str,
    wanted: Sequence[ParameterRecord],
    why: str,
    at: str,
    severity: IssueSeverity,
    updates: int,
) -> Issue:
    layer = flow.layers[node]
    number = sum(p.num_elements for p in wanted)
    told = _WHY[why].format(at=at or "it")
    known = sole_reason(flow, [p.name for p in wanted])
    if known is not None and known.reason is Reason.OFF and why in ("zero input", "operation"):
        told = f"{known.op} at {known.at} has slope zero there for every sample"
        if feeder := _saturating(flow, known.at):
            why, at = "operation", feeder
    asked = why
    if known is not None and known.reason is Reason.ZERO_FACTOR and why in ("loss", "operation") and known.op:
        told, asked = f"in {known.op}, {_behind(known)}, it is multiplied by exactly zero", "zero factor"
    if severity is IssueSeverity.INFO:
        more = "more steps tell" if flow.record.provenance.optimizer else "pass optimizer= to see"
        after = (
            f"That may be by design (a zero initialisation ends with the first steps); {more} whether it "
            "does."
        )
    elif severity is IssueSeverity.LOW:
        after = "Most of its alternatives get some: it may be chosen again."
    elif updates:
        after = f"It still is after {updates} steps of the optimizer."
    else:
        after = ""
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.DEAD,
        severity=severity,
        description=f"The gradient of its {number:,} parameters is exactly zero: {told}. {after}".rstrip(),
        magnitude=float(number),
        recommended_actions=zero_actions(flow, node, asked, at),
        metrics={
            "why": why,
            "num_parameters": number,
            "num_updates": updates,
        },
        evidence=Evidence(
            roles=Role.BLOCKING if at == node else Role.BLOCKED,
            origin=layer_name(at) if at else None,
            developed=any(np.any(p.grad_norm > 0) for p in wanted),
            no_input=why == "zero input" or late(layer.input_rms) == 0,
        ),
    )


def _behind(known: ReachRecord) -> str:
    return f"behind {known.layer_at}" if known.layer_at else "in the loss"


def _saturating(flow: Flow, op: str) -> str:
    """The layer that drives an operation, such as a tanh, to where it has no slope; "" if none does."""
    feeders = flow.wiring.before(op) if op in flow.wiring.nodes else ()
    shut = (n for n in feeders if any(late(a.saturated_share) > 0.5 for a in activations_of(flow, n)))
    return next(shut, "")


def _silent_modules(flow: Flow, zero: Sequence[Issue]) -> list[Issue]:
    """The modules without parameters that give exactly zero for something, and starve layers behind them: of
    spikes below a threshold, gates, masks. Rectifiers are known for it, and told below."""
    known = {node_name(a.layer) for a in flow.record.activations}
    found: dict[str, list[Issue]] = {}
    for issue in zero:
        at = node_name(issue.evidence.origin or "")
        if issue.metrics["why"] == "zero input" and at in flow.layers and at not in known:
            found.setdefault(at, []).append(issue)
    return [
        Issue(
            layer=flow.layers[at].name,
            layer_type=flow.layers[at].type,
            issue_type=IssueType.DEAD,
            severity=max(issue.severity for issue in starved),
            description="All that it gives is exactly zero, though what enters it has rms "
            f"{late(flow.layers[at].input_rms):.3g}: the weights behind it are given nothing to learn from.",
            magnitude=1.0,
            recommended_actions=(
                "If it fires above a threshold, bring what enters it up to that: a batch norm in front of "
                "it, larger weights in the layer before, or a lower threshold.",
                "If it is a gate or a mask, look at what closes it for every sample.",
            ),
            metrics={"why": "silent module", "input_rms": late(flow.layers[at].input_rms)},
            evidence=Evidence(roles=Role.SILENT),
        )
        for at, starved in found.items()
        if not flow.parameters_of(at) and late(flow.layers[at].input_rms) > 0
    ]


# ------------------------------------------------------------------------------ 3. rectifiers


def _silent_units(flow: Flow, threshold: float, some: float, few: float) -> list[Issue]:
    issues, judged = [], []
    for uses in _rectifiers(flow).values():
        # A unit of a reused module is dead only if it is silent in all calls.
        share, now = min(u.never_fired for u in uses), max(late(u.fired_share) for u in uses)
        fires = any(np.any(u.fired_share > 0) for u in uses)
        if share == 1 and fires:  # a NaN in one batch has spoilt the count
            continue
        if now == 0 and fires:  # they fired once and do no more
            share = 1.0
        if share >= few:
            issues.append(_silent_issue(flow, uses[0], share, now, threshold, some))
        if share < some and not _is_fed_by_frozen(flow, uses[0]):
            judged.append(uses)
    return [*issues, *fallen_silent(flow, judged, threshold)]


def _feeders(flow: Flow, activation: ActivationRecord) -> list[str]:
    """The layers whose output enters a rectifier."""
    node = node_name(activation.layer)
    feeders = (node,) if activation.functional else flow.wiring.before(node)
    return [n for n in feeders if n in flow.layers]


def _is_fed_by_frozen(flow: Flow, activation: ActivationRecord) -> bool:
    """Whether what drives a rectifier is not to be trained: units that are off for these data are what a
    trained model that came frozen has for others, and the rest hands back enough."""
    feeders = _feeders(flow, activation)
    return bool(feeders) and all(flow.parameters_of(n) and not flow.trainable(n) for n in feeders)


def _fed_variation(flow: Flow, activation: ActivationRecord) -> float:
    """The least part of what feeds a rectifier that differs between samples in the run; 1 if unknown."""
    seen = [flow.layers[n].output_variation for n in _feeders(flow, activation)]
    return max((float(v[np.isfinite(v)].min()) for v in seen if np.isfinite(v).any()), default=1.0)


def _rectifiers(flow: Flow) -> dict[str, list[ActivationRecord]]:
    """The rectifiers whose units can be judged, the calls of one module together."""
    found: dict[str, list[ActivationRecord]] = {}
    for activation in flow.record.activations:
        if activation.kind != "rectifier" or activation.op not in RECTIFIERS:
            continue
        node = node_name(activation.layer)
        # With no layer behind it, a rectifier that is a function is a part of the loss: a hinge.
        if activation.functional and flow.wiring.known and flow.wiring.is_last(node):
            continue
        layer = flow.layers.get(node)
        if layer is not None and not layer.output_finite.all():  # a NaN does not fire either
            continue
        found.setdefault(re.sub(r"@\d+", "", activation.name), []).append(activation)
    return found


def _silent_issue(
    flow: Flow, activation: ActivationRecord, share: float, now: float, threshold: float, some: float
) -> Issue:
    layer = flow.layers.get(node_name(activation.layer))
    if share >= threshold:
        severity = IssueSeverity.CRITICAL if share == 1 else IssueSeverity.HIGH
    else:
        alike = _fed_variation(flow, activation) < 0.5
        by_chance = 2.0 / math.sqrt(max(activation.num_units, 1)) if alike else 0.0
        many = share >= some + by_chance and not came_knowing(flow.record)
        many = many and not _is_fed_by_frozen(flow, activation)
        severity = IssueSeverity.MEDIUM if many else IssueSeverity.LOW
    fires = f" At the end, {now:.0%} of its elements fire." if math.isfinite(now) else ""
    return Issue(
        layer=activation.layer,
        layer_type=layer.type if layer else activation.op,
        issue_type=IssueType.DEAD,
        severity=severity,
        description=f"{share:.0%} of the {activation.num_units} units of its {activation.op} fire for no "
        f"sample "
        f"of {flow.record.steps} batches, so nothing passes them in either direction.{fires}",
        magnitude=share,
        recommended_actions=rectifier_actions(flow, activation, share),
        metrics={
            "never_fired": share,
            "num_units": activation.num_units,
            "fired_share": now,
            "op": activation.op,
        },
        evidence=Evidence(
            roles=Role.SILENT if share == 1 else Role.PARTLY_SILENT,
            developed=bool(np.any(activation.fired_share > 0)) and share == 1,
        ),
    )
