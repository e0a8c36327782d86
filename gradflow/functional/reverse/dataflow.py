"""Where data goes on and the gradient does not: `detach`, `argmax`, `no_grad`, integer casts and their kind.

It hears of every function of the first step. A tensor that carries no gradient although something it was
computed from does (or did) is *tainted* with where it came from and the operation that cut it; whoever takes
a tainted tensor has a severed edge from there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import resolve_name

from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.tap.asked import Listener
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import source_calls
from gradflow.functional.torch_private import in_checkpoint

# An input of the model or a layer call: ("input" or "layer", its name), as both may have the same name.
Source = tuple[str, str]
# source -> the operation that cut it ("" where nothing is cut: an input of the model)
Taint = dict[Source, str]

_READS = frozenset(("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__"))
_COPIES = frozenset(("__deepcopy__", "clone", "detach", "__get__", "requires_grad_"))  # compute nothing


class DataFlow(Listener):
    """Follows tensors without a gradient through one step.

    Args:
        inputs: tensors of the batch by name.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._inputs: Mapping[str, Tensor] = inputs
        self._recorder: Recorder | None = None
        self._taints: dict[int, tuple[weakref.ref[Tensor], Taint]] = {}
        self.edges: dict[tuple[int, Source], str] = {}  # (target call, source) -> reason
        self.joins: list[tuple[Any, Source, str]] = []  # (autograd node, source, reason)
        self.read: dict[Source, str] = {}  # source -> the read (`item`, ...) that took its values out
        self.lost: Taint = {}  # of the loss, where it has no graph
        self.behind: dict[str, str] = {}  # layer -> one without parameters behind it, whose output is cut
        self.leaves: set[int] = set()  # ids of the leaves that functions outside of layers without parts took
        self.shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start the step, or start it again."""
        self._recorder = recorder
        self._taints, self.edges, self.joins, self.read, self.lost = {}, {}, [], {}, {}
        self.leaves, self.behind = set(), {}
        for name, tensor in self._inputs.items():
            self._mark(tensor, {("input", name): ""})

    def release(self) -> None:
        """Let go of tensors and of the autograd graph, once the cuts were read off."""
        self._recorder, self._inputs = None, {}
        self._taints, self.joins = {}, []

    def _mark(self, tensor: Tensor, taint: Taint) -> None:
        if taint:
            self._taints[id(tensor)] = (weakref.ref(tensor), taint)

    def taint(self, tensor: Tensor) -> Taint:
        """Return the taint of a tensor."""
        found = self._taints.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else {}

    def _sources(self, tensor: Tensor, reason: str) -> Taint:
        """Return what a tensor would taint an output with, if `reason` cut it there."""
        assert self._recorder is not None
        taint = dict(self.taint(tensor))
        calls = self._recorder.calls
        for index in source_calls(tensor):
            taint.setdefault(("layer", calls[index].name), reason)
            if not self._has_parameters(calls[index]):
                for other in source_calls(tensor, past=lambda call: not self._has_parameters(calls[call])):
                    if self._has_parameters(calls[other]):
                        self.behind.setdefault(calls[other].name, calls[index].name)
        return taint

    def _has_parameters(self, call: Call) -> bool:
        assert self._recorder is not None
        return any(True for _ in self._recorder.model.modules[call.module].parameters())

    # ----------------------------------------------------------------- layer calls

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note which tainted tensors a layer takes."""
        if not call.is_layer:
            return
        for tensor in iter_tensors((args, kwargs)):
            for source, reason in self.taint(tensor).items():
                self.edges.setdefault((call.index, source), reason)

    def left(self, call: Call, output: Any) -> None:
        """Taint what a layer gives without a gradient."""
        if not call.is_layer:
            return
        for tensor in iter_tensors(output):
            if not tensor.requires_grad:
                self._mark(tensor, {("layer", call.name): "" if call.grad_enabled else _grad_mode()})

    def differentiate(self, loss: Tensor) -> None:
        """Note what a loss without a graph was computed from."""
        self.lost = self.taint(loss) if loss.grad_fn is None else {}

    # ------------------------------------------------------------------- functions

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Follow what a function does to the gradient."""
        assert self._recorder is not None
        name = getattr(func, "__name__", "")
        inside = self._recorder.innermost_leaf() is not None
        if inside or name.endswith("_like") or name.startswith("new_"):
            return None  # what is inside a layer is the layer's; a like-named factory takes but a shape
        return functools.partial(self._follow, func, name, args, kwargs)

    def _follow(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Mapping[str, Any], out: Any
    ) -> None:
        assert self._recorder is not None
        shape_only = name.endswith("_as") and len(args) > 1  # `view_as(x)` takes a shape of x, no values
        inputs = list(iter_tensors((args[:1], kwargs) if shape_only else (args, kwargs)))
        if name not in _COPIES:
            self.leaves.update(id(t) for t in inputs if t.requires_grad and t.grad_fn is None)
        if name in _READS:
            for tensor in inputs:
                for origin in self._sources(tensor, name):
                    self.read[origin] = name.strip("_")
            return
        for tensor in iter_tensors(args[0] if name == "__setitem__" else out):
            if tensor.grad_fn is not None:
                for source in inputs:
                    if source.grad_fn is None:  # a leaf that was told to require a gradient included
                        for origin, reason in self.taint(source).items():
                            self.joins.append((tensor.grad_fn, origin, reason))
                continue
            taint = dict(self.taint(tensor))  # one that was written to has it already
            for source in inputs:
                if source is not tensor:
                    taint |= self._sources(source, cut_name(func, self._recorder.grad_enabled))
            self._mark(tensor, taint)


def cut_name(func: Any, grad_enabled: bool = True) -> str:
    """Return the plain name of a function that cut the gradient, `no_grad` if the grad mode did."""
    if not grad_enabled:
        return _grad_mode()
    name = getattr(func, "__name__", "function")
    if name == "__get__":
        return (resolve_name(func) or "data").removesuffix(".__get__").rsplit(".", 1)[-1]
    return name.strip("_") or name


def _grad_mode() -> str:
    """Return what switched the gradient off: `checkpoint (reentrant)` or `no_grad`."""
    return "checkpoint (reentrant)" if in_checkpoint() else "no_grad"
