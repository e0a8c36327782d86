"""Matrices whose whole gradient is rounding, since its parts cancel by mathematics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import ParameterRecord, ReachRecord, Reason

OF_CALLS, OF_SAMPLES = "sum of its calls", "sum over its samples"  # in functional/reach/rounding.py
_STEPS = 5  # of a run, after which a start has ended
_FAINT = 1e-4  # of the largest gradient of a step; rounding is below 1e-6 in float32

EQUAL_CALLS = (
    "a gradient arrives at what each of its calls returns, and over the calls it cancels: what is left is "
    "rounding, whose direction changes with any factor on the loss. The calls give the same, and what "
    "follows takes only the difference (a softmax between them weighs all alike), so that it has no say and "
    "no step ends that",
    (
        "Give each of the alternatives that are weighed against one another a score of its own: a layer for "
        "each, or one layer with as many outputs as there are alternatives.",
        "If one layer is to score them all, call it on each alternative's own features, not on what they "
        "share.",
    ),
)
EQUAL_OUTPUTS = (
    "what is left is rounding, whose direction changes with any factor on the loss. What follows takes its "
    "output in such a way that the parts cancel: it comes out the same whatever the layer says (the same "
    "score for every alternative of a softmax, a number that is added and taken off again), and no step ends "
    "that",
    (
        "Follow its output: where several numbers are weighed against one another, each needs one of its "
        "own, so let the layer give as many as there are alternatives.",
        "Look for a term that is taken off again: a difference of two calls, a mean that is subtracted, a "
        "softmax over one and the same number.",
    ),
)


def last_to_cancel(flow: Flow, part: ReachRecord) -> str:
    """Return of the layers that cancel at the place where a part does the last; "" if the part does not."""
    account = flow.record.reach
    if account is None or not _cancels(flow, part):
        return ""
    if part.op == OF_CALLS:
        return part.layer
    if _into_others(flow, part):
        return ""
    if not part.op:
        return part.layer
    names = {p.layer for p in account.unreached if p.at == part.at and _cancels(flow, p)}
    order = {name: flow.layers[node].order for name in names if (node := node_name(name)) in flow.layers}
    return max(order, key=lambda name: order[name], default=part.layer)


def _cancels(flow: Flow, part: ReachRecord) -> bool:
    """Whether a part is zero by mathematics, of a matrix that nothing but zeros and rounding ever reached."""
    account, known = flow.record.reach, flow.parameters.get(part.parameter)
    if part.reason is not Reason.BY_MATHEMATICS or len(part.shape) < 2 or account is None or known is None:
        return False
    if flow.is_table(node_name(part.layer)):
        return False
    largest = np.fmax.reduce([p.grad_norm for p in flow.record.parameters])
    faint = bool((known.grad_norm <= _FAINT * largest).all())
    if part.op in (OF_CALLS, "", OF_SAMPLES):
        return faint and part.op != OF_SAMPLES and _is_silenced(flow, part, largest)
    faint = faint and sum(p.num_elements for p in account.of(part.parameter)) >= part.size
    if not faint or "norm" in part.op.lower():  # what a norm goes over is no matter of the data
        return faint
    return not any((twin.grad_norm > _FAINT * largest).any() for twin in _twins(flow, known, part.op))


def _is_silenced(flow: Flow, part: ReachRecord, largest: float) -> bool:
    """Whether nothing of a layer learns, in a run with steps that would have ended a start, and no layer of
    the same make that feeds the same kinds of operation does.

    The direction of a weight that is one number cancels, and its length learns; and what cancels for these
    data (one neighbour of a kind) need not for others.
    """
    if not flow.record.provenance.optimizer or flow.record.steps < _STEPS:
        return False
    own = [p for p in flow.record.parameters if p.layer == part.layer and p.trainable and p.optimized]
    if any((p.grad_norm > _FAINT * largest).any() for p in own):
        return False
    ops, known = set(flow.wiring.ops_after(node_name(part.layer))), flow.parameters[part.parameter]
    twins = (t for op in ops for t in _twins(flow, known, op) if ops == set(flow.wiring.ops_after(t.layer)))
    return not any((twin.grad_norm > _FAINT * largest).any() for twin in twins)


def _into_others(flow: Flow, part: ReachRecord) -> bool:
    """Whether all that a layer feeds cancels as well, so that it does so there, and not here."""
    account, fed = flow.record.reach, flow.wiring.after(node_name(part.layer))
    layers = {flow.layers[node].module for node in fed if node in flow.layers} - {part.layer}
    cancel = {p.layer for p in account.unreached if _cancels(flow, p)} if account is not None else set()
    return bool(layers) and layers <= cancel


def _twins(flow: Flow, parameter: ParameterRecord, op: str) -> Iterator[ParameterRecord]:
    """Yield the parameters of one shape whose names differ from a parameter's in one part, and whose layers
    feed the same kind of operation.

    Where one of them learns, it is not the make that cancels but what is given: a softmax over the neighbours
    of a kind, of which each node of these data has one.
    """
    parts = parameter.name.split(".")
    for other in flow.record.parameters:
        names = other.name.split(".")
        alike = other.shape == parameter.shape and len(names) == len(parts) and names[-1] == parts[-1]
        alike = alike and sum(a != b for a, b in zip(names, parts, strict=True)) == 1
        if alike and op in flow.wiring.ops_after(other.layer):
            yield other
