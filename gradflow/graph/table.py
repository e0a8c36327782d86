"""The graph record as arrays and adjacency lists, which every query of this folder works on.

Node i and edge j are positions in the record. Nothing here knows of networkx: a query that runs over
20 000 nodes runs over lists of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import attrs
import numpy as np

from gradflow.errors import GraphUnavailableError, RecordFormatError
from gradflow.records import Bools, EdgeRecord, Floats, GraphRecord, Ints, NodeRecord


@attrs.frozen(eq=False, repr=False, kw_only=True)
class FlowTable:
    """A graph record, indexed. N nodes, E edges, S measured steps.

    Args:
        nodes: the node records, N of them.
        edges: the edge records, E of them.
        index: position of every node name.
        source: position of every edge's u, shape (E,).
        target: position of every edge's v, shape (E,).
        out_edges: for every node the edges to its consumers.
        in_edges: for every node the edges from its inputs.
        topo: positions in topological order, or None if the graph has a cycle.
        steps: which steps were measured.
        severed: whether an edge carries nothing: cut, or exactly zero at every measured step, shape (E,).
        cut: whether an edge is cut by an operation, so that no gradient can flow, shape (E,).
        elements: number of elements of every node's output, 0 if unknown, shape (N,).
        grad: ‖g_v‖, shape (N, S).
        input_grad: ‖c_v‖, shape (N, S).
        rank: effective rank of g_v, shape (N, S).
        flow: f(u→v), shape (E, S); exactly zero where the edge is severed.
    """

    nodes: tuple[NodeRecord, ...]
    edges: tuple[EdgeRecord, ...]
    index: dict[str, int]
    source: Ints
    target: Ints
    out_edges: list[list[int]]
    in_edges: list[list[int]]
    topo: list[int] | None
    steps: tuple[int, ...]
    severed: Bools
    cut: Bools
    elements: Ints
    grad: Floats
    input_grad: Floats
    rank: Floats
    flow: Floats

    @property
    def measured(self) -> bool:
        """Whether the edges carry flows."""
        return bool(self.steps)

    def name(self, node: int) -> str:
        """Return the name of the node at a position."""
        return self.nodes[node].name

    def arrow(self, edge: int) -> str:
        """Return an edge as text: `u -> v`."""
        return f"{self.edges[edge].source} -> {self.edges[edge].target}"

    def check_measured(self, call: str) -> None:
        """Raise if only the topology was taken.

        Raises:
            GraphUnavailableError: with the call that needs flows and how to get them.
        """
        if not self.measured:
            raise GraphUnavailableError(
                f"{call} needs the flow on the edges, but this graph holds only the topology (no measured "
                'steps). Measure it with gradflow.analyze(..., detail="full") and ask that record\'s graph.'
            )

    def order(self, call: str) -> list[int]:
        """Return the topological order.

        Raises:
            GraphUnavailableError: if the graph has a cycle.
        """
        if self.topo is None:
            raise GraphUnavailableError(
                f"{call} needs a graph without cycles, but this one has one. In a graph of modules, "
                "contracting has made a block that the data leaves and enters again: ask graph.full, "
                "graph.layers() or a finer graph.at(...)."
            )
        return self.topo

    def roots(self) -> list[int]:
        """Return where the gradient starts: the loss, or every node without consumers if there is none."""
        losses = [i for i, node in enumerate(self.nodes) if node.kind == "loss"]
        return losses or [i for i, out in enumerate(self.out_edges) if not out]

    def scalars(self) -> set[int]:
        """Return the operations with one element, such as a mean over the batch.

        An operation of unknown size counts if only the loss and operations with one element read it.
        """
        found = {i for i, node in enumerate(self.nodes) if node.kind == "loss"}
        for i in reversed(self.topo if self.topo is not None else range(len(self.nodes))):
            node, heads = self.nodes[i], [int(self.target[e]) for e in self.out_edges[i]]
            unknown = node.num_elements == 0 and bool(heads) and all(head in found for head in heads)
            if node.kind == "op" and (node.num_elements == 1 or unknown):
                found.add(i)
        return {i for i in found if self.nodes[i].kind == "op"}

    def walk(self, starts: Iterable[int], *, backward: bool = False, usable: Bools | None = None) -> set[int]:
        """Return the nodes that a walk comes to, those that it starts at included.

        Args:
            starts: where it starts.
            backward: against the data, as the gradient runs.
            usable: the edges that it takes, shape (E,); None for all.
        """
        near, ends = (self.in_edges, self.source) if backward else (self.out_edges, self.target)
        seen = set(starts)
        stack = list(seen)
        while stack:
            for edge in near[stack.pop()]:
                other = int(ends[edge])
                if other not in seen and (usable is None or usable[edge]):
                    seen.add(other)
                    stack.append(other)
        return seen

    def reached(self, usable: Bools) -> Bools:
        """Return which nodes a walk from the loss against the data comes to, over `usable` edges, (N,)."""
        seen = np.zeros(len(self.nodes), dtype=bool)
        seen[list(self.walk(self.roots(), backward=True, usable=usable))] = True
        return seen


def flow_table(record: GraphRecord) -> FlowTable:
    """Return the record as arrays, checked.

    Raises:
        RecordFormatError: if names repeat, an edge joins nodes that are not there, two edges join the same
            pair, or an array's length is not the number of measured steps.
    """
    index = {node.name: i for i, node in enumerate(record.nodes)}
    _check(record, index)
    source = np.array([index[e.source] for e in record.edges], dtype=np.int64)
    target = np.array([index[e.target] for e in record.edges], dtype=np.int64)
    out_edges: list[list[int]] = [[] for _ in record.nodes]
    in_edges: list[list[int]] = [[] for _ in record.nodes]
    for edge, (u, v) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        out_edges[u].append(edge)
        in_edges[v].append(edge)
    grad = _stack(record, record.nodes, lambda n: n.grad_norm)
    is_loss = np.array([node.kind == "loss" for node in record.nodes], dtype=bool)
    grad[is_loss] = np.where(np.isnan(grad[is_loss]), 1.0, grad[is_loss])
    flow = _stack(record, record.edges, lambda e: e.flow)
    flagged = np.array([e.severed for e in record.edges], dtype=bool)
    named = np.array([bool(e.reason) for e in record.edges], dtype=bool)
    known = ~np.isnan(flow)
    severed = flagged | (known.any(axis=1) & ~(known & (flow != 0)).any(axis=1))
    flow[severed] = 0.0
    table = FlowTable(
        nodes=record.nodes,
        edges=record.edges,
        index=index,
        source=source,
        target=target,
        out_edges=out_edges,
        in_edges=in_edges,
        topo=_topological_order(source, target, out_edges, in_edges),
        steps=record.steps,
        severed=severed,
        cut=flagged & named,
        elements=np.array([node.num_elements for node in record.nodes], dtype=np.int64),
        grad=grad,
        input_grad=_stack(record, record.nodes, lambda n: n.input_grad_norm),
        rank=_stack(record, record.nodes, lambda n: n.effective_rank),
        flow=flow,
    )
    for value in attrs.astuple(table, recurse=False):
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
    return table


def _check(record: GraphRecord, index: dict[str, int]) -> None:
    def fail(detail: str) -> None:
        raise RecordFormatError(
            f"LayerGraph: {detail}. A graph record needs unique node names, one edge for every pair of nodes "
            "that hand a tensor on, and arrays of one value for every measured step (or none)."
        )

    if len(index) != len(record.nodes):
        seen: set[str] = set()
        twice = next(n.name for n in record.nodes if n.name in seen or seen.add(n.name))
        fail(f"two nodes are named {twice!r}")
    pairs: set[tuple[str, str]] = set()
    for edge in record.edges:
        pair = (edge.source, edge.target)
        for name in pair:
            if name not in index:
                fail(f"the edge {pair[0]!r} -> {pair[1]!r} names {name!r}, which is no node")
        if pair in pairs:
            fail(f"two edges join {pair[0]!r} -> {pair[1]!r}")
        pairs.add(pair)
        if len(edge.flow) not in (0, len(record.steps)):
            fail(f"the flow of {pair[0]!r} -> {pair[1]!r} has {len(edge.flow)} values for "
                 f"{len(record.steps)} measured steps")  # fmt: skip
    for node in record.nodes:
        for field in ("grad_norm", "input_grad_norm", "effective_rank"):
            if len(getattr(node, field)) not in (0, len(record.steps)):
                fail(f"{field} of node {node.name!r} has {len(getattr(node, field))} values for "
                     f"{len(record.steps)} measured steps")  # fmt: skip


def _stack(record: GraphRecord, parts: Sequence, value: Callable[..., Floats]) -> Floats:
    """Return one row per part and one column per step; NaN where nothing was measured."""
    rows = np.full((len(parts), len(record.steps)), np.nan)
    for i, part in enumerate(parts):
        array = value(part)
        if len(array):
            rows[i] = array
    return rows


def _topological_order(
    source: Ints, target: Ints, out_edges: list[list[int]], in_edges: list[list[int]]
) -> list[int] | None:
    """Return Kahn's order, or None if there is a cycle. The record's own order is kept where it will do."""
    if bool(np.all(source < target)):
        return list(range(len(out_edges)))
    waiting = [len(edges) for edges in in_edges]
    ready = [i for i, count in enumerate(waiting) if not count]
    heads = target.tolist()
    order: list[int] = []
    for node in ready:  # grows while it is walked
        order.append(node)
        for edge in out_edges[node]:
            waiting[heads[edge]] -= 1
            if not waiting[heads[edge]]:
                ready.append(heads[edge])
    return order if len(order) == len(out_edges) else None
