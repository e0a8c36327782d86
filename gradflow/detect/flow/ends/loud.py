"""Outputs that are too loud for the loss: scores that start far too large, signals that have grown."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.actions import Actions
from gradflow.detect.evidence import (
    heads,
    late,
    row_gain,
)
from gradflow.detect.view import Flow
from gradflow.records import (
    Evidence,
    Floats,
    Issue,
    IssueSeverity,
    IssueType,
)


def off_scale_of(flow: Flow, node: str) -> Floats:
    """Return |loss| / (‖gradient‖ ‖output‖) of a head, shape (steps,).

    For a squared error that is half of error / output. Its inverse is the part of the loss that the
    outputs could change, to first order, by changing as much as they are large.
    """
    layer = flow.layers[node]
    size = layer.output_rms * np.sqrt(np.maximum(layer.num_elements, 1))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.abs(flow.record.losses) / (flow.grad[node] * size)


def loud_heads(flow: Flow, above: float) -> list[Issue]:
    """Heads whose scores are so large at the start that their cross entropy is far above that of silence.

    Zeros for all classes cost ln k, or what the loss makes of it (a sum, weights). At the usual scale of
    initialisation the scores have a variance of about one, and cost half a unit more.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be.
    """
    known, losses = flow.record.knowledge, flow.record.losses
    if known is None or not len(losses) or not 0 < known.silent < math.inf:
        return []
    over = float(losses[0]) / known.silent
    if not above <= over < math.inf:
        return []
    found = []
    for node in heads(flow):
        layer, ops = flow.layers[node], flow.wiring.ops_after(node)
        size = float(layer.output_rms[0])
        trained = flow.trainable(node) or flow.is_tied(node)
        if "nll_loss" not in ops or not trained or not size >= 3.0:
            continue
        gain = row_gain(flow, node, at=lambda norms: float(norms[0]))
        found.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.EXPLODING,
                severity=IssueSeverity.HIGH if over >= 2 * above else IssueSeverity.MEDIUM,
                description=f"The first loss is {over:.3g} times what it costs to know nothing "
                f"({losses[0]:.3g}; scores of zero cost {known.silent:.3g}): its scores have rms {size:.3g}, "
                "so the model is sure before it has learned anything, and of the wrong classes. The rms of "
                f"its rows is {gain:.3g}; a usual initialisation has 0.6 to 1.4.",
                magnitude=over,
                recommended_actions=_loud_actions(layer.name, size, gain),
                metrics={
                    "over_silence": over,
                    "silent_loss": known.silent,
                    "output_rms": size,
                    "row_gain": gain,
                },
                evidence=Evidence(growth=over),
            )
        )
    return found


def loud_outputs(flow: Flow, above: float) -> list[Issue]:
    """Heads of a model whose outputs are so large that giving zeros would cost next to nothing beside it.

    The signal has grown on its way, beyond what the loss asks for: the outputs are larger than anything that
    enters a layer's first inputs, and still so at the end of the run. Small targets alone are no illness.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be, and a tenth of it the last.
    """
    known, losses = flow.record.knowledge, flow.record.losses
    if known is None or not len(losses) or not 0 < known.silent < math.inf or not known.scales:
        return []
    over, still = float(losses[0]) / known.silent, late(losses) / known.silent
    firsts = [flow.layers[n].input_rms for n in flow.layers if flow.wiring.is_first(n)]
    entering = max((late(rms) for rms in firsts if math.isfinite(late(rms))), default=math.inf)
    size = max(known.scales)
    if not (above <= over < math.inf and still >= above / 10 and size >= 3.0 * max(entering, 1.0)):
        return []
    return [
        Issue(
            layer=flow.layers[node].name,
            layer_type=flow.layers[node].type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.HIGH,
            description=f"The first loss is {over:.3g} times what outputs of zero would cost, and the last "
            f"{still:.3g} times: the signal grows on its way through the model, from rms {entering:.3g} of "
            f"what enters to {size:.3g} of what comes out, far beyond what the loss asks for.",
            magnitude=over,
            recommended_actions=(
                "Draw the weights so that each layer keeps the scale of its input: variance 1 / fan_in of "
                "the layer that they serve. Weights that another layer generates have the fan-in of what "
                "they are applied to.",
                "Or put a norm layer before the last one.",
            ),
            metrics={"over_silence": over, "late_over_silence": still, "output_rms": size},
            evidence=Evidence(growth=over),
        )
        for node in heads(flow)
        if flow.trainable(node)
    ]


def _loud_actions(layer: str, size: float, gain: float) -> Actions:
    """For a head whose scores start far too large."""
    first = (
        f"Draw the weights of {layer} at their usual scale, so that scores start with rms 1, not {size:.2g} "
        f"(nn.init.normal_({layer}.weight, std={layer}.in_features ** -0.5))."
        if not gain < 3.0
        else f"Normalise what enters {layer} (a LayerNorm before it): its weights are of a usual size, and "
        f"its scores have rms {size:.2g}."
    )
    return (first, f"Or divide its scores by a constant, {size:.2g}, before the loss.")
