"""`observer`: a pair of pure functions that see a training, look by look."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import attrs
from torch import Tensor, nn

from gradflow.detect import Detector
from gradflow.detect.time import TimeDetector, time_detectors
from gradflow.diagnosis import detectors_of
from gradflow.errors import GradflowError, ModelInputError, NotRestoredError
from gradflow.functional.processes.group import OnRank
from gradflow.functional.weights import WeightSample
from gradflow.records import Issue, IssueSeverity, IssueType, every_scalar
from gradflow.report import Report
from gradflow.watching.certain import told
from gradflow.watching.look import (
    Look,
    Seen,
    absent_in,
    carriers,
    closer_look,
    copied,
    no_record,
    quick_look,
)
from gradflow.watching.schedule import is_jump, loss_ceiling, next_look
from gradflow.watching.staged import called, check_staged, is_staged, met
from gradflow.watching.state import Doubt, Key, ObserverState, Suspicion, key_of

logger = logging.getLogger("gradflow")


class Update(Protocol):
    """What `observer` returns as its second function; see there."""

    def __call__(
        self,
        state: ObserverState,
        model: Any,
        batch: Any,
        loss_fn: Callable[..., Any] | None = None,
        optimizer: Any = None,
        step: int = 0,
        *,
        loss: Any = None,
    ) -> tuple[ObserverState, Report | None]:
        """Return the state after a step of the training, and a report if it was looked at."""
        ...


class Observer(NamedTuple):
    """Two pure functions: `init()` gives a state, `update(state, …)` the next one, and a report or None."""

    init: Callable[[], ObserverState]
    update: Update


def observer(
    *,
    every: int = 200,
    pipeline: Any = None,
    in_time: Iterable[TimeDetector] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    batches: int = 4,
    most: int = 512,
    processes: Any = "alone",
) -> Observer:
    """Return the pair of pure functions that see trouble in a training when it begins.

    `update(state, model, batch, loss_fn, optimizer, step)` is called once per training step, with the
    batch of that step, before or after the optimizer's. Between looks it returns the very state it was
    given and does nothing else. At a look it measures this batch on copies, one forward and one backward
    pass, adds a column to `state.history`, and judges. What a single batch shows is suspected only: the
    batches of the steps that follow are collected, and `gradflow.diagnose` on all of them decides. What
    was told before is told again as long as looks show it.

    Nothing of the training is touched: weights, gradients, buffers, modes, optimizer and random states are
    afterwards what they were, bit for bit. A look that raises is noted in the history and in its report, and
    the training goes on; what cannot be measured at all raises at the first look.

    Args:
        every: steps between two looks in the long run. They come more often after the beginning and after a
            jump of the loss: 1, 4, 16, ... steps later.
        pipeline: judges a look; as for `gradflow.diagnose`.
        in_time: judge the history: functions from a `HistoryRecord` to issues; None for
            `gradflow.detect.time.time_detectors()`.
        forward_fn: for a training step that is not `model(batch)`: (model, batch) → the output that `loss_fn`
            takes, or the loss itself where there is no `loss_fn`.
        batches: how many batches a closer look is taken on.
        most: how many looks the history keeps; older ones lie further apart. See `HistoryRecord.thinned`.
        processes: `alone` to look at this process; `auto` or a process group, as for `gradflow.analyze`, to
            look at all of them together, as models that are spread over processes ask for. Then every process
            must watch, and a look is due at the same steps on all: a jump of one process's loss makes none.
            Only of the stages of a pipeline, whose loss the last one knows, it makes one two steps later.

    Returns:
        `init`, which returns the state of a training that was not looked at yet, and `update`.

    Raises:
        ValueError: if `every`, `batches` or `most` is too small a number.
        PipelineError: if `pipeline` cannot be used as one.
        ModelInputError: if `forward_fn` cannot be called, or one process alone is to be told.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model, loss_fn = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)), nn.CrossEntropyLoss()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> init, update = observer(every=50)
    >>> state = init()
    >>> for step in range(101):
    ...     batch = torch.randn(8, 4), torch.randint(0, 2, (8,))
    ...     optimizer.zero_grad()
    ...     loss_fn(model(batch[0]), batch[1]).backward()
    ...     optimizer.step()
    ...     state, report = update(state, model, batch, loss_fn, optimizer, step)
    ...     if report is not None and not report.ok:
    ...         print(report)
    >>> state.history.steps.tolist()
    [0, 1, 4, 16, 50, 100]
    """
    watch = watching(
        every=every, pipeline=pipeline, in_time=in_time, forward_fn=forward_fn, batches=batches, most=most,
        processes=processes,
    )  # fmt: skip
    return Observer(ObserverState, watch.update)


def watching(
    *,
    every: int,
    pipeline: Any,
    in_time: Iterable[TimeDetector] | None,
    forward_fn: Callable[[nn.Module, Any], Any] | None,
    batches: int,
    most: int,
    processes: Any = "alone",
) -> Watch:
    """Return how a training is watched; see `observer` for the arguments, and for what it raises."""
    for name, value, least in (("every", every, 1), ("batches", batches, 1), ("most", most, 4)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if isinstance(processes, OnRank):
        raise ModelInputError(
            f"processes={processes!r}, and what was seen of a training decides on every process when it is "
            "looked at again: all that watch have the history. Pass processes='auto' or a process group, and "
            "write or print on one of them: `if torch.distributed.get_rank() == 0: ...`."
        )
    judging = time_detectors() if in_time is None else tuple(in_time)
    if forward_fn is not None and not callable(forward_fn):
        raise ModelInputError(
            f"forward_fn is a {type(forward_fn).__name__}; pass a function of (model, batch): "
            "`lambda model, batch: model.loss(batch)`."
        )
    return Watch(every, detectors_of(pipeline, "observer"), judging, forward_fn, batches, most, processes)


@attrs.frozen(eq=False)
class Watch:
    """How a training is watched; see `observer` for the fields."""

    every: int
    detectors: tuple[Detector, ...]
    in_time: tuple[TimeDetector, ...]
    forward_fn: Callable[[nn.Module, Any], Any] | None
    batches: int
    most: int
    processes: Any = "alone"

    @property
    def sees_jumps(self) -> bool:
        """Whether a jump of the loss makes a look; of several processes each has a loss of its own."""
        return isinstance(self.processes, str) and self.processes == "alone"

    def update(
        self,
        state: ObserverState,
        model: Any,
        batch: Any,
        loss_fn: Callable[..., Any] | None = None,
        optimizer: Any = None,
        step: int = 0,
        *,
        loss: Any = None,
    ) -> tuple[ObserverState, Report | None]:
        """Return the state after a step of the training, and a report if it was looked at."""
        value = None if loss is None else readable(loss)
        between, staged = state, is_staged(model)
        if staged:
            check_staged(model, self.processes, self.forward_fn)
            state = called(state, model, self.processes, step, value)
        jumped = value is not None and self.sees_jumps and is_jump(value, state.ceiling)
        if step < state.due and not jumped:
            return state, None
        seen = Seen(model, loss_fn, step, self.forward_fn, self.processes)
        try:
            state, report = self._seen(state, seen, batch, jumped)
            if staged:
                met(between, model, self.processes)
            if staged and report is None:  # the step after a look, which has seen the update alone
                state = called(state, model, self.processes, step, value)
            return state, report
        except NotRestoredError:
            raise
        except Exception as error:
            if (staged or isinstance(error, GradflowError)) and not len(state.history):
                raise  # on all stages, or on none
            return self.failed(state, step, f"{type(error).__name__}: {error}")

    def _seen(
        self, state: ObserverState, seen: Seen, batch: Any, jumped: bool
    ) -> tuple[ObserverState, Report | None]:
        state = self.with_changes(state, seen)
        suspicion = state.suspicion
        if suspicion is None:
            if seen.step < state.due and not jumped:
                return state, None
            closely = looks_closely(state)
            look = quick_look(seen, batch, self.detectors, closely=closely, absent=state.absent)
            if closely:
                state = attrs.evolve(state, absent=absent_in(look.record))
            sample = WeightSample.of(seen.model, seen.step)
            state, report = self.taken(state, seen, look, batch, sample)
            if keys := self.suspected(state, look, seen.step):
                suspicion = Suspicion(step=seen.step, keys=keys, batches=(copied(batch),))
            return attrs.evolve(state, suspicion=suspicion), report
        suspicion = attrs.evolve(suspicion, batches=(*suspicion.batches, copied(batch)))
        state = attrs.evolve(state, suspicion=suspicion)
        if len(suspicion.batches) < self.batches:
            return attrs.evolve(state, due=seen.step + 1), None
        look = closer_look(seen, suspicion.batches, self.detectors)
        return self.decided(state, suspicion, look, seen.step)

    def with_changes(self, state: ObserverState, seen: Seen) -> ObserverState:
        """Take down what the update after the last look has done; the next look is where it was."""
        sample = state.sample
        if sample is None:
            return state
        history = state.history
        if sample.step < seen.step:
            history = history.with_numbers(sample.step, sample.changes(seen.model, seen.processes))
        due = next_look(sample.step, self.every, state.since)
        return attrs.evolve(state, history=history, sample=None, due=due)

    def taken(
        self, state: ObserverState, seen: Seen, look: Look, batch: Any, sample: WeightSample
    ) -> tuple[ObserverState, Report]:
        """Take down a look: one column more, and what lasts.

        Args:
            state: before it.
            seen: what the loop handed over.
            look: what was measured, and judged.
            batch: that it was taken on, to name the samples that carry a jump of the loss; None if not known.
            sample: the weights that it was taken at.
        """
        step = seen.step
        types = {layer.name: layer.type for layer in look.record}
        checksum = sample.checksum(seen.model, seen.processes)
        numbers = {**every_scalar(look.record), "weight_checksum": checksum}
        history = state.history.with_types(types).with_look(step, numbers)
        lines = list(look.lines)
        loss = float(look.record.losses[-1])
        if is_jump(loss, state.ceiling):
            lines.append(_jump(state, seen, batch, loss))
            history = history.with_notes(lines[-1])
            if step - state.since >= self.every or not len(state.history):
                state = attrs.evolve(state, since=step)
        state = attrs.evolve(
            state,
            history=history.thinned(self.most),
            looks=state.looks + 1,
            sample=sample,
            ceiling=loss_ceiling(history),
            due=step + 1,
        )
        over_time = [issue for detector in self.in_time for issue in detector(state.history)]
        at_once = [i for i in look.issues if i.severity is IssueSeverity.CRITICAL and _is_numerical(i)]
        return told(state, look, [*at_once, *over_time], step, self.detectors, lines)

    def suspected(self, state: ObserverState, look: Look, step: int) -> frozenset[Key]:
        """Return which of a look's issues are new, and may turn out to be nothing."""
        keys = {key_of(issue) for issue in look.issues if issue.severity.is_serious} - state.certain.keys()
        doubted = {key for key in keys if (doubt := state.doubts.get(key)) is not None and step < doubt.until}
        return frozenset(keys - doubted)

    def decided(
        self, state: ObserverState, suspicion: Suspicion, look: Look, step: int
    ) -> tuple[ObserverState, Report]:
        """Let a closer look, on several batches, decide what one has made suspect."""
        types = {kind for _, kind in suspicion.keys}
        borne_out = [i for i in look.issues if i.severity.is_serious and i.issue_type.value in types]
        found = {key_of(issue) for issue in borne_out}
        doubts = {key: self._doubted(state, key, step) for key in suspicion.keys - found}
        due = next_look(step, self.every, state.since)
        state = attrs.evolve(state, suspicion=None, doubts={**state.doubts, **doubts}, due=due)
        return told(state, look, borne_out, step, self.detectors, look.lines, since=suspicion.step)

    def _doubted(self, state: ObserverState, key: Key, step: int) -> Doubt:
        """Return the doubt in a suspicion that was not borne out: it is left alone for longer every time."""
        times = state.doubts[key].times + 1 if key in state.doubts else 1
        return Doubt(times=times, until=step + self.every * 2 ** (times - 1))

    def failed(self, state: ObserverState, step: int, why: str) -> tuple[ObserverState, Report]:
        """Take down that a step could not be looked at."""
        note = f"Step {step} could not be looked at: {why}"[:500]
        logger.warning("%s", note)
        state = attrs.evolve(
            state,
            history=state.history.with_notes(note),
            sample=None,
            suspicion=None,
            due=(step // self.every + 1) * self.every,
        )
        return state, Report(record=no_record(note), lines=[note])


def looks_closely(state: ObserverState) -> bool:
    """Whether the next look is a close one: the first, and each whose number is a power of two."""
    return state.looks & (state.looks - 1) == 0


def readable(loss: Any) -> float | None:
    """Return a loss as a float, where that makes nobody wait: a number, or a tensor on the CPU; else None.

    Raises:
        ModelInputError: if it is neither a number nor a scalar tensor.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ModelInputError(
                f"loss has shape {tuple(loss.shape)}; pass the scalar that `backward` was called on, or its "
                "value: `monitor(batch, loss=loss.item())`."
            )
        return loss.item() if loss.is_cpu else None
    try:
        return float(loss)
    except (TypeError, ValueError) as error:
        raise ModelInputError(
            f"loss is a {type(loss).__name__}; pass the scalar loss of this step, or leave it out."
        ) from error


def _is_numerical(issue: Issue) -> bool:
    return issue.issue_type is IssueType.NUMERICAL


def _jump(state: ObserverState, seen: Seen, batch: Any, loss: float) -> str:
    """Return in words that a loss has jumped, and which samples carry it."""
    sentence = f"Step {seen.step}: the loss is {loss:.4g}, where {state.ceiling:.4g} is as much as is usual."
    return " ".join(filter(None, (sentence, "" if batch is None else carriers(seen, batch))))
