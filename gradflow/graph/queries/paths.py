"""Where the gradient goes: the paths that carry most and least of it, and how much comes through over all."""

from __future__ import annotations

import math

import attrs
import numpy as np

from gradflow.graph.data import GraphData
from gradflow.graph.flow import (
    absent,
    edge_ratios,
    exponential,
    geometric_mean,
    known_numbers,
    number_field,
    outflow,
    ratio,
)
from gradflow.graph.table import FlowTable
from gradflow.records import Floats


@attrs.frozen(kw_only=True)
class GradientPath:
    """A path through the graph, and what the gradient keeps along it; means over the measured steps.

    Args:
        source: the node that it was to begin at.
        target: the node that it was to end at.
        nodes: names along it, from `source` to `target`; empty if no path carries any gradient.
        ratios: f(u→v) / ‖g_v‖ of each of its edges, one fewer than nodes: what one edge keeps.
        gains: ‖c_v‖ / ‖g_v‖ of each of its nodes, NaN where there is none.
        grad_norms: ‖g_v‖ of each of its nodes.
        log_transmission: sum of the logarithms of `ratios`, in nats; −inf without a path.
        share: what this path carries of the sum of what all paths carry, counted without cancellation,
            in [0, 1].
        reason: why there is no path, in one sentence; empty if there is one.
    """

    source: str
    target: str
    nodes: tuple[str, ...]
    ratios: tuple[float, ...]
    gains: tuple[float, ...] = attrs.field(converter=known_numbers)
    grad_norms: tuple[float, ...] = attrs.field(converter=known_numbers)
    log_transmission: float = number_field()
    share: float = number_field()
    reason: str = ""

    @property
    def transmission(self) -> float:
        """The product of `ratios`: what the gradient keeps along the whole path."""
        return exponential(self.log_transmission)

    def __len__(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        if not self.nodes:
            return f"{self.source} .. {self.target}: {self.reason}"
        steps = [self.nodes[0]]
        for name, kept in zip(self.nodes[1:], self.ratios, strict=True):
            steps.append(f" -({kept:.3g})- {name}")
        return "".join(steps)


def path(graph: GraphData, source: str, target: str) -> GradientPath:
    """Return the path between two nodes that carries most of the gradient.

    An edge u→v keeps r(u→v) = f(u→v) / ‖g_v‖ of the gradient at v; the path is the one with the largest
    product of r (the shortest path by −ω = −ln r, which may be negative, so the search runs once over the
    nodes in topological order). Both directions are understood: from a layer on to the loss, or from the
    loss back to a layer.

    Args:
        source: name of the first node.
        target: name of the last node.

    Returns:
        The path, from `source` to `target`, in the order asked for; of a node to itself, that node. Without
        one that carries any gradient its `nodes` are empty and `reason` tells where the way is cut.

    Raises:
        UnknownLayerError: if there is no node of that name.
        GraphUnavailableError: if only the topology was taken, or the graph has a cycle.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"fc1": 1.02, "fc2": 1.0, "add": 1.0, "loss": 1.0},
    ...     {("fc1", "fc2"): 0.02, ("fc1", "add"): 1.0, ("fc2", "add"): 1.0, ("add", "loss"): 1.0},
    ...     ops=("add",))
    >>> route = graph.path("loss", "fc1")
    >>> route.nodes                         # by the skip, not through fc2
    ('loss', 'add', 'fc1')
    >>> round(route.share, 2)
    0.98
    """
    return _route(graph, source, target, weakest=False)


def weakest_path(graph: GraphData, source: str, target: str) -> GradientPath:
    """Return the path between two nodes that carries least of the gradient, of those that carry any.

    The path with the smallest product of r(u→v) = f(u→v) / ‖g_v‖ over its edges; see `path`. Where it is far
    weaker than the strongest one, a branch of the network is all but out of the training. Ways that are
    severed carry nothing, and are told by `severed` and `unreachable`.

    Args:
        source: name of the first node.
        target: name of the last node.

    Returns:
        As `path` does.

    Raises:
        UnknownLayerError: if there is no node of that name.
        GraphUnavailableError: if only the topology was taken, or the graph has a cycle.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"fc1": 1.02, "fc2": 1.0, "add": 1.0, "loss": 1.0},
    ...     {("fc1", "fc2"): 0.02, ("fc1", "add"): 1.0, ("fc2", "add"): 1.0, ("add", "loss"): 1.0},
    ...     ops=("add",))
    >>> print(graph.weakest_path("loss", "fc1"))
    loss -(1)- add -(1)- fc2 -(0.02)- fc1
    """
    return _route(graph, source, target, weakest=True)


def _route(graph: GraphData, source: str, target: str, *, weakest: bool) -> GradientPath:
    """Return the path with the largest or the smallest sum of ω."""
    call = "graph.weakest_path" if weakest else "graph.path"
    table = graph.table
    table.check_measured(call)
    topo = table.order(call)
    first, last = graph.position(source), graph.position(target)
    place = {node: i for i, node in enumerate(topo)}
    low, high = sorted((first, last), key=place.__getitem__)  # the data runs from low to high
    omega = graph.numbers.mean_omega
    between = topo[place[low] : place[high] + 1]
    best, total, chosen = _best(table, omega, between, high, sign=-1.0 if weakest else 1.0)
    if low not in best:
        reason = _why_not(graph, low, high)
        nan = float("nan")
        return GradientPath(source=source, target=target, nodes=(), ratios=(), gains=(), grad_norms=(),
                            log_transmission=-math.inf, share=nan, reason=reason)  # fmt: skip
    nodes, edges = [low], []
    while nodes[-1] != high:
        edges.append(chosen[nodes[-1]])
        nodes.append(int(table.target[edges[-1]]))
    if first == high:
        nodes.reverse()
        edges.reverse()
    numbers = graph.numbers
    return GradientPath(
        source=source,
        target=target,
        nodes=tuple(table.name(i) for i in nodes),
        ratios=tuple(exponential(nats) for nats in omega[edges].tolist()),
        gains=tuple(numbers.mean_gain[nodes].tolist()),
        grad_norms=tuple(numbers.mean_grad_norm[nodes].tolist()),
        log_transmission=best[low],
        share=min(1.0, math.exp(best[low] - total[low])),
    )


def _best(
    table: FlowTable, omega: Floats, between: list[int], high: int, *, sign: float
) -> tuple[dict[int, float], dict[int, float], dict[int, int]]:
    """Walk back from `high`: the best sum of ω to every node, the log of the sum over all paths, the edge.

    The best is the largest, with a `sign` of −1 the smallest.
    """
    best: dict[int, float] = {high: 0.0}
    total: dict[int, float] = {high: 0.0}
    chosen: dict[int, int] = {}
    weights, heads = omega.tolist(), table.target.tolist()
    for node in reversed(between):
        if node == high:
            continue
        options = [
            (weights[e] + best[heads[e]], weights[e] + total[heads[e]], e)
            for e in table.out_edges[node]
            if heads[e] in best and math.isfinite(weights[e])
        ]
        if options:
            best[node], _, chosen[node] = max(options, key=lambda o: (sign * o[0], -o[2]))
            top = max(option[1] for option in options)
            total[node] = top + math.log(sum(math.exp(option[1] - top) for option in options))
    return best, total, chosen


def _why_not(graph: GraphData, low: int, high: int) -> str:
    """Return why no gradient goes from `high` back to `low`."""
    table = graph.table
    ways = table.walk([low])
    a, b = table.name(low), table.name(high)
    if high not in ways:
        return f"the data does not run from {a} to {b}, nor back"
    live = table.walk([high], backward=True, usable=np.isfinite(graph.numbers.mean_omega))
    ends = zip(table.source.tolist(), table.target.tolist(), strict=True)
    cuts = [e for e, (u, v) in enumerate(ends) if v in live and u in ways and u not in live]
    reasons = [table.edges[e].reason or ("" if table.severed[e] else "not measured") for e in cuts[:3]]
    told = [table.arrow(e) + (f" ({why})" if why else "") for e, why in zip(cuts, reasons, strict=False)]
    return f"no gradient comes from {b} back to {a}: the flow ends at {', '.join(told)}"


@np.errstate(over="ignore", invalid="ignore")
def transmission(graph: GraphData, a: str, b: str) -> float:
    """Return how much of the gradient at `a` reaches `b`, over all paths.

    The gradient runs against the data, so `a` is the later node (the loss, say) and `b` the earlier one.
    T(a) = 1 and, back in topological order, T(u) = coherence(u) · Σ_v r(u→v) · T(v) over u's consumers,
    with r(u→v) = f(u→v) / ‖g_v‖. Every factor was measured, so for the loss T equals ‖g_b‖ / ‖g_loss‖
    exactly. For another `a` some of what arrives at b bypasses a; that the part through a cancels or adds
    up at fan-outs as the whole does is then an assumption.

    Args:
        a: name of the node the gradient comes from.
        b: name of the node it goes to.

    Returns:
        ‖part of g_b that came through a‖ / ‖g_a‖, a ratio without unit; the geometric mean over the
        measured steps. 1.0 if they are the same node. 0.0 if every way is severed, or none leads from one
        to the other (two parallel branches).

    Raises:
        ValueError: if `a` feeds `b`: the gradient runs the other way, so the two were exchanged.
        UnknownLayerError: if there is no node of that name.
        GraphUnavailableError: if only the topology was taken, or the graph has a cycle.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"fc1": 0.5, "fc2": 1.0, "loss": 1.0},
    ...     {("fc1", "fc2"): 0.3, ("fc1", "loss"): 0.4, ("fc2", "loss"): 1.0})
    >>> round(graph.transmission("loss", "fc1"), 6)
    0.5
    """
    table = graph.table
    table.check_measured("graph.transmission")
    topo = table.order("graph.transmission")
    start, goal = graph.position(a), graph.position(b)
    place = {node: i for i, node in enumerate(topo)}
    if place[goal] > place[start]:
        if goal not in table.walk([start]):
            return 0.0
        raise ValueError(
            f"graph.transmission: {a!r} feeds {b!r}, and the gradient runs against the data, so none of the "
            f"gradient at {a!r} reaches {b!r}. The first name is where the gradient comes from: "
            f"graph.transmission({b!r}, {a!r})."
        )
    flow, gone = table.flow, absent(table)
    kept, some_gone = edge_ratios(table), bool(gone.any())
    pull = ratio(table.grad, outflow(table))  # coherence without the cap at 1: the product telescopes
    pull[(table.grad == 0) & (outflow(table) == 0)] = 0.0
    sources: dict[int, Floats] = {start: np.ones(len(table.steps))}
    heads = table.target.tolist()
    for node in reversed(topo[place[goal] : place[start]]):
        live = [e for e in table.out_edges[node] if heads[e] in sources and flow[e].any()]
        if live:
            parts = (kept[e] * sources[heads[e]] for e in live)
            if some_gone:  # what a step lacks adds nothing, though nothing is known of what reads it there
                parts = (np.where(gone[e], 0.0, part) for e, part in zip(live, parts, strict=True))
            sources[node] = pull[node] * sum(parts)
    return float(geometric_mean(sources[goal])) if goal in sources else 0.0
