"""VANISHING, EXPLODING and SATURATION inside recurrent layers, over time: what `recurrence()` has measured.

All three return nothing for a record without `recurrences`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import attrs
import numpy as np

from gradflow.detect.evidence import early, late, loss_fell, middle
from gradflow.detect.flow.readings.recurrent_weights import growth_of, late_profile
from gradflow.detect.knowledge import excused
from gradflow.detect.recurrent.actions import (
    amplifying_actions,
    closed_actions,
    fading_actions,
    stuck_actions,
)
from gradflow.detect.recurrent.padded import behind_padding
from gradflow.detect.recurrent.told import told_too_early
from gradflow.detect.view import Flow, flow_of
from gradflow.detect.wiring import node_name
from gradflow.records import (
    Evidence,
    FlowRecord,
    GateRecord,
    Issue,
    IssueSeverity,
    IssueType,
    RecurrenceRecord,
    RecurrentLevelRecord,
    Role,
    depth,
)

Detector = Callable[[FlowRecord], Iterable[Issue]]

_GROWN = 100.0
_READ_BY_MANY = 0.5  # of the steps are read: then each has a gradient of its own


def fading(heard: float = 0.33, *, few: float = 0.1, some: float = 0.9, fresh: float = 1.0) -> Detector:
    """Return the detector of recurrent layers whose early steps get no gradient from the late ones.

    Measured: the exact gradient at what the input brings to the lowest level, W_ih x_t + b_ih, at every step
    up to the last one that the loss reads; the share of steps at which it is at least 1e-6 of the sample's
    largest; and within how many steps the gradient at the state falls to 1 percent and to 1e-6.

    Why this is evidence: the gradient of W_ih is a sum over the steps. What is below 1e-6 of the largest term
    is lost in it to rounding (float32 keeps 7 digits), so those steps cannot teach, whatever they hold. A bit
    told in the first step and asked for in the last is learned where the first step is heard, and not
    where it is not: `examples/forgetful_lstm.py`.

    Where padding is read, and all that is heard is padding, that is told instead: see `behind_padding`; where
    the inputs tell what is asked for at steps out of reach alone, that is told as well: `told_too_early`.

    Looks alike and is not: a layer that is read at every step (or at most of them), where every step has a
    gradient of its own, however short its memory; a bidirectional layer, whose other direction hears the
    early steps; padding behind the last step that is read; a sequence little longer than the memory, as of
    the 28 rows of a digit: gated layers learn to keep more once late steps have taught them something, so a
    part that is out of reach at the start is LOW; a run whose loss has fallen by half, which has learned
    without: LOW.

    Args:
        heard: share of the steps that is heard, below which it is MEDIUM. At PyTorch's initialisation an LSTM
            or a GRU hears about 28 steps: sequences of 50 are above a half, those of 100 below a third. With
            less than a third, most of the sequence is out of reach of even what is next to be learned.
        few: below which it is HIGH: what is heard is but the end.
        some: below which it is LOW.
        fresh: factor on `heard` and `few` for a layer whose recurrent weights are still as PyTorch draws
            them. It may learn to keep more, so `gradflow.automatic`, which nobody has asked, has 0: LOW.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        for r in _trained(flow):
            if (padded := behind_padding(record, r)) is not None:
                yield padded
                continue
            share = late(r.heard_share)
            grows = any(late(growth_of(level)) >= _GROWN for level in r.levels)  # no loss: see `amplifying`
            if not grows and (told := told_too_early(record, r)) is not None:
                yield told
            if share < some and not late(r.read_share) > _READ_BY_MANY and not grows:
                factor = fresh if _is_fresh(flow, r) else 1.0
                yield _fading_issue(flow, r, share, factor * heard, factor * few)

    return excused(detector)


