"""What the processes of a run have measured beside the numbers of its steps, joined into one record."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from gradflow.functional.processes.group import Ranks
from gradflow.functional.run.run import Run
from gradflow.functional.run.together.exchanged import exchanged
from gradflow.functional.run.together.merging import merged
from gradflow.records import (
    EdgeRecord,
    FlowRecord,
    GraphRecord,
    NodeRecord,
    ProcessesRecord,
    Provenance,
)

_MERGED = (
    "numerics", "transformer", "parts", "recurrences", "policy", "extras", "knowledge", "precision",
)  # fmt: skip


def joined(run: Run, record: FlowRecord, processes: ProcessesRecord | None) -> FlowRecord:
    """Return the record of all processes of a run, of those that each of them has.

    What `numbers.combine` has combined is the same in all of them. Where one process alone joins them, the
    others have their own.

    Args:
        run: the run.
        record: of this process.
        processes: what differs between them.
    """
    if run.line.alone:
        return record
    told = attrs.evolve(record, layers=(), parameters=(), activations=(), losses=np.empty(0), updates=None)
    graphs = [record.graph_record] * run.line.size
    alike = record.graph_record is None or not record.graph_record.measured
    if not run.line.any(not alike) and run.line.agreed(record.graph_record) is None:
        told = attrs.evolve(told, graph_record=None)  # all have the same, and no flows
    every: list[FlowRecord] = run.line.gathered(told, run.speaker)
    if not every:
        return record
    if any(r.graph_record is not None for r in every):
        graphs = [r.graph_record for r in every]
    fields: dict[str, Any] = {name: merged([getattr(r, name) for r in every]) for name in _MERGED}
    numerics = [entry for r in every for entry in r.numerics]
    ran = set.intersection(*(set(r.never_called) for r in every))
    return attrs.evolve(
        record,
        **{**fields, "numerics": tuple(sorted(dict.fromkeys(numerics), key=lambda entry: entry.step))},
        never_called=[name for name in record.never_called if name in ran],
        passed_by=merged([r.passed_by for r in every]),
        graph_record=joined_graph(run, graphs),
        reach=every[0].reach,
        provenance=_provenance(every),
        processes=None if processes is None else attrs.evolve(processes, exchanged=exchanged(run.line)),
    )


def joined_graph(run: Run, every: Sequence[GraphRecord | None]) -> GraphRecord | None:
    """Return the graph of all processes.

    Args:
        run: with the processes, the calls, and what does not come from the batch.
        every: those that each of them saw.
    """
    known = [graph for graph in every if graph is not None]
    if not known:
        return None
    first = known[0]
    shares = _Shares.of(run, first)
    steps = first.steps if all(graph.steps == first.steps for graph in known) else ()
    nodes: dict[str, list[NodeRecord]] = {}
    edges: dict[tuple[str, str], list[EdgeRecord]] = {}
    for graph in known:
        for node in graph.nodes:
            nodes.setdefault(node.name, []).append(node)
        for edge in graph.edges:
            edges.setdefault((edge.source, edge.target), []).append(edge)
    flows = {key: shares.total(key[0], [e.flow for e in of], len(steps)) for key, of in edges.items()}
    into: dict[str, list[Any]] = {}
    for (_, target), flow in flows.items():
        into.setdefault(target, []).append(flow)
    return GraphRecord(
        nodes=[_node(of, shares, into.get(name, ()), len(steps)) for name, of in nodes.items()],
        edges=[
            attrs.evolve(of[0], flow=flows[key], severed=all(e.severed for e in of))
            for key, of in edges.items()
        ],
        steps=steps,
    )


@attrs.frozen(eq=False)
class _Shares:
    """What part of the whole each process has of the gradients at the nodes of a graph.

    Args:
        num_parts: into how many parts the batch is split.
        whole: names of the nodes whose gradients are the same on all parts.
        alike: by node, on how many processes that have the same part of the batch it is the same.
        num_alike: how many of these there are.
    """

    num_parts: int
    whole: Collection[str]
    alike: Mapping[str, int]
    num_alike: int

    @classmethod
    def of(cls, run: Run, graph: GraphRecord) -> _Shares:
        processes, calls = run.line.processes, run.history.calls
        above: dict[str, list[str]] = {}
        for edge in graph.edges:
            above.setdefault(edge.target, []).append(edge.source)
        split: dict[str, set[Ranks]] = {}
        for node in sorted(
            graph.nodes, key=lambda node: node.order
        ):  # an operation takes after what it takes
            of_above = set().union(*(split.get(name, set()) for name in above.get(node.name, ())))
            split[node.name] = set(calls[node.name].split) if node.name in calls else of_above
        alike = {
            name: math.prod(axis.size for axis in processes.model_axes if axis.ranks not in over)
            for name, over in split.items()
        }
        num_alike = math.prod(axis.size for axis in processes.model_axes)
        return cls(processes.num_parts, run.wholes.groups, alike, num_alike)

    def total(self, name: str, found: Sequence[Any], steps: int, *, loss: bool = False) -> Any:
        """Return the norms of a gradient over the measured steps, of those on the processes that have it."""
        if not steps:
            return np.empty(0)
        stack = np.stack([values if len(values) == steps else np.full(steps, math.nan) for values in found])
        missing = np.isnan(stack).all(0)
        alike = self.alike.get(name, 1)
        with np.errstate(all="ignore"):
            squares = np.nansum(stack**2, 0) / alike
            total = np.sqrt(squares) / self.num_parts
            if loss or name in self.whole:
                total = np.sqrt(np.nanmean(stack**2, 0) * self.num_alike / alike)
        return np.where(missing, math.nan, total)

    def number(self, node: NodeRecord, of: Sequence[NodeRecord]) -> int:
        """Return how many elements a node has on all processes; a layer's shape is whole over a model's."""
        alike = self.num_alike if node.kind == "layer" else self.alike.get(node.name, 1)
        return sum(one.num_elements for one in of) // alike


def _node(of: Sequence[NodeRecord], shares: _Shares, into: Sequence[Any], steps: int) -> NodeRecord:
    first = of[0]
    entering = np.sqrt(np.nansum(np.stack(into) ** 2, 0)) if len(into) and steps else np.full(steps, math.nan)
    if len(into) and steps:
        entering = np.where(np.isnan(np.stack(into)).all(0), math.nan, entering)
    loss = first.kind == "loss"
    reachable = any(node.reachable for node in of)
    return attrs.evolve(
        first,
        num_elements=first.num_elements if loss or first.name in shares.whole else shares.number(first, of),
        parameters=tuple(dict.fromkeys(p for node in of for p in node.parameters)),
        grad_norm=shares.total(first.name, [node.grad_norm for node in of], steps, loss=loss),
        input_grad_norm=entering,
        effective_rank=merged([node.effective_rank for node in of]) if steps else np.empty(0),
        reachable=reachable,
        reason="" if reachable else first.reason,
    )


def _provenance(every: Sequence[FlowRecord]) -> Provenance:
    first = every[0].provenance
    return attrs.evolve(
        first,
        notes=tuple(dict.fromkeys(note for r in every for note in r.provenance.notes)),
        chosen=tuple(dict.fromkeys(line for r in every for line in r.provenance.chosen)),
    )
