"""Bottlenecks: where the gradient must pass and is throttled, and waists that are narrow but healthy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from gradflow.graph.coarse.parts import between
from gradflow.graph.data import GraphData
from gradflow.graph.flow import arithmetic_mean, geometric_mean, node_gain, number_field
from gradflow.graph.queries.dominators import DominatorTree, cut_capacities, dominator_tree
from gradflow.graph.table import FlowTable

_MAX_NATS = -math.log(np.finfo(np.float64).eps)  # a loss beyond this (a gain of zero too) counts as this


@attrs.frozen(kw_only=True)
class Bottleneck:
    """A node where the gradient must pass and is throttled; means over the measured steps.

    Args:
        name: the node.
        kind: `layer`, `block` or `op`.
        score: nats of gradient lost or squeezed here beyond what is usual in this network, averaged over
            all trainable layers: (what is lost) × (share of the trainable layers that must pass here).
        gain: ‖c_v‖ / ‖g_v‖; NaN if not measured.
        gain_ratio: gain over the network's usual gain (the median over its layers, at most 1).
        width_before: its number of elements over that of the widest node upstream; NaN if unknown.
        width_after: its number of elements over that of the widest node downstream; NaN if unknown.
        effective_rank: of its output gradient; NaN if not measured.
        rank_ratio: effective rank over the most it could be: the rank at the nearest dominator on the way
            to the loss that has one, or its own number of samples or features if that is smaller:
            how much rank is lost at this node alone. NaN if not measured at both.
        must_pass: share of the trainable layers upstream (itself included) whose gradient has no way but
            through it, in [0, 1].
        is_dominator: whether `must_pass` is above one half.
        cut_capacity: least sum of effective ranks of nodes that separates the loss from what is upstream,
            taken here: its own rank for a dominator, the min cut of its region for one of several parallel
            ways; NaN if unknown or unlimited. Features stand in for ranks not measured.
        waist: whether it is narrower than both sides and nothing is lost there: narrow by design.
        reason: the numbers that made it so, in a sentence.
    """

    name: str
    kind: str
    score: float = number_field()
    gain: float = number_field()
    gain_ratio: float = number_field()
    width_before: float = number_field()
    width_after: float = number_field()
    effective_rank: float = number_field()
    rank_ratio: float = number_field()
    must_pass: float = number_field()
    is_dominator: bool
    cut_capacity: float = number_field()
    waist: bool
    reason: str


@attrs.frozen(eq=False, kw_only=True)
class _Context:
    """What all nodes are weighed against."""

    table: FlowTable
    tree: DominatorTree
    gains: list[float]
    usual_gain: float
    ranks: list[float]
    rank_room: list[float]
    before: list[int]
    after: list[int]
    narrow: set[int]
    cuts: dict[int, float]
    scalars: set[int]


def bottlenecks(
    graph: GraphData,
    k: int = 5,
    *,
    source: str | None = None,
    target: str | None = None,
    throttle: float = 0.5,
    narrow: float = 0.5,
) -> tuple[Bottleneck, ...]:
    """Return where the gradient must pass and is throttled, worst first; healthy waists come last.

    The gradient must pass where a node dominates the trainable layers upstream: every way from the loss
    to them leads through it. It is throttled by a low gain (against the network's median), or by a low
    effective rank (against what arrives), or squeezed by a width below that of both sides. The score is

        (ln 1/gain_ratio · layers dominated + (ln 1/rank_ratio + width) · layers dominated and itself)
        / all trainable layers

    with terms below zero dropped, and the width term, ln(elements of the narrower side / its own), only
    for nodes that are a local minimum of width on the chain of dominators (the first of equals). The loss
    and operations with one element are left out: their gain says how a mean spreads over a batch.

    With `source` and `target` the same is asked of the part of the graph between the two: what throttles the
    gradient on its way from the one back to the other, weighed by the trainable layers between them. What
    gain is usual is still the whole network's.

    Args:
        k: how many to return at most.
        source: name of the node that the gradient comes from; None for the loss.
        target: name of the node that it is to arrive at; None for all that is upstream.
        throttle: a node is listed if `gain_ratio` or `rank_ratio` is below it; a half, as
            layers of one network differ by less than a factor of 2 from their initialisation alone.
        narrow: a node is narrow if both width shares are below it; a half, as widths go in powers of two.

    Returns:
        At most k records: first what is throttled, by score; then waists, by score.

    Raises:
        ValueError: if `k` is below 1, `throttle` or `narrow` is not in (0, 1], or `source` feeds `target`:
            the gradient runs the other way.
        UnknownLayerError: if there is no node named `source` or `target`.
        GraphUnavailableError: if only the topology was taken: what throttles is told by the flow.

    Dominators: K. D. Cooper, T. J. Harvey, K. Kennedy, "A simple, fast dominance algorithm", 2001.
    Effective rank: O. Roy, M. Vetterli, "The effective rank", EUSIPCO 2007.

    >>> from gradflow.graph import LayerGraph
    >>> norms = {"fc1": 0.01, "fc2": 0.01, "fc3": 1.0, "fc4": 1.0, "loss": 1.0}
    >>> graph = LayerGraph.from_flows(norms, {
    ...     ("fc1", "fc2"): 0.01, ("fc2", "fc3"): 0.01, ("fc3", "fc4"): 1.0, ("fc4", "loss"): 1.0})
    >>> worst = graph.bottlenecks()[0]
    >>> worst.name, round(worst.gain, 6), worst.is_dominator, worst.waist
    ('fc3', 0.01, True, False)
    >>> [found.name for found in graph.bottlenecks(source="fc2")]     # nothing is lost before fc2
    []
    """
    if k < 1 or not (0 < throttle <= 1 and 0 < narrow <= 1):
        raise ValueError(
            "graph.bottlenecks: expected k of at least 1, and throttle and narrow in (0, 1]; got "
            f"k={k!r}, throttle={throttle!r}, narrow={narrow!r}."
        )
    graph.table.check_measured("graph.bottlenecks")
    usual_gain = _usual_gain(graph.table)
    if source is not None or target is not None:
        graph = _part(graph, source, target)
    context = _context(graph.table, narrow, usual_gain)
    found = [_weighed(context, node, throttle) for node in context.tree.order]
    ranked = sorted((b for b in found if b is not None), key=lambda b: (b.waist, -b.score))
    return tuple(ranked[:k])


def _part(graph: GraphData, source: str | None, target: str | None) -> GraphData:
    """Return what lies between two nodes."""
    part = between(graph, source, target)
    if len(part) == 0 and source is not None and target is not None and len(between(graph, target, source)):
        raise ValueError(
            f"graph.bottlenecks: {source!r} feeds {target!r}, and the gradient runs against the data: "
            f"ask for source={target!r}, target={source!r}."
        )
    return part


def _usual_gain(table: FlowTable) -> float:
    """Return the median gain of the network's layers, at most 1."""
    gains = geometric_mean(node_gain(table)).tolist()
    pairs = zip(table.nodes, gains, strict=True)
    return min(1.0, _median([gain for node, gain in pairs if node.kind in ("layer", "block") and gain > 0]))


def _context(table: FlowTable, narrow: float, usual_gain: float) -> _Context:
    tree = dominator_tree(table)
    gains = geometric_mean(node_gain(table)).tolist()
    ranks = arithmetic_mean(table.rank).tolist()
    before, after = _widest(table)
    is_layer = [node.kind in ("layer", "block") for node in table.nodes]

    def capacity(node: int) -> float:
        if not is_layer[node]:
            return math.inf
        return ranks[node] if math.isfinite(ranks[node]) else _features(table, node)

    return _Context(
        table=table,
        tree=tree,
        gains=gains,
        usual_gain=usual_gain,
        ranks=ranks,
        rank_room=_rank_room(table, tree, ranks),
        before=before,
        after=after,
        narrow=_local_minima(table, tree, before, after, narrow),
        cuts=cut_capacities(table, tree, capacity),
        scalars=table.scalars(),
    )


def _weighed(context: _Context, node: int, throttle: float) -> Bottleneck | None:
    """Return the node's record, or None if the gradient need not pass or is not throttled there."""
    table, tree = context.table, context.tree
    record = table.nodes[node]
    if record.kind in ("loss", "input") or node in context.scalars:
        return None
    own = int(bool(record.parameters))
    inside, behind = tree.inside[node], tree.behind[node]
    if not inside:
        return None
    gain, rank = context.gains[node], context.ranks[node]
    gain_ratio = gain / context.usual_gain if inside > own else math.nan  # else it dominates no other
    rank_ratio = rank / context.rank_room[node]
    lost, squeezed = _nats(gain_ratio), _nats(rank_ratio)
    throttled = gain_ratio < throttle or rank_ratio < throttle
    if not throttled and node not in context.narrow:
        return None
    widths = [_share(table.elements[node], other[node]) for other in (context.before, context.after)]
    width = _nats(max(widths)) if node in context.narrow else 0.0
    values: dict[str, Any] = {
        "name": record.name,
        "kind": record.kind,
        "score": (lost * (inside - own) + (squeezed + width) * inside) / tree.trainable,
        "gain": gain,
        "gain_ratio": gain_ratio,
        "width_before": widths[0],
        "width_after": widths[1],
        "effective_rank": rank,
        "rank_ratio": rank_ratio,
        "must_pass": inside / behind,
        "is_dominator": 2 * inside > behind,
        "cut_capacity": context.cuts.get(node, math.nan),
        "waist": not throttled,
    }
    return Bottleneck(**values, reason=_reason(values, context, node, throttle))


def _reason(values: dict[str, Any], context: _Context, node: int, throttle: float) -> str:
    table, usual_gain, room = context.table, context.usual_gain, context.rank_room[node]
    parts = []
    if values["gain_ratio"] < throttle:
        parts.append(f"passes on {values['gain']:.3g} of its gradient (usual here: {usual_gain:.3g})")
    if values["rank_ratio"] < throttle:
        parts.append(f"its gradient has effective rank {values['effective_rank']:.3g} "
                     f"of the {room:.3g} it could have")  # fmt: skip
    if values["waist"]:
        told = "with a healthy gain" if math.isfinite(values["gain"]) else "its gain was not measured"
        parts.append(f"is narrow ({values['width_before']:.3g} and {values['width_after']:.3g} of the widest "
                     f"before and behind), {told}")  # fmt: skip
    root = " and ".join(table.name(i) for i in table.roots()[:2]) or "the loss"
    root = "the loss" if any(n.kind == "loss" for n in table.nodes) else root
    share = f"{values['must_pass']:.0%} of the trainable layers up to it have no other way to {root}"
    return f"{values['name']} {'; '.join(parts)}; {share}."


def _nats(ratio: float) -> float:
    """Return how many nats a ratio lies below 1, 0 if it does not or is unknown."""
    if not ratio < 1:
        return 0.0
    return min(-math.log(ratio), _MAX_NATS) if ratio > 0 else _MAX_NATS


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan


def _share(part: int, whole: int) -> float:
    return float(part) / whole if part and whole else math.nan


def _features(table: FlowTable, node: int) -> float:
    """Return the most rank a node's gradient has room for as a matrix of samples × features; inf if unknown.

    Features are the channels of an image, else the last axis; everything else are samples.
    """
    shape = table.nodes[node].shape
    if len(shape) < 2 or 0 in shape:
        return math.inf
    features = shape[1] if len(shape) > 3 else shape[-1]
    return float(min(features, math.prod(shape) // features))


def _rank_room(table: FlowTable, tree: DominatorTree, ranks: list[float]) -> list[float]:
    """Return the most rank that could arrive at each node: what the nearest dominator ahead has, if known."""
    ahead, room = [math.nan] * len(ranks), [math.nan] * len(ranks)
    for node in tree.order:
        above = tree.parent[node]
        if above is not None and above >= 0:
            ahead[node] = ranks[above] if ranks[above] > 0 else ahead[above]
            room[node] = min(ahead[node], _features(table, node))  # NaN where nothing ahead has a rank
    return room


def _widest(table: FlowTable) -> tuple[list[int], list[int]]:
    """Return for every node the most elements of any node upstream, and of any node downstream."""
    order = table.topo if table.topo is not None else list(range(len(table.nodes)))
    elements = table.elements.tolist()
    sources, targets = table.source.tolist(), table.target.tolist()
    before, after = [0] * len(order), [0] * len(order)
    for node in order:
        for edge in table.in_edges[node]:
            before[node] = max(before[node], before[sources[edge]], elements[sources[edge]])
    for node in reversed(order):
        for edge in table.out_edges[node]:
            after[node] = max(after[node], after[targets[edge]], elements[targets[edge]])
    return before, after


def _local_minima(
    table: FlowTable, tree: DominatorTree, before: list[int], after: list[int], narrow: float
) -> set[int]:
    """Return the nodes that are narrower than both sides, the first to run of a stretch of equals.

    Sides are those on the dominator tree: where all the gradient passes before and after. A node counts if
    what it mostly dominates is wider, and the next other width on the way to the loss is wider too.
    """
    elements = table.elements.tolist()
    pairs: dict[int, tuple[int, int]] = {}  # from a node on to the loss: the first width, and the next other
    found: set[int] = set()
    for node in tree.order:
        above, width, below = tree.parent[node], elements[node], tree.heavy[node]
        first, other = pairs[above] if above is not None and above >= 0 else (0, 0)
        ahead = first if first != width else other
        pairs[node] = (width, ahead) if width else (first, other)
        while below >= 0 and not elements[below]:
            below = tree.heavy[below]
        if not width or below < 0 or elements[below] <= width or ahead <= width:
            continue
        if 2 * tree.inside[node] > tree.behind[node] and width < narrow * min(before[node], after[node]):
            found.add(node)
    return found
