"""Circulation round every fork and join: what one side keeps of the gradient against the other."""

from __future__ import annotations

import itertools
import math

import attrs

from gradflow.graph.data import GraphData
from gradflow.graph.flow import exponential, number_field
from gradflow.graph.table import FlowTable
from gradflow.records import Floats, array_field


@attrs.frozen(kw_only=True)
class Circulation:
    """Two ways from a fork to the join where they meet again, and what each keeps of the gradient.

    Args:
        fork: the node whose output both sides read.
        join: the node where they meet.
        branch: the nodes of the side with more edges (the one that runs first, if equal), both ends included.
        shortcut: the nodes of the other side, both ends included; a plain skip is (fork, join).
        circulation: Σω(branch) − Σω(shortcut) = ln(transmission of branch / transmission of shortcut), in
            nats, mean over the steps. 0: alike. Negative: the branch keeps less than the shortcut.
        branch_transmission: exp Σω(branch), what the branch keeps from the join to the fork.
        shortcut_transmission: exp Σω(shortcut).
        per_step: the circulation at each measured step, shape (steps,); NaN where a side carried nothing.
    """

    fork: str
    join: str
    branch: tuple[str, ...]
    shortcut: tuple[str, ...]
    circulation: float = number_field()
    branch_transmission: float = number_field()
    shortcut_transmission: float = number_field()
    per_step: Floats = array_field()

    def __str__(self) -> str:
        one, two = " -> ".join(self.branch[1:-1]), " -> ".join(self.shortcut[1:-1]) or "the skip"
        kept = (self.branch_transmission, self.shortcut_transmission)
        return f"{self.fork} .. {self.join}: by {one} {kept[0]:.3g}, by {two} {kept[1]:.3g}"


# NOTE [A cycle basis of forks and joins]
# Give every node one way on to the loss: its consumer that is fewest edges from it. These ways are a tree
# towards the loss, so any two consumers of a node meet again at one node, the join. Pair every fork's
# consumers one after the other in topological order, follow each to where they meet, and there is one cycle
# for each consumer but the first: Σ (consumers − 1) = E − N + 1 of them, which is the number of independent
# cycles. They are independent, as the pairs at one fork are differences e_i − e_{i+1} of its own edges, and
# no cycle of a later fork has these edges. Both sides of each are paths along the data: the skip and the
# branch of a residual block, two heads of attention, the two ends of a U-Net's bridge. The circulation of
# any other cycle is a signed sum of these, and the cyclic part of the Hodge decomposition has the same sums.


def circulation(graph: GraphData) -> tuple[Circulation, ...]:
    """Return the circulation round every independent cycle, each a fork with two sides and their join.

    The circulation of a cycle is the signed sum of ω round it. A potential sums to zero round a cycle, so
    this is the sum of the cyclic part alone, and it is the log ratio of what the two sides transmit.
    Severed edges are in no cycle (see `graph.severed`).

    Returns:
        One record for each independent cycle of the live edges, largest |circulation| first.

    Raises:
        GraphUnavailableError: if only the topology was taken, or the graph has a cycle of directed edges.

    After HodgeRank: X. Jiang, L.-H. Lim, Y. Yao, Y. Ye, "Statistical ranking and combinatorial Hodge
    theory", Mathematical Programming 127 (2011).

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"fc1": 1.02, "fc2": 1.0, "add": 1.0, "loss": 1.0},
    ...     {("fc1", "fc2"): 0.02, ("fc1", "add"): 1.0, ("fc2", "add"): 1.0, ("add", "loss"): 1.0},
    ...     ops=("add",))
    >>> (block,) = graph.circulation()
    >>> print(block, f"{block.circulation:.3f}", sep=", circulation ")   # ln 0.02
    fc1 .. add: by fc2 0.02, by the skip 1, circulation -3.912
    """
    table = graph.table
    table.check_measured("graph.circulation")
    topo = table.order("graph.circulation")
    weights = graph.numbers.mean_omega.tolist()
    live = [[e for e in edges if math.isfinite(weights[e])] for edges in table.out_edges]
    ahead = _ways_to_loss(table, topo, live)
    place = [0] * len(topo)
    for i, node in enumerate(topo):
        place[node] = i
    heads = table.target.tolist()
    found: list[Circulation] = []
    for node in topo:
        consumers = sorted(live[node], key=lambda e: place[heads[e]])
        for one, two in itertools.pairwise(consumers):
            sides = _meeting(heads, place, ahead, one, two)
            if sides is not None:
                found.append(_record(graph, *sides, weights))
    return tuple(sorted(found, key=lambda c: -abs(c.circulation)))


def _ways_to_loss(table: FlowTable, topo: list[int], live: list[list[int]]) -> list[int]:
    """Return every node's live edge to the consumer nearest to the end; −1 at an end."""
    heads = table.target.tolist()
    hops, ahead = [0] * len(topo), [-1] * len(topo)
    for node in reversed(topo):
        if live[node]:
            ahead[node] = min(live[node], key=lambda e: (hops[heads[e]], e))
            hops[node] = hops[heads[ahead[node]]] + 1
    return ahead


def _meeting(
    heads: list[int], place: list[int], ahead: list[int], one: int, two: int
) -> tuple[list[int], list[int]] | None:
    """Follow two edges of a fork to where they meet: the edges of both sides, or None if they never do."""
    sides = ([one], [two])
    while (x := heads[sides[0][-1]]) != (y := heads[sides[1][-1]]):
        side, node = (sides[0], x) if place[x] < place[y] else (sides[1], y)
        if ahead[node] < 0:
            return None
        side.append(ahead[node])
    return sides


def _record(graph: GraphData, one: list[int], two: list[int], weights: list[float]) -> Circulation:
    branch, shortcut = (one, two) if len(one) >= len(two) else (two, one)
    table, omega = graph.table, graph.numbers.omega
    sums = [sum(weights[e] for e in side) for side in (branch, shortcut)]
    names = [
        (table.edges[side[0]].source, *(table.edges[e].target for e in side)) for side in (branch, shortcut)
    ]
    return Circulation(
        fork=names[0][0],
        join=names[0][-1],
        branch=names[0],
        shortcut=names[1],
        circulation=sums[0] - sums[1],
        branch_transmission=exponential(sums[0]),
        shortcut_transmission=exponential(sums[1]),
        per_step=omega[branch].sum(axis=0) - omega[shortcut].sum(axis=0),
    )
