"""Where the gradient must pass: dominators between the loss and the layers, and cuts between them.

networkx takes longer to import than the rest of gradflow together, so it is imported where it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import attrs

from gradflow.graph.table import FlowTable

_N = TypeVar("_N", bound=Hashable)
_ROOT = -1  # stands before the loss (or before all ends of a graph without one)
MAX_REGION = 2_000  # nodes between two dominators up to which their min cut is computed


@attrs.frozen(eq=False, repr=False, kw_only=True)
class DominatorTree:
    """The dominator tree of the graph walked from the loss against the data, over edges that are not cut.

    Node d dominates v if every way from the loss to v passes d.

    Args:
        parent: immediate dominator of every node; −1 for the loss, None where no way leads from the loss.
        order: the nodes reached, each after its parent.
        inside: trainable nodes that the node dominates, itself included.
        behind: trainable nodes upstream of it, itself included.
        heavy: of the nodes it immediately dominates, the one on the trunk: the one with the most trainable
            nodes inside among those that dominate a node without inputs; −1 for none.
        trainable: number of trainable nodes reached.
    """

    parent: list[int | None]
    order: list[int]
    inside: list[int]
    behind: list[int]
    heavy: list[int]
    trainable: int

    def chain(self) -> list[int]:
        """Return the nodes from the loss down the tree, always to the heavy side."""
        nodes: list[int] = []
        tops = [i for i in self.order if self.parent[i] == _ROOT]
        node = max(tops, key=lambda i: (self.inside[i], -i), default=_ROOT)
        while node >= 0:
            nodes.append(node)
            node = self.heavy[node]
        return nodes


def immediate_dominators(successors: Mapping[_N, Iterable[_N]], root: _N) -> dict[_N, _N]:
    """Return the last node that every way from the root to a node passes, for each node but the root.

    Near-linear on graphs as networks have them: K. D. Cooper, T. J. Harvey, K. Kennedy, "A simple, fast
    dominance algorithm", Rice University 2001.

    Args:
        successors: the nodes next to each node; a node without an entry has none.
        root: where the ways start. Nodes that it does not reach are left out.

    >>> immediate_dominators({"loss": ["add"], "add": ["fc", "x"], "fc": ["x"]}, "loss")
    {'add': 'loss', 'fc': 'add', 'x': 'add'}
    """
    before: dict[_N, list[_N]] = {root: []}
    order: list[_N] = []  # each node after all that are reached from it, but for cycles
    stack = [(root, iter(successors.get(root, ())))]
    while stack:
        node, rest = stack[-1]
        for after in rest:
            if after in before:
                before[after].append(node)
                continue
            before[after] = [node]
            stack.append((after, iter(successors.get(after, ()))))
            break
        else:
            order.append(node)
            stack.pop()
    rank = {node: i for i, node in enumerate(order)}
    above = {root: root}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            a, *others = (p for p in before[node] if p in above)
            for b in others:
                while a != b:
                    if rank[a] < rank[b]:
                        a = above[a]
                    else:
                        b = above[b]
            if above.get(node) != a:
                above[node], changed = a, True
    return {node: above[node] for node in before if node != root}


def dominator_tree(table: FlowTable) -> DominatorTree:
    """Return the dominator tree of the reversed graph."""
    num = len(table.nodes)
    back: dict[int, list[int]] = {_ROOT: list(table.roots())}
    for u, v, cut in zip(table.source.tolist(), table.target.tolist(), table.cut.tolist(), strict=True):
        if not cut:
            back.setdefault(v, []).append(u)
    parent: list[int | None] = [None] * num
    for node, above in immediate_dominators(back, _ROOT).items():
        parent[node] = above
    order = _down(parent)
    inside = [0] * num
    for node in order:
        inside[node] = int(bool(table.nodes[node].parameters))
    for node in reversed(order):
        above = parent[node]
        if above is not None and above >= 0:
            inside[above] += inside[node]
    behind = _behind(table, parent)
    return DominatorTree(
        parent=parent,
        order=order,
        inside=inside,
        behind=behind,
        heavy=_heavy(table, parent, order, inside),
        trainable=sum(bool(table.nodes[i].parameters) for i in order),
    )


def _down(parent: list[int | None]) -> list[int]:
    children: dict[int, list[int]] = {}
    for node, above in enumerate(parent):
        if above is not None:
            children.setdefault(above, []).append(node)
    order = list(children.get(_ROOT, ()))
    for node in order:  # grows while it is walked
        order.extend(children.get(node, ()))
    return order


def _heavy(table: FlowTable, parent: list[int | None], order: list[int], inside: list[int]) -> list[int]:
    """Return `heavy` of every node: the trunk leads to a node without inputs, a branch need not."""
    source = [all(table.cut[edge] for edge in edges) for edges in table.in_edges]
    heavy = [-1] * len(parent)
    for node in reversed(order):
        above = parent[node]
        if above is None or above < 0:
            continue
        source[above] |= source[node]
        rival = heavy[above]
        if rival < 0 or (source[node], inside[node], -node) > (source[rival], inside[rival], -rival):
            heavy[above] = node
    return heavy


def _behind(table: FlowTable, parent: list[int | None]) -> list[int]:
    """Return how many trainable nodes lie upstream of each node, itself included; sets are integers' bits."""
    trainable = [i for i, n in enumerate(table.nodes) if parent[i] is not None and n.parameters]
    bits = [0] * len(table.nodes)
    for place, node in enumerate(trainable):
        bits[node] = 1 << place
    sources, order = table.source.tolist(), table.topo or range(len(bits))
    changed = True
    while changed:  # once over a graph without cycles
        changed = False
        for node in order:
            gathered = bits[node]
            for edge in table.in_edges[node]:
                if not table.cut[edge]:
                    gathered |= bits[sources[edge]]
            changed |= gathered != bits[node]
            bits[node] = gathered
        changed &= table.topo is None
    return [value.bit_count() for value in bits]


