"""The minimum cut: where the edges that all gradient between two nodes must cross carry least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs

from gradflow.graph.coarse.parts import between
from gradflow.graph.data import GraphData
from gradflow.graph.flow import known_numbers, number_field
from gradflow.graph.queries.dominators import immediate_dominators
from gradflow.graph.table import FlowTable


@attrs.frozen(kw_only=True)
class Cut:
    """Edges that part a node from the gradient of another; means over the measured steps.

    Args:
        source: the node that it was asked from.
        target: the node that it was asked to.
        edges: the edges (u, v) of the cut, in the order of execution; none where no way leads from one
            node to the other.
        flows: f(u→v) of each; 0 where it is severed, NaN where it was not measured.
        flow: their sum. The norm of what crosses the cut is at most this, by the triangle inequality.
        share: `flow` over ‖g‖ of the later of the two nodes. Below 1 the gradient is throttled, however many
            ways there are.
    """

    source: str
    target: str
    edges: tuple[tuple[str, str], ...]
    flows: tuple[float, ...] = attrs.field(converter=known_numbers)
    flow: float = number_field()
    share: float = number_field()

    def __str__(self) -> str:
        if not self.edges:
            return f"{self.source} .. {self.target}: no way leads from one to the other"
        pairs = zip(self.edges, self.flows, strict=True)
        told = ", ".join(f"{u} -> {v} ({flow:.3g})" for (u, v), flow in pairs)
        return f"{self.source} .. {self.target}: {self.share:.3g} of the gradient can cross {told}"


def minimum_cut(graph: GraphData, source: str, target: str) -> Cut:
    """Return the set of edges that separates two nodes and carries least of the gradient between them.

    Every way of the gradient from the later node back to the earlier one crosses the cut, and no other set of
    edges with that property has a smaller sum of flows f(u→v). Parallel branches that are weak each by
    itself throttle the gradient together only: no single node is a bottleneck there, and the cut tells them
    all. Of equal cuts that nearest to the later node is returned. Edges of unknown flow are cut only where
    nothing else is left. All ways pass every dominator, so a least cut lies between two neighbours on the
    chain of dominators, and each such region is cut on its own.

    Args:
        source: name of one node.
        target: name of the other; both directions are understood, as by `path`.

    Returns:
        The cut. Its flow is 0 where every way is severed, or where there is none.

    Raises:
        ValueError: if both are the same node.
        UnknownLayerError: if there is no node of that name.
        GraphUnavailableError: if only the topology was taken, or the graph has a cycle.

    L. R. Ford, D. R. Fulkerson, "Maximal flow through a network", Canadian J. of Mathematics 8 (1956).

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"stem": 0.3, "a": 1.0, "b": 1.0, "add": 1.0, "loss": 1.0},
    ...     {("stem", "a"): 0.1, ("stem", "b"): 0.2, ("a", "add"): 1.0, ("b", "add"): 1.0,
    ...      ("add", "loss"): 1.0}, ops=("add",))
    >>> print(graph.minimum_cut("loss", "stem"))
    loss .. stem: 0.3 of the gradient can cross stem -> a (0.1), stem -> b (0.2)
    """
    graph.table.check_measured("graph.minimum_cut")
    topo = graph.table.order("graph.minimum_cut")
    if source == target:
        raise ValueError(f"graph.minimum_cut: {source!r} was given twice; a cut separates two nodes.")
    place = {node: i for i, node in enumerate(topo)}
    early, late = sorted((source, target), key=lambda name: place[graph.position(name)])
    inner = between(graph, late, early)
    table = inner.table
    flows = inner.numbers.mean_flow.tolist() if len(inner) else []
    cut = _least_of_all(inner, late, early, _capacities(flows)) if len(inner) else []
    cut.sort(key=lambda e: (int(table.source[e]), int(table.target[e])))
    flow = float(sum(flows[e] for e in cut))
    norm = float(graph.numbers.mean_grad_norm[graph.position(late)])
    return Cut(
        source=source,
        target=target,
        edges=tuple((table.edges[e].source, table.edges[e].target) for e in cut),
        flows=tuple(flows[e] for e in cut),
        flow=flow,
        share=sum(flows[e] / norm for e in cut) if norm > 0 else math.nan,
    )


def _least_of_all(graph: GraphData, late: str, early: str, capacities: Sequence[float]) -> list[int]:
    """Return the edges of the least cut of any region."""
    best: list[int] = []
    least = math.inf
    for region in _regions(graph.table, graph.position(late), graph.position(early)):
        edges = _least(graph.table, region, capacities)
        total = sum(capacities[e] for e in edges)
        if total < least:
            best, least = edges, total
    return list(best)


def _capacities(flows: Sequence[float]) -> list[float]:
    """Return flows as shares of the largest, unknown ones as more than all that are known together."""
    unit = max((flow for flow in flows if math.isfinite(flow)), default=0.0) or 1.0  # no sum overflows
    known = [flow / unit for flow in flows if math.isfinite(flow)]
    beyond = 2.0 * sum(known) + 1.0
    return [flow / unit if math.isfinite(flow) else beyond for flow in flows]


def _regions(table: FlowTable, near: int, far: int) -> list[list[int]]:
    """Return the edges between every two neighbours on the chain of dominators from `near` down to `far`."""
    back = {i: [int(table.source[e]) for e in edges] for i, edges in enumerate(table.in_edges)}
    above = immediate_dominators(back, near)
    chain = [far]
    while chain[-1] != near:
        chain.append(above[chain[-1]])
    place = {node: i for i, node in enumerate(table.topo or ())}
    borders = [place[node] for node in reversed(chain)]  # from the source down
    regions: list[list[int]] = [[] for _ in borders[1:]]
    which = 0
    for edge in sorted(range(len(table.edges)), key=lambda e: -place[int(table.target[e])]):
        while place[int(table.target[edge])] <= borders[which + 1]:
            which += 1
        regions[which].append(edge)
    return regions


def _least(table: FlowTable, region: list[int], capacities: Sequence[float]) -> list[int]:
    """Return the least cut of one region: edges that begin at one node and end at another."""
    if len(region) == 1:
        return region
    import networkx as nx  # takes longer to import than the rest of gradflow together

    network = nx.DiGraph()
    for edge in region:
        u, v = int(table.source[edge]), int(table.target[edge])
        network.add_edge(v, u, capacity=capacities[edge], edge=edge)
    start = next(node for node in network if not network.in_degree(node))
    end = next(node for node in network if not network.out_degree(node))
    residual = nx.algorithms.flow.boykov_kolmogorov(network, start, end)
    reached = _open(residual, start)
    return [data["edge"] for v, u, data in network.edges(data=True) if v in reached and u not in reached]


def _open(residual: Any, start: int) -> set[int]:
    """Return what is still reached from the start where the flow is as large as it can be."""
    seen, stack = {start}, [start]
    while stack:
        for other, data in residual[stack.pop()].items():
            if other not in seen and data["flow"] < data["capacity"]:
                seen.add(other)
                stack.append(other)
    return seen
