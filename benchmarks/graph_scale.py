"""Times of the layer graph's parts on chains, ladders and U-Nets, and how they grow.

    python benchmarks/graph_scale.py [--layers 100 1000 5000] [--steps 3]

The records are synthetic; no model runs. A chain is (layer, normalise, relu) over and over. A ladder is a
stack of residual blocks of two layers each, (layer, relu, layer, relu, add): every addition is a rung. A
U-Net is a chain whose first half is bridged to its second by nested skips, each joined by a concatenation.
The last column is the exponent p by which a time grows from the smallest size to the largest, time ~ size^p:
1 is linear.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from gradflow.graph import LayerGraph
from gradflow.records import EdgeRecord, GraphRecord, NodeRecord

Edges = list[tuple[str, str]]


def chain(layers: int) -> tuple[Edges, set[str]]:
    """Return the edges and the operations of a chain."""
    names = [name for i in range(layers) for name in (f"m.{i // 10}.{i % 10}", f"norm{i}", f"relu{i}")]
    return list(zip(names, [*names[1:], "loss"], strict=True)), {n for n in names if not n.startswith("m.")}


def ladder(layers: int) -> tuple[Edges, set[str]]:
    """Return the edges and the operations of a stack of residual blocks."""
    edges, ops, last = [("stem", "relu")], {"relu"}, "relu"
    for i in range(layers // 2):
        one, relu, two, after, add = f"m.{i}.a", f"m.{i}.relu", f"m.{i}.b", f"m.{i}.relu1", f"m.{i}.add"
        edges += [(last, one), (one, relu), (relu, two), (two, after), (after, add), (last, add)]
        ops |= {relu, after, add}
        last = add
    return [*edges, (last, "head"), ("head", "loss")], ops


def unet(layers: int) -> tuple[Edges, set[str]]:
    """Return the edges and the operations of a U-Net with a bridge from every layer."""
    half = layers // 2
    down = [f"down.{i}" for i in range(half)]
    edges = list(pairwise(down))
    ops, last = set(), down[-1]
    for i in reversed(range(half)):
        cat, up = f"cat{i}", f"up.{i}"
        edges += [(last, cat), (down[i], cat), (cat, up)] if i < half - 1 else [(last, cat), (cat, up)]
        ops.add(cat)
        last = up
    return [*edges, (last, "loss")], ops


def record(edges: Edges, ops: set[str], steps: int, seed: int = 0) -> GraphRecord:
    """Return a measured graph record over these edges, its norms a random walk."""
    rng = np.random.default_rng(seed)
    order = [*dict.fromkeys(name for edge in edges for name in edge if name != "loss"), "loss"]
    place = {name: i for i, name in enumerate(order)}
    edges = sorted(edges, key=lambda e: (place[e[0]], place[e[1]]))
    outs: dict[str, list[str]] = {name: [] for name in order}
    squares = {name: np.zeros(steps) for name in order}
    for u, v in edges:
        outs[u].append(v)
    grad, flow = {"loss": np.ones(steps)}, {}
    for u in reversed(order[:-1]):
        kept = [np.exp(0.1 * rng.normal(size=steps)) for _ in outs[u]]
        total = np.zeros(steps)
        for v, r in zip(outs[u], kept, strict=True):
            flow[u, v] = r * grad[v]
            squares[v] += flow[u, v] ** 2
            total += flow[u, v]
        grad[u] = total / len(kept)  # a coherence of one over the number of consumers
    nodes = [
        NodeRecord(
            name=name,
            kind="loss" if name == "loss" else "op" if name in ops else "layer",
            layer=name if name.startswith("m.") else "",
            shape=(32, 64),
            num_elements=32 * int(rng.choice([64, 128])),
            parameters=() if name in ops or name == "loss" else (f"{name}.weight",),
            order=i,
            grad_norm=grad[name],
            input_grad_norm=np.sqrt(squares[name]),
            effective_rank=np.full(steps, np.nan if name in ops else rng.uniform(2, 32)),
        )
        for i, name in enumerate(order)
    ]
    flows = [EdgeRecord(source=u, target=v, flow=flow[u, v]) for u, v in edges]
    return GraphRecord(nodes=nodes, edges=flows, steps=range(steps))


def questions(graph: LayerGraph, other: LayerGraph) -> dict[str, Callable[[], object]]:
    """Return what is timed, in order; later ones find cached what earlier ones computed, as in use."""
    first = next(iter(graph))
    return {
        "table": lambda: graph.table,
        "numbers": lambda: graph.numbers,
        "hodge": lambda: graph.hodge,
        "hodge_per_step": lambda: graph.hodge_per_step,
        "nx": lambda: graph.nx,
        "circulation": graph.circulation,
        "bottlenecks": graph.bottlenecks,
        "path": lambda: graph.path("loss", first),
        "transmission": lambda: graph.transmission("loss", first),
        "critical_points": graph.critical_points,
        "unreachable": graph.unreachable,
        "compare": lambda: graph.compare(other),
        "layers": graph.layers,
        "at(depth=2)": lambda: graph.at(depth=2),
        "to_dot": graph.to_dot,
    }


def main() -> None:
    """Print a table of times for every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    limit = sys.getrecursionlimit()
    for shape in (chain, ladder, unet):
        times: dict[str, list[float]] = {}
        sizes = []
        for layers in options.layers:
            edges, ops = shape(layers)
            graph, other = (LayerGraph(record(edges, ops, options.steps, seed)) for seed in (0, 1))
            sizes.append(f"{len(graph)} nodes, {len(edges)} edges")
            for name, ask in questions(graph, other).items():
                start = time.perf_counter()
                ask()
                times.setdefault(name, []).append(time.perf_counter() - start)
        print(f"\n{shape.__name__}, seconds; {options.layers} layers are {'; '.join(sizes)}")
        print(f"{'':16}" + "".join(f"{n:>10}" for n in options.layers) + f"{'p':>8}")
        rows = {**times, "all": [sum(column) for column in zip(*times.values(), strict=True)]}
        for name, row in rows.items():
            sizes = options.layers[-1] / options.layers[0]
            growth = f"{math.log(row[-1] / row[0]) / math.log(sizes):8.2f}" if sizes != 1 else ""
            print(f"{name:16}" + "".join(f"{seconds:10.4f}" for seconds in row) + growth)
    print(f"\nrecursion limit: {limit}, never raised")


if __name__ == "__main__":
    main()
