"""What a run is asked to do, and what it has found."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from gradflow.errors import ModelInputError
from gradflow.functional.extras import check_names
from gradflow.functional.measurement import Measurement, Session
from gradflow.functional.model.purity import checked_seed
from gradflow.functional.processes.group import OnRank, is_told
from gradflow.functional.processes.line import Line
from gradflow.functional.processes.stages import Stages
from gradflow.functional.reach.findings import ReachFindings
from gradflow.functional.run.graph.findings import GraphFindings
from gradflow.functional.run.history import History
from gradflow.functional.run.program import Program
from gradflow.functional.run.together.facts import Facts
from gradflow.functional.run.together.whole import Wholes
from gradflow.functional.run.training.options import Loop
from gradflow.functional.updates.log import UpdateLog
from gradflow.records import FlowRecord, NumericalRecord

Progress = Callable[[int, int], None]


def _num_steps(value: Any) -> int:
    """Return a number of steps as an int, whatever kind of whole number it is (numpy's included)."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {value!r}.")
    return operator.index(value)


def _callable(plan: Plan, field: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not callable(value):
        shown = {"progress": "`lambda done, steps: ...`", "deepen": "`lambda record: True`"}[field.name]
        raise ModelInputError(
            f"{field.name} is {value!r:.100}, which cannot be called. Pass a function, {shown}, or None."
        )


def _one_of(*known: str) -> Callable[[Plan, attrs.Attribute[str], str], None]:
    def check(plan: Plan, field: attrs.Attribute[str], value: str) -> None:
        if value not in known:
            raise ValueError(f"{field.name} must be one of {', '.join(known)}, got {value!r}.")

    return check


def _measurements(given: Any) -> tuple[Measurement, ...]:
    """Return the measurements that were passed, each once.

    Raises:
        ModelInputError: if an entry is no measurement.
        MeasurementError: if a name that one declares is taken.
    """
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    for entry in found:
        if isinstance(entry, type) or not callable(getattr(entry, "start", None)):
            raise ModelInputError(
                f"measurements holds {entry!r}, which is no measurement. A factory must be called first: "
                "`measurements=[attention()]`."
            )
    chosen = tuple(dict.fromkeys(found))
    check_names(chosen)
    return chosen


@attrs.frozen(kw_only=True, eq=False)
class Plan:
    """What a run is asked to do: the options that `analyze`, `diagnose` and their variants share.

    See `analyze` for the meaning of each.

    Args:
        loop: what the training loop does between two batches.
        bend: if it returns True for the record, how the loss bends along an update is measured.
        num_batches: how many there are, if that is known.
        processes: which split the batch; see `analyze`.
        closely: whether to ask what needs more than the pass itself: at which numbers gradient arrived and
            why not at others, and what every run measures of the model's parts.

    Raises:
        ValueError: if `steps`, `seed`, `mode`, `detail` or `transform` has a value not allowed.
        ModelInputError: if `measurements` holds what is no measurement, or `progress` or `deepen` cannot be
            called.
        MeasurementError: if a name that one declares is taken.
    """

    steps: int = attrs.field(default=20, converter=_num_steps)
    loop: Loop = attrs.field(factory=Loop)
    seed: int | None = attrs.field(default=None, converter=attrs.converters.optional(checked_seed))
    mode: str = attrs.field(default="train", validator=_one_of("train", "eval", "keep"))
    detail: str = attrs.field(default="cheap", validator=_one_of("cheap", "full"))
    transform: str = attrs.field(default="auto", validator=_one_of("auto", "fused", "vjp"))
    progress: Progress | None = attrs.field(default=None, validator=_callable)
    deepen: Callable[[FlowRecord], bool] | None = attrs.field(default=None, validator=_callable)
    bend: Callable[[FlowRecord], bool] | None = None
    measurements: tuple[Measurement, ...] = attrs.field(default=(), converter=_measurements)
    num_batches: int | None = None
    closely: bool = True
    processes: Any = "alone"

    @property
    def among(self) -> Any:
        """Which processes take part: `auto`, `alone` or a process group."""
        return self.processes.processes if isinstance(self.processes, OnRank) else self.processes

    @property
    def teller(self) -> int | None:
        """The rank of the one process that is to have the record; None where all are."""
        return self.processes.rank if isinstance(self.processes, OnRank) else None

    def is_look(self, step: int) -> bool:
        """Whether the costlier statistics are taken at a step: the first, the last, powers of four between.

        One that the last follows closely would tell little more.
        """
        power_of_four = step & (step - 1) == 0 and step % 3 == 1
        return self.is_end(step) or (power_of_four and 2 * (self.end - 1) >= 3 * step)

    def is_end(self, step: int) -> bool:
        """Whether a step is the first or the last, as far as that is known: the costliest are taken there."""
        return step == 0 or self.is_last(step)

    def is_last(self, step: int) -> bool:
        """Whether a step is the last, as far as that is known."""
        return step == self.end - 1

    @property
    def end(self) -> int:
        """How many steps there are, as far as that is known."""
        return self.steps if self.num_batches is None else min(self.steps, self.num_batches)


_MAX_TRACES = 3  # a NaN that comes back in every step is traced no more often than this


@attrs.define(eq=False)
class Findings:
    """What a run has found beside the numbers of its steps: births of NaN, and what a reader must know."""

    numerics: list[NumericalRecord] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    _traces: int = 0

    def may_trace(self) -> bool:
        """Whether one more step may be traced; it is counted."""
        self._traces += 1
        return self._traces <= _MAX_TRACES

    def certify(self, births: Iterable[NumericalRecord]) -> None:
        """Keep the birth certificates of a step."""
        self.numerics.extend(births)

    def note(self, *sentences: str) -> None:
        """Keep what a reader must know to trust the numbers."""
        self.notes.extend(sentences)


@attrs.frozen(eq=False)
class Run:
    """One run: what it works with, what it is asked to do, and what it has found so far.

    Args:
        program: what every step runs on.
        plan: what is asked.
        transform: the reverse pass that was chosen.
        transform_reason: why.
        sessions: of the measurements that were asked for.
        history: the numbers of the steps.
        reach: at which numbers gradient has arrived.
        graph: what they have shown of the graph.
        findings: what else was found.
        updates: what the optimizer did.
        line: to the other processes that the run is on, if there are any.
        wholes: the outputs that are one and the same on all of them.
        facts: what differs between them.
    """

    program: Program
    plan: Plan
    transform: str
    transform_reason: str
    sessions: tuple[Session, ...]
    history: History
    reach: ReachFindings
    graph: GraphFindings = attrs.field(factory=GraphFindings)
    findings: Findings = attrs.field(factory=Findings)
    updates: UpdateLog = attrs.field(factory=UpdateLog)
    line: Line = attrs.field(factory=Line)
    wholes: Wholes = attrs.field(factory=Wholes)
    facts: Facts = attrs.field(factory=Facts)

    @property
    def stages(self) -> Stages:
        """The way along the stages of a pipeline, if the model is one of them."""
        return self.program.given.stages

    @property
    def everyone(self) -> Line:
        """The line to all processes of the run, those that have other stages included."""
        return self.line if self.stages.alone else self.stages.line

    @property
    def speaker(self) -> int | None:
        """The rank of the process that joins the parts of those which have the same model; None for all.

        Of a stage it is the first of them, which speaks for the stage.
        """
        if self.plan.teller is None or self.line.alone:
            return None
        return self.plan.teller if self.stages.alone else self.line.ranks[0]

    def decides(self, question: Callable[[], bool]) -> bool:
        """Return the answer to a question that is asked of the record, the same on all processes."""
        if self.plan.teller is None:
            return question()
        return self.everyone.any(is_told(self.plan.processes) and question())
