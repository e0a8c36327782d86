"""What tensors without a gradient are made of: constants of the code, the batch, or what the model computes.

An index, a mask or a factor decides where gradient goes. Whether that is the data's choice (the tokens of a
batch) or the model's own (the nearest code) is told by what it was computed from, which is followed here
through every function of one step, whether or not a gradient goes along.
"""

from __future__ import annotations

import bisect
import enum
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.processes.shards import local
from gradflow.functional.tap.asked import Listener
from gradflow.functional.tap.nodes import Node
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.torch_private import address, is_wrapped, node_number, sequence_number


class Origin(enum.IntEnum):
    """What a tensor is made of; the last that holds of any part."""

    CONSTANT = 0
    """Nothing but the code: `torch.zeros`, a buffer."""
    BATCH = 1
    """A tensor of the batch itself, or one that the code holds, or a view of such."""
    DATA = 2
    """Computed from the batch."""
    MODEL = 3
    """Computed with parameters that train."""


@attrs.frozen(eq=False)
class Past:
    """What is known of a tensor without a gradient.

    Args:
        origin: what it is made of.
        maker: the function that made it; "" if none was heard of.
        live: whether any of it is not zero, still on its device; None if it was not asked.
        parents: the same of what it was made of.
    """

    origin: Origin
    maker: str = ""
    live: Tensor | None = None
    parents: tuple[Past, ...] = ()

    def emptied(self) -> str:
        """Return the function that made all of it, or of what it is made of, zero out of what was not."""
        todo, seen = [self], {id(self)}
        while todo:
            past = todo.pop()
            if past.live is None or bool(past.live):
                continue
            asked = [parent for parent in past.parents if parent.live is not None]
            if past.origin > Origin.CONSTANT and all(bool(parent.live) for parent in asked):
                return past.maker
            new = [parent for parent in asked if id(parent) not in seen]
            seen.update(map(id, new))
            todo += new
        return ""


@attrs.frozen(eq=False)
class Function:
    """One function call of the step that made nodes of autograd's.

    Args:
        name: of the function.
        start: autograd's number before it.
        end: and after it: the nodes in between are its own.
        still: its arguments that carry no gradient.
        lowest: the lowest of the values that it was given, where it is a softmax, still on its device.
    """

    name: str
    start: int
    end: int
    still: tuple[Tensor, ...]
    lowest: Tensor | None = None

    @property
    def masked(self) -> bool:
        """Whether it is a softmax of values so low that they stand for a mask."""
        return self.lowest is not None and bool(self.lowest <= _MASKED)


class Origins(Listener):
    """Follows what tensors are made of through one step.

    Args:
        constants: tensors that the model holds: its buffers.
    """

    def __init__(self, constants: Sequence[Tensor]) -> None:
        self._constants = constants
        self._known: dict[int, tuple[weakref.ref[Tensor], Past]] = {}
        self.functions: list[Function] = []
        self._ends: list[int] = []

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start the step, or start it again."""
        self._known, self.functions, self._ends = {}, [], []
        for tensor in self._constants:
            self._mark(tensor, Past(Origin.CONSTANT))

    def release(self) -> None:
        """Let go of all tensors."""
        self._known, self.functions, self._ends, self._constants = {}, [], [], ()

    def _mark(self, tensor: Tensor, past: Past) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), past)

    def past(self, tensor: Tensor) -> Past:
        """Return what is known of a tensor."""
        found = self._known.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        return Past(Origin.MODEL if tensor.requires_grad else Origin.BATCH)

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Hear of a function, and then of what it has made."""
        name = getattr(func, "__name__", "function").strip("_")
        if name == "get":
            return None
        inputs = [t for t in iter_tensors((args, kwargs)) if not is_wrapped(t)]
        still = tuple(t for t in inputs if not t.requires_grad)
        shape_only = name.endswith("_like") or name.startswith("new_")
        pasts = [] if shape_only else [self.past(t) for t in inputs]
        origin = max((past.origin for past in pasts), default=Origin.CONSTANT)
        scores = next((t for t in inputs if t.is_floating_point() and _is_plain(t) and t.numel()), None)
        lowest = scores.min() if "softmax" in name and scores is not None else None
        start = sequence_number()

        def end(out: Any) -> None:
            last = sequence_number()
            if last > start:
                self.functions.append(Function(name, start, last, still, lowest))
                self._ends.append(last)
            for tensor in iter_tensors(args[0] if name == "setitem" else out):
                if not tensor.requires_grad and not is_wrapped(tensor):
                    self._follow(tensor, name, origin, still, tuple(pasts))

        return end

    def _follow(
        self, out: Tensor, name: str, origin: Origin, still: tuple[Tensor, ...], pasts: tuple[Past, ...]
    ) -> None:
        source = next((t for t in still if _shares(out, t)), None)
        if source is not None:  # a view of it, or itself
            known = self.past(source)
            self._mark(out, Past(max(known.origin, origin), known.maker or name, _live(out), known.parents))
            return
        made = Origin.DATA if origin is Origin.BATCH else origin
        self._mark(out, Past(made, name, _live(out), pasts))

    def of(self, node: Node) -> Function | None:
        """Return the innermost function call that made a node of autograd's."""
        number = node_number(node)
        position = bisect.bisect_right(self._ends, number)  # calls are in the order of their ends
        if position < len(self.functions) and self.functions[position].start <= number:
            return self.functions[position]
        return None


_MASKED = -9000.0  # masks are filled with the smallest float, -1e9 or -1e4


def _shares(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie on the same memory."""
    try:
        return a is b or (address(a) == address(b) and a.numel() > 0)
    except (RuntimeError, NotImplementedError):  # of a kind that has no memory of its own
        return False


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's elements can be looked at: none that is sparse, nested or quantised."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _live(tensor: Tensor) -> Tensor | None:
    """Whether any element is not zero, as a tensor; None where that cannot be asked."""
    tensor = local(tensor)
    return tensor.any() if _is_plain(tensor) and tensor.numel() else None
