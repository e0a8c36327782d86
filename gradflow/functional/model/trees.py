"""Tensors inside the nested values that models take and return."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradflow.functional.model.undo import python_module, slot_values
from gradflow.functional.torch_private import pytree

_PLAIN = frozenset((bool, int, float, str))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return `value` with `function` applied to every tensor in it.

    Goes into tuples, lists, named tuples, mappings known to PyTorch (`ModelOutput` of Hugging Face
    included) and dataclasses; anything else is returned as it is. Where `function` changes nothing, the
    very object `value` is returned, so that a model which checks identity sees what it made.
    """
    if isinstance(value, Tensor):
        return function(value)
    if value is None or isinstance(value, (int, float, str, bool)):
        return value
    leaves, spec = pytree.tree_flatten(value)
    mapped = [_map_leaf(function, leaf) for leaf in leaves]
    if all(new is old for new, old in zip(mapped, leaves, strict=True)):
        return value
    return pytree.tree_unflatten(mapped, spec)


def _map_leaf(function: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return function(leaf)
    if isinstance(leaf, Mapping):  # of a class that PyTorch does not know, such as a tokenizer's encoding
        mapped = {key: map_tensors(function, value) for key, value in leaf.items()}
        if all(mapped[key] is value for key, value in leaf.items()):
            return leaf
        changed: Any = copy.copy(leaf)
        for key, value in mapped.items():
            changed[key] = value
        return changed
    old = _fields(leaf, init=True)
    new = {name: map_tensors(function, value) for name, value in old.items()}
    if all(new[name] is old[name] for name in old):
        return leaf
    return leaf._replace(**new) if isinstance(leaf, tuple) else dataclasses.replace(leaf, **new)  # type: ignore


def _fields(leaf: Any, *, init: bool = False) -> dict[str, Any]:
    """Return the fields of a dataclass, or of a named tuple that PyTorch takes for a leaf, else none.

    Older releases take one of a derived class for a leaf, such as a `PackedSequence`.

    Args:
        leaf: any value.
        init: of a dataclass only those that are arguments.
    """
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if f.init or not init}
    return dict(zip(getattr(leaf, "_fields", ()), leaf, strict=False)) if isinstance(leaf, tuple) else {}


def private_copy(place: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of a batch that can be written to, each tensor replaced by what `place` returns for it.

    Arrays are copied too, and objects of any class that hold tensors, to any depth: a graph with tensors for
    attributes, an encoding. Modules, and what cannot be copied, are shared.
    """
    if isinstance(value, Tensor):
        return place(value)
    if type(value) in (tuple, list):
        return type(value)([private_copy(place, item) for item in value])
    if type(value) is dict:
        return {key: private_copy(place, item) for key, item in value.items()}
    if value is None or isinstance(value, (int, float, str, bytes, bool)):
        return value
    if isinstance(value, np.ndarray):
        return value.copy()
    memo = {id(held): new for held, new in _held_tensors(place, value)}
    try:
        return copy.deepcopy(value, memo) if memo else value
    except Exception:  # an object with a lock, a file
        return map_tensors(place, value)


def _held_tensors(place: Callable[[Tensor], Tensor], value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the tensors below an object and what stands in for each; a module stands for itself."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        held = waiting.pop()
        if id(held) in seen or isinstance(held, (str, bytes, int, float, type(None), type)):
            continue
        seen[id(held)] = held
        if isinstance(held, Tensor):
            yield held, place(held)
        elif isinstance(held, nn.Module):
            yield held, held
        elif isinstance(held, Mapping) and python_module(type(held)) in ("builtins", "collections"):
            waiting += list(held.values())
        elif isinstance(held, (list, tuple, set, frozenset, collections.deque)):
            waiting += list(held)
        elif not callable(held) or isinstance(held, Mapping) or hasattr(held, "__dict__"):
            attributes = getattr(held, "__dict__", {})
            waiting += [*attributes.values(), *(v for _, v in slot_values(held))]
            waiting += list(dict.values(held)) if isinstance(held, dict) else []


def iter_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in `value`, in order."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list, dict):  # most are, and PyTorch's own trees are slow
        for item in value.values() if type(value) is dict else value:
            if isinstance(item, Tensor):
                yield item
            elif item is not None and type(item) not in _PLAIN:
                yield from iter_tensors(item)
    else:
        for _, tensor in named_tensors(value):
            yield tensor


def named_tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor) pairs; paths join keys and positions with dots."""
    if isinstance(value, Tensor):
        yield prefix, value
        return
    if value is None or isinstance(value, (int, float, str, bool)):
        return
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        name = ".".join([*([prefix] if prefix else []), *(_key(k) for k in path)])
        if isinstance(leaf, Tensor):
            yield name, leaf
        held = leaf if isinstance(leaf, Mapping) else _fields(leaf)
        for key, item in held.items():
            yield from named_tensors(item, f"{name}.{key}" if name else str(key))


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_differentiable(tensor: Tensor) -> bool:
    """Whether a gradient with respect to a tensor of this dtype exists."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def summable(tensor: Tensor) -> Tensor:
    """Return a tensor in a dtype that sums can be taken in: integers and 8-bit floats are converted."""
    if tensor.is_complex() or (tensor.dtype.is_floating_point and tensor.element_size() > 1):
        return tensor
    return tensor.float() if tensor.dtype.is_floating_point else tensor.to(wide_dtype(tensor.device))


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype of a device: float64, or float32 on MPS, which lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def shapes(value: Any) -> str:
    """Return the shapes and dtypes of the tensors in `value`, for an error message."""
    found = []
    for name, tensor in named_tensors(value):
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(f"{name + ': ' if name else ''}{dtype}{list(tensor.shape)}")
    return ", ".join(found) or f"no tensor ({type(value).__name__})"


def same_device(model: torch.nn.Module) -> torch.device | None:
    """Return the one device of the model's parameters, or None if there are several or none."""
    devices = {p.device for p in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def map_floats(function: Any, value: Any) -> Any:
    """Return `value` with `function(position, tensor)` applied to every floating-point tensor in it.

    Packed sequences are gone into as well. Positions count from 0, in a fixed order.
    """
    position = -1

    def apply(tensor: Tensor) -> Tensor:
        nonlocal position
        if not tensor.dtype.is_floating_point:
            return tensor
        position += 1
        return function(position, tensor)

    def leaf(value: Any) -> Any:
        if isinstance(value, PackedSequence):
            return value._replace(data=apply(value.data))
        return map_tensors(apply, value)

    if isinstance(value, (Tensor, PackedSequence)):  # most are one, and trees are slow
        return leaf(value)
    return pytree.tree_map(leaf, value, is_leaf=lambda v: isinstance(v, PackedSequence))


def floats(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in `value`, in the order of `map_floats`."""
    found: list[Tensor] = []

    def note(_: int, tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_floats(note, value)
    return found


def replaced(value: Any, positions: tuple[int, ...], new: Tensor) -> Any:
    """Return `value` with `new` in place of the floating-point tensors at `positions`."""
    return map_floats(lambda position, old: new if position in positions else old, value)
