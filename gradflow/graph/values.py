"""Nodes and edges with their numbers, means over the measured steps: as records, or as dicts of fields."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np

from gradflow.errors import UnknownLayerError
from gradflow.graph.data import GraphData
from gradflow.graph.flow import number_field
from gradflow.records import Floats


@attrs.frozen(kw_only=True)
class Node:
    """One node and its numbers: means over the measured steps, NaN where not measured.

    Args:
        name: unique name.
        kind: `layer`, `op`, `input`, `loss` or `block`.
        layer: qualified module name; of an op, the innermost module it ran in.
        type: class name, or the op's name.
        shape: shape of its output.
        num_elements: number of elements of its output; 0 if unknown.
        parameters: names of the parameters that enter here.
        order: position in the order of execution.
        reachable: whether a gradient can flow from the loss to it.
        reason: for an unreachable node, why.
        grad_norm: ‖g_v‖ (geometric mean).
        gain: ‖c_v‖ / ‖g_v‖ (geometric mean).
        divergence: tanh(ln gain).
        coherence: ‖Σ c‖ / Σ ‖c‖ over its consumers (arithmetic mean).
        curl: root mean square of the cyclic part of ω over its edges, in nats.
        potential: its potential in the Hodge decomposition, in nats.
        effective_rank: of its output gradient (arithmetic mean).
    """

    name: str
    kind: str
    layer: str
    type: str
    shape: tuple[int, ...]
    num_elements: int
    parameters: tuple[str, ...]
    order: int
    reachable: bool
    reason: str
    grad_norm: float = number_field()
    gain: float = number_field()
    divergence: float = number_field()
    coherence: float = number_field()
    curl: float = number_field()
    potential: float = number_field()
    effective_rank: float = number_field()


@attrs.frozen(kw_only=True)
class Edge:
    """One edge u→v and its numbers: means over the measured steps, NaN where not measured.

    Args:
        source: u.
        target: v.
        flow: f(u→v) = ‖c_uv‖ (geometric mean); 0 if severed.
        omega: ln(f / ‖g_v‖), in nats (arithmetic mean); NaN if severed.
        cyclic: the part of ω that no potential explains, in nats.
        severed: whether it carries nothing: cut, or exactly zero at every measured step.
        reason: the operation that cuts it, if one does.
    """

    source: str
    target: str
    flow: float = number_field()
    omega: float = number_field()
    cyclic: float = number_field()
    severed: bool
    reason: str


def node_at(graph: GraphData, name: str) -> Node:
    """Return a node with its numbers.

    Raises:
        UnknownLayerError: if there is no node of that name; the message lists the nearest names.
    """
    return Node(**_node(graph, graph.position(name), _node_means(graph)))


def edge_between(graph: GraphData, source: str, target: str) -> Edge:
    """Return the edge from `source` to `target`, in the direction of the data.

    Raises:
        UnknownLayerError: if there is no such edge.
    """
    place = graph.table.index.get(target)
    for edge in graph.table.in_edges[place] if place is not None else ():
        if graph.record.edges[edge].source == source:
            return Edge(**_edge(graph, edge, _edge_means(graph)))
    raise UnknownLayerError.at(f"{source} -> {target}", [f"{u} -> {v}" for u, v in graph.edges])


def node_values(graph: GraphData) -> list[dict[str, Any]]:
    """Return the fields of every `Node`, in the order of execution."""
    means = _node_means(graph)
    return [_node(graph, i, means) for i in range(len(graph))]


def edge_values(graph: GraphData) -> list[dict[str, Any]]:
    """Return the fields of every `Edge`, in the record's order."""
    means = _edge_means(graph)
    return [_edge(graph, i, means) for i in range(len(graph.record.edges))]


_PLAIN = ("name", "kind", "layer", "type", "shape", "num_elements", "parameters", "order", "reason")
_Rows = dict[str, Floats]


def _node(graph: GraphData, i: int, means: _Rows) -> dict[str, Any]:
    node = graph.record.nodes[i]
    values = {name: getattr(node, name) for name in _PLAIN}
    return {**values, "reachable": bool(node.reachable), **{n: float(row[i]) for n, row in means.items()}}


def _edge(graph: GraphData, i: int, means: _Rows) -> dict[str, Any]:
    edge = graph.record.edges[i]
    return {
        "source": edge.source,
        "target": edge.target,
        **{name: float(row[i]) for name, row in means.items()},
        "severed": bool(graph.table.severed[i]),
        "reason": edge.reason,
    }


def _node_means(graph: GraphData) -> _Rows:
    names = ("grad_norm", "gain", "divergence", "coherence", "curl", "potential", "effective_rank")
    if not graph.measured:
        return dict.fromkeys(names, _unknown(len(graph)))
    n, hodge = graph.numbers, graph.hodge
    means = (n.mean_grad_norm, n.mean_gain, n.mean_divergence, n.mean_coherence)
    return dict(zip(names, (*means, hodge.curl, hodge.potential, n.mean_effective_rank), strict=True))


def _edge_means(graph: GraphData) -> _Rows:
    if not graph.measured:
        return dict.fromkeys(("flow", "omega", "cyclic"), _unknown(len(graph.record.edges)))
    return {"flow": graph.numbers.mean_flow, "omega": graph.numbers.mean_omega, "cyclic": graph.hodge.cyclic}


def _unknown(number: int) -> Floats:
    return np.broadcast_to(np.float64(np.nan), number)