def amplifying(threshold: float = 10.0) -> Detector:
    """Return the detector of recurrent layers in which the gradient grows on its way back through time.

    Measured: the gradient of what is read at the last step alone, at the state of every step before it: its
    largest norm over that at the last step. The largest of the run's start, middle and end counts.

    Why this is evidence: it is the product of the true state transitions, slopes of gates and nonlinearities
    included, applied to the true gradient; the loss, the batch and the width cancel. A layer that keeps its
    state keeps the norm; one at a usual initialisation loses it.

    Looks alike and is not: a gradient that is large at early steps because all later ones are read and add
    up; large recurrent weights whose tanh is saturated, and takes as much as they give.

    Args:
        threshold: growth over all steps counts from its square (MEDIUM), as along a path of layers, for
            clipping copes with less; HIGH from its cube, CRITICAL from its sixth power.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for r in _trained(flow_of(record)):
            grown = [(growth, level) for level in r.levels for growth in [_typical_growth(level)]]
            growth, level = max(grown, key=lambda pair: np.nan_to_num(pair[0], nan=-1.0))
            if growth >= threshold**2:
                yield _amplifying_issue(r, level, growth, threshold)

    return excused(detector)


def gated(share: float = 0.5, *, severe_share: float = 0.8, closed: float = 0.1) -> Detector:
    """Return the detector of gates that are stuck, and of forget gates that are closed.

    Measured: for every gate, the share of its values (samples, steps and units) whose derivative is below 1
    percent of the largest it can have, and of those, the share that over the whole sequence amount to less
    than a tenth of a step; the mean of the gate that holds on to the state (an LSTM's forget gate, a GRU's
    update gate).

    Why this is evidence: the gates' own values are seen, which fused kernels hide. Where the candidate (or
    the state of a plain layer) is saturated, no gradient reaches the weights that make it. A gate that lets
    less than a tenth of a step through in a whole sequence is a wall: nothing is written, or nothing read. A
    keeping gate of mean 0.1 loses nine tenths of the state at every step.

    Looks alike and is not: a keeping gate that is open for good, which is how a long memory looks (chrono
    initialisation, the first LSTM), as long as something is written; an input gate that is nearly closed, but
    for a sequence as long as it takes; gates that are shut for some units; a layer that has learned within
    the run (its loss has fallen by half): LOW; gates that come to their ends on padding, in a layer that is
    read behind it: LOW.

    Args:
        share: of stuck values, from which it is MEDIUM, as for any other bounded activation.
        severe_share: from which it is HIGH.
        closed: mean of the keeping gate, below which it is MEDIUM: half of what any usual initialisation has
            is 0.25, and at 0.1 two steps keep a percent. Only for sequences longer than 1 / `closed`, of
            which less than half is remembered.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        for r in _trained(flow):
            stuck = [found for level in r.levels if (found := _stuck(level, share)) is not None]
            if stuck:
                worst = max(stuck, key=lambda found: found.share)
                yield _calmed(record, r, _stuck_issue(flow, r, worst, severe_share))
            for level in r.levels:
                if _forgets(r, level, closed):
                    yield _closed_issue(flow, r, level)
                    shut = _shut(level, share) if not stuck else None
                    if shut is not None:
                        yield _stuck_issue(flow, r, shut, severe_share)
                    break

    return excused(detector)


# --------------------------------------------------------------------------------------- common


def _trained(flow: Flow) -> Iterator[RecurrenceRecord]:
    """Yield the recurrences whose layer has parameters to train."""
    for r in flow.record.recurrences:
        if node_name(r.name) in flow.layers and flow.trainable(node_name(r.name)):
            yield r


def _of(r: RecurrenceRecord, level: RecurrentLevelRecord) -> str:
    """Return which level of the layer is meant, in words; nothing where there is one only."""
    return f" of {level.level}" if len(r.levels) > 1 else ""


# -------------------------------------------------------------------------------------- fading


def _is_fresh(flow: Flow, r: RecurrenceRecord) -> bool:
    """Whether the recurrent weights have the norm that PyTorch draws them with, uniform in ±1 / √hidden."""
    for p in flow.parameters_of(node_name(r.name)):
        if "weight_hh" in p.name and len(p.shape) == 2 and len(p.norm):
            drawn = math.sqrt(p.num_elements / (3.0 * p.shape[1]))
            four_deviations = 2.0 / math.sqrt(p.num_elements)
            return abs(early(p.norm) / drawn - 1.0) < four_deviations + 0.002
    return False


