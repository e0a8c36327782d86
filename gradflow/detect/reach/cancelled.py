"""Matrices whose whole gradient is rounding, since its parts cancel by mathematics."""

from __future__ import annotations

import numpy as np

from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import ReachRecord, Reason

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
    return whole and bool((known.grad_norm <= _FAINT * largest).all())
