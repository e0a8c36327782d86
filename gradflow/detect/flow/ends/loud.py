"""Outputs that are too loud for the loss: scores that start far too large, signals that have grown."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from gradflow.detect.actions import Actions
from gradflow.detect.evidence import (
    early,
    heads,
    late,
    row_gain,
)
from gradflow.detect.knowledge import falls, guesses
from gradflow.detect.view import Flow
from gradflow.records import (
    Evidence,
    Floats,
    Issue,
    IssueSeverity,
    IssueType,
    Role,
)

_LARGE_INPUTS = 30.0  # rms: standardised inputs have 1, and counts or pixels of some tens train all the same


def off_scale_of(flow: Flow, node: str) -> Floats:
    """Return |loss| / (‖gradient‖ ‖output‖) of a head, shape (steps,).

    For a squared error that is half of error / output. Its inverse is the part of the loss that the
    outputs could change, to first order, by changing as much as they are large.
    """
    layer = flow.layers[node]
    size = layer.output_rms * np.sqrt(np.maximum(layer.num_elements, 1))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.abs(flow.record.losses) / (flow.grad[node] * size)


def takes_scores(flow: Flow) -> bool:
    """Whether the loss is a cross entropy, of one kind or another."""
    kinds = (node.type.lower() for node in flow.wiring.nodes.values())
    return any("nll_loss" in kind or "cross_entropy" in kind or "log_softmax" in kind for kind in kinds)


def over_silence(flow: Flow) -> float:
    """Return how many times what zeros cost the first loss is; NaN where that is not known."""
    known, losses = flow.record.knowledge, flow.record.losses
    if known is None or not len(losses) or not 0 < known.silent < math.inf:
        return math.nan
    return float(losses[0]) / known.silent


def loud_heads(flow: Flow, above: float) -> list[Issue]:
    """Heads whose scores are so large at the start that their cross entropy is far above that of silence.

    Zeros for all classes cost ln k, or what the loss makes of it (a sum, weights). At the usual scale of
    initialisation the scores have a variance of about one, and cost half a unit more. Cosines times a scale,
    with a margin to make them harder, cost more by design, whatever the weights are: LOW where the run
    teaches the model all the same. Scores that are alike for all samples (`is_shifted`) are no louder than
    others: it is a constant that puts the softmax at its ends, see `sharp.shifted_scores`.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be.
    """
    known, over = flow.record.knowledge, over_silence(flow)
    if known is None or not above <= over < math.inf:
        return []
    losses, found = flow.record.losses, []
    severity = IssueSeverity.HIGH if over >= 2 * above else IssueSeverity.MEDIUM
    undone = known.share_left <= 0.25 and late(losses) <= known.silent
    if undone:
        severity = IssueSeverity.LOW
    taught = late(losses) <= 0.9 * early(losses) and not guesses(flow.record)
    for node in heads(flow):
        layer, ops = flow.layers[node], flow.wiring.ops_after(node)
        size = float(layer.output_rms[0])
        designed = taught and _scales_by_itself(flow, node)
        trained = flow.trainable(node) or flow.is_tied(node)
        if "nll_loss" not in ops or not trained or not size >= 3.0 or is_shifted(flow, node):
            continue
        gain = row_gain(flow, node, at=lambda norms: float(norms[0]))
        found.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.EXPLODING,
                severity=IssueSeverity.LOW if designed else severity,
                description=f"The first loss is {over:.3g} times what it costs to know nothing "
                f"({losses[0]:.3g}; scores of zero cost {known.silent:.3g}): its scores have rms {size:.3g}, "
                "so the model is sure before it has learned anything, and of the wrong classes. The rms of "
                f"its rows is {gain:.3g}; a usual initialisation has 0.6 to 1.4."
                + (" The run has undone it: its last outputs tell samples apart." if undone else "")
                + (" A constant in the layer makes them so, and the loss falls." if designed else ""),
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


def is_shifted(flow: Flow, node: str, alike: float = 0.1, usual: float = 3.0) -> bool:
    """Whether the first scores of a head are a constant, which its bias adds, or which its usual weights make
    of usual inputs as all of these share it: next to nothing of the scores differs between samples.

    Args:
        flow: the record along its wiring.
        node: of the head.
        alike: the part of the scores that differs, below which they are a constant.
        usual: rms of the rows of the weights and of what enters, up to which they are.
    """
    layer = flow.layers[node]
    if not len(layer.output_variation) or not layer.output_variation[0] < alike:
        return False
    biases = [p for p in flow.parameters_of(node) if len(p.shape) == 1 and len(p.norm)]
    added = max((float(p.norm[0]) / math.sqrt(p.num_elements) for p in biases), default=0.0)
    if added >= 0.7 * float(layer.output_rms[0]):
        return True
    gain = row_gain(flow, node, at=lambda norms: float(norms[0]))
    return gain < usual and len(layer.input_rms) > 0 and float(layer.input_rms[0]) <= usual


def _scales_by_itself(flow: Flow, node: str, times: float = 5.0) -> bool:
    """Whether a layer's first scores are larger than its weights make them of what enters, by a factor of its
    own: weights and inputs that have nothing to do with each other yet give the product of their sizes."""
    layer, entering = flow.layers[node], flow.layers[node].input_rms
    owned = [p for p in flow.parameters_of(node) if len(p.norm)]
    matrices = [p for p in owned if len(p.shape) == 2]
    if len(matrices) != 1 or not layer.shape or not len(entering):
        return False
    outputs = max(layer.shape[-1], 1)
    added = math.hypot(*(float(p.norm[0]) for p in owned if len(p.shape) < 2))
    made = (float(matrices[0].norm[0]) * float(entering[0]) + added) / math.sqrt(outputs)
    return float(layer.output_rms[0]) >= times * made > 0


def growing_signal(flow: Flow, above: float, times: float = 3.0) -> list[Issue]:
    """Layers that make the signal larger one after the other, until the loss is far above that of zeros.

    With weights of a usual size a layer gives as much as it gets in the first step; a norm layer is there to
    change that. One such layer alone is told by others, by its weights or as a head.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be.
        times: how many times what enters a layer what it gives is, from which it counts.
    """
    over, found = over_silence(flow), dict[str, list[str]]()
    for head in heads(flow) if above <= over < math.inf else ():
        before = flow.wiring.upstream(head)
        found[head] = [n for n in flow.layers if n in before and _gain(flow, n) >= times]
        if _gain(flow, head) >= times or len(found[head]) < 2:
            found[head] = []
    longest = max(found.values(), key=len, default=[])
    return [_grown(flow, node, longest, over) for node in longest]


def _gain(flow: Flow, node: str) -> float:
    """By how much a layer with a matrix makes the signal larger in the first step; NaN for others."""
    layer = flow.layers[node]
    if not flow.has_matrix(node) or not len(layer.input_rms) or not layer.input_rms[0] > 0:
        return math.nan
    return float(layer.output_rms[0] / layer.input_rms[0])


def _grown(flow: Flow, node: str, grown: list[str], over: float) -> Issue:
    layer = flow.layers[node]
    start, end = float(flow.layers[grown[0]].input_rms[0]), float(flow.layers[grown[-1]].output_rms[0])
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.EXPLODING,
        severity=IssueSeverity.HIGH,
        description=f"In the first step the signal grows from rms {layer.input_rms[0]:.3g} to "
        f"{layer.output_rms[0]:.3g} here, and from {start:.3g} to {end:.3g} over {len(grown)} layers that do "
        f"so: the first loss is {over:.3g} times what it costs to know nothing.",
        magnitude=end / start,
        recommended_actions=(
            f"Draw (or scale) the weights of {layer.name} by the root of their fan-in, sqrt(2 / fan_in) in "
            "front of a ReLU: each layer then gives as much as it gets.",
            "Or put a norm layer behind each.",
        ),
        metrics={"over_silence": over, "signal_growth": end / start},
        evidence=Evidence(growth=end / start),
    )


def loud_outputs(flow: Flow, above: float) -> list[Issue]:
    """Heads of a model whose outputs are so large that giving zeros would cost next to nothing beside it.

    The signal has grown on its way, beyond what the loss asks for: the outputs are larger than anything that
    enters a layer's first inputs, and still so at the end of the run. Small targets alone are no illness, nor
    are last layers that alone make the signal large while the loss falls (`_made_last`).
    Where what enters is large itself, the first layers are told; see `_loud_inputs`.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be, and a tenth of it the last.
    """
    known, over = flow.record.knowledge, over_silence(flow)
    if known is None or not known.scales or math.isnan(over):
        return []
    still = late(flow.record.losses) / known.silent
    firsts = {n: late(flow.layers[n].input_rms) for n in flow.layers if flow.wiring.is_first(n)}
    entering = max((rms for rms in firsts.values() if math.isfinite(rms)), default=math.inf)
    size = max(known.scales)
    if not (above <= over < math.inf and still >= above / 10 and size >= 3.0):
        return []
    if not size >= 3.0 * entering:
        return _loud_inputs(flow, firsts, over, still)
    if falls(flow.record) and _made_last(flow, entering, size):
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


def _made_last(flow: Flow, entering: float, size: float, most: float = 10.0) -> bool:
    """Whether it is the weights of the last layers alone that make outputs so large, by no more than steps
    cope with: one of gain 10 by itself is no growth, and neither are several side by side that are added up.

    Args:
        flow: the record along its wiring.
        entering: rms of what enters the model.
        size: rms of what comes out.
        most: rms of their rows, up to which steps cope.
    """
    ends = heads(flow)
    if not ends or not all(row_gain(flow, n, at=lambda norms: float(norms[0])) <= most for n in ends):
        return False
    given = math.hypot(*(late(flow.layers[n].output_rms) for n in ends))
    return given >= 0.5 * size and all(late(flow.layers[n].input_rms) < 3.0 * entering for n in ends)


def _loud_inputs(flow: Flow, firsts: Mapping[str, float], over: float, still: float) -> list[Issue]:
    """First layers of a model that guesses, which are given inputs so large that the loss is of their size.

    Args:
        flow: the record along its wiring.
        firsts: by first layer, the rms of what enters.
        over: the first loss over the cost of zeros.
        still: the last one likewise.
    """
    most = max((rms for rms in firsts.values() if math.isfinite(rms)), default=math.nan)
    if not most >= _LARGE_INPUTS or not guesses(flow.record):
        return []
    return [
        Issue(
            layer=flow.layers[node].name,
            layer_type=flow.layers[node].type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.HIGH,
            description=f"What enters has rms {rms:.3g}, and is off scale: the layers hand it on, so that "
            f"the first loss is {over:.3g} times what zeros would cost, the last {still:.3g} times.",
            magnitude=over,
            recommended_actions=(
                "Standardise the inputs feature by feature: subtract the mean, divide by the standard "
                "deviation (take the logarithm first of what spans several orders of magnitude).",
                f"Or put a norm layer before {flow.layers[node].name or 'the first layer'}.",
            ),
            metrics={"over_silence": over, "late_over_silence": still, "input_rms": rms},
            evidence=Evidence(roles=Role.OFF_SCALE, growth=over),
        )
        for node, rms in firsts.items()
        if rms >= 0.1 * most and flow.trainable(node)
    ]


def steep_outputs(flow: Flow, above: float) -> list[Issue]:
    """The head that a loss which zeros bring below zero is far above it for: a log likelihood that is sure.

    A density may cost less than nothing where it is right. One that starts as narrow as 1e-4 costs millions.
    Alike and not: losses that go to both sides of zero, beside which any cost is large.

    Args:
        flow: the record along its wiring.
        above: how many times the size of what zeros cost the last loss must be, and its square the first.
    """
    known, losses = flow.record.knowledge, flow.record.losses
    if known is None or not known.silent < 0 or not (losses > 0).all() or not len(losses):
        return []
    over, still = float(losses[0]) / -known.silent, late(losses) / -known.silent
    ends = [n for n in heads(flow) if flow.trainable(n) and off_scale_of(flow, n)[0] > 0]
    if not above**2 <= over < math.inf or not still >= above or not ends:
        return []
    layer = flow.layers[min(ends, key=lambda n: float(off_scale_of(flow, n)[0]))]
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.HIGH,
            description=f"The first loss is {losses[0]:.3g} and the last {late(losses):.3g}, where outputs "
            f"of zero would cost {known.silent:.3g}: its outputs, of rms {layer.output_rms[0]:.3g} at first, "
            "put the model where it is sure of what is wrong.",
            magnitude=over,
            recommended_actions=(
                f"Start {layer.name or 'the model'} so that its outputs are near zero (its bias too): a "
                "logarithm of a scale of zero is a scale of one.",
                "Or bound such a scale from below: F.softplus(x) + 0.01, log_scale.clamp_min(-5).",
            ),
            metrics={"over_silence": over, "late_over_silence": still, "silent_loss": known.silent},
            evidence=Evidence(growth=over),
        )
    ]


def impossible_targets(flow: Flow, slack: float = 0.01) -> list[Issue]:
    """Heads of a model whose binary cross entropy is given targets that are no probabilities.

    With targets between 0 and 1 it is never below zero. Beyond, it falls without end as the output grows, and
    so do the outputs. Where such targets are left out of the loss (marks of what is not known), it stays
    above zero.

    Args:
        flow: the record along its wiring.
        slack: how far beyond 0 and 1 is taken for rounding.
    """
    known, losses = flow.record.knowledge, flow.record.losses
    if known is None or not known.odds or not np.nanmin(losses, initial=0.0) < 0:
        return []
    low, high = known.odds
    if -slack <= low and high <= 1 + slack:
        return []
    return [
        Issue(
            layer=flow.layers[node].name,
            layer_type=flow.layers[node].type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.HIGH,
            description=f"The binary cross entropy is given targets from {low:.3g} to {high:.3g}, which are "
            "no probabilities: it has no lower bound then, and the outputs run away with it. The loss goes "
            f"from {losses[0]:.3g} to {losses[-1]:.3g}; with targets from 0 to 1 it is never below zero.",
            magnitude=max(high, 1 - low),
            recommended_actions=(
                f"Bring the targets between 0 and 1 (masks read from files: divide by {high:.3g}; marks of "
                "-1 and 1: (y + 1) / 2).",
                "If some mark what is not to count, leave those elements out of the loss.",
            ),
            metrics={"lowest_target": low, "highest_target": high},
            evidence=Evidence(roles=Role.OFF_SCALE, growth=max(high, 1 - low)),
        )
        for node in heads(flow)
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
