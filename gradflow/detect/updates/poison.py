"""A step that made NaN or Inf of finite gradients and finite weights, and why it did."""

from __future__ import annotations

import attrs
import numpy as np

from gradflow.detect.updates.readings import is_adaptive
from gradflow.records import FlowRecord, Issue

_LEAST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}


def with_poison(issue: Issue, record: FlowRecord) -> Issue:
    """Return an issue of parameters that are not finite with the step that made them so, if one did.

    A step has where both weights and gradients were finite before it. In Adam and its kin, a half-precision
    gradient below 2e-4 has a square of zero, and an ε of 1e-8 is zero too in that dtype: what is left is 0/0.

    Args:
        issue: of type NUMERICAL.
        record: the record.
    """
    made = [
        (p, at) for p in record.parameters if (at := _made_at(p.norm, p.grad_finite)) >= 0 and p.optimized
    ]
    module = issue.layer.partition("@")[0]
    own = [(p, at) for p, at in made if p.layer == module]
    if record.updates is None or not (own or (made and issue.metrics.get("phase") == "parameter")):
        return issue
    parameter, step = (own or made)[0]
    text = (
        f" The step of {record.provenance.optimizer} after step {step} made it: weights and gradient of "
        f"{parameter.name} were finite before."
    )
    known = {u.name: u for u in record.updates.parameters}.get(parameter.name)
    actions = issue.recommended_actions
    if known is not None and is_adaptive(record) and known.epsilon < _LEAST.get(parameter.dtype, 0.0) / 2:
        text += (
            f" Its ε, {known.epsilon:.1g}, is 0 in {parameter.dtype}, and so is the square of a small "
            "gradient: it divides by zero."
        )
        actions = (
            "Keep the weights in float32 and compute in half precision: torch.autocast(...), with a "
            "torch.amp.GradScaler().",
            f"Or an ε that {parameter.dtype} can hold: eps=1e-4.",
            *actions,
        )
    return attrs.evolve(
        issue,
        description=issue.description + text,
        recommended_actions=actions,
        metrics={**issue.metrics, "made_by_step": step, "parameter": parameter.name},
    )


def _made_at(norm: np.ndarray, grad_finite: np.ndarray) -> int:
    """Return the step whose update made a parameter not finite; −1 if none did."""
    broken = ~np.isfinite(norm)
    at = int(np.argmax(broken)) if broken.any() else 0
    return at - 1 if at > 0 and bool(grad_finite[at - 1]) else -1
