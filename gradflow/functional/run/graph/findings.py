"""What the steps have shown of the model's graph, from the first one on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs
from torch import Tensor

from gradflow.functional.processes.stages import Stages
from gradflow.functional.reverse.autograd_graph import Structure, bypassed
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.reverse.plain_sums import plainly_summed
from gradflow.functional.run.graph.record import Cut, HostFlows, cuts, graph_record, read_flows
from gradflow.functional.run.step import Outcome
from gradflow.functional.tap.calls import Call
from gradflow.records import GraphRecord


@attrs.define(eq=False)
class GraphFindings:
    """The graphs of the steps that were looked at, their severed edges, and the flows."""

    dataflow: DataFlow | None = None
    calls: Sequence[Call] = ()  # of the first step
    structures: list[Structure] = attrs.field(factory=list)
    severed: list[Cut] = attrs.field(factory=list)
    bypassed: set[str] = attrs.field(factory=set)  # names of calls; see `autograd_graph.bypassed`
    arrived: set[str] = attrs.field(factory=set)  # names of calls at whose output a gradient was seen
    flows: list[HostFlows] = attrs.field(factory=list)
    taken: set[str] = attrs.field(factory=set)  # parameters that ran, where none has a gradient
    summed: tuple[int, ...] = ()  # see `plainly_summed`; of the first step
    handed: tuple[str, ...] = ()  # the nodes that made what a stage hands on, in the first step

    def learn(
        self,
        outcome: Outcome,
        dataflow: DataFlow,
        parameters: Mapping[str, Tensor],
        stages: Stages | None = None,
    ) -> None:
        """Keep what the first step showed of the graph and the data flow."""
        if outcome.gradients.are_none:
            self.taken = {name for name, parameter in parameters.items() if id(parameter) in dataflow.leaves}
        structure, self.calls = outcome.structure, outcome.recorder.calls
        self.dataflow = dataflow
        self.severed = cuts(dataflow, structure, self.calls)
        dataflow.release()
        self.handed = () if stages is None else _handed(structure, self.calls, stages)
        if structure is not None:
            self.structures, self.summed = [structure], plainly_summed(structure)
            self.bypassed = set(bypassed(structure))

    def meet(self, structure: Structure | None) -> None:
        """Keep the graph of a later step, unless it is known."""
        if structure is not None and not any(structure.groups is known.groups for known in self.structures):
            self.structures.append(structure)

    def add(self, step: int, outcome: Outcome) -> None:
        """Keep the flows of a step, where it has any, and its graph, unless that is known."""
        structure, flows, kept = outcome.structure, outcome.gradients.flows, self.structures
        if flows is None or structure is None:
            return
        self.flows.append(read_flows(step, flows, structure))
        if not (kept and structure.groups is kept[-1].groups):
            kept.append(structure)

    def conclude(self, arrived: Collection[str], unprobed: Collection[str]) -> None:
        """Keep where the gradient was seen to arrive, at the end of a run.

        Args:
            arrived: names of calls at whose probes it arrived.
            unprobed: names of calls that could not be probed.
        """
        # The inside of a reentrant checkpoint is not in the graph, but the gradient is seen to arrive there.
        self.severed = [
            cut
            for cut in self.severed
            if cut.source not in arrived or not cut.reason.startswith("checkpoint")
        ]
        self.arrived = {*arrived, *unprobed, *self.bypassed}

    def record(self) -> GraphRecord | None:
        """Return the graph's plain data, where any graph was seen."""
        if not self.structures or self.dataflow is None:
            return None
        return graph_record(
            self.structures, self.severed, self.calls, self.dataflow, self.flows, self.arrived
        )  # fmt: skip

    def record_of(self, step: int, outcome: Outcome) -> GraphRecord | None:
        """Return the graph's plain data with the flows of one step that was run again, and those alone."""
        flows, structure = outcome.gradients.flows, outcome.structure
        if flows is None or structure is None or self.dataflow is None:
            return None
        structures = [*self.structures, structure]
        hosted = [read_flows(step, flows, structure)]
        return graph_record(structures, self.severed, self.calls, self.dataflow, hosted, self.arrived)


def _handed(structure: Structure | None, calls: Sequence[Call], stages: Stages) -> tuple[str, ...]:
    """Return the nodes that made what a stage hands on: those of layers, where no path leads to it."""
    last = next((call.name for call in reversed(calls) if call.is_layer), "")  # of what carries no gradient
    names = ["" if of is None else calls[max(of)].name if of else last for of in stages.feeding]
    if structure is not None and structure.nodes and stages.reached:
        made_of = next(iter(structure.nodes.values()))
        for number, (node, _) in zip(stages.reached, made_of, strict=True):
            names[number] = "" if node is None else structure.group_of.get(node, "")
    return tuple(names)
