"""The passes of one training step as they run: calls led past recorders, reverse passes, a row for each.

NOTE [Rows of a training step]
A training step may hold several passes: micro-batches whose gradients accumulate, the two players of a GAN, a
penalty of its own. Every call of `backward` is a row, as if it were a step of its own: the outputs that its
gradient arrived at, and what it has *added* to the `.grad` of each parameter, so that a row of a later
micro-batch does not hold the sum of all. Calls since the last `backward` belong to the next.

All gradients are divided by what the loss was multiplied with. Where the loss was handed over, that is
measured: the derivative of what `backward` was called on with respect to it, which is the scale of a
GradScaler over the number of micro-batches, for instance. Else it is the scaler's scale, where one was given.
They are taken when `backward` ends, before anything clips them.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.inside.listening import Once
from gradflow.functional.inside.recorder import OwnRecorder
from gradflow.functional.model.supported import distributed
from gradflow.functional.model.trees import named_tensors
from gradflow.functional.reverse.autograd_graph import Structure, build
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.run.again import follow_reach, learn_reach
from gradflow.functional.run.reverse_pass import Gradients
from gradflow.functional.run.rows import Row
from gradflow.functional.run.run import Run
from gradflow.functional.run.step import Outcome
from gradflow.functional.tap.asked import Asked
from gradflow.functional.tap.probes import probes_of
from gradflow.functional.tap.sums import as_norm, magnitude
from gradflow.functional.tap.watch import Watch
from gradflow.functional.torch_private import (
    has_post_accumulate_hooks,
    in_checkpoint,
    in_reverse_pass,
    num_writes,
    transform_level,
    unwatched,
)

logger = logging.getLogger("gradflow")

MOST = 8  # passes of one training step that are measured; those after them run as ever


@attrs.frozen(eq=False)
class _Was:
    """The gradient of a parameter before a reverse pass."""

    gradient: Tensor
    writes: int
    values: Tensor


@attrs.frozen(eq=False)
class _Asked:
    """What a reverse pass is asked: of which loss, how much larger it was made, what was there before."""

    loss: Tensor  # its value
    factor: Tensor | float
    before: Mapping[str, _Was]


@attrs.define(eq=False)
class Passes:
    """The passes of one training step; see NOTE [Rows of a training step].

    What it does itself raises nothing: `failed` says why nothing could be measured, and the step goes on.

    Args:
        run: that the rows are kept in.
        scale: returns what a GradScaler multiplies losses with at present.
    """

    run: Run
    scale: Callable[[], float]
    failed: str = ""
    overflowed: bool = False  # a scaled gradient did, which a scaler skips
    factors: list[float] = attrs.field(factory=list)  # what the loss of each row was multiplied with
    measured: bool = False  # whether those were, since the losses were handed over
    left: float = math.nan  # share of the last gradient that was there at the end of the step
    accumulated: bool = False  # whether gradients of earlier passes were there
    left_out: int = 0  # reverse passes beyond `MOST`, or of what nothing was heard of
    untold: set[str] = attrs.field(factory=set)  # see `OwnRecorder`
    aside: set[str] = attrs.field(factory=set)  # modules that were called for themselves without grad mode
    _thread: int = attrs.field(factory=threading.get_ident)
    _recorder: OwnRecorder | None = None
    _dataflow: DataFlow | None = None
    _inputs: Mapping[str, Tensor] = attrs.field(factory=dict)
    _watch: Watch | None = None
    _handed: list[Tensor] = attrs.field(factory=list)  # losses
    _is_handed: bool = False  # whether the present pass is of one of them
    _over: bool = False
    _total: tuple[list[str], Tensor] | None = None  # norm of the gradients after the last pass, and whose

    def fail(self, why: BaseException | str) -> None:
        """Hear why nothing can be measured; no call is listened to any more."""
        text = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
        self.failed = self.failed or text[:500]
        logger.debug("nothing is measured of this step: %s", text, exc_info=isinstance(why, Exception))
        self._forget()

    def _forget(self) -> None:
        if self._recorder is not None:
            self._recorder.rest()
        if self._dataflow is not None:
            self._dataflow.release()
        self._recorder, self._dataflow, self._watch, self._inputs = None, None, None, {}

    def hand(self, loss: Tensor) -> None:
        """Take the loss of a pass, before it is scaled and differentiated."""
        self._handed.append(loss)

    # -------------------------------------------------------------------------------- forward passes

    def lead(self, name: str) -> Callable[..., Any] | None:
        """Return what runs the calls of a module; None for its own forward alone."""
        if self.failed or self._over or not (threading.get_ident() == self._thread or in_reverse_pass()):
            return None
        return self._call

    def _call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        once = Once(forward)
        try:
            recorder = self._recorder_of(name, args, kwargs)
            if recorder is None:
                return once(*args, **kwargs)
            with probes_of(recorder.whose):
                return recorder.run(name, once, args, kwargs)
        except Exception as error:
            if once.error is not None:
                raise once.error from once.error.__cause__
            self.fail(error)
        return once.output if once.done else forward(*args, **kwargs)

    def _recorder_of(self, name: str, args: Any, kwargs: Any) -> OwnRecorder | None:
        """Return the recorder that a call is told to; None where it is no part of a pass."""
        recorder = self._recorder
        if recorder is None and transform_level():  # of `torch.func`: nothing is accumulated there
            return None
        if in_reverse_pass():  # a checkpoint runs it again
            return recorder if recorder is not None and recorder.in_backward else None
        going_on = recorder is not None and not recorder.in_backward
        alone = recorder is None or not going_on or not recorder.stack
        if alone and not torch.is_grad_enabled() and not in_checkpoint():
            self.aside.add(name)
            return None
        if going_on:
            return recorder
        self._forget()
        return self._begun(args, kwargs) if len(self.factors) < MOST else None

    def _begun(self, args: Any, kwargs: Any) -> OwnRecorder:
        """Begin a pass with its first call, whose arguments are the inputs."""
        given = args[0] if len(args) == 1 and not kwargs else {**dict(enumerate(args)), **kwargs}
        self._inputs = dict(named_tensors(given, "input"))
        self._dataflow = DataFlow(self._inputs)
        taps, listeners = self.run.program.taps, (self._dataflow, *self.run.sessions)
        taps.sum_exactly()
        asked = Asked(look=True, structural=True, inputs=True, watched=True, listeners=listeners)
        recorder = self._recorder = OwnRecorder(taps, asked)
        self._watch = Watch(recorder)
        with unwatched(), torch.no_grad():
            for listener in listeners:
                listener.begin(len(self.run.history.rows), recorder)
        return recorder

    def heard(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> list[Callable[[Any], None]]:
        """Hear of a function that is about to be called, if a forward pass is running."""
        if self._watch is None or self._recorder is None or in_reverse_pass():
            return []
        try:
            with probes_of(self._recorder.whose):
                return self._watch.heard(func, args, kwargs)
        except Exception as error:
            self.fail(error)
            return []

    def told(self, ends: list[Callable[[Any], None]], out: Any) -> None:
        """Hear of the output of a function, unless the pass has ended in it: it was `backward`."""
        if self._watch is None or self._recorder is None:
            return
        try:
            with probes_of(self._recorder.whose):
                for end in ends:
                    end(out)
        except Exception as error:
            self.fail(error)

    # -------------------------------------------------------------------------------- reverse passes

    def differentiates(self, plain: Callable[..., None], given: dict[str, Any]) -> None:
        """Run a reverse pass, and keep a row of it."""
        recorder = self._recorder
        ours = threading.get_ident() == self._thread and not in_reverse_pass()
        ours = ours and not (self.failed or self._over)
        if recorder is None or not ours or len(self.factors) >= MOST:
            self.left_out += ours
            plain(**given)
            return
        asked = None
        try:
            asked = self._before(recorder, given)
        except Exception as error:
            self.fail(error)
        plain(**given)
        if asked is not None and not self.failed:
            try:
                self._after(recorder, asked)
            except Exception as error:
                self.fail(error)

    def _before(self, recorder: OwnRecorder, given: dict[str, Any]) -> _Asked | None:
        """Return what a pass is asked; None if losses were handed over and it is of another, as of a second
        model."""
        with unwatched(), torch.no_grad(), probes_of(recorder.whose):
            root, loss, factor = self._loss_of(given)
            if self._handed and not self._is_handed:
                return None
            first = not recorder.in_backward
            recorder.start_backward()
            self._watch = None
            if first:
                self._learn(recorder, root)
            if (inputs := given.get("inputs")) is not None and recorder.slots():
                wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
                given["inputs"] = [*wanted, *recorder.slots()] if wanted else inputs
            before = {
                name: _Was(p.grad, num_writes(p.grad), p.grad.detach().clone())
                for name, p in self.run.program.state.trainable.items()
                if p.grad is not None
            }
            self.accumulated |= any(bool(was.values.any()) for was in before.values())
        return _Asked(loss, factor, before)

    def _loss_of(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return the loss that is differentiated with its graph, its value, and what it was multiplied with.

        Where several tensors are differentiated at once, or one that is no scalar, that is what stands for
        their sum by the cotangents, and the first of them has the graph.
        """
        tensors, cotangents = given["tensors"], given.get("grad_tensors")
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        weights = [cotangents] if cotangents is None or isinstance(cotangents, Tensor) else list(cotangents)
        self._is_handed = False
        for loss in reversed(self._handed):
            if loss.grad_fn is not None:
                (factor,) = torch.autograd.grad(roots, [loss], weights, retain_graph=True, allow_unused=True)
                if factor is not None:
                    self.measured = self._is_handed = True
                    return loss, loss.detach(), factor
        scale = self.scale()
        if weights == [None]:
            weights = [None] * len(roots)
        parts = [r.detach() if w is None else r.detach() * w for r, w in zip(roots, weights, strict=True)]
        return roots[0], torch.stack([part.sum().cpu() for part in parts]).sum() / scale, scale

    def _learn(self, recorder: OwnRecorder, loss: Tensor) -> None:
        """Keep what the forward pass has shown, and let go of what it held."""
        run, dataflow = self.run, self._dataflow
        assert dataflow is not None
        structure: Structure | None = None
        if loss.grad_fn is not None:
            known, parameters = run.program.learned.structure, run.program.state.every_parameter
            structure = build(loss, recorder, parameters, lambda: self._inputs, before=known)
            run.program.learned.saw_structure(structure, {})
        if run.graph.dataflow is None:
            outcome = Outcome(loss.detach(), Gradients({}, []), recorder, structure)
            learn_reach(run, outcome, dataflow)
            run.graph.learn(outcome, dataflow, {})
        else:
            run.graph.meet(structure)
            dataflow.release()
        if structure is not None:
            structure.release()
        for session in run.sessions:
            session.end()

    def _after(self, recorder: OwnRecorder, asked: _Asked) -> None:
        with unwatched(), torch.no_grad():
            gradients = {
                name: self._added(p, asked.before.get(name))
                for name, p in self.run.program.state.trainable.items()
            }
            outcome = Outcome(asked.loss, Gradients(gradients, recorder.arrived()), recorder)
            row = self.run.history.read(outcome, look=True, parameters_moved=True)
            factor = float(asked.factor)
            row = _divided(row, factor) if math.isfinite(factor) and factor else row
            if abs(factor) != 1 and not row.finite and math.isfinite(row.loss):
                self.overflowed = True
                return
            follow_reach(self.run, outcome, row, look=True)
            self.run.history.keep(row)
            self.factors.append(factor)
            self.untold |= recorder.untold
            reached = [name for name, gradient in gradients.items() if gradient is not None]
            self._total = reached, self._norm(reached)

    def _added(self, parameter: Tensor, was: _Was | None) -> Tensor | None:
        """Return what a reverse pass has added to a parameter's gradient; None if it led to no such."""
        now = parameter.grad
        if now is None:
            if has_post_accumulate_hooks(parameter):
                raise RuntimeError(
                    "a hook takes the gradients away as they arrive: none is there when `backward` ends"
                )
            return None
        if was is None:
            return now
        if was.gradient is now and num_writes(now) == was.writes:
            return None
        parts = distributed(self.run.program.given.model)
        return now if any(part.require_backward_grad_sync for part in parts) else now - was.values

    def _norm(self, names: list[str]) -> Tensor:
        """Return the norm of the present gradients of some parameters together."""
        trainable = self.run.program.state.trainable
        found = [g.detach() for name in names if (g := trainable[name].grad) is not None]
        if not found or len(found) < len(names):
            return torch.tensor(math.nan)
        return torch.linalg.vector_norm(torch.stack([as_norm(magnitude(g, exact=True)).cpu() for g in found]))

    def end(self) -> None:
        """Hear that the training step is over."""
        try:
            if self._total is not None and not self.failed:
                with unwatched(), torch.no_grad():
                    names, before = self._total
                    self.left = float(self._norm(names)) / float(before) if float(before) else math.nan
        except Exception as error:
            self.fail(error)
        self._total, self._over = None, True
        self._forget()
        self._handed.clear()


def _divided(row: Row, factor: float) -> Row:
    """Return a row with its gradients divided by what the loss was multiplied with."""
    gradients = np.isin([kind for kind, _ in row.layout.places], ("grad", "pgrad"))
    return attrs.evolve(row, values=np.where(gradients, row.values / abs(factor), row.values))
