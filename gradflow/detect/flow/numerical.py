"""NUMERICAL: a NaN or an Inf, and where it was born."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gradflow.detect.actions import numerical_actions
from gradflow.detect.flow.ends.swallowed import swallowed
from gradflow.detect.updates.poison import with_poison
from gradflow.detect.view import Flow, flow_of
from gradflow.detect.wiring import node_name
from gradflow.records import (
    Bools,
    Evidence,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    NumericalRecord,
    Role,
)

# Operations that leave the range of floats for reasons of their own; in others, such as a product or a
# sum, it is what enters that has become too large.
_OWN_DOMAIN = ("exp", "log", "sqrt", "div", "norm", "pow", "softmax", "attention", "acos", "mean", "where")
_HUGE = 1e15  # the square of a float32 overflows at 1e19


def numerical() -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of values that are not finite.

    Measured: at every step, whether the loss, each layer's output, each output gradient and each
    parameter's gradient are finite, and for a step in which one is not, its `NumericalRecord`: the layer,
    the operation, forward or backward, and the range of what entered it.

    Why this is evidence: a NaN has no other meaning. Both sides are looked at, for a loss may be finite
    over NaN gradients (the square root at zero, a branch that `where` hides), and gradients may be finite
    under a NaN loss. One step in twenty counts: in real training it ends the run.

    Looks alike and is not: the -inf of an attention mask or of forbidden actions, and any other Inf that
    reaches neither the loss nor a gradient.

    What is not finite may also be swallowed before the loss (x / inf is zero), and the gradient with it: told
    where all gradients, or those of the layer that it comes from, are exactly zero, by `swallowed`.

    Where weights and gradients were finite and the optimizer's step made them otherwise, that is told with
    the reason.

    There are no thresholds. CRITICAL where at least half of the steps, or all from one on, are broken, else
    HIGH.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        broken = broken_steps(flow)
        if not broken.any():
            return swallowed(flow)
        born = [n for n in record.numerics if n.step < len(broken) and broken[n.step]]
        by_layer: dict[str, list[NumericalRecord]] = {}
        for certificate in born:
            by_layer.setdefault(certificate.layer, []).append(certificate)
        if by_layer:
            issues = [_issue(flow, layer, found, broken) for layer, found in by_layer.items()]
        else:
            issues = [_unborn(flow, broken)]
        return [with_poison(issue, record) for issue in issues]

    return detector


def broken_steps(flow: Flow) -> Bools:
    """Return in which steps the loss or any gradient was not finite, shape (steps,)."""
    record = flow.record
    broken = ~np.isfinite(record.losses)
    for parameter in record.parameters:
        broken = broken | ~parameter.grad_finite
    for layer in record.layers:
        broken = broken | ~layer.grad_finite
    return broken


def _severity(broken: Bools) -> IssueSeverity:
    first = int(np.argmax(broken))
    lasting = bool(broken[first:].all()) and first < len(broken) - 1
    return IssueSeverity.CRITICAL if broken.mean() >= 0.5 or lasting else IssueSeverity.HIGH


def _issue(flow: Flow, layer: str, found: Sequence[NumericalRecord], broken: Bools) -> Issue:
    first = min(found, key=lambda n: n.step)
    steps = sorted({n.step for n in found})
    known = flow.layers.get(node_name(layer))
    finite = " The loss itself is finite." if first.loss_finite else ""
    if finite and first.phase == "forward":
        finite = " The loss leaves it out and is finite; the gradients of what was given it are not."
    line = f", called at {first.line}" if first.line else ""
    return Issue(
        layer=layer,
        layer_type=first.layer_type or (known.type if known else "model"),
        issue_type=IssueType.NUMERICAL,
        severity=_severity(broken),
        description=f"{_born(first)}{_range(first)}{line}. First at step {first.step}; "
        f"{int(broken.sum())} of {len(broken)} steps are not finite.{finite}",
        magnitude=float(broken.mean()),
        recommended_actions=numerical_actions(first),
        metrics={
            "op": first.op,
            "phase": first.phase,
            "value": first.value,
            "step": first.step,
            "steps": tuple(steps),
            "input_min": first.input_min,
            "input_max": first.input_max,
            "line": first.line,
            "loss_finite": first.loss_finite,
        },
        evidence=Evidence(roles=_roles(first), op=first.op, developed=first.step > 0),
    )


def _roles(birth: NumericalRecord) -> tuple[Role, ...]:
    """Whether the operation is at fault, or what came in from outside; neither where what entered it had
    become too large before."""
    entered = (abs(value) for value in (birth.input_min, birth.input_max))
    # No operation takes numbers that are huge: what made them is at fault.
    takes = not any(math.isfinite(value) and value > _HUGE for value in entered)
    # Before any step nothing has grown: a derivative taken within the model (`autograd.grad`) has no bound.
    slope = birth.op == "grad" and birth.step == 0
    if takes and (slope or any(word in birth.op.lower() for word in _OWN_DOMAIN)):
        return (Role.UNDEFINED,)
    return (Role.GIVEN,) if birth.phase in ("input", "parameter") else ()


def _born(birth: NumericalRecord) -> str:
    value = {"nan": "A NaN", "inf": "An Inf"}.get(birth.value, "A value that is not finite")
    if birth.phase == "input":
        return f"{value} is in the model's input, first seen here"
    if birth.phase == "parameter":
        return f"{value} is in its parameters"
    return f"{value} is born in {birth.op}{_quotient(birth)} in the {birth.phase} pass"


def _quotient(birth: NumericalRecord) -> str:
    """Return what finite numbers must have been divided by for such a value."""
    if "div" not in birth.op.lower() or not math.isfinite(birth.input_min + birth.input_max):
        return ""
    if birth.phase != "forward" or max(abs(birth.input_min), abs(birth.input_max)) > _HUGE:
        return ""
    return " (zero over zero)" if birth.value == "nan" else " (by zero, or next to it)"


def _range(birth: NumericalRecord) -> str:
    if not (np.isfinite(birth.input_min) or np.isfinite(birth.input_max)):
        return ""
    if birth.input_min == birth.input_max:
        return f" of {birth.input_min:.4g}"
    return f" of values from {birth.input_min:.4g} to {birth.input_max:.4g}"


def _unborn(flow: Flow, broken: Bools) -> Issue:
    """Without a `NumericalRecord`: the first layer whose output is not finite, else the last whose gradient
    is not, for that is the one nearest the loss."""
    step = int(np.argmax(broken))
    calls = sorted((c for c in flow.layers.values() if not c.composite), key=lambda c: c.order)
    forward = [c for c in calls if not c.output_finite[step]]
    backward = [c for c in calls if not c.grad_finite[step]]
    at = (forward or backward[-1:] or calls[-1:] or [None])[0]
    phase = "forward" if forward else "backward" if backward else "loss"
    where = {
        "forward": "Its output is the first that is not finite",
        "backward": "The gradient of its output is not finite, nearest the loss",
        "loss": "The loss is not finite, and all outputs are; it is the layer nearest the loss",
    }[phase]
    return Issue(
        layer=at.name if at else "",
        layer_type=at.type if at else "model",
        issue_type=IssueType.NUMERICAL,
        severity=_severity(broken),
        description=f"{where}, first at step {step}; {int(broken.sum())} of {len(broken)} steps are not "
        f"finite.",
        magnitude=float(broken.mean()),
        recommended_actions=numerical_actions(None),
        metrics={"phase": phase, "step": step, "loss_finite": bool(np.isfinite(flow.record.losses[step]))},
        evidence=Evidence(developed=step > 0),
    )
