"""`sight`: which positions each attention, and the whole model, lets an output see; and which samples.

NOTE [What a position sees]
An output position sees an input position if it has a derivative with respect to it. That is measured, not
read off masks: one vector-Jacobian product from the middle position of what an attention module returns, with
respect to what enters it. Where the future is hidden, the gradient at later positions is exactly zero, in
whatever way the mask is written; where it leaks, it is of the size of the others. Likewise from positions
that hold words to those that hold padding. Only the graph of the module itself is walked, once, in the first
step.

NOTE [Whose output it is]
A row of the outputs should tell of the sample in the same row. From three of them a vector-Jacobian
product goes to what every layer with as many rows has given. Statistics of a batch, sums over neighbours and
attention take some of it to other rows, and leave a good part where it belongs. Numbers that were laid out in
one order and read in another, by a view in the place of a permutation, leave there no more than chance does.
So it is asked only where a view has made rows of what had them along another axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.measurement import Session, gradients
from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.parts.texts import Texts, tells_order
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.recorder import Recorder
from gradflow.records import PartsRecord, SamplesRecord, SightRecord

_FEW = 6  # rows, of which nothing is told
_CHANCE = 4.0  # times what chance leaves at the own row
_OWN = 0.2  # of the gradient, that is at the own row at most, of however few
_SOME = 0.01  # of the gradient
_VIEWS = frozenset({"view", "reshape", "flatten"})
_ATTENTION = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward", "softmax"})


@attrs.frozen
class Sight:
    """The measurement of what attentions let their outputs see; see `sight`."""

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return SightSession(modules)


def sight() -> Sight:
    """Return the measurement of what each attention lets its outputs see: `analyze` takes it in every run.

    The record has it as `record.parts.sights`, one for every module with self-attention, one for the whole
    model where its targets are its own inputs, shifted by one or not.

    >>> import gradflow as gf
    >>> _ = torch.manual_seed(0)
    >>> model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    >>> record = gf.analyze(model, [torch.randn(2, 5, 8, requires_grad=True)], lambda y: y.square().mean())
    >>> [(s.name, 0.2 < s.future < 0.9) for s in record.parts.sights]
    [('self_attn', True)]
    """
    return Sight()


@attrs.define(eq=False)
class _Entered:
    """A module call that is running: what entered it, and the axis of its positions."""

    x: Tensor
    axis: int
    positions: int = 0  # of the self-attention that was seen in it; 0 if none was


@attrs.define(eq=False)
class Rows:
    """What layers and the model have given in a step; see NOTE [Whose output it is]."""

    given: list[tuple[str, Tensor]] = attrs.field(factory=list)
    output: Tensor | None = None
    turned: set[int] = attrs.field(factory=set)  # numbers of rows that views made of other axes

    def left(self, call: Call, output: Any) -> None:
        """Keep what a layer gives, or the model."""
        found = [t for t in iter_tensors(output) if t.is_floating_point() and t.requires_grad and t.dim() > 1]
        if call.index == 0:
            self.output = found[0] if found else None
        if call.is_layer:
            self.given += [(call.name, t) for t in found[:1]]

    def viewed(self, before: Sequence[int], output: Any) -> None:
        """Hear what a view has made of a tensor of some shape."""
        if isinstance(output, Tensor) and output.dim():
            number = len(output)
            if number != before[0] and number in before[1:]:
                self.turned.add(number)

    def read(self) -> tuple[SamplesRecord, ...]:
        """Return where outputs tell of other samples more than of their own; nothing where they do not."""
        y, number = self.output, 0 if self.output is None else len(self.output)
        given = [(name, t) for name, t in self.given if len(t) == number]
        if y is None or number < _FEW or number not in self.turned or not given:
            return ()
        shares: dict[int, list[tuple[float, float, float]]] = {}
        for row in (number // 5, number // 2, number - 2):
            cotangent = torch.zeros_like(y)
            cotangent[row].copy_(_pattern(cotangent[row]))
            for i, gradient in enumerate(gradients(y, [t for _, t in given], cotangent)):
                if gradient is not None and bool(gradient.any()):
                    squares = gradient.detach().float().flatten(1).square().sum(1)
                    squares /= squares.sum()
                    before, at, behind = squares[:row].sum(), squares[row], squares[row + 1 :].sum()
                    shares.setdefault(i, []).append((float(before), float(at), float(behind)))
        own = {i: sorted(at for _, at, _ in of)[(len(of) - 1) // 2] for i, of in sorted(shares.items())}
        mixed = [i for i, share in own.items() if share <= min(_CHANCE / number, _OWN)]
        if not mixed or mixed[0] != next(iter(own)):
            return ()
        clean = [i for i in own if i > mixed[-1]]
        found = shares[mixed[-1]]
        both = any(a > _SOME for a, _, _ in found) and any(b > _SOME for _, _, b in found)
        names = [name for name, _ in given]
        return (
            SamplesRecord(
                layer=names[mixed[0]], rows=number, own=own[mixed[-1]], both_sides=both,
                mixed=names[mixed[-1]], clean=names[clean[0]] if clean else "",
            ),
        )  # fmt: skip


class SightSession(Session):
    """Listens for self-attention in the first step; see `sight`."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._records: tuple[SightRecord, ...] | None = None
        self._samples: tuple[SamplesRecord, ...] = ()
        self._forget()

    def listens(self, *, end: bool) -> bool:
        """In the first step and the last alone."""
        return end

    def _forget(self) -> None:
        self._entered: dict[int, _Entered] = {}
        self._pairs: list[tuple[Call, Tensor, Tensor, int]] = []
        self._found: list[SightRecord] = []
        self._texts = Texts(self._modules)
        self._rows = Rows()
        self._recorder: Recorder | None = None

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start a step."""
        self._forget()
        self._recorder = recorder if self._records is None else None

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what enters a module, if it has positions."""
        if self._recorder is None:
            return
        self._texts.entered(call, args, kwargs)
        x = next((t for t in iter_tensors((args, dict(kwargs))) if t.is_floating_point()), None)
        if x is not None and x.dim() == 3:
            batch_first = bool(getattr(self._modules[call.module], "batch_first", True))
            self._entered[call.index] = _Entered(x, 1 if batch_first else 0)

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Look whether a function is self-attention, and mark the module that it is the matter of."""
        if self._recorder is None:
            return None
        name = getattr(func, "__name__", "")
        self._texts.function(name, args, kwargs)
        if name in _VIEWS and isinstance(x := args[0] if args else None, Tensor) and x.dim() > 1:
            return functools.partial(self._rows.viewed, tuple(x.shape))
        if name in _ATTENTION and (number := _positions(name, args, kwargs)):
            for call in reversed(self._recorder.running()):
                entered = self._entered.get(call.index)
                if entered is not None and entered.x.shape[entered.axis] == number and _mixes(call):
                    entered.positions = number
                    break
        return None

    def left(self, call: Call, output: Any) -> None:
        """Keep what leaves a module with self-attention."""
        if self._recorder is None:
            return
        self._texts.left(call, output)
        self._rows.left(call, output)
        entered = self._entered.pop(call.index, None)
        if entered is None or not entered.positions:
            return
        y = next((t for t in iter_tensors(output) if t.is_floating_point()), None)
        if y is not None and y.dim() == 3 and y.shape[:2] == entered.x.shape[:2]:
            self._pairs.append((call, entered.x, y, entered.axis))

    def differentiate(self, loss: Tensor) -> None:
        """Take the gradients from some output positions at all input positions."""
        if self._recorder is None:
            return
        self._samples = self._rows.read()
        padding = self._texts.padding()
        for call, x, y, axis in self._pairs:
            future = _future(x, y, axis)
            seen = _padding(x, y, axis, padding)
            if not (math.isnan(future) and math.isnan(seen)):
                told = self._texts.padding_told
                self._found.append(
                    SightRecord(
                        name=call.name, type=call.type, future=future, padding=seen, padding_told=told
                    )
                )
        shifted = self._texts.shifted()
        if shifted is not None:
            kind = self._recorder.calls[0].type if self._recorder.calls else ""
            tokens, embedded, output = shifted
            self._found.append(
                SightRecord(
                    name="", type=kind, whole=True, future=_future(embedded, output, 1),
                    ordered=tells_order(tokens, output),
                )
            )  # fmt: skip
        elif (repeated := self._texts.repeated()) is not None:
            kind = self._recorder.calls[0].type if self._recorder.calls else ""
            future = _future(*repeated, 1)
            self._found.append(SightRecord(name="", type=kind, whole=True, own=True, future=future))
        self._entered, self._pairs = {}, []

    def end(self) -> None:
        """Keep what was found, and let go of the tensors."""
        if self._records is None:
            self._records = tuple(self._found)
        self._forget()

    def fields(self) -> Mapping[str, Any]:
        """Return the records."""
        return {"parts": PartsRecord(sights=self._records or (), samples=self._samples)}


def _mixes(call: Call) -> bool:
    return "softmax" not in call.type.lower() and "dropout" not in call.type.lower()


def _positions(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return over how many positions a function is self-attention; 0 if it is not."""
    if name == "softmax":
        scores = args[0] if args else kwargs.get("input")
        if not isinstance(scores, Tensor) or scores.dim() < 3 or scores.shape[-1] != scores.shape[-2]:
            return 0
        return int(scores.shape[-1])
    query, key = (args[i] if len(args) > i else kwargs.get(n) for i, n in ((0, "query"), (1, "key")))
    if not (isinstance(query, Tensor) and isinstance(key, Tensor)) or query.dim() < 3:
        return 0
    axis = 0 if name == "multi_head_attention_forward" else -2
    return int(query.shape[axis]) if query.shape[axis] == key.shape[axis] else 0


