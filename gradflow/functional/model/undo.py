"""How each kind of object is put back as it was, in place.

The built-in classes' own methods are called (`dict.clear(x)`), since a subclass may override them. `==` is
never called, for the same reason: objects are compared by identity, tensors by their bits.
"""

from __future__ import annotations

import collections
import functools
import io
import logging
import operator
import queue
import random
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradflow.functional.torch_private import is_view, num_writes

_LIVE = (
    threading.Thread, threading.Event, threading.Condition, threading.local, queue.Queue, logging.Logger,
    logging.Handler, io.IOBase, type,
)  # fmt: skip
_MACHINERY = (
    "threading", "queue", "logging", "concurrent", "asyncio", "multiprocessing", "networkx", "gradflow",
)  # fmt: skip
_WITH_STATE = (  # packages of PyTorch whose objects hold state of the user's
    "torch.optim", "torch.quasirandom", "torch.distributions", "torch.amp", "torch.cuda.amp", "torch.nn",
    "torch.ao",
)  # fmt: skip

Undo = Callable[[], Any]


def python_module(what: Any) -> str:
    """Return the name of the Python module that a function or class was made in; empty if it tells of none.

    What `exec` makes where no `__name__` is set tells of none.
    """
    found = getattr(what, "__module__", "")
    return found if isinstance(found, str) else ""


def may_hold_state(value: Any) -> bool:
    """Whether an object is looked into for state of the user's."""
    return not isinstance(value, _LIVE) and _is_looked_into(python_module(type(value)))


def _is_looked_into(module: str) -> bool:
    """Whether a class of this Python module may be one whose objects hold state of the user's."""
    if module.startswith("torch."):
        return module.startswith(_WITH_STATE)
    return module.partition(".")[0] not in _MACHINERY


@functools.cache
def slots_of(kind: type) -> tuple[Any, ...]:
    """Return the descriptors of the slots of a class, private ones and those of its bases included."""
    return tuple(
        held for base in kind.__mro__ for held in vars(base).values()
        if isinstance(held, types.MemberDescriptorType) and _is_looked_into(python_module(base))
        and python_module(base) not in ("builtins", "collections")
    )  # fmt: skip


def attempt(failures: list[str], kind: str, undo: Undo) -> None:
    """Undo something; what it raises is kept among the failures, with the kind of the object."""
    try:
        undo()
    except Exception as error:
        failures.append(f"{kind}: {type(error).__name__}: {error}")


def kind_of(value: Any) -> str:
    """Return the name of a value's class, for an error message."""
    return type(value).__name__


def base_of(mapping: dict[Any, Any]) -> type[dict[Any, Any]]:
    """Return the built-in class of a dict, to call its methods whatever a subclass overrides."""
    return collections.OrderedDict if isinstance(mapping, collections.OrderedDict) else dict


