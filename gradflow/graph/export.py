"""Exports of the graph: networkx, node-link JSON, GraphML, DOT and pandas, with plain attributes.

networkx takes longer to import than the rest of gradflow together, so it is imported where it is needed.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from gradflow.graph.data import GraphData
from gradflow.graph.values import Edge, Node, edge_values, node_values

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd


_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\uffff\U00010000-\U0010ffff]|[\ufffe\uffff]")  # not even escaped


def networkx_graph(graph: GraphData) -> nx.DiGraph:
    """Return a frozen `networkx.DiGraph`, edges in the direction of the data.

    Attributes are strings, whole numbers, finite numbers and truth values only, which node-link JSON,
    GraphML and DOT all take; what was not measured is absent. Shapes read `32x64`, parameter names are
    separated by a space.

    Returns:
        The graph: nodes in the order of execution, with the attributes of `Node`; edges with `flow`,
        `omega`, `cyclic`, `severed` and `reason`. Means over the measured steps.
    """
    import networkx as nx

    result = nx.DiGraph(level=graph.level, steps=" ".join(map(str, graph.record.steps)))
    for node in node_values(graph):
        node["shape"] = "x".join(map(str, node["shape"]))
        node["parameters"] = " ".join(node["parameters"])
        result.add_node(node.pop("name"), **_known(node))
    for edge in edge_values(graph):
        result.add_edge(edge.pop("source"), edge.pop("target"), **_known(edge))
    return nx.freeze(result)


def to_node_link(graph: GraphData) -> dict[str, Any]:
    """Return the graph as node-link data for strict JSON, as `networkx.node_link_graph` reads it.

    Returns:
        A dict of dicts, lists, strings, numbers and None (not measured). Shapes and parameters are lists.

    >>> import json
    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows({"fc": 2.0, "loss": 1.0}, {("fc", "loss"): 2.0})
    >>> json.loads(json.dumps(graph.to_node_link(), allow_nan=False))["edges"][0]["flow"]
    2.0
    """
    nodes = [
        {"id": node.pop("name"), **{key: _plain(value) for key, value in node.items()}}
        for node in node_values(graph)
    ]
    edges = [{key: _plain(value) for key, value in edge.items()} for edge in edge_values(graph)]
    return {
        "directed": True,
        "multigraph": False,
        "graph": {"level": graph.level, "steps": list(graph.record.steps)},
        "nodes": nodes,
        "edges": edges,
    }


def to_graphml(graph: GraphData, path: str | Path) -> None:
    """Write the graph as GraphML, which yEd, Gephi, Cytoscape and networkx read.

    Args:
        path: where to write it; an existing file is replaced.

    >>> import tempfile
    >>> import networkx as nx
    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows({"fc": 2.0, "loss": 1.0}, {("fc", "loss"): 2.0})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     graph.to_graphml(f"{folder}/graph.graphml")
    ...     nx.read_graphml(f"{folder}/graph.graphml").edges["fc", "loss"]["flow"]
    2.0
    """
    import networkx as nx

    lines = nx.generate_graphml(networkx_graph(graph))
    text = '<?xml version="1.0" encoding="utf-8"?>\n' + "\n".join(lines)
    text = _NOT_IN_XML.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    Path(path).write_text(text, encoding="utf-8")


def to_dot(graph: GraphData) -> str:
    """Return the graph in the DOT language of Graphviz: data runs down, severed edges are red and dashed.

    Line widths grow with the logarithm of the flow, from 1 to 5 points.

    Returns:
        The text of a `digraph`.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows({"fc": 2.0, "loss": 1.0}, {("fc", "loss"): 2.0})
    >>> print(graph.to_dot())
    digraph gradient_flow {
      rankdir=TB; node [shape=box, style=rounded];
      "fc" [label="fc\\ngain ?", kind="layer"];
      "loss" [label="loss\\ngain 2", kind="loss"];
      "fc" -> "loss" [label="2", penwidth=3.0];
    }
    """
    lines = ["digraph gradient_flow {", "  rankdir=TB; node [shape=box, style=rounded];"]
    for node in node_values(graph):
        gain = f"{node['gain']:.3g}" if math.isfinite(node["gain"]) else "?"
        label = f'{_quoted(node["name"])[:-1]}\\ngain {gain}"'
        lines.append(f"  {_quoted(node['name'])} [label={label}, kind={_quoted(node['kind'])}];")
    edges = edge_values(graph)
    logs = [math.log(e["flow"]) for e in edges if math.isfinite(e["flow"]) and e["flow"] > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    for edge in edges:
        arrow, flow = f"{_quoted(edge['source'])} -> {_quoted(edge['target'])}", edge["flow"]
        if edge["severed"]:
            style = f"label={_quoted(edge['reason'] or 'severed')}, color=red, style=dashed"
        elif math.isfinite(flow) and flow > 0:
            share = (math.log(flow) - low) / (high - low) if high > low else 0.5
            style = f'label="{flow:.3g}", penwidth={1 + 4 * share:.1f}'
        else:
            style = "penwidth=1.0"
        lines.append(f"  {arrow} [{style}];")
    return "\n".join([*lines, "}"])


def to_pandas(graph: GraphData) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the nodes and the edges as two tables of pandas, with all their numbers.

    Returns:
        The nodes, by name in the order of execution, with the fields of `Node` as columns; and the edges, by
        (source, target), with those of `Edge`. Means over the measured steps, NaN where not measured.

    Raises:
        ImportError: if pandas is not installed.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows({"fc": 2.0, "loss": 1.0}, {("fc", "loss"): 2.0})
    >>> nodes, edges = graph.to_pandas()
    >>> float(nodes.loc["fc", "grad_norm"]), float(edges.loc[("fc", "loss"), "flow"])
    (2.0, 2.0)
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            "graph.to_pandas needs pandas, which is not installed. It is an extra of gradflow: "
            'pip install "gradient-flow[pandas]".'
        ) from error
    nodes = pd.DataFrame(node_values(graph), columns=[field.name for field in attrs.fields(Node)])
    edges = pd.DataFrame(edge_values(graph), columns=[field.name for field in attrs.fields(Edge)])
    return nodes.set_index("name"), edges.set_index(["source", "target"])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what was not measured: GraphML has no null, and strict JSON no NaN."""
    return {k: v for k, v in values.items() if not (isinstance(v, float) and not math.isfinite(v))}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
