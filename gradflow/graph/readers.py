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
    if not hasattr(graph, "is_directed") or not graph.is_directed() or graph.is_multigraph():
        raise RecordFormatError(
            "LayerGraph.from_networkx: expected a networkx.DiGraph with edges in the direction of the data, "
            f"got {type(graph).__name__}. networkx.DiGraph(graph) makes one."
        )
    measured = any(data.get("flow") is not None for _, _, data in graph.edges(data=True))
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
    data = {key: value for key, value in data.items() if value is not None}  # as node-link data has unknowns
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
    parameters = data.get("parameters", ())
    if isinstance(parameters, str):
        parameters = parameters.split()
    if not isinstance(parameters, (list, tuple)) or not all(isinstance(p, str) for p in parameters):
        raise _unexpected(where, "names", "parameters", parameters)
    return NodeRecord(
        name=str(name),
        kind=kind,
        layer=str(data.get("layer", name if kind == "layer" else "")),
        type=str(data.get("type", kind)),
        shape=_whole(where, "shape", shape.split("x") if isinstance(shape, str) and shape else shape or ()),
        num_elements=_whole(where, "num_elements", [data.get("num_elements", 0)])[0],
        parameters=parameters,
        order=_whole(where, "order", [data.get("order", place)])[0],
        reachable=bool(data.get("reachable", True)),
        reason=str(data.get("reason", "")),
        **numbers,
    )


def _number(where: str, data: Mapping[str, Any], name: str) -> float:
    value = data.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise _unexpected(where, "a number", name, value)
    return float(value)


def _whole(where: str, name: str, values: Any) -> list[int]:
    """Return whole numbers, from numbers or from their texts."""
    try:
        return [int(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise _unexpected(where, "whole numbers", name, values) from error


def _unexpected(where: str, wanted: str, name: str, value: Any) -> RecordFormatError:
    return RecordFormatError(
        f"LayerGraph.from_networkx: {where}: expected {wanted} for {name}, got {value!r}."
    )
