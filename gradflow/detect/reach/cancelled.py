"""Matrices whose whole gradient is rounding, since its parts cancel by mathematics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import ParameterRecord, ReachRecord, Reason

_FAINT = 1e-4  # of the largest gradient of a step; rounding is below 1e-6 in float32


def last_to_cancel(flow: Flow, part: ReachRecord) -> str:
    """Return of the layers that cancel at the place where a part does the last; "" if the part does not."""
    account = flow.record.reach
    if account is None or not _cancels(flow, part):
        return ""
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
    whole = sum(p.num_elements for p in account.of(part.parameter)) >= part.size
    faint = whole and bool((known.grad_norm <= _FAINT * largest).all())
    if not faint or "norm" in part.op.lower():  # what a norm goes over is no matter of the data
        return faint
    return not any((twin.grad_norm > _FAINT * largest).any() for twin in _twins(flow, known, part.op))


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
