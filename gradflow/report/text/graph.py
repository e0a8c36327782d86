"""What queries of the layer graph find, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gradflow.graph import Bottleneck, Cut, GradientPath, LayerGraph
from gradflow.report.wording import number

MAX_NAMED = 8


def graph_text(graph: LayerGraph) -> str:
    """Return what a graph shows at a glance: its size, what throttles, what is cut off.

    >>> graph = LayerGraph.from_flows({"fc": 2.0, "loss": 1.0}, {("fc", "loss"): 2.0})
    >>> print(graph_text(graph))
    LayerGraph(full: 2 nodes (1 layer, 1 loss), 1 edge, 1 step measured)
    Bottlenecks: none
    Severed edges: none
    Out of reach: none
    """
    told = [f"{graph!r}"]
    if graph.measured:
        told.append(bottlenecks_text(graph.bottlenecks()))
        told += _unknown(graph)
    else:
        told.append("The flow was not measured, which --detail full does; this is the wiring alone.")
    cut = [f"{e.source} -> {e.target}" + (f" ({e.reason})" if e.reason else "") for e in graph.severed]
    told.append(_listed("Severed edges", cut))
    told.append(_listed("Out of reach", [f"{u.name}: {u.reason}" for u in graph.unreachable()]))
    return "\n".join(told)


def _unknown(graph: LayerGraph) -> list[str]:
    """Return a line on the nodes of which the rest can say nothing, if there are any."""
    unknown = [
        node["name"]
        for node in graph.node_values()
        if node["kind"] != "input" and node["reachable"] and not math.isfinite(node["grad_norm"])
    ]
    return [_listed("No finite gradient, so not judged", unknown)] if unknown else []


def bottlenecks_text(found: Sequence[Bottleneck]) -> str:
    """Return bottlenecks, one a line, worst first, each with the numbers that made it so."""
    if not found:
        return "Bottlenecks: none"
    rows = [f"  {i}. [{'waist' if b.waist else number(b.score)}] {b.reason}" for i, b in enumerate(found, 1)]
    return "\n".join(["Bottlenecks, worst first, by nats lost or squeezed:", *rows])


def path_text(path: GradientPath) -> str:
    """Return a path as a table of its nodes: what the edge to each keeps, and its own gain and gradient."""
    if not path.nodes:
        return f"{path.source} .. {path.target}: {path.reason}."
    keeps = f"keeps {number(path.transmission)} of the gradient"
    head = f"{path.source} .. {path.target}: {keeps}, {path.share:.0%} of what all paths carry together"
    width = max(len(name) for name in (*path.nodes, "node"))
    rows = [f"  {'node':<{width}}  {'edge keeps':>10}  {'gain':>9}  {'gradient':>9}"]
    kept = ["", *(number(ratio) for ratio in path.ratios)]
    for name, ratio, gain, norm in zip(path.nodes, kept, path.gains, path.grad_norms, strict=True):
        rows.append(f"  {name:<{width}}  {ratio:>10}  {number(gain):>9}  {number(norm):>9}")
    return "\n".join([head, *rows])


def cut_text(cut: Cut) -> str:
    """Return a cut: what can cross it at most, and the edges that it takes, one a line, with their flows."""
    if not cut.edges:
        return f"{cut}."
    pairs = zip(cut.edges, cut.flows, strict=True)
    rows = [f"{u} -> {v}: {number(flow)}" for (u, v), flow in pairs]
    return _listed(f"{cut.source} .. {cut.target}: {number(cut.share)} of the gradient can cross", rows)


def _listed(title: str, found: Iterable[str]) -> str:
    rows = list(found)
    if not rows:
        return f"{title}: none"
    more = [f"  ... and {len(rows) - MAX_NAMED} more"] if len(rows) > MAX_NAMED else []
    return "\n".join([f"{title}:", *(f"  {row}" for row in rows[:MAX_NAMED]), *more])
