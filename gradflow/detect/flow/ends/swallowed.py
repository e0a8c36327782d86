"""NUMERICAL: an Inf or a NaN that is gone again before the loss, and has taken the gradient with it."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.evidence import late
from gradflow.detect.knowledge import came_knowing, has_learned
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, NumericalRecord, ParameterRecord, Role


def swallowed(flow: Flow) -> list[Issue]:
    """Return the issues of values that are not finite, were swallowed, and left gradients of exactly zero.

    Looks alike and is not: what a mask or a selection leaves out, while gradient arrives (all of the batch's
    nodes without neighbours, whose inverse degree is infinite); a model that has learned, and whose loss has
    come to zero.
    """
    record = flow.record
    births = [birth for birth in record.numerics if birth.swallowed_by]
    fallen = bool(len(record.losses)) and late(record.losses) == 0 < record.losses[0]
    if not births or fallen or came_knowing(record) or has_learned(record):
        return []
    every = [p for p in record.parameters if p.trainable and len(p.grad_norm)]
    if every and _is_silent(every):
        return [_issue(flow, births[0], len(every), whole=True)]
    found: dict[str, Issue] = {}
    for birth in births:
        own = [p for p in flow.parameters_of(node_name(birth.layer)) if p.trainable and len(p.grad_norm)]
        if birth.layer and own and _is_silent(own):
            found.setdefault(birth.layer, _issue(flow, birth, len(own), whole=False))
    return list(found.values())


def _is_silent(parameters: list[ParameterRecord]) -> bool:
    """Whether no gradient arrived at any of them in the last step."""
    return all(p.grad_norm[-1] == 0 for p in parameters)


def _issue(flow: Flow, birth: NumericalRecord, number: int, *, whole: bool) -> Issue:
    known = flow.layers.get(node_name(birth.layer))
    value = {"nan": "A NaN", "inf": "An Inf"}.get(birth.value, "A value that is not finite")
    of = f" of {birth.input_min:.6g}" if birth.input_min == birth.input_max else ""
    if not of and math.isfinite(birth.input_min + birth.input_max):
        of = f" of values from {birth.input_min:.4g} to {birth.input_max:.4g}"
    line = f", called at {birth.line}" if birth.line else ""
    whose = f"all {number} parameters" if whole else f"the {number} parameters of {birth.layer}"
    losses = flow.record.losses
    silent = np.all([p.grad_norm == 0 for p in flow.record.parameters if p.trainable], axis=0)
    return Issue(
        layer=birth.layer,
        layer_type=known.type if known is not None else birth.layer_type,
        issue_type=IssueType.NUMERICAL,
        severity=IssueSeverity.CRITICAL if whole and np.mean(silent) >= 0.5 else IssueSeverity.HIGH,
        description=f"{value} is born in {birth.op}{of} in the forward pass{line}, and {birth.swallowed_by} "
        f"swallows it: what comes out is finite, and its slope there is exactly zero. So the loss is finite "
        f"({losses[-1]:.3g}), nothing warns, and the gradient of {whose} is exactly zero.",
        magnitude=1.0,
        recommended_actions=(
            f"Keep {birth.op} inside the range of its dtype: compute it in float32 (float16 ends at 65504, "
            "which sums and counts of a batch exceed), or take means of parts and not a sum.",
            f"Do not let {birth.swallowed_by} hide what is not finite: a division by it, exp(-inf), a clamp "
            "and nan_to_num take the gradient away with it. Make its argument safe before.",
        ),
        metrics={
            "op": birth.op,
            "phase": birth.phase,
            "value": birth.value,
            "step": birth.step,
            "input_min": birth.input_min,
            "input_max": birth.input_max,
            "line": birth.line,
            "swallowed_by": birth.swallowed_by,
        },
        evidence=Evidence(roles=(Role.UNDEFINED,), op=birth.op),
    )
