"""`recurrence`: what recurrent layers, and loops over recurrent cells, do to state and gradient over time.

NOTE [What a look costs]
A recurrent layer is computed again beside the model (see NOTE [Computed again beside the model]), once
forward and once back, which takes about as long as the layer's own step; `RecurrenceRecord.cost` tells. Its
gates and its memory change with training and not from step to step, so two looks, at both ends of a run,
tell what five do. `exact` asks for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from gradflow.functional.measurement import Session, gradients
from gradflow.functional.recurrent.cell_loop import CellCall, chains, loop_numbers
from gradflow.functional.recurrent.cells import KINDS, Level, level_of_cell, work_dtype
from gradflow.functional.recurrent.fused import FOREIGN, FusedCall, fused_numbers
from gradflow.functional.recurrent.numbers import EXACT, Budget, CallNumbers, level_record
from gradflow.functional.reverse.flushing import flushing
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.ignorance import Ignorance
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import source_calls
from gradflow.records import RecurrenceRecord

_INEXACT = 0.01  # relative difference of states beyond which a note is made


@attrs.frozen
class Recurrence:
    """The measurement of recurrent layers; made by `recurrence`."""

    states: bool = True
    exact: bool = False

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run; see `Measurement`."""
        return RecurrenceSession(modules, attrs.evolve(EXACT if self.exact else Budget(), states=self.states))


def recurrence(*, states: bool = True, exact: bool = False) -> Recurrence:
    """Return the measurement of gradient and state through time in recurrent layers.

    It covers `nn.RNN`, `nn.LSTM` and `nn.GRU` with all their options, packed sequences included, and loops
    over `nn.RNNCell`, `nn.LSTMCell` and `nn.GRUCell`. What is measured is in `FlowRecord.recurrences`.

    Args:
        states: also measure the rms of h, and of c, at every step.
        exact: at every measured step, and not at the first and the last alone; of the whole batch; with the
            eigenvalues of more transitions, to more digits, and tangent vectors along all samples.

    >>> import gradflow as gf
    >>> model = nn.RNN(2, 3)
    >>> record = gf.analyze(model, [torch.ones(5, 1, 2)], lambda y: y[0].sum(), measurements=[recurrence()])
    >>> record.recurrences[0].levels[0].gradient_profile.shape  # ‖∂L/∂h_t‖ of five steps, in one batch
    (1, 5)
    """
    return Recurrence(states, exact)


@attrs.define(eq=False)
class _Key:
    module: str
    type: str
    kind: str
    order: int
    loop: bool


