"""An exact solver for graph Laplacians, near-linear on graphs as networks have them; NumPy only."""

from __future__ import annotations

import heapq

import numpy as np

from gradflow.records import Floats, Ints

# NOTE [Eliminating a graph Laplacian]
# The normal equations of least squares on an incidence matrix are L s = b with L the graph Laplacian.
# Eliminating node i joins its neighbours j, k by a weight w_ij w_ik / Σ_j w_ij: what is left is a smaller
# Laplacian, the Schur complement, as when a resistor network is reduced (series, star to mesh). Taking a
# node of least degree first, a chain, a ladder, a stack of residual blocks and a U-Net (all of small
# treewidth) never show a degree above a few, so the work is linear in their size, and it is exact: only
# positive numbers are added and the diagonal is always recomputed as a sum, so nothing cancels. Where many
# nodes are joined to many (the least degree exceeds _DENSE_DEGREE), the rest goes to a dense solver, whose
# cost grows with the cube of that core. A node whose last neighbour is gone is the root of its component,
# at potential zero. There is no recursion.
_DENSE_DEGREE = 32


def laplacian_potentials(num_nodes: int, source: Ints, target: Ints, omega: Floats) -> Floats:
    """Return the s that minimises Σ (ω_e − (s_u − s_v))² over the edges e = u→v.

    Args:
        num_nodes: N.
        source: position of every u, shape (E,).
        target: position of every v, shape (E,).
        omega: K right-hand sides, shape (E, K).

    Returns:
        Potentials, shape (N, K), up to a constant per connected component and column.

    >>> s = laplacian_potentials(3, np.array([0, 1]), np.array([1, 2]), np.array([[1.0], [2.0]]))[:, 0]
    >>> float(s[0] - s[1]), float(s[1] - s[2])
    (1.0, 2.0)
    """
    b = np.zeros((num_nodes, omega.shape[1]))
    np.add.at(b, source, omega)
    np.subtract.at(b, target, omega)
    weights: list[dict[int, float]] = [{} for _ in range(num_nodes)]
    for u, v in zip(source.tolist(), target.tolist(), strict=True):
        if u != v:
            weights[u][v] = weights[u].get(v, 0.0) + 1.0
            weights[v][u] = weights[v].get(u, 0.0) + 1.0
    eliminated, core = _eliminate(weights, b)
    s = np.zeros_like(b)
    if core:
        s[core] = _dense(core, weights, b)
    for node, total, neighbours in reversed(eliminated):
        value = b[node].copy()
        for other, weight in neighbours:
            value += weight * s[other]
        s[node] = value / total
    return s


_Step = tuple[int, float, list[tuple[int, float]]]


def _eliminate(weights: list[dict[int, float]], b: Floats) -> tuple[list[_Step], list[int]]:
    """Eliminate nodes of least degree first, in place; return the steps taken and the dense core left."""
    heap = [(len(near), node) for node, near in enumerate(weights)]
    heapq.heapify(heap)
    done = [False] * len(weights)
    steps: list[_Step] = []
    while heap:
        degree, node = heapq.heappop(heap)
        if done[node] or degree != len(weights[node]):
            continue  # an entry from before its degree changed
        if degree > _DENSE_DEGREE:
            break
        done[node] = True
        near = list(weights[node].items())
        if not near:
            continue  # the root of its component
        total = sum(weight for _, weight in near)
        steps.append((node, total, near))
        for i, (j, w_j) in enumerate(near):
            row = weights[j]
            del row[node]
            b[j] += (w_j / total) * b[node]
            for k, w_k in near[:i]:
                joined = row.get(k, 0.0) + w_j * w_k / total
                row[k] = joined
                weights[k][j] = joined
        for j, _ in near:
            heapq.heappush(heap, (len(weights[j]), j))
    return steps, [node for node, is_done in enumerate(done) if not is_done]


def _dense(core: list[int], weights: list[dict[int, float]], b: Floats) -> Floats:
    """Return the potentials of the nodes left, the first node of every component at zero."""
    place = {node: i for i, node in enumerate(core)}
    matrix = np.zeros((len(core), len(core)))
    for node in core:
        i = place[node]
        for other, weight in weights[node].items():
            matrix[i, place[other]] = -weight
            matrix[i, i] += weight
    rhs = b[core]
    seen: set[int] = set()
    for root in core:
        if root in seen:
            continue
        stack = [root]
        seen.add(root)
        while stack:
            fresh = [other for other in weights[stack.pop()] if other not in seen]
            seen.update(fresh)
            stack.extend(fresh)
        i = place[root]
        matrix[i], matrix[:, i], rhs[i] = 0.0, 0.0, 0.0
        matrix[i, i] = 1.0
    return np.asarray(np.linalg.solve(matrix, rhs), dtype=np.float64)
