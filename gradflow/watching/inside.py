"""A training step as a context: looked at from inside where a look is due, and left alone where none is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol, Self

import attrs
from torch import Tensor

from gradflow.detect import detect
from gradflow.diagnosis import summaries, wanted
from gradflow.errors import GradflowError, ModelInputError
from gradflow.functional.inside.look import InsideLook
from gradflow.functional.inside.passes import Passes
from gradflow.functional.weights import WeightSample
from gradflow.report import Report
from gradflow.watching.look import Look, Seen
from gradflow.watching.observer import Watch, looks_closely, readable
from gradflow.watching.schedule import is_jump, next_look
from gradflow.watching.state import ObserverState, Suspicion

Keep = Callable[[ObserverState, "Report | None", int], None]


class Step(Protocol):
    """A training step, as `Monitor.step` gives it: a context round what the loop does in it."""

    @property
    def report(self) -> Report | None:
        """The report on this step, after the context, where it was looked at and has one."""
        ...

    def loss(self, loss: Any) -> Any:
        """Tell of a loss before it is scaled and differentiated; returns it as it is."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: Any) -> None: ...


class PlainStep:
    """A training step that is no look.

    Args:
        ceiling: a loss above it makes the next step one.
        jumped: called where it does.
    """

    report = None

    def __init__(self, ceiling: float, jumped: Callable[[], None]) -> None:
        self._ceiling, self._jumped = ceiling, jumped

    def loss(self, loss: Any) -> Any:
        """Tell of the loss; returns it as it is."""
        value = readable(loss)
        if value is not None and is_jump(value, self._ceiling):
            self._jumped()
        return loss

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass


def scale_of(scaler: Any) -> Callable[[], float]:
    """Return what tells the present scale of a `GradScaler`, or of none.

    Raises:
        ModelInputError: if it is something else.
    """
    if scaler is None:
        return lambda: 1.0
    get_scale = getattr(scaler, "get_scale", None)
    if not callable(get_scale):
        raise ModelInputError(
            f"scaler is a {type(scaler).__name__}; pass the GradScaler of the loop: "
            '`scaler = torch.amp.GradScaler("cuda")`.'
        )
    return lambda: float(scaler.get_scale())


class LookedStep:
    """A training step that is looked at from inside.

    Args:
        watch: how the training is watched.
        state: what is known so far.
        seen: the model, and the step.
        batch: of the step; None if it is not known.
        scale: returns what a GradScaler multiplies losses with.
        keep: is handed the state after the step, the report and the step.

    Raises:
        GradflowError: at the first look, if the model cannot be looked into.
    """

    def __init__(
        self,
        watch: Watch,
        state: ObserverState,
        seen: Seen,
        *,
        batch: Any,
        scale: Callable[[], float],
        keep: Keep,
    ) -> None:
        self.report: Report | None = None
        self._watch, self._state, self._seen = watch, state, seen
        self._batch, self._scale, self._keep = batch, scale, keep
        self._stack = contextlib.ExitStack()
        self._passes: Passes | None = None
        self._why = ""
        try:
            self._sample = WeightSample.of(seen.model, seen.step)
            self._look = self._begun()
        except Exception as error:
            if isinstance(error, GradflowError) and not len(state.history):
                raise
            self._why = f"{type(error).__name__}: {error}"

    @property
    def is_open(self) -> bool:
        """Whether the context was entered and not left."""
        return self._passes is not None

    def _begun(self) -> InsideLook:
        """Return the look that goes on in this step, or a new one."""
        suspicion = self._state.suspicion
        if suspicion is not None and suspicion.inside is not None:
            return suspicion.inside
        closely = suspicion is not None or looks_closely(self._state)
        measurements = wanted(self._watch.detectors, "cheap")["measurements"]
        return InsideLook.of(self._seen.model, measurements, closely=closely, processes=self._seen.processes)

    def loss(self, loss: Any) -> Any:
        """Tell of a loss before it is scaled and differentiated; returns it as it is."""
        readable(loss)
        if self._passes is not None and isinstance(loss, Tensor):
            self._passes.hand(loss)
        return loss

    def __enter__(self) -> Self:
        if self._why:
            return self
        try:
            self._passes = self._stack.enter_context(self._look.listening(self._scale))
        except Exception as error:
            self._why = f"{type(error).__name__}: {error}"
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)
        passes, self._passes = self._passes, None
        try:
            state, report = self._after(passes)
        except Exception as error:
            state, report = self._failed(f"{type(error).__name__}: {error}")
        self.report = report
        self._keep(state, report, self._seen.step)

    def _failed(self, why: str) -> tuple[ObserverState, Report]:
        return self._watch.failed(self._state, self._seen.step, why)

    def _after(self, passes: Passes | None) -> tuple[ObserverState, Report | None]:
        """Return the state and the report after the step."""
        why = self._why if passes is None else passes.failed
        if passes is not None:
            why = self._look.failed_anywhere(why)
        if passes is None or why:
            return self._failed(why)
        state, step, watch = self._state, self._seen.step, self._watch
        if passes.overflowed:  # as a scale that is still sought does
            note = f"Step {step} could not be looked at: the scaled gradient overflowed, and is skipped."
            history = state.history.with_notes(note)
            return attrs.evolve(state, history=history, suspicion=None, due=step + 1), None
        suspicion = state.suspicion
        if suspicion is not None:
            suspicion = attrs.evolve(suspicion, inside=self._look)
            if self._look.steps < watch.batches:
                return attrs.evolve(state, suspicion=suspicion, due=step + 1), None
            return watch.decided(state, suspicion, self._judged(), step)
        look = self._judged()
        state, report = watch.taken(state, self._seen, look, self._batch, self._sample)
        state = self._with_changes(state)
        if keys := watch.suspected(state, look, step):
            state = attrs.evolve(state, suspicion=Suspicion(step=step, keys=keys), due=step + 1)
        return state, report

    def _judged(self) -> Look:
        record, detectors = self._look.record(), self._watch.detectors
        return Look(record, detect(record, detectors), summaries(record, detectors))

    def _with_changes(self, state: ObserverState) -> ObserverState:
        """Take down what the update in the step has done; one that comes after it, the next call sees."""
        step, watch = self._seen.step, self._watch
        changes = self._sample.changes(self._seen.model, self._seen.processes)
        if not any(value for name, value in changes.items() if name.startswith("update_ratio/")):
            return attrs.evolve(state, sample=self._sample)
        history = state.history.with_numbers(step, changes)
        return attrs.evolve(
            state, history=history, sample=None, due=next_look(step, watch.every, state.since)
        )
