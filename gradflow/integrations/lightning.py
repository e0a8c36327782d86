"""`GradflowCallback`: watches a training that Lightning runs, by its own `training_step`.

    trainer = Trainer(callbacks=[GradflowCallback(every=200, path="history.jsonl")])

NOTE [The module's stand-in]
A look runs the user's `training_step` once more, which would log again, count again and, under manual
optimisation, step the optimizers again. So it is run on a stand-in: an object of a subclass of the user's
class that shares the module's parameters, buffers and parts, and whose methods for logging and optimising do
nothing that lasts. The trainer that it sees has no loggers. What `training_step` sets on `self` is set on the
stand-in; what it changes in place (a metric's state, a list) the look puts back, as every look does.

NOTE [Losses of several optimizers]
Under manual optimisation the loss of an optimizer is what its parameters had their gradients from when it
stepped: the sum of what was passed to `manual_backward` since its last `zero_grad`, left out what was passed
while another was toggled. Every optimizer is watched by a monitor of its own, in which only its parameters
are trained. The losses are all taken at the weights after the batch, where the training steps one optimizer
after another.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor, nn

from gradflow.errors import LossError
from gradflow.integrations.trackers import Tracker, Which
from gradflow.integrations.watched import Watched
from gradflow.watching.look import copied


def _library() -> Any:
    names = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise ImportError(
        "gradflow.integrations.lightning needs Lightning: pip install 'gradient-flow[lightning]'."
    )


class GradflowCallback(Watched, _library().Callback):
    """Watches a training of Lightning's `Trainer`: automatic or manual optimisation, several optimizers.

    A look runs the module's own `training_step` on the batch of that step, on copies: the weights come out
    the same bit for bit, and nothing is logged twice. Steps are counted by updates, so with gradient
    accumulation a look sees the last batch before an update. Lightning's checkpoints take the history with
    them. In a distributed training the first process looks at its own batches; layers that wait for other
    processes in their forward (`SyncBatchNorm`) cannot be watched so.

    Args:
        every: steps between two looks in the long run; more often at the start, and where the loss jumps.
        path: a file for the history, as for `gradflow.Monitor`.
        log: which scalars of the reports the trainer's loggers get: `few`, `all`, or None for none.
        pipeline: judges a look; as for `gradflow.diagnose`.

    Attributes:
        monitors: by name: the one of an automatic optimisation is "", those of several optimizers are
            `optimizer-0`, `optimizer-1`, ...

    Raises:
        ImportError: when this file is imported, if there is no Lightning.
        ValueError: if `log` is none of these.

    >>> callback = GradflowCallback(every=100)
    >>> callback.on_issue(lambda issue, step: print(step, issue), severity="HIGH")
    >>> len(callback.history), callback.report
    (0, None)
    """

    def __init__(
        self,
        *,
        every: int = 200,
        path: str | os.PathLike[str] | None = None,
        log: Which | None = None,
        pipeline: Any = None,
    ) -> None:
        super().__init__(every, path, pipeline)
        self._loggers: Iterable[Any] = ()
        self._stepped: list[Any] = []
        self._stand_in: tuple[nn.Module, nn.Module] | None = None
        if log is not None:
            self.on_look(Tracker(self._log, which=log))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Take down which optimizer steps in this batch."""
        if not any(optimizer is known for known in self._stepped):
            self._stepped.append(optimizer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand the batch to the monitors of the optimizers that have stepped."""
        stepped, self._stepped = self._stepped, []
        if not trainer.is_global_zero or not stepped:
            return
        self._loggers = trainer.loggers
        stand_in = self._stand_in_of(pl_module)
        if pl_module.automatic_optimization:
            if outputs:
                loss = outputs["loss"] * trainer.accumulate_grad_batches
                forward = _Forward(pl_module, trainer)
                monitor = self.watch("", stand_in, forward, stepped[0])
                monitor((batch, batch_idx), loss=loss)
            return
        several = len(trainer.optimizers) > 1
        for number, optimizer in enumerate(trainer.optimizers):
            if any(optimizer is other for other in stepped):
                name = f"optimizer-{number}" if several else ""
                monitor = self.watch(name, stand_in, _Forward(pl_module, trainer, number), optimizer)
                if monitor.is_due:
                    with _only(optimizer, pl_module) if several else contextlib.nullcontext():
                        monitor((batch, batch_idx))
                else:
                    monitor(None)

    def _stand_in_of(self, module: nn.Module) -> nn.Module:
        if self._stand_in is None or self._stand_in[0] is not module:
            self._stand_in = module, _stand_in(module)
        return self._stand_in[1]

    def _log(self, scalars: dict[str, float], report: object, step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics(scalars, step=step)


@contextlib.contextmanager
def _only(optimizer: Any, module: nn.Module) -> Iterator[None]:
    """Let only the parameters of an optimizer be trained for the length of the context."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


# ------------------------------------------------------------------- see NOTE [The module's stand-in]


@attrs.frozen(eq=False)
class _Forward:
    """Runs a module's `training_step` on its stand-in, and returns the loss.

    Args:
        module: the user's.
        trainer: that trains it.
        optimizer: the number of the optimizer whose loss it is; None under automatic optimisation.
    """

    module: Any
    trainer: Any
    optimizer: int | None = None

    def __call__(self, stand_in: nn.Module, seen: tuple[Any, int]) -> Tensor:
        batch, batch_idx = copied(seen[0]), seen[1]
        tape = _Tape(self.trainer.optimizers)
        trainer = _QuietTrainer(self.trainer)
        vars(stand_in).update(_state(self.module), _trainer=trainer, _gradflow_tape=tape)
        step = type(self.module).training_step
        with _quiet(stand_in, trainer), self.trainer.precision_plugin.train_step_context():
            output = step(stand_in, *_arguments(step, batch, batch_idx))
        if self.optimizer is not None:
            return tape.loss_of(self.optimizer)
        return output["loss"] if isinstance(output, Mapping) else output


def _arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """Return what Lightning would call a `training_step` with."""
    names = list(inspect.signature(step).parameters)[1:]
    if names[:1] == ["dataloader_iter"]:
        return (iter([(batch, batch_idx, 0)]),)
    return (batch, batch_idx) if "batch_idx" in names or len(names) > 1 else (batch,)


def _state(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, without the methods that a compiler has put in the place of its own."""
    compiled = ("forward", "training_step") if getattr(module, "_compiler_ctx", None) else ()
    return {name: value for name, value in vars(module).items() if name not in compiled}


def _stand_in(module: nn.Module) -> nn.Module:
    kind = type(module)
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__qualname__": kind.__qualname__}
    stand_in = object.__new__(type(kind.__name__, (_Quiet, kind), names))
    vars(stand_in).update(_state(module))
    return stand_in


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


class _Quiet:
    """The methods of a `LightningModule` that would leave a trace."""

    _gradflow_tape: _Tape
    log = log_dict = print = clip_gradients = _nothing

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return stand-ins of the optimizers, or of the only one."""
        found = self._gradflow_tape.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> Any:
        """Return stand-ins of the schedulers, or of the only one; None if there are none."""
        trainer: Any = vars(self)["_trainer"]
        found = [_QuietScheduler(config.scheduler) for config in trainer.lr_scheduler_configs]
        return found[0] if len(found) == 1 else found or None

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Take a loss down in the place of its backward pass."""
        self._gradflow_tape.backward(loss)

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Take down whose parameters alone are trained from now on."""
        self._gradflow_tape.toggle(optimizer)

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Take down that all are trained again."""
        self._gradflow_tape.toggle(None)

    @contextlib.contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Iterator[None]:
        """Toggle for the length of the context."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)


class _Delegate:
    """Has the attributes of another object, and keeps those that are set to itself."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _QuietTrainer(_Delegate):
    """A trainer without loggers."""

    logger, loggers = None, ()


class _QuietScheduler(_Delegate):
    """A scheduler that does not step."""

    step = _nothing


class _QuietOptimizer(_Delegate):
    """An optimizer that does not step, but tells a tape that it should."""

    def __init__(self, real: Any, tape: _Tape) -> None:
        super().__init__(real)
        self._tape = tape
        self.param_groups = [dict(group) for group in real.param_groups]

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> None:
        """Take down the loss of this step."""
        if closure is not None:
            closure()
        self._tape.step(self)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Take down that the gradients begin anew."""
        self._tape.zero_grad(self)

    @contextlib.contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Take down that all others are left out for the length of the context, as Lightning's does."""
        yield


class _Tape:
    """What a `training_step` under manual optimisation did; see NOTE [Losses of several optimizers].

    Args:
        optimizers: the trainer's.
    """

    def __init__(self, optimizers: Iterable[Any]) -> None:
        self.optimizers = tuple(_QuietOptimizer(optimizer, self) for optimizer in optimizers)
        self._pending: list[list[Tensor]] = [[] for _ in self.optimizers]
        self._losses: dict[int, Tensor] = {}
        self._toggled: int | None = None

    def _place(self, optimizer: Any) -> int:
        return next(i for i, known in enumerate(self.optimizers) if known is optimizer)

    def backward(self, loss: Tensor) -> None:
        """Hear of a backward pass."""
        for place, pending in enumerate(self._pending):
            if self._toggled in (None, place):
                pending.append(loss)

    def zero_grad(self, optimizer: Any) -> None:
        """Hear that an optimizer's gradients were set to zero."""
        self._pending[self._place(optimizer)].clear()

    def step(self, optimizer: Any) -> None:
        """Hear that an optimizer has stepped; its first step in a batch counts."""
        place = self._place(optimizer)
        if self._pending[place]:
            self._losses.setdefault(place, sum(self._pending[place][1:], self._pending[place][0]))

    def toggle(self, optimizer: Any) -> None:
        """Hear whose parameters alone are trained; None for all."""
        self._toggled = None if optimizer is None else self._place(optimizer)

    def loss_of(self, place: int) -> Tensor:
        """Return the loss that an optimizer stepped by.

        Raises:
            LossError: if there was none.
        """
        if place not in self._losses:
            raise LossError(
                f"the training_step took no step of optimizer {place} by a loss that was passed to "
                "`self.manual_backward(loss)`. Likely cause: `loss.backward()`, which Lightning advises "
                "against as well; or the step hangs on chance."
            )
        return self._losses[place]


@contextlib.contextmanager
def _quiet(stand_in: nn.Module, trainer: _QuietTrainer) -> Iterator[None]:
    """Let the modules of Lightning's within another see the quiet trainer for the length of the context."""
    inner = [vars(m) for m in stand_in.modules() if m is not stand_in and "_trainer" in vars(m)]
    saved = [attributes["_trainer"] for attributes in inner]
    for attributes in inner:
        attributes["_trainer"] = trainer
    try:
        yield
    finally:
        for attributes, before in zip(inner, saved, strict=True):
            attributes["_trainer"] = before
