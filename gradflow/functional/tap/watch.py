"""Functional operations as they run: activations, and where the data flow leaves the gradient's reach.

`torch.overrides.TorchFunctionMode` sees every call of a PyTorch function with its arguments, in any model,
modules' own calls included, without touching the model.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradflow.functional.model.layers import owns_parameters
from gradflow.functional.processes.shards import settled
from gradflow.functional.tap.calls import ActivationKey, unit_axis
from gradflow.functional.tap.ignorance import InnerLoss
from gradflow.functional.tap.nodes import nodes_under
from gradflow.functional.tap.probes import site_of
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.torch_private import transform_level, unwatched

# name of the function -> (op, kind); see ActivationRecord
ACTIVATIONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("relu", "relu_", "threshold", "threshold_"), ("relu", "rectifier")),
    "relu6": ("relu6", "rectifier"),
    **dict.fromkeys(("sigmoid", "sigmoid_"), ("sigmoid", "sigmoid")),
    **dict.fromkeys(("tanh", "tanh_"), ("tanh", "tanh")),
    **{n: (n.rstrip("_"), "hard") for n in ("hardtanh", "hardtanh_", "hardsigmoid")},
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_"), ("clamp", "clamp")),
    "softmax": ("softmax", "softmax"),
    **dict.fromkeys(("div", "true_divide", "__truediv__"), ("squash", "squash")),
}


class Watch(TorchFunctionMode):
    """Tells the recorder of activations, and its listeners of every function.

    Args:
        recorder: of the step that is running.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._recorder.model.exchanges and _is_exchange():
            return func(*args, **kwargs)
        ends = self.heard(func, args, kwargs)
        out = func(*args, **kwargs)
        for end in ends:
            end(out)
        return out

    def heard(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Callable[[Any], None]]:
        """Tell of a function that is about to be called; return what is to be called with its output."""
        recorder = self._recorder
        if transform_level() > recorder.level:
            return []
        ends: list[Callable[[Any], None]] = []
        if recorder.asked.listeners:
            with recorder.telling():
                told = [listener.function(func, args, kwargs) for listener in recorder.asked.listeners]
            ends = [functools.partial(self._tell, end) for end in told if end is not None]
        before = self._before(func, args, kwargs)
        return ends if before is None else [before, *ends]

    def _tell(self, end: Callable[[Any], None], out: Any) -> None:
        with self._recorder.telling():
            end(out)

    def _before(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Callable[[Any], None] | None:
        """Look at the input of an activation; return what looks at its output, None for other functions."""
        found = ACTIVATIONS.get(getattr(func, "__name__", ""))
        if found is None:
            return None
        x = args[0] if args else kwargs.get("input")
        bounds = _bounds(found, args, kwargs) if found[1] != "squash" else _squash(x, args, kwargs)
        if not isinstance(x, Tensor) or not _is_watched(x) or bounds is None:
            return None
        with unwatched():
            op = "relu6" if found[0] == "hardtanh" and bounds.kind == "rectifier" else found[0]
            before = _Before(self._recorder, op, x, bounds)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)

        def after(out: Any) -> None:
            if isinstance(out, Tensor) and out.numel():
                with unwatched():
                    before.note(out, dim)

        return after


def _is_exchange() -> bool:
    """Whether what exchanges tensors between processes calls a function, and not the model.

    Tensors may have no memory there yet.
    """
    for frame, _ in traceback.walk_stack(sys._getframe(2)):
        module = frame.f_globals.get("__name__", "")
        if module == InnerLoss.__module__:
            continue  # which hears the same function, and hands it on
        if module.startswith("torch.distributed"):
            return True
        if not module.startswith("torch.") or module.startswith("torch.nn.modules"):
            return False
    return False


