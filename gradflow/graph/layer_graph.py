"""`LayerGraph`: a graph record with every query as a method."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from gradflow.graph import export, readers, values
from gradflow.graph.coarse import blocks, contract, folding, parts
from gradflow.graph.data import GraphData
from gradflow.graph.queries import bottlenecks, circulation, compare, critical, cuts, paths, reach
from gradflow.graph.values import Edge
from gradflow.records.showing import Shown

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure


@attrs.frozen(slots=False, repr=False)
class LayerGraph(GraphData, Shown):
    """The model's graph as the gradient sees it, ready for queries.

    Nodes are layer calls, operations between them, inputs and the loss, by unique names. An edge u→v runs
    with the data; the gradient runs along it from v back to u. Iterating gives the names in the order of
    execution, `graph["fc1"]` gives a node with its numbers, `graph.nx` the frozen `networkx.DiGraph`.

    Args:
        record: the plain data.
        level: what the nodes are: `full`, `layers`, or the blocks asked for.
        origin: the full graph that this one was contracted from, if it was.

    >>> graph = LayerGraph.from_flows(
    ...     {"fc1": 0.3, "relu": 0.6, "fc2": 2.0, "loss": 1.0},
    ...     {("fc1", "relu"): 0.3, ("relu", "fc2"): 0.6, ("fc2", "loss"): 2.0}, ops=("relu",))
    >>> graph
    LayerGraph(full: 4 nodes (2 layer, 1 op, 1 loss), 3 edges, 1 step measured)
    >>> round(graph["fc2"].gain, 6), graph.layers().nx.number_of_nodes()
    (0.3, 3)
    """

    @classmethod
    def from_flows(
        cls,
        grad_norms: Mapping[str, float | Sequence[float]],
        flows: Mapping[tuple[str, str], float | Sequence[float]],
        *,
        ops: Collection[str] = (),
        num_elements: Mapping[str, int] | None = None,
        effective_ranks: Mapping[str, float | Sequence[float]] | None = None,
    ) -> LayerGraph:
        """Return a graph from plain numbers, for graphs that gradflow did not measure.

        Args:
            grad_norms: ‖g_v‖ of every node, in the order of execution; one number, or one per step. The
                node `loss` is the loss, names that begin with `input` are inputs, all others not in `ops`
                are layers with one parameter `NAME.weight`.
            flows: f(u→v) of every edge (u, v); one number, or one per step.
            ops: names of the nodes that are operations.
            num_elements: number of elements of nodes' outputs, where known.
            effective_ranks: effective rank of nodes' output gradients, where known.

        Returns:
            The full graph; ‖c_v‖ of a node is the root of the sum of squares of its in-edges' flows.

        Raises:
            RecordFormatError: if an edge names a node that is not there, or lengths differ.

        >>> LayerGraph.from_flows({"fc": [2.0, 1.0], "loss": [1.0, 1.0]}, {("fc", "loss"): [2.0, 1.0]})
        LayerGraph(full: 2 nodes (1 layer, 1 loss), 1 edge, 2 steps measured)
        """
        record = readers.record_of_flows(
            grad_norms, flows, ops=ops, num_elements=num_elements or {}, effective_ranks=effective_ranks or {}
        )
        return cls(record)

    @classmethod
    def from_networkx(cls, graph: nx.DiGraph) -> LayerGraph:
        """Return a graph from a directed graph of networkx, such as a changed copy of `graph.nx`.

        Args:
            graph: edges in the direction of the data, with a `flow` each where flows are known; attributes of
                nodes as `graph.nx` has them, all optional: `kind` (`layer`, `op`, `input`, `loss`, `block`),
                `grad_norm`, `gain`, `effective_rank`, `parameters`, `shape`, `num_elements`, and so on. A
                node without a kind is a layer, and the loss if it is called `loss`.

        Returns:
            The full graph, of one measured step; of topology alone where no edge has a flow.

        Raises:
            RecordFormatError: if it is not a `DiGraph`, or an attribute is something else than expected.

        >>> import networkx as nx
        >>> flows = nx.DiGraph()
        >>> flows.add_edge("fc", "loss", flow=2.0)
        >>> LayerGraph.from_networkx(flows).edge("fc", "loss").flow
        2.0
        """
        return cls(readers.record_of_networkx(graph))

    @functools.cached_property
    def nx(self) -> nx.DiGraph:
        """The graph as a frozen `networkx.DiGraph`; `networkx.DiGraph(graph.nx)` is a copy to change.

        Attributes are plain strings, numbers and truth values; what was not measured is absent.
        """
        return export.networkx_graph(self)

    @property
    def severed(self) -> tuple[Edge, ...]:
        """The edges that carry nothing: cut, or exactly zero at every measured step."""
        return tuple(Edge(**e) for e in values.edge_values(self) if e["severed"])

    def draw(self, path: str | Path | None = None, **options: Any) -> Figure:
        """Draw the graph with matplotlib; see `gradflow.report.plots.draw_graph` for the options.

        Args:
            path: where to save it, as PNG, SVG or PDF by its ending; None to save nothing.
            options: `ax`, `level`, `max_nodes`.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        # Against the direction of the layout, as `record.graph` is: graphs know nothing of rendering.
        from gradflow.report.plots import draw_graph

        return draw_graph(self, path, **options)

    def __repr__(self) -> str:
        kinds: dict[str, int] = {}
        for node in self.record.nodes:
            kinds[node.kind] = kinds.get(node.kind, 0) + 1
        severed = int(self.table.severed.sum())
        parts = [
            f"{_count(len(self), 'node')} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})",
            _count(len(self.record.edges), "edge") + (f" ({severed} severed)" if severed else ""),
            f"{_count(len(self.record.steps), 'step')} measured" if self.measured else "topology only",
        ]
        return f"LayerGraph({self.level}: {', '.join(parts)})"

    # -------------------------------------------------------------------------- queries

    __getitem__ = values.node_at
    edge = values.edge_between
    node_values = values.node_values
    edge_values = values.edge_values
    layers = contract.layers
    at = blocks.at
    fold = folding.fold
    subgraph = parts.subgraph
    path = paths.path
    weakest_path = paths.weakest_path
    transmission = paths.transmission
    circulation = circulation.circulation
    bottlenecks = bottlenecks.bottlenecks
    minimum_cut = cuts.minimum_cut
    critical_points = critical.critical_points
    unreachable = reach.unreachable
    compare = compare.compare
    to_node_link = export.to_node_link
    to_graphml = export.to_graphml
    to_dot = export.to_dot
    to_pandas = export.to_pandas


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
