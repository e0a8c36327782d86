"""Steps the working copies as the user's loop steps the parameters."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import ModelInputError
from gradflow.functional.model.optimizers import clip_gradients, copy_training, is_handed_closure, update
from gradflow.functional.model.trees import summable
from gradflow.functional.processes.line import Line
from gradflow.functional.processes.shards import local
from gradflow.functional.processes.stages import Stages
from gradflow.functional.reverse.reverse import fused
from gradflow.functional.run.program import Program
from gradflow.functional.run.step import Outcome, Request, evaluated
from gradflow.functional.run.together.gradients import averaged_backward
from gradflow.functional.run.training.options import Loop
from gradflow.functional.updates.figures import ages, remembered, update_figures
from gradflow.functional.updates.log import UpdateLog
from gradflow.functional.updates.undone import Stepped

Gradients = dict[str, Tensor | None]


@attrs.define(eq=False)
class Stepper:
    """Makes the updates of a run, with copies of all that the user's loop makes them with.

    Args:
        loop: what the loop does.
        optimizers: copies, which hold the working parameters.
        schedulers: copies, which hold those.
        scaler: a copy; None without one, or where it is not enabled.
        log: hears of every update.
        line: to the other processes, over which gradients are averaged.
    """

    loop: Loop
    optimizers: list[Any]
    schedulers: list[Any]
    scaler: Any
    log: UpdateLog
    line: Line = attrs.field(factory=Line)
    _sum: Gradients = attrs.field(factory=dict)  # of the batches since the last update
    _number: int = 0  # of them
    _broken: bool = False  # whether a loss or gradient among them was not finite
    _left: dict[str, Tensor] = attrs.field(factory=dict)  # gradients that a `step_fn` has left behind
    _handed: list[bool] = attrs.field(factory=list)  # whether each optimizer is handed a closure
    _stepped: Stepped | None = None  # the last update that was looked at, until the next forward pass is over

    @classmethod
    def of(
        cls, loop: Loop, model: nn.Module, parameters: Mapping[str, Tensor], log: UpdateLog, line: Line
    ) -> Stepper:
        """Return the stepper of a run.

        Args:
            loop: what the user's loop does.
            model: whose parameters the optimizers hold.
            parameters: working copies by qualified name.
            log: hears of every update.
            line: to the other processes.
        """
        scaler = loop.scaler if is_enabled(loop.scaler) else None
        optimizers, (schedulers, scaler) = copy_training(
            loop.optimizers, (list(loop.schedulers), scaler), model, parameters
        )
        return cls(loop, optimizers, schedulers, scaler, log, line)

    @property
    def loss_scale(self) -> float:
        """By what the loss is multiplied before it is differentiated; 1 without a scaler."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def after(self, program: Program, request: Request, outcome: Outcome, *, finite: bool, end: int) -> None:
        """Do what the loop does after a batch.

        Args:
            program: whose working copies are stepped.
            request: the step.
            outcome: of it.
            finite: whether its loss and gradients are.
            end: how many steps the run has, as far as that is known.
        """
        if self._stepped is not None:
            self.log.put_back(self._stepped.step, self._stepped.undone(program.state.trainable))
            self._stepped = None
        self._broken |= not finite
        self._number += 1
        if self.loop.accumulate > 1:
            self._gather(program, outcome)
            if self._number < self.loop.accumulate:
                return
        overflown, self._broken, self._number = self._broken, False, 0
        if overflown:
            self.log.skipped()
        if not overflown or self.scaler is not None:
            look = not overflown and self._is_look(request.step, end)
            watched = program.state.trainable if look else {}
            was, aged = (remembered(watched), ages(self.optimizers, watched)) if look else ({}, {})
            if self.scaler is not None:
                self.log.scaled(request.step, self.loss_scale)
            gradients = self._step(program, request, outcome, made=not overflown)
            if watched:
                figures = update_figures(
                    self.optimizers,
                    was,
                    watched,
                    gradients,
                    aged=aged,
                    total=functools.partial(program.state.shards.total, self.line),
                )
                self.log.look(request.step, figures)
                if not program.state.shards:
                    self._stepped = Stepped.of(request.step, was, watched)
        self._schedule(outcome.loss)

    def _is_look(self, step: int, end: int) -> bool:
        """Whether to look at the next update: the first, after each power of four, and the last."""
        number, looked = len(self.log.rates), len(self.log.looks)
        if step + self.loop.accumulate >= end - 1:
            return looked <= 1 or number > 4 ** (looked - 1) + 1  # that of the update before is as good
        return number == (0 if looked == 0 else 4**looked)

    def _gather(self, program: Program, outcome: Outcome) -> None:
        kept = outcome.gradients.kept
        for name in program.state.trainable:
            gradient, known = kept[name], self._sum.get(name)
            if gradient is not None:
                gradient = gradient / self.loop.accumulate
                self._sum[name] = gradient if known is None else known + gradient

    def _step(self, program: Program, request: Request, outcome: Outcome, *, made: bool) -> Gradients:
        """Make one update, and return the gradients that it was made with; a scaler may leave it unmade."""
        trainable = program.state.trainable
        kept = outcome.gradients.kept
        gradients: Gradients = {name: kept[name] for name in trainable}
        if self.loop.accumulate > 1:
            gradients, self._sum = {name: self._sum.get(name) for name in trainable}, {}
        rates = _rates(self.optimizers)
        gradients, share = self.make(program, request, gradients, outcome.loss)
        if made:
            self.log.updated(request.step, rates=rates, clipped=share)
        return gradients

    def make(
        self, program: Program, request: Request, gradients: Gradients, loss: Tensor
    ) -> tuple[Gradients, Tensor | None]:
        """Make one update with some gradients; they may be written to.

        Returns:
            The gradients that it was made with, and by what clipping multiplied them.
        """
        if self.loop.step_fn is not None:
            return self._by_function(program, request, gradients), None
        if self.scaler is not None:
            return gradients, self._scaled(program, gradients, loss)
        share = self._clipped(program, gradients)
        again = self._again(program, request)
        trainable = program.state.trainable
        self._handed = self._handed or [is_handed_closure(optimizer) for optimizer in self.optimizers]
        for optimizer, handed in zip(self.optimizers, self._handed, strict=True):
            update(optimizer, trainable, gradients, again, loss, handed=handed)
        return gradients, share

    def _clipped(self, program: Program, gradients: Gradients) -> Tensor | None:
        if self.loop.clip is None:
            return None
        ours = [gradients[name] for name in program.state.trainable if name in program.state.parameters]
        stages = program.given.stages
        return clip_gradients(ours, self.loop.clip, None if stages.alone else stages.added)

    def _again(self, program: Program, request: Request) -> Any:
        """Return what evaluates the loss anew, at other parameters, for optimizers that ask for it."""
        given, state = program.given, program.state
        trainable = state.trainable

        def again() -> Tensor:
            if not given.stages.alone:
                raise ModelInputError(
                    "the optimizer asks for the loss at other parameters, and the model is a stage of a "
                    "pipeline: a loss takes a pass through all stages, and that of each asks as often as it "
                    "likes. Leave it out, or pass one that steps once a batch, such as `torch.optim.SGD`."
                )
            with state.swapped():
                loss, _ = evaluated(given, request)
                found = fused(loss, list(trainable.values()))
            gradients: Gradients = dict(zip(trainable, found, strict=True))
            self._clipped(program, gradients)
            for name, gradient in gradients.items():
                trainable[name].grad = gradient
            return loss.detach()

        return again

    def _scaled(self, program: Program, gradients: Gradients, loss: Tensor) -> Tensor | None:
        """Step as a loop with a scaler does, which leaves out a step whose gradients are not finite."""
        trainable, scale = program.state.trainable, self.loss_scale
        stages, optimizers = program.given.stages, self.optimizers
        self.scaler.scale(loss)  # by which it finds its device
        for name, parameter in trainable.items():
            gradient = gradients[name]
            parameter.grad = None if gradient is None else gradient * scale
        try:
            if not stages.alone:
                optimizers = _for_all_stages(optimizers, trainable, stages, loss.device)
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)
            gradients.update({name: p.grad for name, p in trainable.items()})
            share = self._clipped(program, gradients)
            for optimizer in optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        finally:
            _clear(trainable.values())
        return share

    def _by_function(self, program: Program, request: Request, measured: Gradients) -> Gradients:
        """Have the user's function make the step, on copies, from what this one began with."""
        given, state = program.given, program.state
        trainable = state.trainable
        request.before.restore(program)
        for name, parameter in trainable.items():
            parameter.grad = self._left.get(name)
        optimizers = self.loop.like(self.optimizers)
        batch = request.step if given.draws_itself else request.batch
        try:
            with state.swapped(), torch.enable_grad(), averaged_backward(self.line, trainable):
                assert self.loop.step_fn is not None
                self.loop.step_fn(given.model if given.handed is None else given.handed, batch, optimizers)
                state.keep_buffers()
            self._left = {name: p.grad for name, p in trainable.items() if p.grad is not None}
        except Exception as error:
            error.add_note(f"gradflow: raised by step_fn at step {request.step}.")
            raise
        finally:
            _clear(trainable.values())
        return {name: self._left.get(name, gradient) for name, gradient in measured.items()}

    def _schedule(self, loss: Tensor) -> None:
        if not self.schedulers:
            return
        with warnings.catch_warnings():  # a copy of an optimizer has no trace of what counts its steps
            warnings.filterwarnings("ignore", message=".*optimizer.step.*", category=UserWarning)
            for scheduler in self.schedulers:
                asks = "metrics" in inspect.signature(scheduler.step).parameters
                scheduler.step(float(loss)) if asks else scheduler.step()


