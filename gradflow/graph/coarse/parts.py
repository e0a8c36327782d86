"""Parts of a graph: nodes of one's choice with the edges among them, and what lies between two nodes."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from gradflow.errors import UnknownLayerError
from gradflow.graph.coarse.blocks import by_pattern
from gradflow.graph.data import G
from gradflow.records import GraphRecord


def subgraph(graph: G, *patterns: str) -> G:
    """Return the nodes that match any of some globs, with the edges among them.

    The numbers of nodes and edges are those that were measured in the whole; what is computed from edges
    (coherence, curl, transmission) sees the edges that are kept. Where the loss is left out, the gradient
    enters at the nodes that nothing in the part reads.

    Args:
        patterns: globs on names of nodes (`relu*`), and on dotted module names, component by component: a
            module brings all layer calls in it and the operations that ran in it (`encoder.layers.3`).

    Returns:
        A graph of its own at the same level: its `full` is itself.

    Raises:
        ValueError: if no pattern is given.
        UnknownLayerError: if a pattern matches no node; the message lists the nearest names.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"enc.fc1": 0.2, "enc.fc2": 0.5, "head": 2.0, "loss": 1.0},
    ...     {("enc.fc1", "enc.fc2"): 0.2, ("enc.fc2", "head"): 0.5, ("head", "loss"): 2.0})
    >>> graph.subgraph("enc").edges
    (('enc.fc1', 'enc.fc2'),)
    >>> list(graph.subgraph("*.fc2", "head"))
    ['enc.fc2', 'head']
    """
    if not patterns:
        raise ValueError("graph.subgraph takes one glob or more, such as 'encoder.layers.3' or 'head*'.")
    kept: set[int] = set()
    for pattern in patterns:
        in_module = by_pattern(pattern)
        found = {
            i
            for i, node in enumerate(graph.record.nodes)
            if fnmatchcase(node.name, pattern) or (node.layer and in_module(node.layer))
        }
        if not found:
            raise UnknownLayerError.at(pattern, list(graph))
        kept |= found
    return part(graph, kept)


def between(graph: G, source: str | None, target: str | None) -> G:
    """Return the part that the gradient crosses on its way from `source` back to `target`, both included.

    Args:
        source: where the gradient comes from; None for the loss.
        target: where it is to arrive; None for everything upstream.

    Returns:
        The part, without any node where the data does not run from `target` to `source`.

    Raises:
        UnknownLayerError: if there is no node of that name.
    """
    table = graph.table
    inside = set(range(len(graph)))
    if source is not None:
        inside &= table.walk([graph.position(source)], backward=True)
    if target is not None:
        inside &= table.walk([graph.position(target)])
    return part(graph, inside)


def part(graph: G, kept: Iterable[int]) -> G:
    """Return the nodes at these positions with the edges among them, as a graph of its own."""
    nodes = [graph.record.nodes[i] for i in sorted(kept)]
    names = {node.name for node in nodes}
    edges = [e for e in graph.record.edges if e.source in names and e.target in names]
    return type(graph)(GraphRecord(nodes=nodes, edges=edges, steps=graph.record.steps), level=graph.level)
