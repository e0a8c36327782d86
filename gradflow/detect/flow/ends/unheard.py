"""Outputs that the loss hardly hears, as operations behind them hand back next to nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradflow.detect.actions import Actions, far_actions
from gradflow.detect.evidence import heads, late, loss_fell
from gradflow.detect.flow.ends.drowned import drowned_terms
from gradflow.detect.flow.ends.loud import off_scale_of, over_silence, takes_scores
from gradflow.detect.flow.ends.off_scale import dominating_heads
from gradflow.detect.knowledge import guesses
from gradflow.detect.updates.readings import held, is_unmoved, layer_of, response, typical, whole_ratio
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import Evidence, Floats, Issue, IssueSeverity, IssueType, Role

_SMALL = 0.02  # part of the loss that outputs change by changing as much as they are large: usual is a tenth
_WHOLE = 0.3  # part of the gradient: operations that keep less are at fault for that, others are not
_FAINT = 0.01  # of the loss, that a parameter could change at most by changing as much as it is large
_FLAT_END = {"softplus", "log_sigmoid", "elu", "celu", "selu"}  # smooth, with a slope of 1 at the other end
_NEAR = 0.05  # of what zeros cost, by which outputs that are small beside their targets cost less or more


def unheard(flow: Flow, leverage: float, kept: float) -> list[Issue]:
    """Heads of a model that guesses, whose outputs the loss hardly depends on since operations behind them
    hand back next to nothing.

    Undecided (INFO) until the flow through those operations has been measured. Where steps of a usual size
    leave the loss where it is (see `is_unmoved`), it takes less to be told; and where such a loss depends on
    the outputs all the same, it is what is trained that hardly touches them. Where the operation that loses
    most is a smooth activation with one flat end, a softplus, it is there: a SATURATION. Of several terms of
    a loss, those that another drowns; see `drowned_terms`. Alike and not: heads beside one whose targets are
    so far off that it makes up the loss, of which no other is a part; that one is told (`dominating_heads`).

    Args:
        flow: the record along its wiring.
        leverage: largest part of the loss that the outputs can change by changing as much as they are large.
        kept: largest part of the gradient that the operations keep.
    """
    if drowned := drowned_terms(flow):
        return drowned
    if not guesses(flow.record) or loss_fell(flow.record):
        return []
    moved = _moved(flow)
    if is_unmoved(flow.record):
        leverage, kept = max(leverage, _SMALL), max(kept, _WHOLE)
        if not max(moved.values(), default=0.0) < _SMALL:
            return _untouched(flow)
    if not max(moved.values(), default=math.inf) < leverage:
        return []
    measured = flow.record.graph_record is not None and flow.record.graph_record.measured
    found, louder = [], {issue.layer for issue in dominating_heads(flow)}
    for node, part in moved.items():
        if louder and flow.layers[node].name not in louder:
            continue
        share, op = _kept_behind(flow, node) if measured else (math.nan, "")
        if measured and not share < kept:
            continue
        found.append(_unheard_issue(flow, node, part, share, op))
    return found


def flat_scores(flow: Flow, leverage: float = 0.03, *, own: float = 0.1, moved: float = 0.01) -> list[Issue]:
    """Heads of a model whose scores stay next to zero for a softmax, though what they give is of usual size.

    A quotient by a temperature, or a factor, stands between. The cross entropy is what zeros cost from the
    first step to the last, and as the outputs are of a size, it is no start from small weights, which steps
    enlarge.

    Args:
        flow: the record along its wiring.
        leverage: largest part of the loss that the outputs can change by changing as much as they are large,
            at the start and at the end. Scores of rms 0.1 have 0.1 and more.
        own: least rms of what the heads give.
        moved: largest part of what zeros cost by which the losses may differ from it.
    """
    record, known = flow.record, flow.record.knowledge
    if known is None or not 0 < known.silent < math.inf:
        return []
    if not record.provenance.optimizer or len(record.losses) < 5:
        return []
    if not takes_scores(flow) or not guesses(record):
        return []
    at = (float(record.losses[0]), late(record.losses))
    if not all(abs(loss - known.silent) <= moved * known.silent for loss in at):
        return []
    ends, found = heads(flow), []
    for node in ends:
        size, off = flow.layers[node].output_rms, off_scale_of(flow, node)
        parts = [1.0 / x if x > 0 else math.inf for x in (float(off[0]), late(off))]
        if not (max(parts) < leverage and min(float(size[0]), late(size)) >= own):
            return []
        found.append(_flat_issue(flow, node, max(parts), late(size), at[1] / known.silent))
    return found


def _flat_issue(flow: Flow, node: str, part: float, size: float, left: float) -> Issue:
    layer = flow.layers[node]
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.VANISHING,
        severity=IssueSeverity.HIGH if part < 0.003 else IssueSeverity.MEDIUM,
        description=f"The scores made of its output are next to zero, though it has rms {size:.3g} itself: "
        f"the softmax is flat, so the loss stays at what zeros cost ({left:.3g} times it), and if the output "
        f"changed by as much as it is large, the loss would change by {part:.1e} of itself. What stands "
        "between divides by too much.",
        magnitude=part,
        recommended_actions=(
            f"Give the scores made of {layer.name or 'the output'} rms 1: a temperature of 1 for what a "
            "layer gives, of 0.05 to 0.1 for similarities of unit vectors. See whether it divides where it "
            "should multiply.",
        ),
        metrics={"leverage": part, "output_rms": size},
        evidence=Evidence(roles=Role.ABSORBING),
    )


def heard_below_a_tower(flow: Flow, tower: float = 1e4, heard: float = 0.1) -> frozenset[str]:
    """Return the layer calls that the loss hears, below one at which its slope towers.

    Beside a probability next to 0 or 1 the slope of its logarithm is up to 1e12, and the sigmoid takes back
    what that is too much: what arrives before it is next to nothing of it, and is all there is to know. What
    has vanished cannot change the loss by changing as much as it is large; this can.

    Args:
        flow: the record along its wiring.
        tower: times the loss that outputs promise to change by changing as much as they are large. Usual are
            1 to 100.
        heard: part of the loss that a layer so promises, from which the loss hears it.
    """
    with np.errstate(all="ignore"):
        promised = {node: late(1 / off_scale_of(flow, node)) for node in flow.grad}
    high = [node for node, part in promised.items() if part >= tower]
    below = {node for one in high for node in flow.wiring.upstream(one)}
    return frozenset(node for node in below if promised.get(node, 0.0) >= heard)


def _moved(flow: Flow) -> dict[str, float]:
    """What `_moves` tells of each head; none where it is not known of all."""
    moved = {node: _moves(flow, node) for node in heads(flow)}
    return moved if all(part > 0 for part in moved.values()) else {}


def _moves(flow: Flow, node: str) -> float:
    """The part of the loss that the outputs of a layer change by changing as much as they are large; all
    samples count, whether or not they ask for the same. NaN where it is not known."""
    off = late(off_scale_of(flow, node)) if node in flow.layers else math.nan
    return 1.0 / off if off > 0 else math.nan


def _untouched(flow: Flow) -> list[Issue]:
    """What is trained hardly touches the loss, which hears the outputs all the same."""
    record = flow.record
    pairs = [(u, p) for u, p in held(record) if np.nanmax(np.nan_to_num(u.gradient_rms)) > 0]
    heard, ratio = late(response(record)), typical(whole_ratio(record))
    loss = abs(late(record.losses))
    faint = [p.name for u, p in pairs if late(u.gradient_rms * u.weight_rms) * p.num_elements < _FAINT * loss]
    name, kind = layer_of(record, (faint or [p.name for _, p in pairs])[-1])
    if not heard < _SMALL and not _moves(flow, node_name(name)) < _SMALL:  # what samples ask for cancels
        return []
    return [
        Issue(
            layer=name,
            layer_type=kind,
            issue_type=IssueType.VANISHING,
            severity=IssueSeverity.HIGH if heard < 0.01 else IssueSeverity.MEDIUM,
            description="The loss hardly depends on what is trained: as all of it moves by its own size, "
            f"the loss changes by {heard:.1e} of itself at most, where 0.7 and more is usual. The steps are "
            f"of a usual size ({ratio:.1e} of the weights), and the loss stands still.",
            magnitude=heard,
            recommended_actions=(
                f"Look for a factor that makes what {name or 'the trained part'} gives next to nothing "
                "beside what is added to it: the scale of an adapter (alpha over rank), of a branch, a gate.",
                "Or train more than this part.",
            ),
            metrics={"response": heard, "ratio": ratio},
        )
    ]


def tiny_targets(flow: Flow, above: float) -> list[Issue]:
    """Heads of a model that guesses, beside whose outputs the targets are next to nothing.

    Measured: the first and the last loss over that of zeros. Steps of a usual size move such outputs by more
    than they should be, so the loss stays where the noise of the steps is. Alike and not: small targets that
    a run comes near.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be, and a tenth of it the last.
    """
    over, known = over_silence(flow), flow.record.knowledge
    if known is None or not above <= over < math.inf or not guesses(flow.record):
        return []
    still = late(flow.record.losses) / known.silent
    ends = [node for node in heads(flow) if flow.trainable(node)]
    if not still >= above / 10 or not ends:
        return []
    layer = flow.layers[ends[-1]]
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.MEDIUM,
            description=f"Beside its outputs, of rms {max(known.scales, default=math.nan):.2g}, targets are "
            f"next to nothing: the first loss is {over:.3g} times what outputs of zero would cost, the last "
            f"{still:.3g} times, and the model guesses. Every step moves outputs by more than targets are.",
            magnitude=over,
            recommended_actions=(
                "Scale the targets to a standard deviation of one, and what comes out back.",
                f"Or multiply what {layer.name or 'the model'} gives by their scale.",
            ),
            metrics={"over_silence": over, "late_over_silence": still},
            evidence=Evidence(roles=Role.OFF_SCALE, growth=over),
        )
    ]


def unmet_targets(flow: Flow, hopeless: float = 1e-3) -> list[Issue]:
    """Heads of a model that guesses, whose targets are so far off that steps of a usual size change nothing.

    Measured: the response of the loss to the steps, the part of it that the outputs can change, and that the
    operations behind them hand back what reaches them, and it costs what zeros do: so the outputs are small
    beside what is asked for. A few hundred times as far as the outputs are large takes a longer run (LOW).

    Args:
        flow: the record along its wiring.
        hopeless: part of the loss that the outputs can change by changing as much as they are large, below
            which it is MEDIUM: of a squared error, targets two thousand times as large as they are.
    """
    graph, moved = flow.record.graph_record, _moved(flow)
    if graph is None or not graph.measured or not max(moved.values(), default=math.inf) < _SMALL:
        return []
    known = flow.record.knowledge
    if known is None or not abs(known.loss - known.silent) <= _NEAR * abs(known.silent):
        return []
    if not is_unmoved(flow.record) or min(_kept_behind(flow, node)[0] for node in moved) < _WHOLE:
        return []
    heard = late(response(flow.record))
    return [
        Issue(
            layer=flow.layers[node].name,
            layer_type=flow.layers[node].type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.MEDIUM if part < hopeless else IssueSeverity.LOW,
            description=f"Its targets are far from the scale of its outputs: if those changed by as much as "
            f"they are large, the loss would change by {part:.1e} of itself, and by {heard:.1e} as all "
            "weights did. The steps are of a usual size, and the loss stands still: what it costs is the "
            "distance to the targets.",
            magnitude=1.0 / part,
            recommended_actions=far_actions(flow.layers[node].name, flow.record.provenance.learning_rates),
            metrics={"leverage": part, "response": heard},
            evidence=Evidence(roles=Role.OFF_SCALE),
        )
        for node, part in moved.items()
        if part == max(moved.values())
    ]


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
    flat = name.lower().rstrip("_") in _FLAT_END
    others = [s for s in wires.sources.get(op, ()) if wires.nodes[s].kind == "input"]
    by = f" by {' and '.join(others)}, which comes from the batch" if others else ""
    between = (
        f" The operations behind it hand back {share:.1e} of the gradient that reaches them; most is lost in "
        f"`{name}`{by}." + (" That is at its flat end." if flat else "")
        if decided
        else ""
    )
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.SATURATION if flat else IssueType.VANISHING,
        severity=(IssueSeverity.HIGH if decided else IssueSeverity.INFO),
        description=f"The loss hardly depends on its output: if that changed by as much as it is large, the "
        f"loss would change by {part:.1e} of itself, and the model guesses.{between}",
        magnitude=share if decided else part,
        recommended_actions=_flat_actions(layer.name, name)
        if flat
        else _unheard_actions(layer.name, name, others),
        metrics={"leverage": part, "kept_behind": share, "op": op},
        evidence=Evidence(roles=Role.ABSORBING if decided else (), op=op, undecided=not decided),
    )


def _flat_actions(layer: str, op: str) -> Actions:
    """For outputs that a function with one flat end takes there."""
    return (
        f"See whether the loss can be met by what {op} gives: targets below its lowest value drive {layer} "
        "to its flat end, from which no gradient leads back. Leave it out where values of any sign are asked "
        "for.",
        f"Or start {layer} from smaller weights, with a bias on the side where {op} has a slope.",
    )


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
