"""What changed between two graphs of the same model."""

from __future__ import annotations

import math

import attrs
import numpy as np

from gradflow.graph.coarse.contract import layers
from gradflow.graph.data import GraphData
from gradflow.graph.flow import log_of, number_field
from gradflow.records import FlowRecord


@attrs.frozen(kw_only=True)
class NodeChange:
    """How a node that is in both graphs changed. Logarithms are natural: 2.3 is a factor of 10.

    Args:
        name: the node.
        grad_norm: ln of its mean gradient norm, after over before; NaN where either is zero or unmeasured.
        relative: `grad_norm` less the graph's common shift, so that a rescaled loss changes nothing.
        gain: ln of its mean gain, after over before.
        size: the larger of |relative| and |gain|; what changes are sorted by. Infinite where the gradient
            vanished altogether or came back.
    """

    name: str
    grad_norm: float = number_field()
    relative: float = number_field()
    gain: float = number_field()
    size: float = number_field()

    def __str__(self) -> str:
        known = [
            (n, v) for n, v in (("gradient norm", self.relative), ("gain", self.gain)) if math.isfinite(v)
        ]
        if not known:
            return f"{self.name}: its gradient is exactly zero in one of the two, and not in the other"
        return f"{self.name}: {', '.join(f'{name} {value:+.3g}' for name, value in known)} nats"


@attrs.frozen(kw_only=True)
class EdgeChange:
    """How an edge that is in both graphs changed.

    Args:
        source: u.
        target: v.
        omega: ω(u→v) after less before, in nats: the change in what the gradient keeps on the edge.
    """

    source: str
    target: str
    omega: float


@attrs.frozen(kw_only=True)
class GraphChange:
    """What changed from one graph to another; empty tuples where nothing did.

    Args:
        nodes: changes of the nodes in both, largest first.
        edges: changes of the live edges in both, largest first.
        common_shift: median over the nodes of ln(gradient norm after / before): a change that all share,
            such as a rescaled loss. NaN without measured flows on both sides.
        nodes_before: names of the nodes that are only in the graph before.
        nodes_after: names of the nodes that are only in the graph after.
        edges_before: edges that are only in the graph before.
        edges_after: edges that are only in the graph after.
        severed: edges in both that carried gradient before and carry none after.
        restored: edges in both that carried none before and do after.
    """

    nodes: tuple[NodeChange, ...]
    edges: tuple[EdgeChange, ...]
    common_shift: float = number_field()
    nodes_before: tuple[str, ...]
    nodes_after: tuple[str, ...]
    edges_before: tuple[tuple[str, str], ...]
    edges_after: tuple[tuple[str, str], ...]
    severed: tuple[tuple[str, str], ...]
    restored: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        if math.isfinite(self.common_shift):
            lines = [f"common shift of the gradient norms: {self.common_shift:+.3g} nats"]
        else:
            lines = ["only the structure was compared: no gradient norm is known of a node in both"]
        lines += [str(change) for change in self.nodes[:10]]
        for label, items in (
            ("only before", self.nodes_before),
            ("only after", self.nodes_after),
            ("edges only before", tuple(f"{u} -> {v}" for u, v in self.edges_before)),
            ("edges only after", tuple(f"{u} -> {v}" for u, v in self.edges_after)),
            ("severed", tuple(f"{u} -> {v}" for u, v in self.severed)),
            ("restored", tuple(f"{u} -> {v}" for u, v in self.restored)),
        ):
            if items:
                lines.append(f"{label}: {', '.join(items)}")
        return "\n".join(lines)


