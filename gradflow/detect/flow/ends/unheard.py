"""Outputs that the loss hardly hears, as operations behind them hand back next to nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradflow.detect.actions import Actions
from gradflow.detect.evidence import (
    heads,
    late,
    loss_fell,
)
from gradflow.detect.flow.ends.loud import off_scale_of, takes_scores
from gradflow.detect.knowledge import guesses
from gradflow.detect.view import Flow
from gradflow.records import (
    Evidence,
    Floats,
    Issue,
    IssueSeverity,
    IssueType,
    Role,
)


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
