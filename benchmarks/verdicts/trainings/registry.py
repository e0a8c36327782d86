"""What a whole training is, how it is registered, and how it is carried on to a moment.

A training is a function that returns a `Training`: a model, a source of batches, a loss, an optimizer, and a
figure, taken with plain PyTorch, that tells whether it has learned or whether it is ill. `healthy` registers
one that learns and stays well; `late` one that is well early and ill at its end. The function's docstring is
the note. Protocol: call `make_batch`, then the model, then `loss_fn`, in that order, since the loss looks at
the targets of the latest batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from zoo import TYPES, call

Pair = tuple[str, str]
Hook = Callable[[int], None]


@dataclass
class Training:
    """A training that can be carried on, step by step.

    Args:
        model: the model.
        make_batch: returns the next batch.
        loss_fn: from the model's output to a scalar, with the targets of the latest batch.
        optimizer: steps the parameters that are meant to train; its state is the training's own.
        figure: how well it does or how ill it is, without any change to the training.
        clip: the norm that gradients are clipped to, if they are.
        before: called with the number of steps done before each step: rollouts, the other net's turn.
        after: called likewise after each step: target nets, schedules.
        advance: carries on from one number of steps to another, where that is not the plain loop.
        step: how many steps are done.
    """

    model: nn.Module
    make_batch: Callable[[], Any]
    loss_fn: Callable[[Any], Tensor]
    optimizer: Optimizer
    figure: Callable[[], float]
    clip: float | None = None
    before: Hook | None = None
    after: Hook | None = None
    advance: Callable[[int, int], None] | None = None
    step: int = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled training's state, with what L-BFGS leaves out of its own."""
        self.__dict__.update(state)
        if isinstance(self.optimizer, torch.optim.LBFGS):
            own = {"_params": self.optimizer.param_groups[0]["params"], "_numel_cache": None}
            self.optimizer.__dict__.update(own)

    def carry_on(self, to: int) -> None:
        """Train up to a number of steps."""
        if self.advance is not None:
            if self.step < to:
                self.advance(self.step, to)
            self.step = to
            return
        self.model.train()
        while self.step < to:
            self._one()
            self.step += 1
        self.optimizer.zero_grad()

    def _one(self) -> None:
        if self.before is not None:
            self.before(self.step)
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(self._closure)  # type: ignore[arg-type]
        else:
            self._closure()
            self.optimizer.step()
        if self.after is not None:
            self.after(self.step)

    def _closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss_fn(call(self.model, self.make_batch()))
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        return loss

    def measured(self) -> float:
        """Return the figure, in evaluation mode and without gradients; modes and random state are kept."""
        modes = {module: module.training for module in self.model.modules()}
        state = torch.get_rng_state()
        torch.manual_seed(0)
        self.model.eval()
        try:
            with torch.no_grad():
                return float(self.figure())
        finally:
            torch.set_rng_state(state)
            for module, mode in modes.items():
                module.training = mode


@dataclass(frozen=True)
class Case:
    """A registered training.

    Args:
        id: its name, the kind first.
        note: what it is.
        steps: how many steps it is trained for.
        at_least, at_most: the bounds that the figure is within at the end.
        expect: pairs (issue type, layer or prefix of layers, "*" for any), one of which is right to be told
            at the end; none for healthy ones.
        early: the part of the steps after which a training that goes bad is still well.
        source: where the kind is known from; may be empty.
    """

    id: str
    note: str
    make: Callable[[], Training] = field(repr=False)
    steps: int
    at_least: float
    at_most: float
    expect: tuple[Pair, ...] = ()
    early: float = 0.0
    source: str = ""

    @property
    def healthy(self) -> bool:
        """Whether it is well all the way."""
        return not self.expect

    @property
    def seed(self) -> int:
        """What its build and each look at it start from."""
        return zlib.crc32(self.id.encode()) % 10_000

    @property
    def module(self) -> str:
        """The name of the module that it is written in."""
        return self.make.__module__

    def build(self) -> Training:
        """Return the training before its first step; the same one at every call."""
        torch.manual_seed(self.seed)
        return self.make()

    def within(self, figure: float) -> bool:
        """Whether the figure is within its bounds: learned, or ill. One that is no number is ill."""
        if math.isnan(figure):
            return not self.healthy
        return self.at_least <= figure <= self.at_most


CASES: dict[str, Case] = {}
Make = Callable[[], Training]


def healthy(
    id: str, steps: int, *, at_least: float = -float("inf"), at_most: float = float("inf"), source: str = ""
) -> Callable[[Make], Make]:
    """Register a training that has learned once its figure is within the bounds."""
    if at_least == -float("inf") and at_most == float("inf"):
        raise ValueError(f"{id}: nothing says when it has learned")

    def register(make: Make) -> Make:
        _add(Case(id, _note(make), make, steps, at_least, at_most, source=source))
        return make

    return register


def late(
    id: str,
    steps: int,
    expect: Iterable[Pair],
    *,
    early: float,
    at_least: float = -float("inf"),
    at_most: float = float("inf"),
    source: str = "",
) -> Callable[[Make], Make]:
    """Register a training that goes bad: its figure is within the bounds at the end, and not early."""
    expected = tuple(expect)
    if not expected or {kind for kind, _ in expected} - set(TYPES):
        raise ValueError(f"{id}: expected issue types among {TYPES}, got {expected}")

    def register(make: Make) -> Make:
        _add(Case(id, _note(make), make, steps, at_least, at_most, expected, early, source))
        return make

    return register


def _note(make: Make) -> str:
    return " ".join((make.__doc__ or "").split())


def _add(case: Case) -> None:
    if case.id in CASES:
        raise ValueError(f"{case.id}: registered twice")
    if not case.note:
        raise ValueError(f"{case.id}: the docstring of its function is its note, and there is none")
    CASES[case.id] = case