def _fading_issue(flow: Flow, r: RecurrenceRecord, share: float, heard: float, few: float) -> Issue:
    level = min(r.levels, key=lambda level: (_reach(level, 1e-6), level.level))
    steps = _length(level)
    percent, rounding = _reach(level, 1e-2), _reach(level, 1e-6)
    severity = (
        IssueSeverity.HIGH if share < few else IssueSeverity.MEDIUM if share < heard else IssueSeverity.LOW
    )
    learned = loss_fell(flow.record) and severity > IssueSeverity.LOW
    if learned:
        severity = IssueSeverity.LOW
    keep = level.gate("forget") or level.gate("update")
    mean = late(keep.mean) if keep else math.nan
    rate = late(level.spectral_radius)
    gate_text = f", its {keep.name} gate is {mean:.2g} in the mean" if keep else ""
    calm = " The loss has fallen by more than half meanwhile: it seems not to need them." if learned else ""
    return Issue(
        layer=r.name,
        layer_type=r.type,
        issue_type=IssueType.VANISHING,
        severity=severity,
        description=f"{1 - share:.0%} of its {steps} steps teach it nothing: going back in time the gradient"
        f"{_of(r, level)} falls to a percent within {percent} steps and to less than 1e-6, lost to rounding, "
        f"within {rounding} (the state transition keeps {rate:.2g} a step{gate_text}).{calm}",
        magnitude=share,
        recommended_actions=fading_actions(r, level, steps),
        metrics={
            "heard_share": share,
            "read_share": late(r.read_share),
            "num_steps": steps,
            "steps_to_percent": percent,
            "steps_to_rounding": rounding,
            "spectral_radius": rate,
            "keep_gate": mean,
            "level": level.level,
        },
        evidence=Evidence(roles=Role.ABSORBING),
    )


def _length(level: RecurrentLevelRecord) -> int:
    return int(np.isfinite(level.gradient_profile).any(axis=0).sum())


def _reach(level: RecurrentLevelRecord, share: float) -> int:
    return depth(late_profile(level.readout_profile), share)


# ---------------------------------------------------------------------------------- amplifying


def _typical_growth(level: RecurrentLevelRecord) -> float:
    growth = growth_of(level)
    parts = [v for v in (early(growth), middle(growth), late(growth)) if math.isfinite(v)]
    return max(parts, default=math.nan)


def _amplifying_issue(
    r: RecurrenceRecord, level: RecurrentLevelRecord, growth: float, threshold: float
) -> Issue:
    severity = IssueSeverity.MEDIUM
    if growth >= threshold**3:
        severity = IssueSeverity.CRITICAL if growth >= threshold**6 else IssueSeverity.HIGH
    profile = np.nanmedian(level.readout_profile, axis=0)
    back = max(len(profile) - 1 - int(np.nanargmax(profile)), 1)
    rate = growth ** (1 / back)
    doubling = max(math.ceil(math.log(2) / math.log(rate)), 1)
    exponent, radius = late(level.lyapunov), late(level.spectral_radius)
    chaotic = f", and states that are near part (Lyapunov exponent {exponent:.2g})" if exponent > 0 else ""
    return Issue(
        layer=r.name,
        layer_type=r.type,
        issue_type=IssueType.EXPLODING,
        severity=severity,
        description=f"Going back {back} steps in time the gradient{_of(r, level)} grows {growth:.3g} times: "
        f"it doubles within {doubling} step(s). The state transition has a spectral radius of "
        f"{radius:.3g}{chaotic}.",
        magnitude=growth,
        recommended_actions=amplifying_actions(r, level),
        metrics={
            "growth": growth,
            "total_growth": growth,
            "growth_at_start": early(growth_of(level)),
            "num_steps": back,
            "kept_per_step": rate,
            "steps_to_double": doubling,
            "spectral_radius": radius,
            "lyapunov": exponent,
            "level": level.level,
        },
        evidence=Evidence(developed=early(growth_of(level)) < growth / 10, growth=growth),
    )


# --------------------------------------------------------------------------------------- gated


@attrs.frozen(kw_only=True)
class _Stuck:
    """Gates of a level that are stuck: how many, which, and what they do."""

    level: RecurrentLevelRecord
    gate: str
    share: float
    text: str


