"""What the optimizer's steps did: a parameter that one of them threw away."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.actions import unstable_actions
from gradflow.detect.knowledge import guesses
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, ParameterRecord, Role


def thrown(flow: Flow, jump: float, times: float) -> list[Issue]:
    """The parameter that a single step has thrown furthest, in a run that has come to nothing.

    A parameter that starts at zero, or a tiny gate, grows as much with its first step; so the gradient that
    threw it must have been a jump over its own past, and the model must guess at the end.

    Args:
        flow: the record along its wiring.
        jump: how many times its usual gradient the one that threw it was.
        times: how many times its size it had after the step.
    """
    if not flow.record.provenance.optimizer or not guesses(flow.record):
        return []
    worst: tuple[float, int, str, ParameterRecord] | None = None
    for node, layer in flow.layers.items():
        for parameter in () if layer.composite else flow.trainable(node):
            found = _throw(parameter, jump, times)
            if found is not None and (worst is None or found[0] > worst[0]):
                worst = (*found, node, parameter)
    if worst is None:
        return []
    grown, step, node, parameter = worst
    layer = flow.layers[node]
    over = float(parameter.grad_norm[step] / np.median(parameter.grad_norm[:step]))
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.UNSTABLE,
            severity=IssueSeverity.HIGH,
            description=f"The update of step {step} made its {parameter.name.rpartition('.')[2]} {grown:.3g} "
            f"times as large ({parameter.norm[step]:.3g} to {parameter.norm[step + 1]:.3g}): its gradient "
            f"was {over:.3g} times what it had been. The model has known nothing since.",
            magnitude=grown,
            recommended_actions=(
                f"Give {parameter.name} a smaller learning rate, in a parameter group of its own, or scale "
                "its gradient: where one number serves many outputs, their gradients add up in it.",
                *unstable_actions(flow, node, over),
            ),
            metrics={"step": step, "grown": grown, "ratio": over, "parameter": parameter.name},
            evidence=Evidence(roles=Role.JUMPING),
        )
    ]


def _throw(parameter: ParameterRecord, jump: float, times: float) -> tuple[float, int] | None:
    """By how much a parameter grew in the one step that threw it, and which; None where none did."""
    size, gradient = parameter.norm, np.nan_to_num(parameter.grad_norm)
    for step in range(2, len(size) - 1):
        usual = float(np.median(gradient[:step]))
        largest = float(np.nanmax(size[: step + 1])) if size[: step + 1].size else math.nan
        if usual > 0 and gradient[step] >= jump * usual and largest > 0 and size[step + 1] >= times * largest:
            return float(size[step + 1] / size[step]), step
    return None
