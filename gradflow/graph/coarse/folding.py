"""Folding: a deep model in a few boxes, the blocks of its numbered lists or runs of them.

A model has hundreds of layer calls; what one can look at has some thirty boxes. So the modules of a numbered
list are boxes of their own (`h.0`, `h.1`, ...), and where these are too many, runs of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from gradflow.graph.coarse.blocks import grouped
from gradflow.graph.data import G
from gradflow.records import NodeRecord


def fold(graph: G, *, most: int = 32) -> G:
    """Return the graph with repeated blocks as one node each, or runs of them, and residual sums kept.

    A block is an entry of a numbered list of modules (`h.3`); layers outside of lists stand alone. Where
    that makes more than `most` nodes, equal runs of neighbours become one: `h.0 … 3`. Operations that no
    block holds are contracted as in `layers`, but for those that both join and fork: on a stream of residual
    sums these keep the edges linear in the depth. The numbers are those of `at`.

    Args:
        most: how many boxes of layers there are at most.

    Raises:
        ValueError: if `most` is no whole number, or below 1.

    >>> from gradflow.graph import LayerGraph
    >>> names = [f"h.{i}.{part}" for i in range(100) for part in ("fc", "act")]
    >>> norms = {**dict.fromkeys(names, 1.0), "head": 1.0, "loss": 1.0}
    >>> graph = LayerGraph.from_flows(norms, {pair: 1.0 for pair in itertools.pairwise(norms)})
    >>> list(graph.fold(most=6))
    ['h.0 … 19', 'h.20 … 39', 'h.40 … 59', 'h.60 … 79', 'h.80 … 99', 'head', 'loss']
    """
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"graph.fold: expected most to be a whole number of at least 1, got {most!r}.")
    calls = {node.name: node.layer for node in graph.full.record.nodes if node.kind == "layer"}
    return grouped_by_runs(graph, runs_of(calls, most), max_edges=0)


def grouped_by_runs(graph: G, runs: Mapping[str, Sequence[str]], *, max_edges: int) -> G:
    """Return the graph with the layer calls of every run as one node, operations of its blocks included.

    Args:
        runs: names of layer calls by the title of their box, as `runs_of` returns them.
        max_edges: as in `LayerGraph.layers`.
    """
    box_of_call = {call: title for title, calls in runs.items() if len(calls) > 1 for call in calls}
    box_of_block = {
        block: box_of_call[node.name]
        for node in graph.full.record.nodes
        if node.name in box_of_call and (block := block_of(node.layer))
    }

    def box(node: NodeRecord) -> str | None:
        return box_of_call.get(node.name) or box_of_block.get(block_of(node.layer))

    return grouped(graph, box, "folded", max_edges=max_edges)


def runs_of(calls: Mapping[str, str], most: int) -> dict[str, tuple[str, ...]]:
    """Return layer calls by the box that they are in, at most `most` boxes, in the order they run.

    Args:
        calls: the module of every layer call by its name, in the order they run.
        most: how many boxes there are at most.

    >>> runs_of({"emb": "emb", "h.0.a": "h.0.a", "h.0.b": "h.0.b", "h.1.a": "h.1.a"}, 9)
    {'emb': ('emb',), 'h.0': ('h.0.a', 'h.0.b'), 'h.1': ('h.1.a',)}
    """
    units: dict[str, list[str]] = {}
    for name, module in calls.items():
        units.setdefault(block_of(module) or name, []).append(name)
    names = list(units)
    size, split = 1, True
    while len(runs := _runs(names, size, split)) > most:
        size, split = (size + 1, True) if size < len(names) else (math.ceil(len(names) / most), False)
    found = {}
    for run in runs:
        title = run[0] if len(run) == 1 else f"{run[0]} … {run[-1].rpartition('.')[2] or run[-1]}"
        found[title] = tuple(call for name in run for call in units[name])
    return found


def block_of(module: str) -> str:
    """Return the entry of a numbered list that a module is in: `h.3` for `h.3.attn.proj`; "" for none.

    >>> block_of("transformer.h.3.attn.proj"), block_of("head")
    ('transformer.h.3', '')
    """
    parts = module.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if place is None else ".".join(parts[: place + 1])


def _runs(names: Sequence[str], size: int, split: bool) -> list[list[str]]:
    """Return names in runs of `size`; with `split`, no run goes beyond the list that its first one is in."""
    runs = []
    for _, some in itertools.groupby(names, key=lambda n: n.rpartition(".")[0] if split else ""):
        listed = list(some)
        runs += [listed[i : i + size] for i in range(0, len(listed), size)]
    return runs
