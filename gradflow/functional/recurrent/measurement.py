"""`recurrence`: what recurrent layers, and loops over recurrent cells, do to state and gradient over time.

NOTE [Unrolled beside the model]
The model runs its own kernels. The session keeps what went into each recurrent call and what came out, asks
for the loss's gradient at what came out, and then, beside the model, unrolls the layer with pure cells of the
same weights (`cells.py`) and sends that gradient back through them (`unroll.py`). The unrolled states are
held against those that the model has computed; where they are not the same, a note says so. Dropout between
the levels is drawn again from the random state at the call's start, by a generator of the session's own: on a
CPU these are the masks of the model's call. Other devices draw other numbers; there dropout is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradflow.functional.measurement import Session, gradients
from gradflow.functional.recurrent.cell_loop import CellCall, chains, loop_numbers
from gradflow.functional.recurrent.cells import KINDS, Level, level_of_cell, levels_of, work_dtype
from gradflow.functional.recurrent.numbers import (
    Budget,
    Cotangents,
    LevelNumbers,
    heard_share,
    level_numbers,
    level_record,
    readout_profiles,
    spread,
)
from gradflow.functional.recurrent.unroll import Layout, given_state, track_gradients, unroll
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.ignorance import Ignorance
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import source_calls
from gradflow.records import RecurrenceRecord

_FOREIGN = 0.1  # relative difference of the first states beyond which a layer computes something else
_INEXACT = 0.01  # relative difference beyond which a note is made


@attrs.frozen
class Recurrence:
    """The measurement of recurrent layers; made by `recurrence`."""

    states: bool = True

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run; see `Measurement`."""
        return RecurrenceSession(modules, Budget(states=self.states))


def recurrence(*, states: bool = True) -> Recurrence:
    """Return the measurement of gradient and state through time in recurrent layers.

    It covers `nn.RNN`, `nn.LSTM` and `nn.GRU` with all their options, packed sequences included, and loops
    over `nn.RNNCell`, `nn.LSTMCell` and `nn.GRUCell`. What is measured is in `FlowRecord.recurrences`.

    Args:
        states: also measure the rms of h, and of c, at every step.

    >>> import gradflow as gf
    >>> model = nn.RNN(2, 3)
    >>> record = gf.analyze(model, [torch.ones(5, 1, 2)], lambda y: y[0].sum(), measurements=[recurrence()])
    >>> record.recurrences[0].levels[0].gradient_profile.shape  # ‖∂L/∂h_t‖ of five steps, in one batch
    (1, 5)
    """
    return Recurrence(states)


@attrs.define(eq=False, kw_only=True)
class _FusedCall:
    """One call of a fused layer, until the step has ended."""

    call: Call
    module: nn.RNNBase
    x: Any
    hx: Any
    random: Tensor | None  # CPU state before it, where it will draw dropout masks
    levels: tuple[Level, ...] = ()
    outputs: tuple[Tensor, ...] = ()  # output (a packed one's data), h_n and c_n
    found: list[Tensor | None] = attrs.field(factory=list)  # the loss's gradient at these


