"""`try_remedies`: run a model with and without each remedy, on copies, and tell what it did."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from gradflow.detect import Detector
from gradflow.diagnosis import Judge, detectors_of, judged, wanted
from gradflow.errors import RecordInputError, RemedyError
from gradflow.functional.analyze import analyzed
from gradflow.functional.model.closures import modules_in
from gradflow.functional.model.optimizers import asks_again
from gradflow.functional.model.purity import checked_seed, preserved, seed_all
from gradflow.functional.run.run import Plan
from gradflow.functional.run.training.options import Loop
from gradflow.records import Cause, FlowRecord, TrialRecord, TrialsRecord, TrialVerdict
from gradflow.remedies.choosing.choice import remedies_for
from gradflow.remedies.remedy import Remedy, unchanged
from gradflow.remedies.surgery import adopted
from gradflow.remedies.trials.copies import Copies, copies_of
from gradflow.remedies.trials.plain import plain_losses
from gradflow.remedies.trials.replay import Drawn, Recorder, replayed
from gradflow.remedies.trials.verdict import CLEAR, CLEAR_IF_GONE, Outcome, effect, gain
from gradflow.report import Report
from gradflow.report.wording import serious_issues

logger = logging.getLogger("gradflow")

RATE = 1e-3  # of the Adam that stands in where there is no optimizer
MEASURED = 2  # seeds; of those behind them the loss alone is looked at
MORE = 2  # remedies that are tried after one that cures: the first cure need not be the best

_NOTHING = Remedy(name="nothing", words="Nothing.", code="pass", apply=unchanged)


def try_remedies(
    report: Report,
    model: nn.Module,
    batches: Any,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: Optimizer | None = None,
    *,
    steps: int = 50,
    seeds: int = 3,
    budget: float | None = None,
    max_steps: int | None = None,
    remedies: Iterable[Remedy] | None = None,
    pipeline: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrialsRecord:
    """Return what became of a model when fixes for what a report blames were tried, on copies.

    Every remedy is run for `steps` steps of training and judged by the same measurements and detectors as
    `gradflow.diagnose`, against runs without it. Both arms see the same batches in the same order and start
    from the same random states, seed by seed; the batches are drawn once, and each seed has an order of its
    own. The likeliest remedies of a cause are tried first. A remedy that does nothing with the first seed is
    not tried with the others; and where one cures, two more are tried, with the other seeds only if the loss
    comes out lower still.

    The model, the optimizer, the loss and all random states are afterwards what they were, bit for bit; the
    source of the batches stays advanced by the `steps` batches drawn.

    Whether the issue is gone, and whether another is new, is measured with the first two seeds; the loss with
    all of them.

    Args:
        report: what `gradflow.diagnose` said of this model.
        model: the model.
        batches, loss_fn: as `diagnose` was given them. Where the batches end before `steps`, they come again.
        optimizer: copies of it train the copies; None is Adam at a rate of 0.001.
        steps: how many steps a run has.
        seeds: how many seeds a remedy is tried with.
        budget: seconds after which no run is begun any more; None has no limit. The first runs are made in
            any case, without and with the first remedy.
        max_steps: steps of training after which no run is begun, all runs together; None has no limit.
        remedies: to be tried for every cause that they apply to; None are those that the causes' recommended
            actions stand for, `gradflow.remedies.remedies_for(cause, record)`.
        pipeline: as `diagnose` was given it.
        progress: called with (steps done, steps at most) after every step.

    Returns:
        A `TrialsRecord`; `report.with_trials(trials)` is the report that tells of them.

    Raises:
        RecordInputError: if `report` is no report.
        RemedyError: if `remedies` holds something else.
        ValueError: if a number is not as it should be.
        GradflowError: what `diagnose` raises for a model or batches that cannot be run. What a remedy raises
            is in its trial.

    >>> import torch
    >>> from torch import nn
    >>> from gradflow.diagnosis import diagnose
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    >>> _ = nn.init.constant_(model[0].bias, -9.0)
    >>> x = torch.randn(64, 8)
    >>> args = model, [(x, x[:, :1])], nn.MSELoss(), torch.optim.Adam(model.parameters(), 0.01)
    >>> report = diagnose(*args[:3], optimizer=args[3], steps=5)
    >>> trials = try_remedies(report, *args, steps=20, seeds=1)
    >>> trials.best(report.causes[0]).verdict.value
    'cures'
    """
    started = time.perf_counter()
    if not isinstance(report, Report):
        raise RecordInputError(
            f"try_remedies: expected a Report, got {type(report).__name__}: diagnose(model, batches, "
            "loss_fn) returns one."
        )
    given = None if remedies is None else _checked(remedies)
    for name, value, least in (("steps", steps, 2), ("seeds", seeds, 1), ("max_steps", max_steps, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, or None, got {budget!r}.")
    stepper = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    laboratory = _Laboratory(
        model=model, batches=batches, loss_fn=loss_fn, optimizer=stepper, steps=steps, seeds=seeds,
        clip=report.record.provenance.clip, mode=report.record.provenance.mode,
        detectors=detectors_of(pipeline, "try_remedies"), limits=_Limits(started, budget, max_steps),
    )  # fmt: skip
    candidates = [
        (cause, _chosen(cause, report.record, given))
        for cause in report.causes
        if cause.issues and cause.issues[0].severity.is_serious
    ]
    laboratory.announce(progress, sum(len(found) for _, found in candidates))
    notes = [] if optimizer is not None else [f"No optimizer was given: Adam at a rate of {RATE:g} stepped."]
    trials: list[TrialRecord] = []
    try:
        for cause, found in candidates:
            if not found:
                notes.append(_nothing_for(cause))
            trials += laboratory.tried(cause, found)
    finally:
        laboratory.close()
    if laboratory.left_out:
        notes.append(f"{laboratory.left_out} remedies were left out: the budget was spent.")
    return TrialsRecord(
        trials=trials, steps=steps, seeds=seeds, optimizer=type(stepper).__name__, notes=notes,
        num_batches=len(laboratory.drawn), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _nothing_for(cause: Cause) -> str:
    where = f"{cause.issue_type.value} in {cause.layer or '(model)'}"
    return f"No remedy is known for {where} that can be tried from outside the model's code."


def _checked(remedies: Iterable[Remedy]) -> tuple[Remedy, ...]:
    found = (remedies,) if isinstance(remedies, Remedy) else tuple(remedies)
    for entry in found:
        if not isinstance(entry, Remedy):
            raise RemedyError(
                f"try_remedies: remedies holds {entry!r:.100}, which is no Remedy. A factory must be called "
                "first: `remedies=[clipped(1.0)]`."
            )
    return found


def _chosen(cause: Cause, record: FlowRecord, given: Sequence[Remedy] | None) -> list[Remedy]:
    """Return the remedies to try for a cause, in order; one whose `applies` raises counts as applying."""
    if given is None:
        return list(remedies_for(cause, record))
    found = []
    for remedy in given:
        try:
            applies = bool(remedy.applies(cause, record))
        except Exception as error:
            logger.info("gradflow: `applies` of the remedy %r raised %r; it is tried.", remedy.name, error)
            applies = True
        if applies:
            found.append(remedy)
    return found


@attrs.define(eq=False)
class _Limits:
    """What may be spent: seconds and steps of training."""

    started: float
    seconds: float | None
    steps: int | None
    done: int = 0

    def allow(self, steps: int) -> bool:
        """Whether one more run of so many steps may begin."""
        if self.steps is not None and self.done + steps > self.steps:
            return False
        return self.seconds is None or time.perf_counter() - self.started < self.seconds


@attrs.define(eq=False, kw_only=True)
class _Laboratory:
    """Where trials are made: the user's objects, the batches that were drawn, and the runs without a remedy.

    Args:
        model, batches, loss_fn, optimizer: the user's.
        steps, seeds, clip, mode: how runs are made.
        detectors: judge them.
        limits: what may be spent.
        drawn: the batches, after the first run.
        without: the runs without a remedy, by seed.
        left_out: how many remedies were not tried for want of budget.
    """

    model: nn.Module
    batches: Any
    loss_fn: Any
    optimizer: Optimizer
    steps: int
    seeds: int
    clip: float | None
    mode: str
    detectors: tuple[Detector, ...]
    limits: _Limits
    drawn: list[Drawn] = attrs.field(factory=list)
    without: list[Outcome] = attrs.field(factory=list)
    left_out: int = 0
    _progress: Callable[[int, int], None] | None = None
    _most: int = 0
    _recorder: Recorder | None = None

    def announce(self, progress: Callable[[int, int], None] | None, remedies: int) -> None:
        """Tell progress from now on, of as many remedies."""
        self._progress, self._most = progress, (remedies + 1) * self.seeds * self.steps

    def close(self) -> None:
        """Leave the loss with what came with the last batch that was drawn."""
        if self._recorder is not None:
            self._recorder.close()
        if self._progress is not None:
            self._progress(self._most, self._most)

    def tried(self, cause: Cause, remedies: Sequence[Remedy]) -> list[TrialRecord]:
        """Return the trials of remedies for a cause, in order, up to a few after the first that cures."""
        found: list[TrialRecord] = []
        first_cure = len(remedies)
        for place, remedy in enumerate(remedies):
            if place > first_cure + MORE:
                break
            if self.without and not self.limits.allow(self.steps):
                self.left_out += len(remedies) - place
                break
            cures = [trial for trial in found if trial.verdict is TrialVerdict.CURES]
            best = min(cures, key=lambda trial: trial.loss_with, default=None)
            found.append(self._tried(cause, remedy, best))
            if found[-1].verdict is TrialVerdict.CURES:
                first_cure = min(first_cure, place)
        return found

    def _tried(self, cause: Cause, remedy: Remedy, best: TrialRecord | None) -> TrialRecord:
        common = {
            "remedy": remedy.name, "words": remedy.words, "code": remedy.code, "layer": cause.layer,
            "issue_type": cause.issue_type,
        }  # fmt: skip
        treated: list[Outcome] = []
        none = np.empty((0, 0))
        for seed in range(self.seeds):
            if treated and not (self._promising(treated, cause, best) and self.limits.allow(self.steps)):
                break
            self._untreated(seed)
            try:
                treated.append(self._run(remedy, seed))
            except Exception as error:
                why = _reason(error)
                return TrialRecord(
                    **common, verdict=TrialVerdict.NOT_APPLICABLE, why=why,
                    losses_without=none, losses_with=none,
                )  # fmt: skip
        found = effect(self.without, treated, cause, general=remedy.general)
        return TrialRecord(
            **common,
            **attrs.asdict(found),
            steps=self.steps,
            losses_without=np.stack([run.losses for run in self.without[: len(treated)]], axis=1),
            losses_with=np.stack([run.losses for run in treated], axis=1),
            seconds=sum(run.seconds for run in treated),
        )

    def _promising(self, treated: Sequence[Outcome], cause: Cause, best: TrialRecord | None) -> bool:
        """Whether what the first seeds showed is worth trying with another."""
        if best is not None and gain(best.losses_with[:, 0], treated[0].losses) < CLEAR / 2:
            return False
        return abs(effect(self.without, treated, cause).gain) >= CLEAR_IF_GONE / 2

    def _untreated(self, seed: int) -> None:
        """Make the run without a remedy for a seed, unless it was made; the first one draws the batches."""
        if seed < len(self.without):
            return
        if seed == 0:
            self._recorder = Recorder(self.batches, self.loss_fn, seed)
            self.without.append(
                self._measured(self.model, self._recorder, self.loss_fn, self.optimizer, seed)
            )
            self.drawn = self._recorder.drawn
        else:
            self.without.append(self._run(_NOTHING, seed))

    def _run(self, remedy: Remedy, seed: int) -> Outcome:
        """Apply a remedy to copies, and run them on the batches that were drawn."""
        with preserved(self.model, *modules_in(self.loss_fn)):
            made = copies_of(self.model, self.loss_fn, self.optimizer)
            seed_all(checked_seed(seed))
            changed = _applied(remedy, made)
            drawn = remedy.on_batches([one.batch for one in self.drawn])
        batches = replayed(_kept_in_step(self.drawn, drawn), seed, made.memo)
        run = changed.model, batches, changed.loss_fn, changed.optimizer
        if seed < MEASURED or asks_again(changed.optimizer):
            return self._measured(*run, seed)
        begun = time.perf_counter()
        losses = plain_losses(*run, self._plan(changed.optimizer, seed))
        self.limits.done += self.steps
        return Outcome(losses, None, time.perf_counter() - begun)

    def _measured(
        self, model: nn.Module, batches: Any, loss_fn: Any, optimizer: Optimizer, seed: int
    ) -> Outcome:
        begun, judge = time.perf_counter(), Judge(self.detectors)
        plan = attrs.evolve(self._plan(optimizer, seed), **wanted(judge, "cheap"))
        record = analyzed(model, batches, loss_fn, plan)
        self.limits.done += self.steps
        issues = serious_issues(judged(record, judge).issues)
        return Outcome(np.array(record.losses), issues, time.perf_counter() - begun)

    def _plan(self, optimizer: Optimizer, seed: int) -> Plan:
        """Return the plan of a run, without what is measured in it."""
        done = self.limits.done

        def told(step: int, steps: int) -> None:
            if self._progress is not None:
                self._progress(min(done + step, self._most), self._most)

        return Plan(
            steps=self.steps, loop=Loop(optimizer=optimizer, clip=self.clip), seed=seed, mode=self.mode,
            progress=told,
        )  # fmt: skip


def _applied(remedy: Remedy, made: Copies) -> Copies:
    """Return copies after a remedy was applied to them."""
    before = list(made.model.parameters())
    found = remedy.apply(made.model, made.optimizer)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module)):
        raise RemedyError(
            f"`apply` of {remedy.name!r} returned {type(found).__name__}; it must return (model, optimizer)."
        )
    model, optimizer = found
    loss_fn = remedy.on_loss(made.loss_fn)
    with contextlib.suppress(AttributeError):
        adopted(model, optimizer, before)
    return Copies(model, loss_fn, optimizer, made.memo)


def _kept_in_step(drawn: Sequence[Drawn], batches: Sequence[Any]) -> list[Drawn]:
    """Return changed batches with what came with those that they were drawn as."""
    if not batches:
        raise RemedyError("`on_batches` returned no batch.")
    if len(batches) > len(drawn):
        raise RemedyError(f"`on_batches` returned {len(batches)} batches, of {len(drawn)} that were drawn.")
    return [attrs.evolve(one, batch=batch) for one, batch in zip(drawn, batches, strict=False)]


def _reason(error: Exception) -> str:
    """Return in one line why a remedy could not be tried."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RemedyError) else f"{type(error).__name__}: {text:.300}"
