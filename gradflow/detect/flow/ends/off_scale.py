"""Heads whose targets are far from the scale of their outputs, all of them or in one column."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.actions import dominance_actions, far_actions
from gradflow.detect.evidence import activations_of, early, heads, loss_fell, middle, total_gradient
from gradflow.detect.flow.ends.drowned import measures
from gradflow.detect.flow.ends.loud import off_scale_of
from gradflow.detect.knowledge import falls, guesses
from gradflow.detect.view import Flow
from gradflow.detect.wiring import layer_name
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, Role


def dominating_heads(flow: Flow, dominance: float = 100.0, off_scale: float = 30.0) -> list[Issue]:
    """A head that alone steers the layers that it shares with others, since its targets are far off.

    Where the run teaches the model nothing, less will do: each measure of its gradient (see `drowned_terms`)
    that is as many times the next one's as its outputs are to be from their targets' scale (MEDIUM). Alike
    and not: a term of a small weight beside one whose outputs are of the scale of its targets; far targets
    that the steps come up to.

    Args:
        flow: the record along its wiring.
        dominance: ratio of its gradient to that of the next one.
        off_scale: how far its outputs must be from its targets' scale.
    """
    ends = heads(flow)
    if len(ends) < 2:
        return []
    strength = {node: middle(flow.grad[node]) for node in ends}
    strongest = max(ends, key=lambda node: (strength[node], node))
    trunk = flow.wiring.upstream(strongest)
    shared = {n for n in trunk if n in flow.layers and flow.trainable(n)}
    # by node, whether something to be trained feeds it that feeds the strongest too
    fed: dict[str, bool] = {}
    for node in flow.wiring.order:
        fed[node] = any(n in shared or fed[n] for n in flow.wiring.preds[node])
    rivals = [
        node
        for node in ends
        if flow.layers[node].module != flow.layers[strongest].module and fed[node] and strength[node] > 0
    ]
    if not rivals:
        return []
    rival = max(rivals, key=lambda node: (strength[node], node))
    ratio = strength[strongest] / strength[rival]
    layer = flow.layers[strongest]
    off = early(off_scale_of(flow, strongest))
    with np.errstate(divide="ignore", invalid="ignore"):
        least = float((measures(flow, strongest) / measures(flow, rival)).min())
    stands = guesses(flow.record) and not falls(flow.record) and least >= off_scale
    if not ((ratio >= dominance or stands) and off >= off_scale):
        return []
    severity = IssueSeverity.HIGH if ratio >= dominance else IssueSeverity.MEDIUM
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.EXPLODING,
            severity=severity,
            description=f"Its gradient is {ratio:.3g} times that of {rival}, with which it shares layers, "
            "so it alone steers them; its outputs are far from the scale of its targets (loss over gradient "
            f"times output: {off:.3g}).",
            magnitude=ratio,
            recommended_actions=dominance_actions(layer.name, layer_name(rival), ratio),
            metrics={"dominance": ratio, "off_scale": off, "rival": layer_name(rival)},
        )
    ]


def _shut(flow: Flow, node: str) -> bool:
    """Whether an activation behind a layer is at its ends from the first step on, and lets nothing pass."""
    ends = [a for a in activations_of(flow, node) if a.kind in ("bounded", "softmax")]
    return any(len(a.saturated_share) and a.saturated_share[0] >= 0.5 for a in ends)


def far_targets(flow: Flow, off_scale: float) -> list[Issue]:
    """A head whose targets are so far from its outputs that the first steps blow it up.

    Far targets alone are common, and harmless where the optimizer takes steps of its own size; it takes both.
    """
    record, norms = flow.record, total_gradient(flow.record)
    ends = heads(flow)
    if not record.provenance.optimizer or not ends or not len(norms) or not norms[0] > 0:
        return []
    blown = np.any(~np.isfinite(record.losses)) or np.nanmax(norms) >= 1e3 * norms[0]
    head = max(ends, key=lambda node: (np.nan_to_num(flow.grad[node][0]), node))
    off = float(off_scale_of(flow, head)[0])
    if not blown or not off_scale**2 <= off < math.inf or _shut(flow, head):
        return []
    layer = flow.layers[head]
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.CRITICAL,
            description="Its targets are far from the scale of its outputs (loss over gradient times output: "
            f"{off:.3g} at the first step), and the steps that follow blow it up.",
            magnitude=off,
            recommended_actions=far_actions(layer.name, record.provenance.learning_rates),
            metrics={"off_scale": off},
            evidence=Evidence(roles=Role.OFF_SCALE),
        )
    ]


def lone_columns(flow: Flow, times: float = 30.0) -> list[Issue]:
    """A head of which one output alone steers the model, as its targets are far from those of the others.

    Measured: the slope of the loss at each column of the outputs, at the end of the run; how many times that
    at the next one the largest is. All columns share what leads to them, so what the others ask for moves
    that by a thirtieth and less; and the loss, a thousand times their part, does not tell of it. By the end
    of a run the others have been thrown off as well, which makes it less than it was. Alike and not: classes
    of which one is rare, columns that no target asks for, whose slope is small or zero beside *several*
    others; a model that has learned all but one, or that learns.

    Args:
        flow: the record along its wiring.
        times: as large as the next one. In healthy models it is at most five.
    """
    known, ends = flow.record.knowledge, heads(flow)
    if known is None or not ends or not times <= known.lone < math.inf:
        return []
    if not flow.record.provenance.optimizer or not guesses(flow.record) or loss_fell(flow.record):
        return []
    layer = flow.layers[ends[-1]]
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.MEDIUM,  # what divides a column by next to nothing is told as graver
            description=f"One of its outputs gets {known.lone:.3g} times the gradient of any other, so it "
            "alone steers all that leads to them: its targets are as many times further away than those of "
            f"the others. The loss, {known.loss:.3g}, is nearly all its own.",
            magnitude=known.lone,
            recommended_actions=(
                "Print smallest, largest and deviation of the targets, column by column, as the loss gets "
                "them: statistics of other data (absolute for relative ones), a deviation next to zero that "
                "they are divided by, or a column of other units.",
                *far_actions(layer.name, flow.record.provenance.learning_rates)[1:2],
            ),
            metrics={"lone": known.lone, "loss": known.loss},
            evidence=Evidence(roles=Role.OFF_SCALE),
        )
    ]
