"""`GraphData`: a graph record with what is computed from it once; every query takes one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Self, TypeVar

import attrs

from gradflow.errors import GraphUnavailableError, UnknownLayerError
from gradflow.graph.algebra.hodge import HodgeDecomposition, column, hodge_decomposition
from gradflow.graph.flow import FlowNumbers, arithmetic_mean, flow_numbers, log_of
from gradflow.graph.table import FlowTable, flow_table
from gradflow.records import FlowRecord, GraphRecord


@attrs.frozen(slots=False, repr=False)
class GraphData:
    """A graph record with its arrays, flow numbers and Hodge decomposition, computed on first use.

    Queries are functions of this; `LayerGraph` has them as methods.

    Args:
        record: the plain data.
        level: what the nodes are: `full`, `layers`, or the blocks asked for.
        origin: the full graph that this one was contracted from, if it was.
    """

    record: GraphRecord
    level: str = attrs.field(default="full", kw_only=True)
    origin: Self | None = attrs.field(default=None, kw_only=True, eq=False)

    @classmethod
    def from_record(cls, record: FlowRecord) -> Self:
        """Return the graph of a run.

        Args:
            record: what `gradflow.analyze` returned.

        Raises:
            GraphUnavailableError: if the run could not take the graph.

        >>> from gradflow.graph import LayerGraph
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

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: a copy or a pickle computes its cached arrays anew."""
        return {"record": self.record, "level": self.level, "origin": self.origin}

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

    @property
    def measured(self) -> bool:
        """Whether the edges carry flows."""
        return self.record.measured

    @property
    def full(self) -> Self:
        """The graph with its operations: itself, or the one that it was contracted from."""
        return self if self.origin is None else self.origin

    def coarser(self, record: GraphRecord, level: str) -> Self:
        """Return a graph contracted from this one."""
        return type(self)(record, level=level, origin=self.full)

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """The edges as (u, v), in the direction of the data."""
        return tuple((edge.source, edge.target) for edge in self.record.edges)

    def step(self, step: int) -> Self:
        """Return the graph at one measured step, for any query per step.

        Args:
            step: one of `record.steps`.

        Raises:
            ValueError: if that step was not measured.

        >>> from gradflow.graph import LayerGraph
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

    def __len__(self) -> int:
        return len(self.record.nodes)

    def __iter__(self) -> Iterator[str]:
        return iter(node.name for node in self.record.nodes)

    def __contains__(self, name: object) -> bool:
        return name in self.table.index

    def position(self, name: str) -> int:
        """Return the position of a node in the record and in the rows of `numbers`.

        Raises:
            UnknownLayerError: if there is no node of that name; the message lists the nearest names.
        """
        if name not in self.table.index:
            raise UnknownLayerError.at(name, list(self.table.index))
        return self.table.index[name]


G = TypeVar("G", bound=GraphData)
