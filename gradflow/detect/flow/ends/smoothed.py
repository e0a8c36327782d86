"""Rows that mixing has made alike: nodes of a graph, tokens under attention, averaged neighbours; and
samples that are so where noise comes in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np

from gradflow.detect.actions import smoothing_actions
from gradflow.detect.evidence import early, kept_at_least, late, loss_fell, shares
from gradflow.detect.knowledge import guesses
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, LayerRecord, Role

MIXING = ("matmul", "mm", "attention", "scatter", "index_add", "sparse", "einsum", "mean")
# Functions of each number by itself, or of none, that a layer's output may go through on its way.
_EACH = frozenset(
    (
        "relu",
        "leaky_relu",
        "elu",
        "gelu",
        "silu",
        "tanh",
        "sigmoid",
        "softplus",
        "view",
        "unsafeview",
        "reshape",
    )
)


def smoothed(flow: Flow, passages: list[str], alike: float, fall: float) -> list[Issue]:
    """The first passage at which the rows have become alike by mixing."""
    wires = flow.wiring
    mixing = {node for node, entry in wires.nodes.items() if entry.kind == "op" and _mixes(entry.type)}
    if len(mixing) < 2:  # as often as that rows must be mixed on the way to a passage
        return []
    kept = shares(flow, kept_at_least(flow)).share
    mixed: dict[str, int] = {}  # how often rows are mixed on the way to a node
    most: dict[str, float] = {}  # the largest variation before a node
    starved: dict[str, bool] = {}  # whether a layer up to a node gets too little, which is another illness
    for node in wires.order:
        preds = wires.preds[node]
        mixed[node] = max((mixed[p] for p in preds), default=0) + int(node in mixing)
        most[node] = max((max(most[p], _variation(flow, p)) for p in preds), default=0.0)
        starved[node] = any(starved[p] for p in preds) or (node in kept and late(kept[node]) < 1e-3)
    for node in passages:
        layer = flow.layers[node]
        variation = late(layer.output_variation)
        if not math.isfinite(variation) or len(layer.shape) < 2 or layer.shape[0] < 2:
            continue
        if flow.is_last(node) or mixed[node] < 2:
            continue
        told_apart = most[node] >= fall * max(variation, alike) and variation <= alike
        if not told_apart and not _fades(flow, node, variation, most[node], mixed[node], alike):
            continue
        issue = _smoothing_issue(flow, node, variation, most[node], mixed[node])
        if starved[node]:  # what dies out is told by `vanishing`; that rows are alike by mixing, too
            return [attrs.evolve(issue, severity=IssueSeverity.MEDIUM)] if guesses(flow.record) else []
        return [issue]
    return []


def starved_before(flow: Flow, smooth: Sequence[Issue], least: float = 1e-6) -> list[Issue]:
    """The first layer before rows that have become alike, where next to none of the gradient arrives, in the
    first step or at the end: what does not differ between rows cancels on its way back, too."""
    record = flow.record
    if not smooth or not record.provenance.optimizer or not guesses(record):
        return []
    kept = shares(flow, kept_at_least(flow, by_matrix=1.0)).share
    before = flow.wiring.upstream(node_name(smooth[0].layer))
    trained = (n for n in kept if n in before and flow.has_matrix(n) and flow.trainable(n))
    for node in sorted(trained, key=lambda n: flow.layers[n].order):
        arrives = float(np.nanmin([kept[node][0], late(kept[node])]))
        if not 0 < arrives < least:
            return []
        layer = flow.layers[node]
        return [
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.VANISHING,
                severity=IssueSeverity.MEDIUM,
                description=f"Only {arrives:.1e} of the gradient that enters the model at the loss arrives "
                f"here, through {smooth[0].layer or 'the model'}, whose rows are all alike.",
                magnitude=arrives,
                recommended_actions=smooth[0].recommended_actions,
                metrics={"arriving": arrives},
                evidence=Evidence(roles=Role.STARVED, origin=smooth[0].layer),
            )
        ]
    return []


def _fades(flow: Flow, node: str, variation: float, most: float, times: int, alike: float) -> bool:
    """Whether rows that many mixings have made alike but for some percent are too alike to learn by: the
    model guesses, as one answer for all would, and they do not come apart within the run."""
    known, first = flow.record.knowledge, early(flow.layers[node].output_variation)
    if known is None or times < 4 or not guesses(flow.record) or not variation <= 1.2 * first:
        return False
    useless = math.isclose(known.loss, known.averaged, rel_tol=1e-2)
    return useless and variation <= 5 * alike and most >= 10 * max(variation, alike)


def _mixes(op: str) -> bool:
    return any(word in op.lower() for word in MIXING)


def _variation(flow: Flow, node: str) -> float:
    value = late(flow.layers[node].output_variation) if node in flow.layers else math.nan
    return value if math.isfinite(value) else 0.0


def _smoothing_issue(flow: Flow, node: str, variation: float, most: float, times: int) -> Issue:
    layer = flow.layers[node]
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH if variation < 1e-3 else IssueSeverity.MEDIUM,
        description=f"All rows of its output are alike: only {variation:.1e} of it differs between them, "
        f"after "
        f"{most:.2g} before. They have been mixed {times} times on the way, so what tells them apart is "
        f"lost, "
        "and no gradient can bring it back.",
        magnitude=variation,
        recommended_actions=smoothing_actions(layer.name, times),
        metrics={"variation": variation, "variation_before": most, "num_mixings": times},
    )


def drowned_in_dropout(flow: Flow, passages: Sequence[str], alike: float = 1e-3) -> list[Issue]:
    """The layer of a model that guesses, whose output is the same for all samples where a dropout takes it.

    Measured: the part that differs between samples of what enters a dropout which all data pass, in the last
    look. Behind it samples differ, by what was dropped: noise of a third of their size and more, beside which
    what tells them apart is a thousandth and less. So the outputs look as if they told samples apart.

    Args:
        flow: the record along its wiring.
        passages: the layer calls that every gradient passes, in order.
        alike: the part that differs, below which it is drowned.
    """
    wires = flow.wiring
    if not guesses(flow.record) or loss_fell(flow.record):
        return []
    for node in passages:
        before = wires.before(node)
        if (
            "dropout" not in flow.layers[node].type.lower()
            or len(before) != 1
            or before[0] not in flow.layers
        ):
            continue
        varied = late(flow.layers[before[0]].output_variation)
        between = {op.rstrip("_") for op in wires.ops_after(before[0])}
        if not varied < alike or between - _EACH or not late(flow.layers[node].output_variation) > 0.1:
            continue
        return [_in_dropout(_made_by(flow, before[0]), flow.layers[node].name, varied)]
    return []


def _made_by(flow: Flow, node: str) -> LayerRecord:
    """The layer with parameters that has made what a function gives."""
    while not flow.parameters_of(node) and len(before := flow.wiring.before(node)) == 1:
        node = before[0]
    return flow.layers[node]


def _in_dropout(layer: LayerRecord, dropout: str, varied: float) -> Issue:
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description=f"What it gives is the same for every sample, but for {varied:.1e} of it, and then "
        f"{dropout} drops numbers at random: all that follows hears noise, a thousand times louder than what "
        "tells samples apart, and the model guesses.",
        magnitude=varied,
        recommended_actions=(
            "Look upstream for where samples become alike: inputs far from a mean of zero and a deviation of "
            "one (standardise them), sigmoids one after another (use ReLU or GELU), weights too small for "
            "the depth (He's initialisation, or a norm layer behind each).",
            f"Take {dropout} out while you look: what the outputs differ by is then what the model knows.",
        ),
        metrics={"variation": varied, "dropout": dropout},
    )
