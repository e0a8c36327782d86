"""`Monitor`: the observer with its state kept, a file, and calls when an issue is told."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor, nn

from gradflow.detect.time import TimeDetector
from gradflow.errors import ModelInputError
from gradflow.functional.model.optimizers import check_optimizers
from gradflow.functional.model.supported import check_module
from gradflow.functional.run.together.beside import is_first, module_of
from gradflow.functional.run.training.options import Loop
from gradflow.records import HistoryRecord, Issue, IssueSeverity
from gradflow.report import Report
from gradflow.watching.inside import LookedStep, PlainStep, Step, scale_of
from gradflow.watching.log import append, mend, resumed
from gradflow.watching.look import Seen
from gradflow.watching.observer import readable, watching
from gradflow.watching.schedule import loss_ceiling
from gradflow.watching.staged import check_staged, is_staged
from gradflow.watching.state import Key, ObserverState, key_of

logger = logging.getLogger("gradflow")
_INFINITE = math.inf


def _check_listener(call: str, function: Any, told: str) -> None:
    if not callable(function):
        raise ModelInputError(
            f"{call}: {function!r:.100} cannot be called. Pass a function of ({told}, step): "
            f"`monitor.{call}(lambda {told}, step: print(step, {told}))`."
        )


class Monitor:
    """Watches a training from inside its loop: one call a step, and a report at every look.

    Between looks a call compares two numbers. At a look this step's batch is measured on copies of the model,
    one forward and one backward pass; see `gradflow.observer`, of which this is the thin face. Weights,
    gradients, buffers, modes, the optimizer and every random state are left as they are: the training gives
    the same weights with and without it, bit for bit.

    Args:
        model: the model that is trained; on the process of every stage of a pipeline its `PipelineStage`, or
            the schedule that runs it.
        loss_fn: from its output to a scalar, as for `gradflow.diagnose`.
        optimizer: the optimizer of the loop; only read.
        every: steps between two looks in the long run.
        pipeline: judges a look; as for `gradflow.diagnose`.
        in_time: judge the history; as for `gradflow.observer`.
        forward_fn: for a training step that is not `model(batch)`; as for `gradflow.observer`.
        path: a file that the history is written to as it grows, of several processes by the first. If it is
            there, the training is taken up where it ends: all of them must see it.
        batches: how many batches a closer look is taken on.
        most: how many looks are kept in memory; the file keeps all.
        processes: whether to look at this process `alone`, or at all that split the batch; as for
            `gradflow.observer`.

    Raises:
        ModelInputError: if the model is none, `forward_fn` cannot be called, or the history at `path` is of
            another model.
        OptimizerMismatchError: if `optimizer` is none, or holds none of the model's parameters.
        RecordFormatError: if the file at `path` is no history.
        ValueError: if `every`, `batches` or `most` is too small.
        PipelineError: if `pipeline` cannot be used as one.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model, loss_fn = nn.Linear(4, 1), nn.MSELoss()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = Monitor(model, loss_fn, optimizer, every=20)
    >>> for step in range(41):
    ...     x = torch.randn(16, 4)
    ...     batch = x, x.sum(1, keepdim=True)
    ...     optimizer.zero_grad()
    ...     loss = loss_fn(model(batch[0]), batch[1])
    ...     loss.backward()
    ...     optimizer.step()
    ...     report = monitor(batch, loss=loss)
    >>> monitor.history.steps.tolist(), report.ok
    ([0, 1, 4, 16, 20, 40], True)
    """

    def __init__(
        self,
        model: Any,
        loss_fn: Callable[..., Any] | None = None,
        optimizer: Any = None,
        *,
        every: int = 200,
        pipeline: Any = None,
        in_time: Iterable[TimeDetector] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        path: str | os.PathLike[str] | None = None,
        batches: int = 4,
        most: int = 512,
        processes: Any = "alone",
    ) -> None:
        check_staged(model, processes, forward_fn)
        check_module(module_of(model))
        if optimizer is not None:
            check_optimizers(Loop(optimizer=optimizer).optimizers, module_of(model))
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self._watch = watching(
            every=every, pipeline=pipeline, in_time=in_time, forward_fn=forward_fn, batches=batches,
            most=most, processes=processes,
        )  # fmt: skip
        self._go_on(ObserverState())
        self._path = None if path is None else Path(path)
        self._step = 0
        self._looked: LookedStep | None = None
        self._report: Report | None = None
        self._written = HistoryRecord.empty()
        self._warned = self._torn = False
        self._looks: list[Callable[[Report, int], Any]] = []
        self._alerts: list[tuple[IssueSeverity, Callable[[Issue, int], Any]]] = []
        self._alerted: dict[Key, IssueSeverity] = {}
        if self._path is not None and self._path.exists():
            history = self._written = resumed(self._path, model)
            self._take_up(history, int(history.steps[-1]) + 1 if len(history) else 0)

    def __call__(self, batch: Any, *, loss: Any = None, step: int | None = None) -> Report | None:
        """Return a report if this step was looked at, else None; once per step, before or after the update.

        Args:
            batch: of this step, as `gradflow.diagnose` takes them.
            loss: of this step, a number or a scalar tensor: where it jumps, the step is looked at whatever
                its number. A tensor on another device is not read, for that would wait for it.
            step: the training's own count; by default the calls are counted.

        Raises:
            GradflowError: at the first look, if model, batch or loss cannot be measured.
        """
        now = self._step if step is None else step
        self._step = now + 1
        if now < self._due:  # nearly always: nothing may be done here that takes time
            if step is not None and self._is_past(step):
                self._warn_of_the_past(step)
            limit = self._limit
            if loss is None or limit == _INFINITE:
                return None
            plain = type(loss) is Tensor and loss.is_cpu
            try:
                value = loss.item() if plain else readable(loss)
            except (RuntimeError, ValueError):  # it is no scalar
                value = readable(loss)
            if value is None or value <= limit:
                return None
        return self._look(batch, loss, now)

    def _look(self, batch: Any, loss: Any, step: int) -> Report | None:
        before = self._state.history
        if len(before) and step <= before.steps[-1]:  # gone through again after a restart
            self._warn_of_the_past(step)
            return None
        state, report = self._watch.update(
            self._state, self.model, batch, self.loss_fn, self.optimizer, step, loss=loss
        )
        self._keep(state, report, step)
        return report

    def _keep(self, state: ObserverState, report: Report | None, step: int) -> None:
        """Go on with a state: write what is new of it, and tell of what was found."""
        before = self._state.history
        self._go_on(state)
        if self._path is not None and self._state.history is not before:
            self._written = self._write(self._path, self._state.history)
        if report is not None:
            self._report = report
            for function in self._looks:
                function(report, step)
            self._alert(report, step)

    def _go_on(self, state: ObserverState) -> None:
        """Go on with a state, of which two numbers are kept at hand: a call between looks compares these."""
        self._state, self._due, self._limit = state, state.due, self._ceiling(state)
        if state.ceiling < _INFINITE and is_staged(self.model):
            self._due = 0  # each call asks whether the last stage has seen a jump

    def _is_past(self, step: int) -> bool:
        """Whether a step is before the last look."""
        history = self._state.history
        return len(history) > 0 and step < int(history.steps[-1])

    def _warn_of_the_past(self, step: int) -> None:
        """Say once that steps before the last look are not looked at."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "step %d is before the last look, at step %d: nothing is looked at until then. Pass the "
                "count of the whole training, not of an epoch, and another path= for another training.",
                step, self.history.steps[-1],
            )  # fmt: skip

    def _write(self, path: Path, history: HistoryRecord) -> HistoryRecord:
        """Write what is new to the file, and return what it holds then; a full disk ends no training.

        Of several processes that look together, the first does.
        """
        if not is_first(self._watch.processes, self.model):
            return history
        try:
            if self._torn:
                mend(path)
            append(path, self._written, history)
            self._torn = False
        except OSError as error:
            self._torn = path.exists()
            logger.warning("the history could not be written to %s: %s", path, error)
            return self._written
        return history

    def step(self, batch: Any = None, *, scaler: Any = None, step: int | None = None) -> Step:
        """Return a context for one training step, which is measured from inside where a look is due.

        Taps are on the model for the length of such a context alone, and the numbers are those of the very
        passes that train it, with their loss scale, accumulation and averaging over processes, at no pass
        more. Probes are identities: the weights come out the same, bit for bit. In a step that is no look the
        context does nothing. An exception of the loop comes through; one of the look is noted, and the
        training goes on.

        Args:
            batch: of this step, to name the samples that carry a jump of the loss; may be left out.
            scaler: the GradScaler of the loop. With it, or with `step.loss(loss)` before the loss is scaled,
                gradients are told of as they are without the scale.
            step: the training's own count; by default the calls are counted.

        Returns:
            The context; `step.loss(loss)` in it tells of a loss before `backward`, and `step.report` after it
            has the report, if there is one.

        Raises:
            ModelInputError: if `scaler` is none, or the context of another step is open; at the first look,
                if the model cannot be looked into.

        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model, loss_fn = nn.Linear(4, 1), nn.MSELoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = Monitor(model, every=20)
        >>> for _ in range(41):
        ...     x = torch.randn(16, 4)
        ...     with monitor.step() as step:
        ...         optimizer.zero_grad()
        ...         loss = step.loss(loss_fn(model(x), x.sum(1, keepdim=True)))
        ...         loss.backward()
        ...         optimizer.step()
        >>> monitor.history.steps.tolist(), monitor.report.ok
        ([0, 1, 4, 16, 20, 40], True)
        """
        if self._looked is not None and self._looked.is_open:
            raise ModelInputError(
                "monitor.step() was called inside of monitor.step(): all passes of one training step go into "
                "one context. For several models take a monitor each."
            )
        check_staged(self.model, self._watch.processes, inside=True)
        now = self._step if step is None else step
        self._step = now + 1
        if now < self._due:
            return PlainStep(self._limit, self._jumped)
        scale = scale_of(scaler)
        seen = Seen(self.model, self.loss_fn, now, self._watch.forward_fn, self._watch.processes)
        state = self._watch.with_changes(self._state, seen)
        if now < state.due and state.suspicion is None:
            self._keep(state, None, now)
            return PlainStep(self._ceiling(state), self._jumped)
        self._looked = LookedStep(self._watch, state, seen, batch=batch, scale=scale, keep=self._keep)
        return self._looked

    def _ceiling(self, state: ObserverState) -> float:
        return state.ceiling if self._watch.sees_jumps else math.inf

    def _jumped(self) -> None:
        """Hear that the loss of a step that is no look has jumped: the next one is looked at."""
        since = self._step - 1
        self._go_on(attrs.evolve(self._state, due=since + 1, since=since))

    @property
    def state(self) -> ObserverState:
        """What is known so far: the state that `gradflow.observer` hands on."""
        return self._state

    @property
    def history(self) -> HistoryRecord:
        """What the looks so far have measured, and the issues over time."""
        return self._state.history

    @property
    def report(self) -> Report | None:
        """The report of the last look; None before the first."""
        return self._report

    @property
    def is_due(self) -> bool:
        """Whether the next call looks whatever the loss is; before any other its batch is not needed."""
        return self._step >= self._state.due

    def on_look(self, function: Callable[[Report, int], Any]) -> None:
        """Have a function called with the report of every look: a tracker, see `gradflow.integrations`.

        What the function raises comes through.

        Args:
            function: called as `function(report, step)`, before those of `on_issue`.

        Raises:
            ModelInputError: if `function` cannot be called.
        """
        _check_listener("on_look", function, "report")
        self._looks.append(function)

    def on_issue(self, function: Callable[[Issue, int], Any], severity: Any = "HIGH") -> None:
        """Have a function called when an issue is told: once, and again if it becomes graver.

        What the function raises comes through, so that it may end the training.

        Args:
            function: called as `function(issue, step)`.
            severity: from which severity on, an `IssueSeverity` or its name.

        Raises:
            ModelInputError: if `function` cannot be called.
            ValueError: if `severity` is none.
        """
        _check_listener("on_issue", function, "issue")
        names = IssueSeverity.__members__
        if not isinstance(severity, IssueSeverity) and severity not in names:
            raise ValueError(f"severity must be one of {', '.join(names)}, got {severity!r}.")
        least = severity if isinstance(severity, IssueSeverity) else IssueSeverity[severity]
        self._alerts.append((least, function))

    def _alert(self, report: Report, step: int) -> None:
        told = {key_of(issue): issue for issue in report.issues}
        news = [
            issue
            for key, issue in told.items()
            if key not in self._alerted or issue.severity > self._alerted[key]
        ]
        self._alerted |= {key_of(issue): issue.severity for issue in news}
        for issue in news:
            for least, function in self._alerts:
                if issue.severity >= least:
                    function(issue, step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to take the watching up: the history as JSON, and the next step."""
        return {"history": self.history.to_json(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: its step, and its history unless there is one already (from `path`).

        Args:
            state: what `state_dict` returned.

        Raises:
            ModelInputError: if it is something else.
            RecordFormatError: if its history cannot be read.
        """
        if not isinstance(state, Mapping) or not {"history", "step"} <= state.keys():
            raise ModelInputError(
                f"load_state_dict: expected what `monitor.state_dict()` returned, with the keys history and "
                f"step, got {state!r:.100}. Save it with the model: "
                '`torch.save({"model": model.state_dict(), "monitor": monitor.state_dict()}, path)`.'
            )
        history, self._step = HistoryRecord.from_json(state["history"]), int(state["step"])
        if not len(self.history):
            if self._path is not None:
                self._written = self._write(self._path, history)
            self._take_up(history, self._step)

    def _take_up(self, history: HistoryRecord, step: int) -> None:
        """Go on after a history; the first step is looked at."""
        self._step = step
        self._go_on(ObserverState(history=history, due=step, ceiling=loss_ceiling(history)))