def _stuck(level: RecurrentLevelRecord, share: float) -> _Stuck | None:
    """Return the gate of a level that is stuck most, by share of its values; None if none is."""
    walls = {"input": False, "output": False, "update": True}  # closed, closed, holding on for good
    found = []
    for gate in level.gates:
        saturated, idle, mean = late(gate.saturated_share), late(gate.idle_share), late(gate.mean)
        if gate.name in ("candidate", "state"):
            found.append((saturated, gate.name, "saturated: its tanh passes no gradient on"))
        elif gate.name in walls and (mean > 0.5) is walls[gate.name]:
            what = "never writes" if gate.name != "output" else "lets nothing out"
            found.append((idle, gate.name, f"shut (mean {mean:.2g}): it {what}"))
    worst = max(found, default=(0.0, "", ""), key=lambda entry: np.nan_to_num(entry[0]))
    if not worst[0] >= share:
        return None
    return _Stuck(level=level, gate=worst[1], share=worst[0], text=worst[2])


def _shut(level: RecurrentLevelRecord, share: float) -> _Stuck | None:
    """Return the keeping gate of a level that forgets, if its sigmoid is at its end and cannot open."""
    keep = level.gate("forget") or level.gate("update")
    if keep is None or not late(keep.saturated_share) >= share:
        return None
    text = f"shut (mean {late(keep.mean):.2g}): it keeps nothing of the state, and has no slope to learn by"
    return _Stuck(level=level, gate=keep.name, share=late(keep.saturated_share), text=text)


def _stuck_issue(flow: Flow, r: RecurrenceRecord, stuck: _Stuck, severe_share: float) -> Issue:
    gate = stuck.level.gate(stuck.gate)
    assert gate is not None
    first = _first_share(gate)
    learned = loss_fell(flow.record)
    severity = IssueSeverity.HIGH if stuck.share >= severe_share else IssueSeverity.MEDIUM
    entering = middle(flow.layers[node_name(r.name)].input_rms)
    trend = f" It was {first:.0%} in the first steps." if stuck.share > first + 0.2 else ""
    return Issue(
        layer=r.name,
        layer_type=r.type,
        issue_type=IssueType.SATURATION,
        severity=IssueSeverity.LOW if learned else severity,
        description=f"{stuck.share:.0%} of the values of its {stuck.gate} gate{_of(r, stuck.level)} are "
        f"{stuck.text}.{trend}",
        magnitude=stuck.share,
        recommended_actions=stuck_actions(r, stuck.level, stuck.gate, entering),
        metrics={
            "saturated_share": stuck.share,
            "gate": stuck.gate,
            "gate_mean": late(gate.mean),
            "first_steps": first,
            "input_rms": entering,
            "level": stuck.level.level,
        },
        evidence=Evidence(developed=stuck.share > first + 0.2),
    )


def _calmed(record: FlowRecord, r: RecurrenceRecord, issue: Issue) -> Issue:
    """An issue of gates that came to their ends on padding, which is told itself: LOW."""
    padded = behind_padding(record, r) if issue.evidence.developed else None
    if padded is None or not padded.severity.is_serious:
        return issue
    text = f"{issue.description} But it is read behind padding, and that is where most of these values are."
    return attrs.evolve(issue, severity=IssueSeverity.LOW, description=text)


def _first_share(gate: GateRecord) -> float:
    at_ends = gate.name in ("candidate", "state", "forget")
    return early(gate.saturated_share if at_ends else gate.idle_share)


def _forgets(r: RecurrenceRecord, level: RecurrentLevelRecord, closed: float) -> bool:
    keep = level.gate("forget") or level.gate("update")
    if keep is None or not late(keep.mean) < closed:
        return False
    steps = _length(level)
    return steps >= 1 / closed and _reach(level, 1e-2) < steps / 2


def _closed_issue(flow: Flow, r: RecurrenceRecord, level: RecurrentLevelRecord) -> Issue:
    keep = level.gate("forget") or level.gate("update")
    assert keep is not None
    mean, reach, steps = late(keep.mean), _reach(level, 1e-2), _length(level)
    return Issue(
        layer=r.name,
        layer_type=r.type,
        issue_type=IssueType.VANISHING,
        severity=IssueSeverity.LOW if loss_fell(flow.record) else IssueSeverity.MEDIUM,
        description=f"Its {keep.name} gate{_of(r, level)} is closed: it keeps {mean:.1%} of the state a "
        f"step, so that what is read at the last of {steps} steps reaches {reach} step(s) back.",
        magnitude=mean,
        recommended_actions=closed_actions(r, level, steps),
        metrics={
            "keep_gate": mean,
            "steps_to_percent": reach,
            "num_steps": steps,
            "level": level.level,
        },
        evidence=Evidence(roles=Role.ABSORBING),
    )
