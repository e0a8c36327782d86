"""Matrices that are zero and not trained: nothing goes through them, ever."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.parts.peers import type_of
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType, ParameterRecord, Role


def held_at_zero() -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of weight matrices that are all zero and are not trained.

    Measured: the norm of every parameter in every step, and whether it requires a gradient.

    Why this is evidence: what such a layer gives is its bias, whatever enters, and nothing comes back through
    it. No step changes that: it is no start at zero, which the first step ends.

    Looks alike and is not: matrices that start at zero and are trained; biases and other vectors; layers that
    no step runs, which another detector tells; single numbers; a part that is frozen as a whole, where all
    that is trained gets its gradient (LOW: it takes part in nothing, and keeps nothing from learning).
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        called = {layer.module for layer in record.layers}
        starves = any(p.trainable and not np.any(p.grad_norm > 0) for p in record.parameters)
        severity = IssueSeverity.HIGH if starves else IssueSeverity.LOW
        for parameter in record.parameters:
            matrix = len(parameter.shape) >= 2 and parameter.num_elements > 1
            if matrix and not parameter.trainable and parameter.layer in called and _is_zero(parameter):
                yield _issue(parameter, type_of(record, parameter.layer), severity)

    return detector


def _is_zero(parameter: ParameterRecord) -> bool:
    return len(parameter.norm) > 0 and bool(np.all(parameter.norm == 0))


def _issue(parameter: ParameterRecord, kind: str, severity: IssueSeverity) -> Issue:
    short = parameter.name.rpartition(".")[2]
    return Issue(
        layer=parameter.layer,
        layer_type=kind,
        issue_type=IssueType.DEAD,
        severity=severity,
        description=f"All of its {short} is zero, and it is not trained: nothing that enters has an "
        "effect, nothing comes back through it, and no step will change that.",
        magnitude=0.0,
        recommended_actions=(
            f"Train it, {parameter.name}.requires_grad_(True), or give it values before freezing it.",
            "If it is to do nothing, leave it out.",
        ),
        metrics={"parameter": parameter.name},
        evidence=Evidence(roles=Role.BLOCKING, origin=parameter.layer),
    )