@attrs.frozen(eq=False, kw_only=True)
class _Numbers:
    """What one measured step gave for one call or loop."""

    num_steps: int
    read_share: float
    heard_share: float
    state_error: float
    levels: list[LevelNumbers]
    unmasked: bool = False  # its dropout masks are not known


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
        self._steps: dict[int, dict[str, _Numbers]] = {}
        self._notes: dict[str, None] = {}
        self._forget()

    def _forget(self) -> None:
        self._fused: dict[int, _FusedCall] = {}
        self._cells: dict[int, CellCall] = {}
        self._made: dict[int, int] = {}  # id of a cell's new h -> its call
        self._levels: dict[str, Level] = {}  # of the cells, with the weights of this step
        self._ignorance = Ignorance()

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
            self._fused[call.index] = _FusedCall(call=call, module=module, x=x, hx=hx, random=random)

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
            heard.outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
            module = self._modules[call.module]
            if call.module not in self._levels and isinstance(module, nn.RNNCellBase):
                self._levels[call.module] = level_of_cell(module, work_dtype(heard.x, *module.parameters()))
            self._made[id(heard.outputs[0])] = call.index
        elif call.index in self._fused:
            heard = self._fused[call.index]
            try:
                sequence, last = output
                parts = last if isinstance(last, tuple) else (last,)
                data = sequence.data if isinstance(sequence, PackedSequence) else sequence
                heard.outputs = (data, *parts)
                x = heard.x.data if isinstance(heard.x, PackedSequence) else heard.x
                heard.levels = levels_of(heard.module, work_dtype(x, *heard.module.parameters()))
            except (TypeError, ValueError, AttributeError):  # a subclass with a forward of its own
                del self._fused[call.index]
                self._foreign(call.name)

    def differentiate(self, loss: Tensor) -> None:
        """Take the gradients at what they gave."""
        every = [*self._fused.values(), *self._cells.values()]
        found = iter(gradients(loss, [t for heard in every for t in heard.outputs]))
        for heard in every:
            heard.found = [next(found) for _ in heard.outputs]

    def end(self) -> None:
        """Measure what was heard, and let go of the step's tensors."""
        device = next((t.device.type for heard in self._fused.values() for t in heard.outputs), "cpu")
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            for heard in self._fused.values():
                if any(g is not None for g in heard.found):
                    self._keep(heard.call, KINDS[heard.module.mode], self._fused_numbers(heard))
            for chain in chains(self._cells):
                if any(g is not None for heard in chain for g in heard.found):
                    self._keep_loop(chain)
        if self._now and not math.isnan(known := self._ignorance.share()):
            self._loss_share = known
        self._forget()

    def _keep(self, call: Call, kind: str, numbers: _Numbers | None, *, loop: bool = False) -> None:
        if numbers is None:
            self._foreign(call.name)
            return
        self._keys.setdefault(call.name, _Key(call.module, call.type, kind, call.index, loop))
        self._now[call.name] = numbers
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

    # -------------------------------------------------------------------------------- fused layers

    def _fused_numbers(self, heard: _FusedCall) -> _Numbers | None:
        """Unroll one call and measure it; None if it computes something else than its class does."""
        layout = Layout.of(heard.module, heard.x)
        data = heard.x.data if isinstance(heard.x, PackedSequence) else heard.x
        levels, dtype = heard.levels, heard.levels[0].weight_ih.dtype
        x = layout.steps(data.detach()).to(dtype)
        chosen = self._chosen(heard.call, levels, x)
        alive = layout.alive
        lengths = torch.full((x.shape[1],), len(x)) if alive is None else alive.sum(0)
        alive = None if alive is None else alive[:, chosen].to(x.device)
        state = given_state(layout, heard.hx, dtype)
        state = None if state is None else tuple(part[:, chosen] for part in state)
        unrolled = unroll(
            levels, x[:, chosen].contiguous().requires_grad_(), state, alive=alive,
            between=self._dropout(heard, layout, chosen),
        )  # fmt: skip
        output, *last = (torch.zeros_like(t) if g is None else g
                         for t, g in zip(heard.outputs, heard.found, strict=True))  # fmt: skip
        cotangents = Cotangents(
            output=layout.steps(output.detach()).to(dtype)[:, chosen],
            last=tuple(layout.states(part.detach()).to(dtype)[:, chosen] for part in last),
            lengths=lengths[chosen],
        )
        real = layout.steps(heard.outputs[0].detach()).to(dtype)[:, chosen]
        first = _error(unrolled.output[:4], real[:4], None if alive is None else alive[:4])
        if first > _FOREIGN and self._masks_known(heard):
            return None
        whole = track_gradients(unrolled, cotangents.output, cotangents.last)
        readouts = readout_profiles(unrolled, cotangents, whole, x.shape[1])
        read = cotangents.read_steps
        lowest = [g.drive for t, g in zip(unrolled.tracks, whole, strict=True) if t.level.index == 0]
        return _Numbers(
            num_steps=len(x),
            read_share=float(read.mean() if alive is None else read[alive.cpu().numpy()].mean()),
            heard_share=heard_share(lowest, alive, one_way=len(lowest) == 1),
            state_error=_error(unrolled.output, real, alive),
            levels=[
                level_numbers(track, gradient, readout, total=x.shape[1], budget=self._budget)
                for track, gradient, readout in zip(unrolled.tracks, whole, readouts, strict=True)
            ],
            unmasked=not self._masks_known(heard),
        )

    def _masks_known(self, heard: _FusedCall) -> bool:
        """Whether the call's dropout masks can be drawn again, or there are none."""
        return heard.random is None or _draws_on_cpu(heard.outputs[0])

    def _chosen(self, call: Call, levels: Sequence[Level], x: Tensor) -> list[int]:
        """Return the samples to unroll: all, unless that takes too much memory."""
        per_sample = len(x) * sum(level.weight_ih.shape[0] for level in levels)
        most = int(min(max(self._budget.numbers // per_sample, 8), self._budget.samples))
        if x.shape[1] > most:
            self._thin(call, most, x.shape[1])
        return spread(x.shape[1], most)

    def _thin(self, call: Call, most: int, number: int) -> None:
        """Hear that some samples of a call stand for all."""
        self._notes[
            f"The gradient through time of {call.name or 'the model'!r} was measured on {most} of "
            f"{number} samples, and scaled up."
        ] = None

    def _dropout(
        self, heard: _FusedCall, layout: Layout, chosen: list[int]
    ) -> Callable[[int, Tensor], Tensor] | None:
        """Return what applies the dropout masks of the call between its levels; see NOTE [Unrolled ...]."""
        p, data = heard.module.dropout, heard.outputs[0]
        if heard.random is None:
            return None
        if not self._masks_known(heard):
            self._notes[
                f"The dropout masks between the levels of {heard.call.name or 'the model'!r} are not known "
                "on this device; its gradient through time is that without dropout."
            ] = None
            return None
        generator = torch.Generator()
        generator.set_state(heard.random)
        packed = layout.batch_sizes is not None
        places = (
            data.shape[:-1] if packed else layout.steps(data.detach()).shape[:-1]
        )  # as the kernel has them

        def between(index: int, y: Tensor) -> Tensor:
            if p == 1:
                return y * 0.0
            mask = torch.empty((*places, y.shape[-1]), dtype=data.dtype)
            mask = mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
            return y * (layout.steps(mask) if packed else mask)[:, chosen].to(y.dtype)

        return between

    # ------------------------------------------------------------------------------ loops over cells

    def _keep_loop(self, chain: Sequence[CellCall]) -> None:
        first = chain[0].call
        level = self._levels[first.module]
        found = loop_numbers(chain, level, budget=self._budget)
        numbers = _Numbers(
            num_steps=len(chain),
            read_share=found.read_share,
            heard_share=found.heard_share,
            state_error=found.state_error,
            levels=[found.level],
        )
        self._keep(first, level.cell.kind, None if found.state_error > _FOREIGN else numbers, loop=True)

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
            read_share=np.array([n.read_share for n in numbers]),
            heard_share=np.array([n.heard_share for n in numbers]),
            state_error=np.array([n.state_error for n in numbers]),
            levels=[level_record(levels) for levels in zip(*(n.levels for n in numbers), strict=True)],
            loss_share=self._loss_share,
        )

    def notes(self) -> Sequence[str]:
        """Return how far the numbers can be trusted."""
        return tuple(self._notes)


def _draws_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _error(found: Tensor, real: Tensor, alive: Tensor | None) -> float:
    """Return the relative difference of states, over the steps that count."""
    difference = (found.detach() - real).square().sum(-1)
    size = real.square().sum(-1)
    if alive is not None:
        difference, size = difference[alive], size[alive]
    total = float(size.sum())
    return math.sqrt(float(difference.sum()) / total) if total else float(difference.sum().sqrt())
