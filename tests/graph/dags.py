"""Graphs for the tests: random linear networks whose flows are norms of real cotangents, and fixed ones.

A network is x_v = Σ A_uv x_u over v's inputs u, and the loss is one number. The gradient at u is
Σ A_uvᵀ g_v over its consumers, so every flow, gain and coherence belongs to vectors that exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import attrs
import numpy as np
from hypothesis import strategies as st

from gradflow.graph import LayerGraph
from gradflow.records import EdgeRecord, GraphRecord, NodeRecord


@dataclass
class Network:
    """A random linear network and its exact gradient, one list entry per step."""

    record: GraphRecord
    grads: dict[str, list[np.ndarray]]
    cotangents: dict[tuple[str, str], list[np.ndarray]]
    maps: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)

    @property
    def graph(self) -> LayerGraph:
        return LayerGraph(self.record)


def edges_of(seed: int, num: int, extra: float) -> list[tuple[int, int]]:
    """Return random edges i < j such that every node but the last has a consumer."""
    rng = np.random.default_rng(seed)
    pairs = {(i, int(rng.integers(i + 1, num))) for i in range(num - 1)}
    wanted = len(pairs) + int(extra * num)
    for _ in range(4 * wanted):
        if len(pairs) >= wanted:
            break
        i, j = sorted(rng.integers(0, num, size=2).tolist())
        if i < j:
            pairs.add((i, j))
    return sorted(pairs)


def network(
    edges: list[tuple[int, int]],
    *,
    seed: int = 0,
    steps: int = 1,
    ops: set[int] | None = None,
    identity_ops: bool = False,
    scale: float = 1.0,
    modules: dict[int, str] | None = None,
) -> Network:
    """Return the linear network over these edges; the last node is the loss."""
    rng = np.random.default_rng(seed)
    num = max(j for _, j in edges) + 1
    ops, modules = ops or set(), modules or {}
    width = [4] * num if identity_ops else rng.integers(2, 5, size=num).tolist()
    width[-1] = 1
    names = [f"op{i}" if i in ops else f"n{i}" for i in range(num - 1)] + ["loss"]
    grads: dict[str, list[np.ndarray]] = {name: [] for name in names}
    cotangents: dict[tuple[str, str], list[np.ndarray]] = {(names[i], names[j]): [] for i, j in edges}
    maps: dict[tuple[str, str], list[np.ndarray]] = {pair: [] for pair in cotangents}
    for _ in range(steps):
        grad = [np.zeros(w) for w in width]
        grad[-1] = np.array([scale])
        for j in reversed(range(num)):
            for i in [a for a, b in edges if b == j]:
                matrix = rng.normal(size=(width[j], width[i])) / np.sqrt(width[i])
                if identity_ops and j in ops:
                    matrix = np.eye(width[j])
                back = matrix.T @ grad[j]
                grad[i] = grad[i] + back
                cotangents[names[i], names[j]].append(back)
                maps[names[i], names[j]].append(matrix)
        for name, g in zip(names, grad, strict=True):
            grads[name].append(g)
    nodes = []
    for i, name in enumerate(names):
        ins = [cotangents[names[a], name] for a, b in edges if b == i]
        handed = [np.sqrt(sum(c[s] @ c[s] for c in ins)) if ins else np.nan for s in range(steps)]
        kind = "op" if i in ops else "loss" if name == "loss" else "layer"
        nodes.append(
            NodeRecord(
                name=name,
                kind=kind,
                layer=modules.get(i, name if kind == "layer" else ""),
                type="Linear" if kind == "layer" else kind,
                shape=(width[i],),
                num_elements=width[i],
                parameters=(f"{name}.weight",) if kind == "layer" else (),
                order=i,
                grad_norm=[np.linalg.norm(g) for g in grads[name]],
                input_grad_norm=handed,
                effective_rank=[np.nan] * steps,
            )
        )
    records = [
        EdgeRecord(source=u, target=v, flow=[np.linalg.norm(c) for c in cs])
        for (u, v), cs in cotangents.items()
    ]
    return Network(GraphRecord(nodes=nodes, edges=records, steps=range(steps)), grads, cotangents, maps)


@st.composite
def networks(draw: st.DrawFn, *, max_nodes: int = 9, steps: int = 2, with_ops: bool = True) -> Network:
    """Draw a random linear network."""
    num = draw(st.integers(3, max_nodes))
    seed = draw(st.integers(0, 10_000))
    edges = edges_of(seed, num, draw(st.sampled_from([0.0, 0.5, 1.5])))
    ops = set(draw(st.lists(st.integers(1, num - 2), max_size=num // 2))) if with_ops else set()
    return network(edges, seed=seed, steps=steps, ops=ops)


def scaled(record: GraphRecord, factor: float) -> GraphRecord:
    """Return the record with every gradient multiplied by a factor."""
    nodes = [
        attrs.evolve(n, grad_norm=n.grad_norm * factor, input_grad_norm=n.input_grad_norm * factor)
        for n in record.nodes
    ]
    edges = [attrs.evolve(e, flow=e.flow * factor) for e in record.edges]
    return attrs.evolve(record, nodes=nodes, edges=edges)


def topology(record: GraphRecord) -> GraphRecord:
    """Return the record as it would be if nothing had been measured."""
    nodes = [attrs.evolve(n, grad_norm=[], input_grad_norm=[], effective_rank=[]) for n in record.nodes]
    edges = [attrs.evolve(e, flow=[], severed=e.severed) for e in record.edges]
    return GraphRecord(nodes=nodes, edges=edges, steps=())


def unknown(nodes: list[NodeRecord], edges: list[EdgeRecord]) -> GraphRecord:
    """Return a record of one measured step at which no number is known: structure and width alone."""
    blank = [np.nan]
    return GraphRecord(
        nodes=[attrs.evolve(n, grad_norm=blank, input_grad_norm=blank, effective_rank=blank) for n in nodes],
        edges=[attrs.evolve(e, flow=blank) for e in edges],
        steps=(0,),
    )


def node(name: str, kind: str = "layer", **values: object) -> NodeRecord:
    """Return a node record of a graph of which only the topology was taken."""
    defaults: dict = {
        "layer": name if kind == "layer" else "",
        "parameters": (f"{name}.weight",) if kind == "layer" else (),
        "grad_norm": [],
        "input_grad_norm": [],
        "effective_rank": [],
    }
    return NodeRecord(name=name, kind=kind, **{**defaults, **values})


def edge(source: str, target: str, **values: object) -> EdgeRecord:
    """Return an edge record without a flow."""
    return EdgeRecord(source=source, target=target, **{"flow": [], **values})


def residual(kept: float, skip: float = 1.0) -> LayerGraph:
    """Return a block a -> fc -> add with a skip a -> add: the branch keeps `kept`, the skip `skip`."""
    return LayerGraph.from_flows(
        {"a": kept + skip, "fc": 1.0, "add": 1.0, "loss": 1.0},
        {("a", "fc"): kept, ("a", "add"): skip, ("fc", "add"): 1.0, ("add", "loss"): 1.0},
        ops=("add",),
        num_elements={"a": 8, "fc": 8, "add": 8, "loss": 1},
    )