def compare(graph: GraphData, other: GraphData | FlowRecord) -> GraphChange:
    """Return what changed from this graph (before) to another of the same model (after).

    Nodes and edges are matched by name; means over the steps are compared, so the graphs may have been
    measured at different steps, or one of them not at all (then only the structure is compared).

    Args:
        other: the graph after, at the same level; or the record after, if this is a full graph or one of
            layers.

    Returns:
        The changes, each kind sorted by size, largest first.

    Raises:
        TypeError: if `other` is neither a layer graph, nor a record that can be brought to this level.

    >>> from gradflow.graph import LayerGraph
    >>> def chain(flow):
    ...     norms = {"fc1": flow, "fc2": 1.0, "fc3": 1.0, "loss": 1.0}
    ...     flows = {("fc1", "fc2"): flow, ("fc2", "fc3"): 1.0, ("fc3", "loss"): 1.0}
    ...     return LayerGraph.from_flows(norms, flows)
    >>> change = chain(0.5).compare(chain(0.05))
    >>> [(node.name, round(node.size, 3)) for node in change.nodes[:2]]      # ln 10
    [('fc1', 2.303), ('fc2', 2.303)]
    >>> change.edges[0].source, change.edges[0].target
    ('fc1', 'fc2')
    """
    if isinstance(other, FlowRecord) and graph.level in ("full", "layers"):
        other = type(graph).from_record(other)
        other = other if graph.level == "full" else layers(other)
    if not isinstance(other, type(graph)):
        raise TypeError(
            f"graph.compare expected a LayerGraph at the level {graph.level!r}, got {type(other).__name__}. "
            "Of a record, pass its .graph, .graph.layers() or .graph.at(...)."
        )
    one, two = graph.table, other.table
    ours = {(e.source, e.target): i for i, e in enumerate(one.edges)}
    theirs = {(e.source, e.target): i for i, e in enumerate(two.edges)}
    both = [pair for pair in ours if pair in theirs]
    nodes, shift = _node_changes(graph, other)
    return GraphChange(
        nodes=nodes,
        edges=_edge_changes(graph, other, [(pair, ours[pair], theirs[pair]) for pair in both]),
        common_shift=shift,
        nodes_before=tuple(name for name in one.index if name not in two.index),
        nodes_after=tuple(name for name in two.index if name not in one.index),
        edges_before=tuple(pair for pair in ours if pair not in theirs),
        edges_after=tuple(pair for pair in theirs if pair not in ours),
        severed=tuple(p for p in both if two.severed[theirs[p]] and not one.severed[ours[p]]),
        restored=tuple(p for p in both if one.severed[ours[p]] and not two.severed[theirs[p]]),
    )


def _node_changes(graph: GraphData, other: GraphData) -> tuple[tuple[NodeChange, ...], float]:
    if not (graph.table.measured and other.table.measured):
        return (), float("nan")
    names = [name for name in graph.table.index if name in other.table.index]
    before = [graph.table.index[name] for name in names]
    after = [other.table.index[name] for name in names]
    one, two = graph.numbers, other.numbers
    norms = log_of(two.mean_grad_norm[after]) - log_of(one.mean_grad_norm[before])
    gains = log_of(two.mean_gain[after]) - log_of(one.mean_gain[before])
    known = np.isfinite(norms) & np.array([graph.table.nodes[i].kind != "loss" for i in before], dtype=bool)
    shift = float(np.median(norms[known])) if known.any() else float("nan")
    flipped = (one.mean_grad_norm[before] == 0) != (two.mean_grad_norm[after] == 0)
    flipped &= np.isfinite(one.mean_grad_norm[before]) & np.isfinite(two.mean_grad_norm[after])
    sizes = np.fmax(np.fmax(np.abs(norms - shift), np.abs(gains)), 0.0)
    sizes[flipped] = np.inf
    changes = [
        NodeChange(name=name, grad_norm=norm, relative=norm - shift, gain=gain, size=size)
        for name, norm, gain, size in zip(names, norms.tolist(), gains.tolist(), sizes.tolist(), strict=True)
        if np.isfinite(norm) or np.isfinite(gain) or size > 0
    ]
    return tuple(sorted(changes, key=lambda c: -c.size)), shift


def _edge_changes(
    graph: GraphData, other: GraphData, pairs: list[tuple[tuple[str, str], int, int]]
) -> tuple[EdgeChange, ...]:
    if not (graph.table.measured and other.table.measured):
        return ()
    one, two = graph.numbers.mean_omega.tolist(), other.numbers.mean_omega.tolist()
    changes = [
        EdgeChange(source=pair[0], target=pair[1], omega=two[j] - one[i])
        for pair, i, j in pairs
        if np.isfinite(two[j] - one[i])
    ]
    return tuple(sorted(changes, key=lambda c: -abs(c.omega)))