def _is_watched(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad and x.numel() > 0


def unit_rows(y: Tensor, feeding: str) -> Tensor:
    """Return an output as a matrix, a row per unit."""
    return y.movedim(unit_axis(y, feeding), 0).flatten(1) if y.dim() > 1 else y.reshape(-1, 1)


class _Before:
    """What must be known of an activation before it runs: its input, which may be overwritten."""

    def __init__(self, recorder: Recorder, op: str, x: Tensor, bounds: Bounds) -> None:
        self.recorder, self.op, self.bounds = recorder, op, bounds
        self.key = self._key(x)
        here = settled(x.detach())
        self.entering = recorder.entering_size(x, here, exact=True) if recorder.asked.look else None
        self.masked = here <= MASKED if recorder.asked.look and op == "softmax" else None

    def _key(self, x: Tensor) -> ActivationKey:
        recorder = self.recorder
        leaf = recorder.innermost_leaf()
        if leaf is not None and not owns_parameters(recorder.model.modules[leaf.module]):
            return ActivationKey(leaf.name, self.op, self.bounds.kind, False, leaf.name)
        if leaf is not None:
            layer = leaf.name
        else:
            layer = source_layer(recorder, x, joint=self.op == "softmax")
        number = recorder.numbered(f":{layer}:{self.op}")
        name = f"{layer}:{self.op}" + (f"@{number}" if number else "")
        return ActivationKey(name, self.op, self.bounds.kind, True, layer)

    def note(self, out: Tensor, dim: Any) -> None:
        recorder, y = self.recorder, settled(out.detach())
        if self.bounds.kind == "softmax":
            self._note_softmax(y, dim)
            return
        if self.bounds.kind == "rectifier":
            recorder.note_rectifier(self.key, y)
        elif recorder.asked.look:
            flat = self.bounds.saturated(unit_rows(y, recorder.last_type))
            recorder.note("saturated", self.key, flat.sum(), y.numel())
            recorder.note("stuck", self.key, flat.all(1), y.numel())
        if self.entering is not None:
            recorder.note("input", self.key, self.entering, y.numel())

    def _note_softmax(self, y: Tensor, dim: Any) -> None:
        if not self.recorder.asked.look or not isinstance(dim, int) or not y.dim():
            return
        width = y.shape[dim]
        # 1 − Σp² is the trace of the softmax's Jacobian diag(p) − ppᵀ; at most 1 − 1/n
        trace = 1.0 - y.double().square().sum(dim) if y.device.type != "mps" else 1.0 - y.square().sum(dim)
        saturated_rows = trace < SATURATED * (1.0 - 1.0 / width) if width > 1 else trace > -1.0
        if self.masked is not None and width > 1:  # a row with one allowed alternative has no choice
            saturated_rows = saturated_rows & ((~self.masked).sum(dim) != 1)
        self.recorder.note("saturated", self.key, saturated_rows.sum(), saturated_rows.numel())
        self.recorder.note("width", self.key, torch.tensor(float(width)), width)
        if self.entering is not None:
            self.recorder.note("input", self.key, self.entering, y.numel())


# Scores at or below this are taken for masked: masks use -inf, the smallest float, -1e9 or -1e4.
MASKED = -9000.0

# A bounded unit whose derivative is below this share of its maximum passes next to no gradient: the
# sigmoid beyond |x| = 6, tanh beyond |x| = 3.
SATURATED = 0.01


@attrs.frozen
class Bounds:
    """The kind of an activation (see `ActivationRecord`), and its bounds where they are hard."""

    kind: str
    low: Any = None
    high: Any = None
    smooth: str = ""

    def saturated(self, y: Tensor) -> Tensor:
        """Return which outputs have a derivative below 1 percent of the largest it can have."""
        if self.smooth == "sigmoid":  # derivative y(1 − y), at most 1/4
            return y * (1 - y) < SATURATED / 4
        if self.smooth == "tanh":  # derivative 1 − y², at most 1
            return 1 - y * y < SATURATED
        if self.smooth == "squash":  # y = x / (c + x) for x from 0 on: derivative (1 − y)² / c, at most 1 / c
            return (1 - y) ** 2 < SATURATED
        return (y <= self.low) | (y >= self.high)


def _squash(x: Any, args: Any, kwargs: Any) -> Bounds | None:
    """Return what kind of activation x / (c + x) is, of a square by which capsules squash a length; None for
    other quotients."""
    over = args[1] if len(args) > 1 else kwargs.get("other")
    if not isinstance(x, Tensor) or not isinstance(over, Tensor) or x.shape != over.shape:
        return None
    above, below = x.grad_fn, over.grad_fn
    if above is None or below is None or type(below).__name__ != "AddBackward0":
        return None
    made_of = [child for child, _ in below.next_functions if child is not None]
    squares = any(type(above).__name__.startswith(name) for name in ("Pow", "Sum", "Mul"))
    return Bounds("bounded", smooth="squash") if made_of == [above] and squares else None


def _bounds(found: tuple[str, str], args: Any, kwargs: Any) -> Bounds | None:
    """Return what kind of activation a call is; None for a clamp that is none (a guard against zero, say)."""
    op, kind = found
    if kind in ("sigmoid", "tanh"):
        return Bounds("bounded", smooth=kind)
    if kind in ("rectifier", "softmax"):
        return Bounds(kind)
    names = ("min_val", "max_val") if op == "hardtanh" else ("min", "max")
    low = kwargs.get(names[0], args[1] if len(args) > 1 else None)
    high = kwargs.get(names[1], args[2] if len(args) > 2 else None)
    if op == "hardsigmoid":
        return Bounds("bounded", 0.0, 1.0)
    if op == "hardtanh" and low == 0:  # `nn.ReLU6`: off below zero like any rectifier
        return Bounds("rectifier")
    if op == "hardtanh":
        return Bounds("bounded", -1.0 if low is None else low, 1.0 if high is None else high)
    if isinstance(low, (int, float)) and low == 0 and high is None:
        return Bounds("rectifier")
    plain = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return Bounds("bounded", low, high) if plain else None


def source_calls(x: Tensor, past: Callable[[int], bool] = lambda call: False) -> list[int]:
    """Return the layer calls whose outputs feed `x` through functional operations, by autograd's graph.

    Args:
        x: the tensor.
        past: whether to go on past a layer call, to those before it.
    """
    if not isinstance(x, Tensor) or x.grad_fn is None:
        return []

    def stops(node: Any) -> bool:
        site = site_of(node)
        return site is not None and not past(site.call)

    sites = map(site_of, nodes_under([x.grad_fn], stops=stops))
    return sorted({site.call for site in sites if site is not None})


def source_layer(recorder: Recorder, x: Tensor, *, joint: bool = False) -> str:
    """Return the layer call whose output feeds `x`: the latest, if there are several.

    Args:
        recorder: the step's recorder.
        x: the tensor.
        joint: with several sources, return the module that holds them all (an attention module for its
            query and key projections) where it is not the model itself.
    """
    sources = source_calls(x)
    if joint and len(sources) > 1:
        names = [recorder.calls[i].module.split(".")[:-1] for i in sources]
        common = _common_prefix(names)
        if common:
            return ".".join(common)
    if sources:
        return recorder.calls[sources[-1]].name
    done = [c for c in recorder.calls if c.is_layer and c.index not in recorder.stack]
    return done[-1].name if done else ""


def _common_prefix(names: list[list[str]]) -> list[str]:
    shared = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared
