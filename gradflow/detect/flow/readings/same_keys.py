"""Attention whose keys are all one: what its queries and keys get is rounding, and told of what they read."""

from __future__ import annotations

import numpy as np

from gradflow.detect.evidence import late
from gradflow.detect.view import Flow
from gradflow.records import AttentionRecord

ROUNDING = 1e-5  # distance of scores, and share of the gradient at the values; float32 leaves 1e-7 of either


def reads_one(layer: AttentionRecord, apart: float = 0.1, rounding: float = ROUNDING) -> bool:
    """Whether no query has ever told one key from another, nor learned to, while queries differ.

    Args:
        layer: what was measured of an attention layer.
        apart: residual of the queries' positions from which on they differ.
        rounding: distance of scores, and share of the gradient at the values, that may be rounding.
    """
    peak, found = layer.scores.logit_peak, layer.gradients
    if not (np.isfinite(peak).any() and np.nanmax(peak) <= rounding):
        return False
    if not (late(layer.num_keys) >= 2 and late(layer.input_residual) >= apart):
        return False
    heard = np.fmax(found.query_grad, found.key_grad) <= rounding * found.value_grad
    known = np.isfinite(found.value_grad) & (found.value_grad > 0)
    there = late(found.query_norm) > 0 and late(found.key_norm) > 0  # a start at zero is another matter
    return bool(known.any() and heard[known].all() and there)


def never_asked(flow: Flow) -> frozenset[str]:
    """Return the layer calls inside of such attention that get next to nothing beside others inside of it."""
    found = set[str]()
    for layer in filter(reads_one, flow.record.transformer.attention):
        inside = [n for n in flow.grad if flow.layers[n].module.startswith(f"{layer.name}.")]
        most = max((late(flow.grad[n]) for n in inside if late(flow.grad[n]) > 0), default=0.0)
        found.update(n for n in inside if late(flow.grad[n]) <= ROUNDING * most)
    return frozenset(found)
