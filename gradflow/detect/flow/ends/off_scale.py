"""Heads whose targets are far from the scale of their outputs."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.actions import dominance_actions, far_actions
from gradflow.detect.evidence import activations_of, early, heads, middle, total_gradient
from gradflow.detect.flow.ends.loud import off_scale_of
from gradflow.detect.view import Flow
from gradflow.detect.wiring import layer_name
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, Role


def dominating_heads(flow: Flow, dominance: float, off_scale: float) -> list[Issue]:
    """A head that alone steers the layers that it shares with others, since its targets are far off.

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
    if not (ratio >= dominance and off >= off_scale):
        return []
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.HIGH,
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