def is_enabled(scaler: Any) -> bool:
    """Whether there is a scaler that scales."""
    asked = getattr(scaler, "is_enabled", None)
    return scaler is not None and (not callable(asked) or bool(asked()))


def _for_all_stages(
    optimizers: Sequence[Any], trainable: Mapping[str, Tensor], stages: Stages, device: torch.device
) -> list[Any]:
    """Return the optimizers that a scaler is to step on this stage of a pipeline.

    One loop has one scaler, which leaves a step out on all stages if a gradient of any is not finite. So the
    scaler of each is shown a number more, of no parameter of theirs, that is not finite then; where it is, no
    other optimizer is stepped. Those whose parameters got no gradient at all have nothing that it could see.
    """
    given = [p.grad for p in trainable.values() if p.grad is not None]
    broken = stages.any(not all(bool(torch.isfinite(summable(local(g))).all()) for g in given))
    seen = nn.Parameter(torch.zeros((), device=device, dtype=torch.float32))
    seen.grad = torch.full_like(seen, math.inf if broken else 0.0)
    stepped = [] if broken else [o for o in optimizers if _has_gradient(o)]
    return [torch.optim.SGD([seen]), *stepped]


def _has_gradient(optimizer: Any) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _rates(optimizers: Iterable[Any]) -> list[float]:
    """Return the learning rates of all groups; NaN for one that has none."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return [float(group.get("lr", math.nan)) for group in groups]


def _clear(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
