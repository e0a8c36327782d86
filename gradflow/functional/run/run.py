"""What a run is asked to do, and its state."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from gradflow.functional.measurement import Measurement, Session
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.run.graph_record import Cut, HostFlows
from gradflow.functional.run.history import History
from gradflow.functional.run.step import Program
from gradflow.functional.tap.calls import Call
from gradflow.records import FlowRecord, NumericalRecord

Progress = Callable[[int, int], None]


@attrs.frozen(kw_only=True, eq=False)
class Plan:
    """What a run is asked to do; see `analyze` for the meaning of each."""

    steps: int = 20
    optimizer: torch.optim.Optimizer | None = None
    seed: int | None = None
    mode: str = "train"
    detail: str = "cheap"
    transform: str = "auto"
    progress: Progress | None = None
    deepen: Callable[[FlowRecord], bool] | None = None
    measurements: tuple[Measurement, ...] = ()
    num_batches: int | None = None  # how many there are, if that is known

    def is_look(self, step: int) -> bool:
        """Whether the costlier statistics are taken at a step: the first, each power of four, the last."""
        return self.is_end(step) or (step & (step - 1) == 0 and step % 3 == 1)

    def is_end(self, step: int) -> bool:
        """Whether a step is the first or the last, as far as that is known: the costliest are taken there."""
        last = self.steps if self.num_batches is None else min(self.steps, self.num_batches)
        return step in (0, last - 1)


@attrs.define(eq=False)
class Run:
    """The state of one run."""

    program: Program
    plan: Plan
    history: History
    transform: str
    transform_reason: str
    dataflow: DataFlow | None = None
    calls: list[Call] = attrs.field(factory=list)  # of the first step
    structures: list[Structure] = attrs.field(factory=list)
    severed: list[Cut] = attrs.field(factory=list)
    bypassed: set[str] = attrs.field(factory=set)  # names of calls; see `autograd_graph.bypassed`
    capturable: set[str] = attrs.field(factory=set)  # the like
    arrived: set[str] = attrs.field(factory=set)  # names of calls at whose output a gradient was seen
    flows: list[HostFlows] = attrs.field(factory=list)
    numerics: list[NumericalRecord] = attrs.field(factory=list)
    traces: int = 0
    notes: list[str] = attrs.field(factory=list)
    sessions: list[Session] = attrs.field(factory=list)