def _pattern(like: Tensor) -> Tensor:
    """Return numbers of the shape of a tensor that no structure of it cancels, without moving any seed."""
    numbers = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return torch.cos(numbers * 1.7 + 0.3).view(like.shape).to(like.dtype)


def _squares(x: Tensor, y: Tensor, cotangent: Tensor, axis: int) -> Tensor | None:
    """Return the squared norms of the gradient at every position, shape (samples, positions)."""
    (gradient,) = gradients(y, [x], cotangent)
    if gradient is None:
        return None
    squares = gradient.detach().float().square().sum(-1)
    return squares if axis == 1 else squares.T


def _future(x: Tensor, y: Tensor, axis: int) -> float:
    """Return the share of the gradient from the middle position that is at later ones: a ratio of norms."""
    number = y.shape[axis]
    if number < 3:
        return math.nan
    middle = number // 2
    cotangent = torch.zeros_like(y)
    here = cotangent.select(axis, middle)
    here.copy_(_pattern(here))
    squares = _squares(x, y, cotangent, axis)
    if squares is None:
        return math.nan
    other = squares.sum() - squares[:, middle].sum()
    return math.sqrt(float(squares[:, middle + 1 :].sum() / other)) if float(other) > 0 else math.nan


def _padding(x: Tensor, y: Tensor, axis: int, padding: Tensor | None) -> float:
    """Return the rms of the gradient at padding over that at words, from all positions that hold words."""
    shape = tuple(y.shape[:2]) if axis == 1 else (y.shape[1], y.shape[0])
    if padding is None or tuple(padding.shape) != shape:
        return math.nan
    pads = padding if axis == 1 else padding.T
    squares = _squares(x, y, _pattern(y).masked_fill(pads[..., None], 0.0), axis)
    if squares is None:
        return math.nan
    at_words = float(squares[~padding].mean())
    return math.sqrt(float(squares[padding].mean()) / at_words) if at_words > 0 else math.nan
