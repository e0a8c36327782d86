"""The layer graph: a small immutable class around the graph record, and its queries."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from gradflow.errors import GraphUnavailableError, UnknownLayerError
from gradflow.graph import blocks, bottlenecks, circulation, compare, contract, critical, export, paths, reach
from gradflow.graph.flow import FlowNumbers, arithmetic_mean, flow_numbers, log_of, number_field
from gradflow.graph.hodge import HodgeDecomposition, column, hodge_decomposition
from gradflow.graph.table import FlowTable, flow_table
from gradflow.records import EdgeRecord, Floats, FlowRecord, GraphRecord, NodeRecord

if TYPE_CHECKING:
    import networkx as nx


@attrs.frozen(kw_only=True)
class Node:
    """One node and its numbers: means over the measured steps, NaN where not measured.

    Args:
        name: unique name.
        kind: `layer`, `op`, `input`, `loss` or `block`.
        layer: qualified module name; of an op, the innermost module it ran in.
        type: class name, or the op's name.
        shape: shape of its output.
        num_elements: number of elements of its output; 0 if unknown.
        parameters: names of the parameters that enter here.
        order: position in the order of execution.
        reachable: whether a gradient can flow from the loss to it.
        reason: for an unreachable node, why.
        grad_norm: ‖g_v‖ (geometric mean).
        gain: ‖c_v‖ / ‖g_v‖ (geometric mean).
        divergence: tanh(ln gain).
        coherence: ‖Σ c‖ / Σ ‖c‖ over its consumers (arithmetic mean).
        curl: root mean square of the cyclic part of ω over its edges, in nats.
        potential: its potential in the Hodge decomposition, in nats.
        effective_rank: of its output gradient (arithmetic mean).
    """

    name: str
    kind: str
    layer: str
    type: str
    shape: tuple[int, ...]
    num_elements: int
    parameters: tuple[str, ...]
    order: int
    reachable: bool
    reason: str
    grad_norm: float = number_field()
    gain: float = number_field()
    divergence: float = number_field()
    coherence: float = number_field()
    curl: float = number_field()
    potential: float = number_field()
    effective_rank: float = number_field()


@attrs.frozen(kw_only=True)
class Edge:
    """One edge u→v and its numbers: means over the measured steps, NaN where not measured.

    Args:
        source: u.
        target: v.
        flow: f(u→v) = ‖c_uv‖ (geometric mean); 0 if severed.
        omega: ln(f / ‖g_v‖), in nats (arithmetic mean); NaN if severed.
        cyclic: the part of ω that no potential explains, in nats.
        severed: whether it carries nothing: cut, or exactly zero at every measured step.
        reason: the operation that cuts it, if one does.
    """

    source: str
    target: str
    flow: float = number_field()
    omega: float = number_field()
    cyclic: float = number_field()
    severed: bool
    reason: str


@attrs.frozen(slots=False, repr=False)
class LayerGraph:
    """The model's graph as the gradient sees it, ready for questions.

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

    record: GraphRecord
    level: str = attrs.field(default="full", kw_only=True)
    origin: LayerGraph | None = attrs.field(default=None, kw_only=True, eq=False)

    @classmethod
    def from_record(cls, record: FlowRecord) -> LayerGraph:
        """Return the graph of a run.

        Args:
            record: what `gradflow.analyze` returned.

        Raises:
            GraphUnavailableError: if the run could not take the graph.

        >>> from gradflow.records import FlowRecord
        >>> LayerGraph.from_record(FlowRecord(steps=0, losses=[], layers=(), parameters=()))
        Traceback (most recent call last):
        gradflow.errors.GraphUnavailableError: record.graph: this run holds no layer graph...
        """
        if record.graph_record is None:
            notes = " ".join(record.provenance.notes)
            raise GraphUnavailableError(
                "record.graph: this run holds no layer graph. It is taken from the autograd graph of one "
                "eager call, which a compiled or scripted model does not have. Pass the plain model to "
                "gradflow.analyze, or gradflow.layer_graph(model, batch, loss_fn) for the graph alone."
                + (f" The run noted: {notes}" if notes else "")
            )
        return cls(record.graph_record)

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
        rows = {name: np.atleast_1d(np.asarray(value, dtype=float)) for name, value in grad_norms.items()}
        steps = max((len(row) for row in rows.values()), default=0)
        blank = np.full(steps, np.nan)
        elements, ranks = num_elements or {}, effective_ranks or {}
        nodes = []
        for order, (name, norm) in enumerate(rows.items()):
            kind = "op" if name in ops else "loss" if name == "loss" else "layer"
            kind = "input" if name.startswith("input") else kind
            nodes.append(
                NodeRecord(
                    name=name, kind=kind, layer=name if kind == "layer" else "", type=kind, order=order,
                    num_elements=elements.get(name, 0), grad_norm=norm, input_grad_norm=blank,
                    parameters=(f"{name}.weight",) if kind == "layer" else (),
                    effective_rank=np.atleast_1d(ranks[name]) if name in ranks else blank,
                )
            )  # fmt: skip
        edges = [
            EdgeRecord(source=u, target=v, flow=np.atleast_1d(np.asarray(flow, dtype=float)))
            for (u, v), flow in flows.items()
        ]
        return cls(GraphRecord(nodes=nodes, edges=edges, steps=range(steps)))

    # ------------------------------------------------------------------------ what it holds

    @functools.cached_property
    def table(self) -> FlowTable:
        """The record as arrays and adjacency lists."""
        return flow_table(self.record)

    @functools.cached_property
    def numbers(self) -> FlowNumbers:
        """Gain, divergence, coherence, flow and ω as arrays, per step and averaged.

        Raises:
            GraphUnavailableError: if only the topology was taken.
        """
        return flow_numbers(self.table)

    @functools.cached_property
    def hodge(self) -> HodgeDecomposition:
        """The discrete Hodge decomposition of the mean ω: arrays of shape (nodes,) and (edges,).

        Raises:
            GraphUnavailableError: if only the topology was taken.
        """
        self.table.check_measured("graph.hodge")
        level = arithmetic_mean(log_of(self.table.grad))
        return column(hodge_decomposition(self.table, self.numbers.mean_omega[:, None], level[:, None]), 0)

    @functools.cached_property
    def hodge_per_step(self) -> HodgeDecomposition:
        """The decomposition at each measured step: arrays of shape (nodes, steps) and (edges, steps).

        Raises:
            GraphUnavailableError: if only the topology was taken.
        """
        self.table.check_measured("graph.hodge_per_step")
        return hodge_decomposition(self.table, self.numbers.omega, log_of(self.table.grad))

    @functools.cached_property
    def nx(self) -> nx.DiGraph:
        """The graph as a frozen `networkx.DiGraph`; `networkx.DiGraph(graph.nx)` is a copy to change.

        Attributes are plain strings, numbers and truth values; what was not measured is absent.
        """
        return export.networkx_graph(self)

    @property
    def measured(self) -> bool:
        """Whether the edges carry flows."""
        return self.record.measured

    @property
    def full(self) -> LayerGraph:
        """The graph with its operations: itself, or the one that it was contracted from."""
        return self if self.origin is None else self.origin

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """The edges as (u, v), in the direction of the data."""
        return tuple((edge.source, edge.target) for edge in self.record.edges)

    @property
    def severed(self) -> tuple[Edge, ...]:
        """The edges that carry nothing: cut, or exactly zero at every measured step."""
        return tuple(Edge(**e) for e in self.edge_values() if e["severed"])

    def step(self, step: int) -> LayerGraph:
        """Return the graph at one measured step, for any query per step.

        Args:
            step: one of `record.steps`.

        Raises:
            ValueError: if that step was not measured.

        >>> norms, flows = {"fc": [2.0, 1.0], "loss": [1.0, 1.0]}, {("fc", "loss"): [2.0, 1.0]}
        >>> LayerGraph.from_flows(norms, flows).step(1)["fc"].grad_norm
        1.0
        """
        if step not in self.record.steps:
            measured = ", ".join(map(str, self.record.steps)) or "none"
            raise ValueError(f"graph.step: step {step!r} was not measured. Measured steps: {measured}.")
        place = self.record.steps.index(step)

        def cut(part: Any, *names: str) -> Any:
            return attrs.evolve(part, **{n: getattr(part, n)[place : place + 1] for n in names})

        nodes = [cut(n, "grad_norm", "input_grad_norm", "effective_rank") for n in self.record.nodes]
        edges = [cut(e, "flow") for e in self.record.edges]
        record = GraphRecord(nodes=nodes, edges=edges, steps=(step,))
        return type(self)(record, level=self.level, origin=self.origin.step(step) if self.origin else None)

    # ------------------------------------------------------------------------ nodes and edges

    def __len__(self) -> int:
        return len(self.record.nodes)

    def __iter__(self) -> Iterator[str]:
        return iter(node.name for node in self.record.nodes)

    def __contains__(self, name: object) -> bool:
        return name in self.table.index

    def __getitem__(self, name: str) -> Node:
        """Return a node with its numbers.

        Raises:
            UnknownLayerError: if there is no node of that name; the message lists the nearest names.
        """
        return Node(**self._node(self.position(name)))

    def edge(self, source: str, target: str) -> Edge:
        """Return the edge from `source` to `target`, in the direction of the data.

        Raises:
            UnknownLayerError: if there is no such edge.
        """
        place = self.table.index.get(target)
        for edge in self.table.in_edges[place] if place is not None else ():
            if self.record.edges[edge].source == source:
                return Edge(**self._edge(edge))
        raise UnknownLayerError.at(f"{source} -> {target}", [f"{u} -> {v}" for u, v in self.edges])

    def position(self, name: str) -> int:
        """Return the position of a node in the record and in the rows of `numbers`.

        Raises:
            UnknownLayerError: if there is no node of that name; the message lists the nearest names.
        """
        if name not in self.table.index:
            raise UnknownLayerError.at(name, list(self.table.index))
        return self.table.index[name]

    def node_values(self) -> list[dict[str, Any]]:
        """Return the fields of every `Node`, in the order of execution."""
        return [self._node(i) for i in range(len(self))]

    def edge_values(self) -> list[dict[str, Any]]:
        """Return the fields of every `Edge`, in the record's order."""
        return [self._edge(i) for i in range(len(self.record.edges))]

    def _node(self, i: int) -> dict[str, Any]:
        node = self.record.nodes[i]
        values = {name: getattr(node, name) for name in _PLAIN}
        means = self._node_means
        return {**values, "reachable": bool(node.reachable), **{n: float(row[i]) for n, row in means.items()}}

    def _edge(self, i: int) -> dict[str, Any]:
        edge, means = self.record.edges[i], self._edge_means
        return {
            "source": edge.source,
            "target": edge.target,
            **{name: float(row[i]) for name, row in means.items()},
            "severed": bool(self.table.severed[i]),
            "reason": edge.reason,
        }

    @functools.cached_property
    def _node_means(self) -> dict[str, Floats]:
        names = ("grad_norm", "gain", "divergence", "coherence", "curl", "potential", "effective_rank")
        if not self.measured:
            return dict.fromkeys(names, np.full(len(self), np.nan))
        n = self.numbers
        means = (n.mean_grad_norm, n.mean_gain, n.mean_divergence, n.mean_coherence)
        rows = (*means, self.hodge.curl, self.hodge.potential, n.mean_effective_rank)
        return dict(zip(names, rows, strict=True))

    @functools.cached_property
    def _edge_means(self) -> dict[str, Floats]:
        if not self.measured:
            return dict.fromkeys(("flow", "omega", "cyclic"), np.full(len(self.record.edges), np.nan))
        return {"flow": self.numbers.mean_flow, "omega": self.numbers.mean_omega, "cyclic": self.hodge.cyclic}

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

    # ------------------------------------------------------------------------ questions

    layers = contract.layers
    at = blocks.at
    path = paths.path
    transmission = paths.transmission
    circulation = circulation.circulation
    bottlenecks = bottlenecks.bottlenecks
    critical_points = critical.critical_points
    unreachable = reach.unreachable
    compare = compare.compare
    to_node_link = export.to_node_link
    to_graphml = export.to_graphml
    to_dot = export.to_dot


_PLAIN = ("name", "kind", "layer", "type", "shape", "num_elements", "parameters", "order", "reason")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