def cut_capacities(
    table: FlowTable, tree: DominatorTree, capacity: Callable[[int], float]
) -> dict[int, float]:
    """Return the least capacity of nodes that separates the loss from the layers, region by region.

    All the gradient passes each node of the tree's heavy chain, so a cut of least capacity is either one of
    these nodes or lies between two of them: a min cut with node capacities (each node split in two) of
    that region alone.

    Args:
        capacity: capacity of a node; infinite if unknown.

    Returns:
        For every node on the heavy chain its own capacity, and for every node between two of them the min
        cut of that region; left out where it is infinite (an open way past) or the region is too large.

    L. R. Ford, D. R. Fulkerson, "Maximal flow through a network", Canadian J. of Mathematics 8 (1956).
    """
    chain = tree.chain()
    region: dict[int, int] = {node: i for i, node in enumerate(chain)}
    between: list[list[int]] = [[] for _ in chain]
    on_chain = set(chain)
    for node in tree.order:
        above = tree.parent[node]
        if node not in on_chain and above is not None and above in region:
            region[node] = region[above]
            between[region[node]].append(node)
    found = {node: value for node in chain if math.isfinite(value := capacity(node))}
    for i, nodes in enumerate(between[:-1]):
        if nodes and len(nodes) <= MAX_REGION:
            value = _min_cut(table, nodes, chain[i], chain[i + 1], capacity)
            if math.isfinite(value):
                found.update(dict.fromkeys(nodes, value))
    return found


def _min_cut(
    table: FlowTable, nodes: list[int], near: int, far: int, capacity: Callable[[int], float]
) -> float:
    """Return the min cut between two dominators over the nodes between them; infinite if none is finite."""
    import networkx as nx

    members = {near, far, *nodes}
    network = nx.DiGraph()
    network.add_nodes_from([("out", far), ("in", near)])
    for node in nodes:
        value = capacity(node)
        network.add_edge(("in", node), ("out", node), **({"capacity": value} if math.isfinite(value) else {}))
    for node in (far, *nodes):
        for edge in table.out_edges[node]:
            head = int(table.target[edge])
            if head in members and head != far and not table.cut[edge]:
                network.add_edge(("out", node), ("in", head))
    try:
        return float(nx.maximum_flow_value(network, ("out", far), ("in", near)))
    except nx.NetworkXUnbounded:
        return math.inf
