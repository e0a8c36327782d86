"""Blocks: the graph with each module of a chosen name or depth contracted to one node."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

import attrs
import numpy as np

from gradflow.errors import UnknownLayerError
from gradflow.graph.coarse.contract import contracted, norm_of_parts
from gradflow.graph.data import G, GraphData
from gradflow.graph.table import FlowTable
from gradflow.records import EdgeRecord, Floats, GraphRecord, NodeRecord


def at(graph: G, pattern: str | None = None, *, depth: int | None = None, max_edges: int = 100_000) -> G:
    """Return the graph with nodes contracted to blocks of the module tree.

    A layer belongs to the block of its module, an operation to the block of the innermost module it ran
    in. Layers that match no block stay as they are, and operations that match none are contracted as in
    `layers`. Nothing is counted twice and nothing is lost:

    - cotangents that a block hands to one tensor of u add as vectors; where they are all of u's consumers
      their norm is the measured ‖g_u‖, else one cosine for all pairs is assumed that explains ‖g_u‖;
    - cotangents at different tensors are coordinates of one vector: root of the sum of squares;
    - at a step that lacks a part of what is summed (a branch not taken), the sum is not known;
    - a block's output gradient is what reaches, from outside, the tensors that leave it; its gain is the
      norm of what it hands back to the outside over the norm of its output gradient.

    A block that the data leaves and enters again (shared modules, say) makes a cycle. The graph still has
    its numbers, but path, transmission, circulation and layouts need one without cycles.

    Args:
        pattern: a glob on the dotted module name, component by component (`encoder.layers.*` makes one
            block of every entry of `encoder.layers`).
        depth: instead of a pattern, the number of leading components that name a block.
        max_edges: as in `layers`.

    Returns:
        A graph with nodes of kind `block` named by their module, in the order they begin to run.

    Raises:
        ValueError: if neither or both of `pattern` and `depth` are given, or `depth` is below 1.
        UnknownLayerError: if no module matches the pattern.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"enc.fc1": 0.2, "enc.fc2": 0.5, "head": 2.0, "loss": 1.0},
    ...     {("enc.fc1", "enc.fc2"): 0.2, ("enc.fc2", "head"): 0.5, ("head", "loss"): 2.0})
    >>> blocks = graph.at(depth=1)
    >>> list(blocks), blocks["enc"].grad_norm
    (['enc', 'head', 'loss'], 0.5)
    """
    full = graph.full
    if (pattern is None) == (depth is None):
        raise ValueError(
            "graph.at takes a pattern such as 'encoder.layers.*', or depth=2, and exactly one of them; "
            f"got pattern={pattern!r}, depth={depth!r}."
        )
    if depth is not None and depth < 1:
        raise ValueError(f"graph.at: expected depth of at least 1, got {depth}. depth=1 names top modules.")
    name_of = _by_depth(depth) if depth is not None else by_pattern(str(pattern))
    if pattern is not None and not any(_blocks(full, lambda node: name_of(node.layer))):
        raise UnknownLayerError.at(pattern, sorted({n.layer for n in full.record.nodes if n.layer}))
    level = f"depth {depth}" if depth is not None else str(pattern)
    return grouped(graph, lambda node: name_of(node.layer), level, max_edges=max_edges)


def grouped(
    graph: G, block_of: Callable[[NodeRecord], str | None], level: str, *, max_edges: int = 100_000
) -> G:
    """Return the graph with nodes contracted to blocks of one's own choice; see `at` for the numbers.

    Args:
        graph: at any level; it is contracted from its full one.
        block_of: the name of a node's block, or None for one that stays as it is; not asked of inputs and
            of the loss.
        level: what to call the result's level.
        max_edges: as in `layers`.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"a": 0.2, "b": 0.5, "c": 2.0, "loss": 1.0},
    ...     {("a", "b"): 0.2, ("b", "c"): 0.5, ("c", "loss"): 2.0})
    >>> list(grouped(graph, lambda node: "ab" if node.name in "ab" else None, "halves"))
    ['ab', 'c', 'loss']
    """
    table = graph.full.table
    record = contracted(_quotient(table, _blocks(graph.full, block_of)), max_edges=max_edges)
    return graph.coarser(record, level)


def _blocks(graph: GraphData, block_of: Callable[[NodeRecord], str | None]) -> list[str | None]:
    return [None if n.kind in ("input", "loss") else block_of(n) for n in graph.record.nodes]


def _by_depth(depth: int) -> Callable[[str], str | None]:
    def block(module: str) -> str | None:
        parts = module.split(".") if module else []
        return ".".join(parts[:depth]) if len(parts) >= depth else None

    return block


def by_pattern(pattern: str) -> Callable[[str], str | None]:
    """Return a function from a dotted module name to the part of it that a glob matches, or None."""
    globs = pattern.split(".")

    def block(module: str) -> str | None:
        parts = module.split(".") if module else []
        if len(parts) < len(globs) or not all(map(fnmatchcase, parts, globs)):
            return None
        return ".".join(parts[: len(globs)])

    return block


def _quotient(table: FlowTable, blocks: list[str | None]) -> GraphRecord:
    """Return the record with every block as one node; nodes of no block stay, operations too."""
    taken = {table.name(i) for i, block in enumerate(blocks) if block is None}
    members: dict[str, list[int]] = {}
    names: list[str] = []
    for i, block in enumerate(blocks):
        name = table.name(i) if block is None else f"{block} (block)" if block in taken else block
        names.append(name)
        members.setdefault(name, []).append(i)
    edges = _edges(table, names)
    handed: dict[str, Floats] = {}
    for edge in edges:
        handed[edge.target] = np.hypot(handed.get(edge.target, 0.0), edge.flow)
    nodes = []
    for name, some in members.items():
        first = table.nodes[some[0]]
        if len(some) == 1 and first.kind != "op":  # a layer on its own keeps what was measured there
            nodes.append(attrs.evolve(first, name=name))
        elif blocks[some[0]] is None:
            nodes.append(first)
        else:
            nodes.append(
                _block(table, name, some, names, handed.get(name, np.full(len(table.steps), np.nan)))
            )
    return GraphRecord(nodes=nodes, edges=edges, steps=table.steps)


def _edges(table: FlowTable, names: list[str]) -> list[EdgeRecord]:
    """Return the edges between blocks: vectors at one tensor are added, tensors squared and summed."""
    at_tensor: dict[tuple[str, str], dict[int, list[int]]] = {}
    for edge, (u, v) in enumerate(zip(table.source.tolist(), table.target.tolist(), strict=True)):
        if names[u] != names[v]:
            at_tensor.setdefault((names[u], names[v]), {}).setdefault(u, []).append(edge)
    edges = []
    for (a, b), tensors in at_tensor.items():
        total = np.zeros(len(table.steps))
        for u, some in tensors.items():
            total = np.hypot(total, _handed(table, u, some))
        every = [e for some in tensors.values() for e in some]
        severed = all(bool(table.severed[e]) for e in every)
        reason = next((table.edges[e].reason for e in every if severed and table.edges[e].reason), "")
        edges.append(EdgeRecord(source=a, target=b, flow=total, severed=severed, reason=reason))
    return edges


def _handed(table: FlowTable, u: int, edges: list[int]) -> Floats:
    """Return the norm of what some of u's consumers hand back to it together, shape (S,)."""
    return norm_of_parts(table, u, [table.flow[e] for e in edges])


def _block(table: FlowTable, name: str, members: list[int], names: list[str], handed: Floats) -> NodeRecord:
    """Return a block's node: the output gradient is what reaches its exits from outside."""
    total = np.zeros(len(table.steps))
    exits: list[int] = []
    for u in members:
        outside = [e for e in table.out_edges[u] if names[int(table.target[e])] != name]
        if outside:
            exits.append(u)
            total = np.hypot(total, _handed(table, u, outside))
    nodes = [table.nodes[i] for i in members]
    only = table.nodes[exits[0]] if len(exits) == 1 else None
    reachable = any(node.reachable for node in nodes)
    unknown = np.full(len(table.steps), np.nan)
    return NodeRecord(
        name=name,
        kind="block",
        layer=name,
        type="block",
        shape=only.shape if only else (),
        num_elements=int(table.elements[exits].sum()) if exits else 0,
        parameters=tuple(dict.fromkeys(p for node in nodes for p in node.parameters)),
        order=min(node.order for node in nodes),
        grad_norm=total if exits else unknown,
        input_grad_norm=handed,
        effective_rank=table.rank[exits[0]] if only else unknown,
        reachable=reachable,
        reason="" if reachable else next((node.reason for node in nodes if node.reason), ""),
    )
