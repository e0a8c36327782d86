"""What the gradient never reaches, and where the way to it is cut."""

from __future__ import annotations

from collections import deque

import attrs
import numpy as np

from gradflow.graph.data import GraphData


@attrs.frozen(kw_only=True)
class Unreachable:
    """A layer that no gradient reaches.

    Args:
        name: the layer call.
        layer: qualified module name.
        type: class name.
        parameters: names of its parameters, which get no gradient here.
        cut: the severed edge (u, v) at which the gradient on its way from the loss to this layer ends (the
            nearest, if several), or None if no way leads there.
        reason: why, in one sentence.
    """

    name: str
    layer: str
    type: str
    parameters: tuple[str, ...]
    cut: tuple[str, str] | None
    reason: str


def unreachable(graph: GraphData) -> tuple[Unreachable, ...]:
    """Return the layers that no gradient reaches, and why.

    A layer counts if the record says so, if no walk from the loss against the data reaches it over edges
    that are not severed, or if its output gradient was exactly zero at every measured step. The reason is
    the record's where it gives one, else the severed edge at which the gradient ends.

    Returns:
        One record for each such layer or block, in the order of execution. Works without measured flows.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"fc1": 0.0, "fc2": 1.0, "loss": 1.0}, {("fc1", "fc2"): 0.0, ("fc2", "loss"): 1.0})
    >>> [layer.name for layer in graph.unreachable()]
    ['fc1']
    """
    table = graph.table
    alive = table.reached(~table.severed)
    known = np.isfinite(table.grad)
    zero = known.any(axis=1) & ~(known & (table.grad != 0)).any(axis=1)
    cuts = _nearest_cuts(graph, alive)
    found = []
    for i, node in enumerate(table.nodes):
        if node.kind not in ("layer", "block") or (node.reachable and alive[i] and not zero[i]):
            continue
        cut = cuts.get(i)
        found.append(
            Unreachable(
                name=node.name,
                layer=node.layer,
                type=node.type,
                parameters=node.parameters,
                cut=(table.edges[cut].source, table.edges[cut].target) if cut is not None else None,
                reason=node.reason or _reason(graph, i, cut, bool(alive[i])),
            )
        )
    return tuple(found)


def _nearest_cuts(graph: GraphData, alive: np.ndarray) -> dict[int, int]:
    """Return for every node upstream of a cut the nearest severed edge into a node that is alive."""
    table = graph.table
    nearest: dict[int, int] = {}
    queue: deque[int] = deque()
    for edge in np.flatnonzero(table.severed).tolist():
        tail = int(table.source[edge])
        if tail not in nearest and not alive[tail] and alive[int(table.target[edge])]:
            nearest[tail] = edge
            queue.append(tail)
    while queue:
        node = queue.popleft()
        for edge in table.in_edges[node]:
            tail = int(table.source[edge])
            if tail not in nearest and not alive[tail]:
                nearest[tail] = nearest[node]
                queue.append(tail)
    return nearest


def _reason(graph: GraphData, node: int, cut: int | None, alive: bool) -> str:
    table = graph.table
    if cut is not None:
        why = table.edges[cut].reason
        how = f"is cut by {why}" if why else "is exactly zero at every measured step"
        return f"the gradient on its way from the loss {how} at {table.arrow(cut)}."
    if not table.out_edges[node]:
        return "nothing that the loss depends on reads its output."
    if alive:
        return "its output gradient is exactly zero at every measured step."
    return "no way leads from its output to the loss."
