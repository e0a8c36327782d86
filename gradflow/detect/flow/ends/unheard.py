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
from gradflow.detect.flow.ends.loud import off_scale_of
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
