"""Circulation: the discrete Hodge decomposition of what the gradient keeps on every edge."""

from __future__ import annotations

import attrs
import numpy as np

from gradflow.graph.algebra.laplacian import laplacian_potentials
from gradflow.graph.table import FlowTable
from gradflow.records import Floats


@attrs.frozen(eq=False, kw_only=True, repr=False)
class HodgeDecomposition:
    """ω split into the difference of a potential and a cyclic rest; arrays are read-only.

    Args:
        names: node names, N of them.
        edges: (u, v) pairs, E of them.
        omega: ω(u→v) = ln(f(u→v) / ‖g_v‖), shape (E,) or (E, S); NaN on severed edges.
        potential: s, in nats, shape (N,) or (N, S); NaN at a node without live edges.
        cyclic: ω(u→v) − (s_u − s_v), shape (E,) or (E, S); NaN on severed edges.
        curl: root mean square of the cyclic part over a node's live edges, shape (N,) or (N, S).
    """

    names: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]
    omega: Floats
    potential: Floats
    cyclic: Floats
    curl: Floats

    def __repr__(self) -> str:
        worst = float(np.nanmax(np.abs(self.cyclic))) if np.isfinite(self.cyclic).any() else 0.0
        return (
            f"HodgeDecomposition({len(self.names)} nodes, {len(self.edges)} edges, "
            f"largest cyclic part {worst:.3g})"
        )


def hodge_decomposition(table: FlowTable, omega: Floats, level: Floats) -> HodgeDecomposition:
    """Return the discrete Hodge decomposition of an edge field.

    ω(u→v) = (s_u − s_v) + cyclic(u→v), where s minimises Σ cyclic² over the live edges, so that the cyclic
    part sums to zero over the edges at every node and lives on cycles of the undirected graph alone. On a
    chain s_v = ln ‖g_v‖ and the cyclic part is zero. s is defined up to a constant in every connected
    component; it is fixed by s = `level` at the loss, or, in a component without the loss, at its last node.

    Args:
        table: the indexed graph record.
        omega: the field in nats, NaN where an edge is left out, shape (E, K).
        level: ln ‖g_v‖, shape (N, K); read at one node of every component.

    Returns:
        The decomposition, with K columns. Columns that leave out the same edges are solved together.

    HodgeRank: X. Jiang, L.-H. Lim, Y. Yao, Y. Ye, "Statistical ranking and combinatorial Hodge theory",
    Mathematical Programming 127 (2011).

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows({"a": 0.5, "b": 2.0, "loss": 1.0},
    ...                               {("a", "b"): 0.5, ("b", "loss"): 2.0})
    >>> np.exp(graph.hodge.potential).round(6).tolist()   # the norms: a chain has nothing cyclic
    [0.5, 2.0, 1.0]
    """
    potential = np.full((len(table.nodes), omega.shape[1]), np.nan)
    live = np.isfinite(omega)
    for columns in _same_columns(live):
        edges = np.flatnonzero(live[:, columns[0]])
        if not len(edges):
            continue
        u, v = table.source[edges], table.target[edges]
        s = laplacian_potentials(len(table.nodes), u, v, omega[edges][:, columns])
        shift, used = _gauge(table, s, edges, level[:, columns])
        potential[np.array(used)[:, None], columns] = (s + shift)[used]
    cyclic = omega - (potential[table.source] - potential[table.target])
    decomposition = HodgeDecomposition(
        names=tuple(node.name for node in table.nodes),
        edges=tuple((edge.source, edge.target) for edge in table.edges),
        omega=omega,
        potential=potential,
        cyclic=cyclic,
        curl=_curl(table, cyclic),
    )
    for value in (omega, potential, cyclic, decomposition.curl):
        value.setflags(write=False)
    return decomposition


def column(decomposition: HodgeDecomposition, place: int) -> HodgeDecomposition:
    """Return one column of a decomposition, with arrays of shape (N,) and (E,)."""
    return attrs.evolve(
        decomposition,
        omega=decomposition.omega[:, place],
        potential=decomposition.potential[:, place],
        cyclic=decomposition.cyclic[:, place],
        curl=decomposition.curl[:, place],
    )


def _same_columns(live: np.ndarray) -> list[list[int]]:
    """Return the columns in groups that have the same edges live."""
    groups: dict[bytes, list[int]] = {}
    for place in range(live.shape[1]):
        groups.setdefault(live[:, place].tobytes(), []).append(place)
    return list(groups.values())


def _gauge(table: FlowTable, s: Floats, edges: np.ndarray, level: Floats) -> tuple[Floats, list[int]]:
    """Return what to add to s to make it `level` at one node of each component, and the nodes of them all."""
    near: dict[int, list[int]] = {}
    for u, v in zip(table.source[edges].tolist(), table.target[edges].tolist(), strict=True):
        near.setdefault(u, []).append(v)
        near.setdefault(v, []).append(u)
    shift = np.zeros_like(s)
    seen: set[int] = set()
    for start in near:
        if start in seen:
            continue
        component = [start]
        seen.add(start)
        for node in component:  # grows while it is walked
            for other in near[node]:
                if other not in seen:
                    seen.add(other)
                    component.append(other)
        anchor = max(component, key=lambda i: (table.nodes[i].kind == "loss", i))
        shift[component] = np.where(np.isfinite(level[anchor]), level[anchor], 0.0) - s[anchor]
    return shift, sorted(seen)


def _curl(table: FlowTable, cyclic: Floats) -> Floats:
    squares = np.zeros((len(table.nodes), cyclic.shape[1]))
    count = np.zeros_like(squares)
    live = np.isfinite(cyclic)
    square = np.where(live, cyclic, 0.0) ** 2
    for ends in (table.source, table.target):
        np.add.at(squares, ends, square)
        np.add.at(count, ends, live.astype(np.float64))
    return np.sqrt(np.divide(squares, count, out=np.full(squares.shape, np.nan), where=count > 0))
