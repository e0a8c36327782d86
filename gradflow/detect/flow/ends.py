"""Between the last layers and the loss: outputs too loud for it, outputs it does not hear, outputs all alike.

What the layers before do is told by the detectors of each type, which call these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradflow.detect.actions import Actions
from gradflow.detect.evidence import (
    early,
    heads,
    last_layers,
    late,
    loss_fell,
    row_gain,
)
from gradflow.detect.knowledge import guesses
from gradflow.detect.view import Flow
from gradflow.records import (
    Evidence,
    Floats,
    Issue,
    IssueSeverity,
    IssueType,
    KnowledgeRecord,
    Role,
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


# ------------------------------------------------------------------------------------- too loud


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
        if "nll_loss" not in ops or not flow.trainable(node) or not size >= 3.0:
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


# ------------------------------------------------------------------------------------- not heard


def unheard(flow: Flow, leverage: float, kept: float) -> list[Issue]:
    """Heads of a model that guesses, whose outputs the loss hardly depends on since operations behind them
    hand back next to nothing.

    Undecided (INFO) until the flow through those operations has been measured.

    Args:
        flow: the record along its wiring.
        leverage: largest part of the loss that the outputs can change by changing as much as they are large.
        kept: largest part of the gradient that the operations keep.
    """
    ends = heads(flow)
    moved = [1.0 / late(off_scale_of(flow, node)) for node in ends if late(off_scale_of(flow, node)) > 0]
    if not moved or len(moved) < len(ends) or not max(moved) < leverage:
        return []
    if not guesses(flow.record) or loss_fell(flow.record):
        return []
    measured = flow.record.graph_record is not None and flow.record.graph_record.measured
    found = []
    for node, part in zip(ends, moved, strict=True):
        share, op = _kept_behind(flow, node) if measured else (math.nan, "")
        if measured and not share < kept:
            continue
        found.append(_unheard_issue(flow, node, part, share, op))
    return found


def _kept_behind(flow: Flow, node: str) -> tuple[float, str]:
    """The part of the gradient that the operations between a layer and the loss hand on to it, and the node
    of the one that keeps least. Those that give one number form the loss, and are left out."""
    wires, least, op, at, seen = flow.wiring, math.inf, "", node, {node}
    total = 1.0
    while behind := [s for s in wires.succs.get(at, ()) if s not in seen and wires.nodes[s].kind == "op"]:
        following = max(behind, key=lambda s: (_known(wires.nodes[s].input_grad_norm), s))
        seen.add(following)
        here = wires.nodes[following]
        if here.num_elements <= 1:
            break
        arrives, hands = _known(here.grad_norm), _known(here.input_grad_norm)
        if arrives > 0:
            total *= min(hands / arrives, 1.0)
            if hands / arrives < least:
                least, op = hands / arrives, following
        at = following
    return total, op


def _known(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else 0.0


def _unheard_issue(flow: Flow, node: str, part: float, share: float, op: str) -> Issue:
    layer, wires = flow.layers[node], flow.wiring
    decided = math.isfinite(share)
    name = wires.nodes[op].type if op else ""
    others = [s for s in wires.sources.get(op, ()) if wires.nodes[s].kind == "input"]
    by = f" by {' and '.join(others)}, which comes from the batch" if others else ""
    between = (
        f" The operations behind it hand back {share:.1e} of the gradient that reaches them; most is lost in "
        f"`{name}`{by}."
        if decided
        else ""
    )
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.VANISHING,
        severity=(IssueSeverity.HIGH if decided else IssueSeverity.INFO),
        description=f"The loss hardly depends on its output: if that changed by as much as it is large, the "
        f"loss would change by {part:.1e} of itself, and the model guesses.{between}",
        magnitude=share if decided else part,
        recommended_actions=_unheard_actions(layer.name, name, others),
        metrics={"leverage": part, "kept_behind": share, "op": op},
        evidence=Evidence(roles=Role.ABSORBING if decided else (), op=op, undecided=not decided),
    )


# ------------------------------------------------------------------------------------- all alike


def silenced(flow: Flow) -> list[Issue]:
    """Heads of a model whose outputs are exactly zero for all samples, and which get no gradient any more.

    The last activation is off everywhere, and the loss costs what zeros cost.
    """
    known = flow.record.knowledge
    if known is None or not known.scales or max(known.scales) > 0 or not guesses(flow.record):
        return []
    if not flow.record.provenance.optimizer:  # a start from zero ends with the first step
        return []
    found = []
    for module, node in {flow.layers[n].module: n for n in reversed(last_layers(flow))}.items():
        layer = flow.layers[node]
        wanted = [p for p in flow.trainable(node) if p.reached.any()]
        if not wanted or late(layer.output_rms) == 0:
            continue
        zero = [np.nan_to_num(p.grad_norm) == 0 for p in wanted]
        if not all(z[-1] and z.mean() >= 0.8 for z in zero):  # a rare sample may still pass
            continue
        ops = ", ".join(dict.fromkeys(flow.wiring.ops_after(node)))
        found.append(
            Issue(
                layer=module,
                layer_type=layer.type,
                issue_type=IssueType.DEAD,
                severity=IssueSeverity.HIGH,
                description="What comes out of the model is exactly zero for every sample, though its own "
                f"output has rms {late(layer.output_rms):.3g}: what follows it ({ops or 'an activation'}) is "
                f"off, so no gradient comes back, and the loss is the {known.silent:.3g} that zeros cost.",
                magnitude=float(sum(p.num_elements for p in wanted)),
                recommended_actions=(
                    f"Let what follows {module or 'the model'} pass something below zero as well (softplus, "
                    "a leaky rectifier), or start its bias above zero.",
                    "Weigh less what drives the outputs to zero: a penalty on their size, weight decay.",
                ),
                metrics={"why": "silent output", "silent_loss": known.silent},
                evidence=Evidence(roles=Role.BLOCKING, developed=bool(np.any(wanted[0].grad_norm > 0))),
            )
        )
    return found


def collapsed(flow: Flow, alike: float) -> list[Issue]:
    """Two outputs that are compared with each other and are the same for all samples: a collapsed embedding.

    Where a model makes its own targets (two views, a teacher), giving the same for every input meets the loss
    and teaches nothing: the loss of a constant output is no larger than that of the model. Seen in the
    outputs of the last step, and in the first step's layers already; where the variation rises within the
    run, the model is about to learn.

    Args:
        flow: the record along its wiring.
        alike: largest part of the outputs that differs between samples.
    """
    known = flow.record.knowledge
    if known is None or not known.averaged <= known.loss + 1e-3 * abs(known.loss):
        return []
    rows = [(s, v) for s, v in zip(known.shapes, known.variations, strict=True) if len(s) > 1 and s[-1] > 1]
    same = [v for s, v in rows if sum(s == other for other, _ in rows) >= 2]
    if len(known.shapes) == 1 and _compares_samples(known):
        same = [*known.variations] * 2
    elif guesses(flow.record) and _agree(known):
        alike *= 2  # what differs between samples is of no use to the loss
    if len(same) < 2 or not max(same) < alike:
        return []
    last = max(heads(flow), key=lambda node: flow.layers[node].order, default="")
    lost = _first_alike(flow, alike) or ((last, 1.0) if last else None)
    if lost is None:
        return []
    layer, before = flow.layers[lost[0]], lost[1]
    now, first = late(layer.output_variation), early(layer.output_variation)
    if now > 1.5 * first:
        return []
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.BOTTLENECK,
            severity=IssueSeverity.HIGH,
            description=f"What comes out is the same for all samples: only {now:.1e} of its output differs "
            f"between them, after {before:.2g} before, and {max(same):.1e} of the outputs that the loss "
            f"compares. With the same output for all samples the loss is {known.averaged:.3g}, no more than "
            f"the {known.loss:.3g} of the model: it is met without telling one input from another.",
            magnitude=now,
            recommended_actions=_alike_actions(layer.name),
            metrics={"variation": now, "variation_before": before, "constant_loss": known.averaged},
        )
    ]


def _compares_samples(known: KnowledgeRecord) -> bool:
    """Whether the loss asks of outputs only how samples differ: all constants cost the same, zeros too."""
    return math.isclose(known.averaged, known.silent, rel_tol=1e-5) and math.isclose(
        known.loss, known.averaged, rel_tol=1e-2
    )


def _agree(known: KnowledgeRecord) -> bool:
    """Whether the outputs are as good as a constant, or differ by little of their size from one another."""
    near = 0 <= known.loss <= 0.05 * min(known.scales) ** 2
    return near or math.isclose(known.loss, known.averaged, rel_tol=1e-2)


def _first_alike(flow: Flow, alike: float) -> tuple[str, float] | None:
    """The first layer whose rows are alike, and the largest variation upstream, three times it or more."""
    most: dict[str, float] = {}
    found: dict[str, float] = {}
    for node in flow.wiring.order:
        preds = flow.wiring.preds[node]
        most[node] = max((most[p] for p in preds), default=0.0)
        layer = flow.layers.get(node)
        here = late(layer.output_variation) if layer is not None else math.nan
        if not math.isfinite(here):
            continue
        if here < alike and most[node] > 3 * alike and layer is not None and not layer.composite:
            found[node] = most[node]
        most[node] = max(most[node], here)
    first = min(found, key=lambda node: flow.layers[node].order, default="")
    return (first, found[first]) if found else None


# ------------------------------------------------------------------------------------- what to change


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


def _unheard_actions(layer: str, op: str, others: Sequence[str]) -> Actions:
    """For outputs that the loss hardly depends on."""
    what = f"`{op}`" if op else "what stands"
    by = (
        f" Look at {' and '.join(others)}: a scale taken from the batch may be next to zero there."
        if others
        else ""
    )
    return (
        f"Check {what} between {layer} and the loss: it multiplies the output by next to nothing.{by}",
        "Take the loss before that operation, or guard its factor from below: scale.clamp_min(eps).",
    )


def _alike_actions(layer: str) -> Actions:
    """For two outputs that are compared with each other and are the same for all samples."""
    return (
        "Stop the gradient on the side that makes the target (target.detach(), a slow teacher), and give the "
        "other side a predictor of its own.",
        "Or add a term that keeps samples apart: variance and covariance (VICReg), or negatives (InfoNCE).",
        f"Start {layer} anew: an embedding that has collapsed does not come back by itself.",
    )
