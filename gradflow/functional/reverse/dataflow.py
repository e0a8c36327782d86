"""Where data goes on and the gradient does not: `detach`, `argmax`, `no_grad`, integer casts and their kind.

In the first step every function is observed. A tensor that carries no gradient although something it was
computed from does (or did) is *tainted* with where it came from and the operation that cut it; whoever takes
a tainted tensor has a severed edge from there.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import source_calls
from gradflow.functional.torch_private import has_gradient_hooks, in_checkpoint

# An input of the model or a layer call: ("input" or "layer", its name), as both may have the same name.
Source = tuple[str, str]
# source -> the operation that cut it ("" where nothing is cut: an input of the model)
Taint = dict[Source, str]

_READS = frozenset(("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__"))


class DataFlow:
    """Follows tensors without a gradient through one step.

    Args:
        recorder: the step's recorder; its `on_enter` and `on_exit` are set to this.
        inputs: tensors of the batch by name.
    """

    def __init__(self, recorder: Recorder, inputs: Mapping[str, Tensor]) -> None:
        self.recorder = recorder
        self._taints: dict[int, tuple[weakref.ref[Tensor], Taint]] = {}
        self.edges: dict[tuple[int, Source], str] = {}  # (target call, source) -> reason
        self.joins: list[tuple[Any, Source, str]] = []  # (autograd node, source, reason)
        # hooks on tensors, those of the modules' backward and of parameters included, change gradients
        recorder.hooked = any(
            has_gradient_hooks(owner)
            for module in recorder.modules.values()
            for owner in (module, *module.parameters(recurse=False))
        )
        self.read: dict[Source, str] = {}  # source -> the read (`item`, ...) that took its values out
        recorder.on_enter, recorder.on_exit = self._enter, self._exit
        self.shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        for name, tensor in inputs.items():
            self._mark(tensor, {("input", name): ""})

    def release(self) -> None:
        """Let go of tensors and of the autograd graph."""
        self._taints.clear()
        self.joins.clear()

    def _mark(self, tensor: Tensor, taint: Taint) -> None:
        if taint:
            self._taints[id(tensor)] = (weakref.ref(tensor), taint)

    def taint(self, tensor: Tensor) -> Taint:
        """Return the taint of a tensor."""
        found = self._taints.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else {}

    def _sources(self, tensor: Tensor, reason: str) -> Taint:
        """Return what a tensor would taint an output with, if `reason` cut it there."""
        taint = dict(self.taint(tensor))
        for index in source_calls(self.recorder, tensor):
            taint.setdefault(("layer", self.recorder.calls[index].name), reason)
        return taint

    # ----------------------------------------------------------------- layer calls

    def _enter(self, call: Call, arguments: Any) -> None:
        if not call.is_layer:
            return
        for tensor in iter_tensors(arguments):
            for source, reason in self.taint(tensor).items():
                self.edges.setdefault((call.index, source), reason)

    def _exit(self, call: Call, args: Any, output: Any) -> None:
        if not call.is_layer:
            return
        for tensor in iter_tensors(output):
            if not tensor.requires_grad:
                self._mark(tensor, {("layer", call.name): "" if call.grad_enabled else _grad_mode()})

    # ------------------------------------------------------------------- functions

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function and follow what it does to the gradient."""
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        inside = self.recorder.innermost_leaf() is not None
        if not self.recorder.active or inside or name.endswith("_like") or name.startswith("new_"):
            return out  # what is inside a layer is the layer's; a like-named factory takes a shape, no values
        shape_only = name.endswith("_as") and len(args) > 1  # `view_as(x)` takes a shape of x, no values
        inputs = list(iter_tensors((args[:1], kwargs) if shape_only else (args, kwargs)))
        if name in _READS:
            for tensor in inputs:
                for origin in self._sources(tensor, name):
                    self.read[origin] = name.strip("_")
            return out
        for tensor in iter_tensors(args[0] if name == "__setitem__" else out):
            if tensor.requires_grad:
                if tensor.grad_fn is not None:
                    for source in inputs:
                        if not source.requires_grad:
                            for origin, reason in self.taint(source).items():
                                self.joins.append((tensor.grad_fn, origin, reason))
                continue
            taint = dict(self.taint(tensor))  # one that was written to has it already
            for source in inputs:
                taint |= self._sources(source, cut_name(func)) if source is not tensor else {}
            self._mark(tensor, taint)
        return out


def cut_name(func: Any) -> str:
    """Return the plain name of a function that cut the gradient, `no_grad` if the grad mode did."""
    if not torch.is_grad_enabled():
        return _grad_mode()
    name = getattr(func, "__name__", "function")
    if name == "__get__":
        return (resolve_name(func) or "data").removesuffix(".__get__").rsplit(".", 1)[-1]
    return name.strip("_") or name


def _grad_mode() -> str:
    """Return what switched the gradient off: `checkpoint (reentrant)` or `no_grad`."""
    return "checkpoint (reentrant)" if in_checkpoint() else "no_grad"