def entries(mapping: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    """Return the keys and the values of a dict, in order."""
    if type(mapping) is dict:  # nearly all
        return list(mapping), list(mapping.values())
    base = base_of(mapping)
    return list(base.keys(mapping)), list(base.values(mapping))


def _same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the same objects, by identity."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def holds(mapping: dict[Any, Any], keys: list[Any], values: list[Any]) -> bool:
    """Whether a dict holds the same objects, by identity, in the same order."""
    now = entries(mapping)
    return _same(now[1], values) and _same(now[0], keys)


def refill_dict(mapping: dict[Any, Any], keys: list[Any], values: list[Any]) -> None:
    """Empty a dict and fill it anew."""
    base = base_of(mapping)
    base.clear(mapping)
    for key, value in zip(keys, values, strict=True):
        base.__setitem__(mapping, key, value)


def _refill_list(value: list[Any], saved: list[Any]) -> None:
    list.__setitem__(value, slice(None), saved)


def _refill_deque(value: collections.deque[Any], saved: list[Any]) -> None:
    collections.deque.clear(value)
    collections.deque.extend(value, saved)


def _refill_set(value: set[Any], saved: list[Any]) -> None:
    set.clear(value)
    set.update(value, saved)


def _refill_bytes(value: bytearray, saved: list[int]) -> None:
    value[:] = bytes(saved)


REFILL: dict[type, Callable[[Any, list[Any]], None]] = {
    list: _refill_list, collections.deque: _refill_deque, set: _refill_set, bytearray: _refill_bytes,
}  # fmt: skip


def restore_container(value: Any, base: Any, saved: list[Any]) -> None:
    """Put a list, deque, set or bytearray back, unless it holds the same objects."""
    if not _same(list(base.__iter__(value)), saved):
        REFILL[base](value, saved)


_EMPTY = object()


def slot_value(slot: Any, value: Any) -> Any:
    """Return what a slot holds, or a mark that it is empty."""
    try:
        return slot.__get__(value)
    except AttributeError:
        return _EMPTY


def slot_values(value: Any) -> list[tuple[Any, Any]]:
    """Return the slots of an object that hold something, and what they hold."""
    held = [(slot, slot_value(slot, value)) for slot in slots_of(type(value))]
    return [(slot, found) for slot, found in held if found is not _EMPTY]


def restore_slots(value: Any, slots: Sequence[Any], saved: list[Any]) -> None:
    """Put the slots of an object back."""
    for slot, old in zip(slots, saved, strict=True):
        if slot_value(slot, value) is not old:
            slot.__delete__(value) if old is _EMPTY else slot.__set__(value, old)


def restore_array(value: np.ndarray, saved: np.ndarray, writeable: bool) -> None:
    """Put an array back: its shape, its values, and whether it can be written to."""
    if not writeable and not value.flags.writeable:
        return
    value.flags.writeable = True
    if value.shape != saved.shape:
        value.resize(saved.shape, refcheck=False)
    np.copyto(value, saved)
    value.flags.writeable = writeable


def restore_flags(flags: list[tuple[Tensor, bool, Tensor | None]]) -> None:
    """Put back which parameters require a gradient, and which tensor is the gradient of each."""
    for parameter, flag, grad in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)
        if parameter.grad is not grad:
            parameter.grad = grad


class TensorState:
    """The values of a tensor, and what else an operation in place may change of it."""

    def __init__(self, value: Tensor, alias: Tensor, saved: Tensor, leaf: bool, grad: Tensor | None) -> None:
        self.value, self.alias, self.saved, self.leaf, self.grad = value, alias, saved, leaf, grad
        self.writes, self.flag = num_writes(value), value.requires_grad

    def restore(self) -> None:
        """Put them back."""
        value = self.value
        if self.leaf and not value.is_leaf and not is_view(value):
            value.detach_()  # an operation in place had joined it to a graph
        if value.is_leaf:
            if value.requires_grad != self.flag:
                value.requires_grad_(self.flag)
            if value.grad is not self.grad:
                value.grad = self.grad
        strided = value.layout is torch.strided and not value.is_nested
        if strided and not value.is_set_to(self.alias):  # other memory, or another shape on it
            value.data = self.alias
        if num_writes(value) != self.writes or not same_bits(value, self.saved):
            with torch.no_grad():
                value.copy_(self.saved)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; those of a layout that cannot be compared count as equal."""
    if a.is_nested and b.is_nested:
        parts = a.unbind(), b.unbind()
        return len(parts[0]) == len(parts[1]) and all(map(same_bits, *parts))
    if a.is_nested or b.is_nested or a.shape != b.shape or a.dtype is not b.dtype:
        return False
    if a.layout is torch.sparse_coo:
        return torch.equal(a._indices(), b._indices()) and same_bits(a._values(), b._values())
    if a.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return same_bits(a.values(), b.values())
    return a.layout is not torch.strided or torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    """Return a view as integers, in which NaN equals NaN; complex and quantised tensors as they are."""
    same = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    tensor = tensor.detach()
    if tensor.is_complex() or tensor.is_quantized:
        return tensor
    return tensor.view(same[tensor.element_size()]) if tensor.dim() else tensor.reshape(1)


def generator_undo(value: Any) -> Undo | None:
    """Return what puts a random generator back into its present state; None for anything else."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.BitGenerator):
        return functools.partial(setattr, value, "state", value.state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    return None


class GeneratorStates:
    """The states of the random generators that some objects hold as attributes.

    Args:
        owners: the objects.
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        held = [v for owner in owners for v in list(getattr(owner, "__dict__", {}).values())]
        self._undo = [undo for value in held if (undo := generator_undo(value)) is not None]

    def restore(self) -> None:
        """Put them back."""
        for undo in self._undo:
            undo()