class RecurrenceSession(Session):
    """Listens for recurrent layers and loops over cells; see `recurrence`.

    Args:
        modules: of the model, by qualified name.
        budget: on how much the costlier numbers are taken.
    """

    def __init__(self, modules: Mapping[str, nn.Module], budget: Budget) -> None:
        self._modules, self._budget = modules, budget
        self._loss_share = math.nan
        self._keys: dict[str, _Key] = {}
        self._steps: dict[int, dict[str, CallNumbers]] = {}
        self._notes: dict[str, None] = {}
        self._forget()

    def _forget(self) -> None:
        self._fused: dict[int, FusedCall] = {}
        self._cells: dict[int, CellCall] = {}
        self._made: dict[int, int] = {}  # id of a cell's new h -> its call
        self._levels: dict[str, Level] = {}  # of the cells, with the weights of this step
        self._ignorance = Ignorance()

    def listens(self, *, end: bool) -> bool:
        """Return whether to look at a measured step; see NOTE [What a look costs]."""
        return end or self._budget.looks

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start a step."""
        self._now = self._steps[step] = {}
        self._forget()

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Note the loss functions."""
        self._ignorance.hear(func, args, kwargs)
        return None

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what enters a recurrent layer or cell."""
        module = self._modules[call.module]
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or not call.grad_enabled:
            return
        x = args[0] if args else kwargs.get("input")
        hx = args[1] if len(args) > 1 else kwargs.get("hx")
        if isinstance(module, nn.RNNCellBase) and isinstance(x, Tensor):
            states = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
            follows = self._source(call, states[0]) if states else None
            self._cells[call.index] = CellCall(
                call=call, x=x.detach(), before=tuple(s.detach() for s in states), follows=follows
            )
        elif isinstance(module, nn.RNNBase) and module.mode in KINDS:
            drops = module.dropout > 0 and module.training and module.num_layers > 1
            random = torch.get_rng_state() if drops else None
            self._fused[call.index] = FusedCall(call=call, module=module, x=x, hx=hx, random=random)

    def _source(self, call: Call, h: Tensor) -> int | None:
        """Return the earlier call of the same cell that a state comes from; None where a sequence begins."""
        if not h.requires_grad:
            return None
        if id(h) in self._made and self._cells[self._made[id(h)]].call.module == call.module:
            return self._made[id(h)]
        known = [
            i for i in source_calls(h)
            if i in self._cells and self._cells[i].call.module == call.module
        ]  # fmt: skip
        return known[-1] if known else None

    def left(self, call: Call, output: Any) -> None:
        """Keep what a recurrent layer or cell gives."""
        if call.index in self._cells:
            heard = self._cells[call.index]
            heard.gives(output)
            module = self._modules[call.module]
            if call.module not in self._levels and isinstance(module, nn.RNNCellBase):
                self._levels[call.module] = level_of_cell(module, work_dtype(heard.x, *module.parameters()))
            self._made[id(heard.outputs[0])] = call.index
        elif call.index in self._fused and not self._fused[call.index].gives(output):
            del self._fused[call.index]
            self._foreign(call.name)

    def differentiate(self, loss: Tensor) -> None:
        """Take the gradients at what they gave."""
        every = [*self._fused.values(), *self._cells.values()]
        with flushing():
            found = iter(gradients(loss, [t for heard in every for t in heard.outputs]))
        for heard in every:
            heard.receives(found)

    def end(self) -> None:
        """Measure what was heard, and let go of the step's tensors."""
        device = next((t.device.type for heard in self._fused.values() for t in heard.outputs), "cpu")
        with torch.no_grad(), torch.autocast(device, enabled=False):
            for heard in self._fused.values():
                if any(g is not None for g in heard.found):
                    self._keep(heard.call, KINDS[heard.module.mode], fused_numbers(heard, self._budget))
            for chain in chains(self._cells):
                if any(g is not None for heard in chain for g in heard.found):
                    self._keep_loop(chain)
        if self._now and not math.isnan(known := self._ignorance.share()):
            self._loss_share = known
        self._forget()

    def _keep(self, call: Call, kind: str, numbers: CallNumbers | None, *, loop: bool = False) -> None:
        if numbers is None:
            self._foreign(call.name)
            return
        self._keys.setdefault(call.name, _Key(call.module, call.type, kind, call.index, loop))
        self._now[call.name] = numbers
        if numbers.num_samples < numbers.batch:
            self._thin(call, numbers)
        if numbers.unmasked:
            self._notes[
                f"The dropout masks between the levels of {call.name or 'the model'!r} are not known "
                "on this device; its gradient through time is that without dropout."
            ] = None
        if numbers.state_error > _INEXACT and not numbers.unmasked:
            self._notes[
                f"The states of {call.name or 'the model'!r} could be computed again only to a relative "
                "error of more than a percent (chaotic states, or a short dtype): so far can its numbers be "
                "trusted."
            ] = None

    def _foreign(self, name: str) -> None:
        self._notes[
            f"The gradient through time of {name or 'the model'!r} was not measured: it is a recurrent layer "
            "by its class, but does not compute what that class computes."
        ] = None

    def _thin(self, call: Call, numbers: CallNumbers) -> None:
        """Hear that some samples of a call stand for all."""
        self._notes[
            f"The gradient through time of {call.name or 'the model'!r} was measured on "
            f"{numbers.num_samples} of {numbers.batch} samples, and scaled up."
        ] = None

    def _keep_loop(self, chain: Sequence[CellCall]) -> None:
        first = chain[0].call
        level = self._levels[first.module]
        found = loop_numbers(chain, level, budget=self._budget)
        self._keep(first, level.cell.kind, None if found.state_error > FOREIGN else found, loop=True)

    # ------------------------------------------------------------------------------------ the record

    def fields(self) -> Mapping[str, Any]:
        """Return the records, in the order of execution."""
        names = sorted(self._keys, key=lambda name: self._keys[name].order)
        return {"recurrences": tuple(self._record(name) for name in names)}

    def _record(self, name: str) -> RecurrenceRecord:
        key = self._keys[name]
        seen = {step: found[name] for step, found in sorted(self._steps.items()) if name in found}
        numbers = list(seen.values())
        return RecurrenceRecord(
            name=name,
            module=key.module,
            type=key.type,
            kind=key.kind,
            loop=key.loop,
            measured_steps=np.array(list(seen)),
            num_steps=np.array([n.num_steps for n in numbers]),
            num_samples=np.array([n.num_samples for n in numbers]),
            read_share=np.array([n.read_share for n in numbers]),
            heard_share=np.array([n.heard_share for n in numbers]),
            state_error=np.array([n.state_error for n in numbers]),
            subnormal_share=np.array([n.subnormal_share for n in numbers]),
            cost=np.array([n.cost for n in numbers]),
            still_end=np.array([n.still_end for n in numbers]),
            told_heard=np.array([n.told.heard for n in numbers]),
            told_faint=np.array([n.told.faint for n in numbers]),
            told_share=np.array([n.told.share for n in numbers]),
            levels=[level_record(levels) for levels in zip(*(n.levels for n in numbers), strict=True)],
            loss_share=self._loss_share,
        )

    def notes(self) -> Sequence[str]:
        """Return how far the numbers can be trusted."""
        return tuple(self._notes)
