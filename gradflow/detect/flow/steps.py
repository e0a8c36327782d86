"""What the optimizer's steps did: a parameter that one of them threw away, a number that they throw about."""

from __future__ import annotations

import numpy as np

from gradflow.detect.actions import unstable_actions
from gradflow.detect.knowledge import calm, guesses, has_learned, healed
from gradflow.detect.updates.readings import layer_of
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Floats, Issue, IssueSeverity, IssueType, ParameterRecord, Role


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


def flung(flow: Flow, times: float) -> list[Issue]:
    """The single number that its steps throw further than the loss can follow.

    A number that serves many outputs (a step size, a temperature, a gate) gets the sum of their gradients,
    and one rate for all parameters is too high for it. The step of such a number u over its gradient g tells
    that by itself: |g u|, by how much it alone should change the loss to first order, beside the loss. A
    positive loss cannot fall by more than it is, so where that reaches the loss (the first one, if that is
    larger: a run may be nearly solved), what the gradient says holds for no such step. That the number
    becomes several times as large or passes zero with it is the other half: an offset moves far beside its
    own size as well, but changes the loss by little. A step of Adam's has the size of its rate whatever the
    gradient is, so where it led to counts too: a loss that is several times as large behind it, and a slope
    there along the step that accounts for the rise. A run that has learned nonetheless was not thrown about:
    of a model of one or two numbers the first step is the whole way. Nor one whose loss is a small part of
    its start all the second half.

    Args:
        flow: the record along its wiring.
        times: how many times its size before its step was, at least.
    """
    record, losses = flow.record, np.abs(flow.record.losses)
    positive = np.isfinite(record.losses).all() and bool(np.all(record.losses >= 0))
    if not record.provenance.optimizer or not positive or len(losses) < 3:
        return []
    if calm(record) or has_learned(record) or healed(record):
        return []
    numbers = [p for p in record.parameters if p.num_elements == 1 and p.trainable and p.optimized]
    found = [(*_asked(flow, p, times), p) for p in numbers]
    asked_for, step, parameter = max(found, key=lambda f: f[0], default=(0.0, 0, None))
    if parameter is None or asked_for < 1:
        return []
    layer, kind = layer_of(record, parameter.name)
    name = parameter.name.rpartition(".")[2]
    return [
        Issue(
            layer=layer,
            layer_type=kind,
            issue_type=IssueType.UNSTABLE,
            severity=IssueSeverity.HIGH if guesses(record) else IssueSeverity.MEDIUM,
            description=f"Its steps throw its {name}, one number, about: that of step {step} took it from "
            f"size {parameter.norm[step]:.3g} to {parameter.norm[step + 1]:.3g}, {_followed(losses, step)}. "
            f"The slope of the loss along it makes that {asked_for:.3g} times what such a step can follow.",
            magnitude=asked_for,
            recommended_actions=(
                f"Scale the gradient of {parameter.name} down by the root of how many numbers it serves, or "
                "give it a smaller learning rate, in a parameter group of its own.",
                f"If it must stay above zero, learn its logarithm: {name} = log_{name}.exp().",
            ),
            metrics={"step": step, "asked": asked_for, "parameter": parameter.name},
            evidence=Evidence(roles=Role.JUMPING),
        )
    ]


def _followed(losses: Floats, step: int) -> str:
    return f"and the loss from {losses[step]:.3g} to {losses[step + 1]:.3g}"


def _asked(flow: Flow, parameter: ParameterRecord, times: float) -> tuple[float, int]:
    """How far beyond what the loss can follow the furthest step of a number went, and which step; 0 for none.

    By its gradient before the step, over the loss; or, where the loss is `times` as large behind it, by that
    behind the step, over half of the rise.
    """
    losses, size, gradient = np.abs(flow.record.losses), parameter.norm, np.nan_to_num(parameter.grad_norm)
    moved = _moved(flow, parameter)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        asked = gradient[:-1] * moved / np.maximum(losses, losses[0])[:-1]
        rise = np.diff(losses)
        risen = losses[1:] >= times * np.maximum(losses[:-1], losses[0])
        led = np.where(risen, gradient[1:] * moved / (0.5 * rise), 0.0)
    far = (size[:-1] > 0) & (moved >= size[:-1] * np.where(risen, 1.0, times))
    asked = np.where(far, np.nan_to_num(np.fmax(asked, led)), 0.0)
    step = int(np.argmax(asked))
    return float(asked[step]), step


def _moved(flow: Flow, parameter: ParameterRecord) -> Floats:
    """How far a number moved with each step: what was seen, else the least, as it may have passed zero."""
    moved, updates = np.abs(np.diff(parameter.norm)), flow.record.updates
    seen = [u for u in updates.parameters if u.name == parameter.name] if updates is not None else []
    for update in seen:
        for at, far in zip(updates.steps if updates else (), update.rms, strict=False):
            if at < len(moved) and far > moved[at]:
                moved[at] = far
    return moved


def _throw(parameter: ParameterRecord, jump: float, times: float) -> tuple[float, int] | None:
    """By how much a parameter grew in the one step that threw it, and which; None where none did."""
    size, gradient = parameter.norm, np.nan_to_num(parameter.grad_norm)
    largest = np.fmax.accumulate(size)[:-1]  # up to each step; NaN as long as nothing is known
    grown = (largest > 0) & (size[1:] >= times * largest)
    for step in (np.flatnonzero(grown[2:]) + 2).tolist():
        usual = float(np.median(gradient[:step]))
        if usual > 0 and gradient[step] >= jump * usual:
            return float(size[step + 1] / size[step]), step
    return None
