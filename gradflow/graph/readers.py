"""Graphs from elsewhere: from plain numbers, and from networkx."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradflow.errors import RecordFormatError
from gradflow.records import EdgeRecord, GraphRecord, NodeRecord

if TYPE_CHECKING:
    import networkx as nx

_KINDS = ("layer", "op", "input", "loss", "block")


def record_of_flows(
    grad_norms: Mapping[str, float | Sequence[float]],
    flows: Mapping[tuple[str, str], float | Sequence[float]],
    *,
    ops: Collection[str],
    num_elements: Mapping[str, int],
    effective_ranks: Mapping[str, float | Sequence[float]],
) -> GraphRecord:
    """Return the record of a graph from plain numbers; see `LayerGraph.from_flows`."""
    rows = {name: np.atleast_1d(np.asarray(value, dtype=float)) for name, value in grad_norms.items()}
    steps = max((len(row) for row in rows.values()), default=0)
    blank = np.full(steps, np.nan)
    nodes = []
    for order, (name, norm) in enumerate(rows.items()):
        kind = "op" if name in ops else "loss" if name == "loss" else "layer"
        kind = "input" if name.startswith("input") else kind
        nodes.append(
            NodeRecord(
                name=name, kind=kind, layer=name if kind == "layer" else "", type=kind, order=order,
                num_elements=num_elements.get(name, 0), grad_norm=norm, input_grad_norm=blank,
                parameters=(f"{name}.weight",) if kind == "layer" else (),
                effective_rank=np.atleast_1d(effective_ranks[name]) if name in effective_ranks else blank,
            )
        )  # fmt: skip
    edges = [
        EdgeRecord(source=u, target=v, flow=np.atleast_1d(np.asarray(flow, dtype=float)))
        for (u, v), flow in flows.items()
    ]
    return GraphRecord(nodes=nodes, edges=edges, steps=range(steps))


def record_of_networkx(graph: nx.DiGraph) -> GraphRecord:
    """Return the record of a directed graph of networkx; see `LayerGraph.from_networkx`."""
    if not graph.is_directed() or graph.is_multigraph():
        raise RecordFormatError(
            "LayerGraph.from_networkx: expected a networkx.DiGraph with edges in the direction of the data, "
            f"got {type(graph).__name__}. networkx.DiGraph(graph) makes one."
        )
    measured = any("flow" in data for _, _, data in graph.edges(data=True))
    nodes = [_node(name, data, i, measured) for i, (name, data) in enumerate(graph.nodes(data=True))]
    edges = [
        EdgeRecord(
            source=str(u),
            target=str(v),
            flow=np.array([_number(f"edge {u!s} -> {v!s}", data, "flow")] if measured else []),
            severed=bool(data.get("severed", False)),
            reason=str(data.get("reason", "")),
        )
        for u, v, data in graph.edges(data=True)
    ]
    return GraphRecord(nodes=nodes, edges=edges, steps=(0,) if measured else ())


def _node(name: Hashable, data: Mapping[str, Any], place: int, measured: bool) -> NodeRecord:
    where = f"node {name!s}"
    kind = str(data.get("kind", "loss" if name == "loss" else "layer"))
    if kind not in _KINDS:
        raise RecordFormatError(
            f"LayerGraph.from_networkx: {where}: expected a kind of {', '.join(_KINDS)}, got {kind!r}."
        )
    numbers: dict[str, Any] = {"grad_norm": [], "input_grad_norm": [], "effective_rank": []}
    if measured:
        norm = _number(where, data, "grad_norm")
        numbers["grad_norm"] = [norm]
        numbers["input_grad_norm"] = [norm * _number(where, data, "gain")]
        numbers["effective_rank"] = [_number(where, data, "effective_rank")]
    shape = data.get("shape", ())
    sides = shape.split("x") if isinstance(shape, str) else shape
    parameters = data.get("parameters", ())
    return NodeRecord(
        name=str(name),
        kind=kind,
        layer=str(data.get("layer", name if kind == "layer" else "")),
        type=str(data.get("type", kind)),
        shape=[int(side) for side in sides if side != ""],
        num_elements=int(data.get("num_elements", 0)),
        parameters=parameters.split() if isinstance(parameters, str) else parameters,
        order=int(data.get("order", place)),
        reachable=bool(data.get("reachable", True)),
        reason=str(data.get("reason", "")),
        **numbers,
    )


def _number(where: str, data: Mapping[str, Any], name: str) -> float:
    value = data.get(name, math.nan)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordFormatError(
            f"LayerGraph.from_networkx: {where}: expected a number for {name}, got {value!r}."
        )
    return float(value)
