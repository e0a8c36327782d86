"""State that modules hold besides their swapped parameters and buffers: remembered, and put back after a run.

NOTE [State outside buffers]
A module may keep a counter, a list of activations, a plain tensor, a teacher in a list, an optimizer of its
own, an object of its own class. All are reached from its `__dict__`. Dicts, containers and slots are put back
as they were, in place, so that other references to them see the old contents too; tensors, arrays and
generators are remembered with their values. The parameters and buffers of the modules that a run works on
are swapped for copies: their values are remembered only where something else holds them as well. Those of
any other module that is reached, through a list, an object or a closure, are not swapped but remembered.

NOTE [What is left alone]
A function may refer to anything, and often to what is meant to see the run from outside: the list that a
hook fills. So of what functions, bound methods and partials refer to, modules, optimizers, tensors and
generators are remembered, and nothing else. Also left alone are threads, queues, files and loggers, which
others use during a run; classes and Python modules; data sets (containers above some size); and objects of
PyTorch's own that hold no state of the user's.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradflow.functional.model.closures import cells_of
from gradflow.functional.model.undo import (
    REFILL,
    TensorState,
    Undo,
    attempt,
    base_of,
    entries,
    generator_undo,
    holds,
    kind_of,
    may_hold_state,
    refill_dict,
    restore_array,
    restore_container,
    restore_flags,
    restore_slots,
    same_bits,
    slot_value,
    slot_values,
    slots_of,
)
from gradflow.functional.torch_private import stores

_ATOMS = frozenset(
    {int, float, complex, str, bytes, bool, type(None), type, slice, range, type(Ellipsis)}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
    | {types.BuiltinFunctionType, types.ModuleType, types.CodeType, types.GenericAlias}
)
_NOT_KEYED = (nn.Module, Tensor, torch.optim.Optimizer, np.ndarray)
_CODE = (types.FunctionType, types.MethodType, functools.partial)
_CONTAINERS = (list, tuple, set, frozenset, collections.deque)
_PLAIN = (dict, collections.OrderedDict, set)
_HELD_AS_KEYS = (Tensor, nn.Module, tuple)
_LARGE = 10_000


class ModuleState:
    """All that modules hold outside of their parameters and buffers; see NOTE [State outside buffers].

    Args:
        swapped: modules that a run works on, whose parameters and buffers it swaps for copies.
        also: what else a run calls, such as a loss: remembered is what it holds.
        earlier: what was remembered before; tensors that are as they were then share its copies.
    """

    def __init__(
        self, swapped: Sequence[nn.Module], also: Sequence[Any] = (), earlier: ModuleState | None = None
    ) -> None:
        self._tensors: dict[int, TensorState] = {}
        self._earlier = {} if earlier is None else earlier._tensors
        self._seen: dict[int, Any] = {}  # keeps what it has seen alive, so that ids stay unique
        self._empty: list[dict[Any, Any] | set[Any]] = []
        self._dicts: list[tuple[dict[Any, Any], list[Any], list[Any]]] = []
        self._undo: list[tuple[str, Undo]] = []
        self._waiting: list[tuple[Any, bool]] = []  # values, and whether a function alone refers to them
        for root in swapped:
            for module in root.modules():
                self._remember_swapped(module)
        self._waiting += [(value, False) for value in also]
        while self._waiting:
            self._remember(*self._waiting.pop())

    def restore(self) -> list[str]:
        """Put back all that can be, and return what could not; may be called again."""
        failures: list[str] = []
        for held in self._empty:
            if held:
                base = set if isinstance(held, set) else base_of(held)
                attempt(failures, kind_of(held), functools.partial(base.clear, held))
        for mapping, keys, values in self._dicts:
            if not holds(mapping, keys, values):
                attempt(failures, kind_of(mapping), functools.partial(refill_dict, mapping, keys, values))
        for kind, undo in reversed(self._undo):
            attempt(failures, kind, undo)
        return failures

    # -------------------------------------------------------------------------------- what is remembered

    def _new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = value
        return True

    def _remember(self, value: Any, loose: bool) -> None:
        """Remember a value; `loose` where a function alone refers to it: see NOTE [What is left alone]."""
        kind = type(value)
        if kind in _ATOMS or (loose and not _has_state(value)) or not self._new(value):
            return
        try:
            self._remember_kind(value)
        except Exception:  # an object that cannot even be looked at
            return

    def _remember_kind(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._remember_dict(vars(value))
        elif isinstance(value, Tensor):
            self._remember_tensor(value)
        elif isinstance(value, _CODE):
            self._waiting += [(held, True) for held in _referred_to(value)]
        elif isinstance(value, dict):
            self._remember_dict(value)
            self._remember_attributes(value)
        elif isinstance(value, (*_CONTAINERS, bytearray)):
            self._remember_container(value)
            self._remember_attributes(value)
        elif isinstance(value, np.ndarray):
            self._remember_array(value)
        elif (undo := generator_undo(value)) is not None:
            self._undo.append((kind_of(value), undo))
        elif may_hold_state(value):
            self._remember_attributes(value)

    def _remember_swapped(self, module: nn.Module) -> None:
        """Remember a module that is run with copies of its tensors; of these, all but the values."""
        if not self._new(module):
            return
        own = stores(module)
        for store in own:
            if not isinstance(store, dict):  # TorchScript's, which are written through to C++
                continue
            self._seen[id(store)] = store
            for tensor in self._keep_dict(store):
                if tensor is not None and (held := vars(tensor)):
                    self._waiting.append((held, False))
        flags = [(p, p.requires_grad, p.grad) for p in own[0].values() if p is not None]
        if flags:
            self._undo.append((kind_of(module), functools.partial(restore_flags, flags)))
        self._remember_dict(vars(module))

    def _keep_dict(self, mapping: dict[Any, Any]) -> list[Any]:
        """Remember the entries of a dict, and return its values."""
        if not mapping:
            self._empty.append(mapping)
            return []
        keys, values = entries(mapping)
        self._dicts.append((mapping, keys, values))
        return values

    def _remember_dict(self, mapping: dict[Any, Any]) -> None:
        values, seen = self._keep_dict(mapping), self._seen
        if not 0 < len(values) <= _LARGE:
            return
        for value in values:
            kind = type(value)
            if kind in _ATOMS or (key := id(value)) in seen:
                continue
            if kind in _PLAIN and not value:  # as most a module has are: those of its hooks
                seen[key] = value
                self._empty.append(value)
            else:
                self._waiting.append((value, False))
        for held in mapping:
            if type(held) is not str and isinstance(held, _HELD_AS_KEYS):
                self._waiting.append((held, False))

    def _remember_container(self, value: Any) -> None:
        base: Any = next(kind for kind in (*_CONTAINERS, bytearray) if isinstance(value, kind))
        saved = list(base.__iter__(value))
        if base in REFILL:
            self._undo.append((kind_of(value), functools.partial(restore_container, value, base, saved)))
        if base is not bytearray and len(saved) <= _LARGE:  # else a data set, not state
            self._waiting += [(item, False) for item in saved if type(item) not in _ATOMS]

    def _remember_attributes(self, value: Any) -> None:
        """Remember the attributes of an object, those in slots included."""
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and self._new(attributes):
            self._remember_dict(attributes)
        slots = slots_of(type(value))
        saved = [slot_value(slot, value) for slot in slots]
        if slots:
            self._undo.append((kind_of(value), functools.partial(restore_slots, value, slots, saved)))
            self._waiting += [(item, False) for item in saved]

    def _remember_tensor(self, value: Tensor) -> None:
        if value.is_meta or value.is_inference():
            return
        leaf, grad = value.is_leaf, value.grad if value.is_leaf else None
        state = TensorState(value, value.detach(), self._saved(value), leaf, grad)
        self._tensors[id(value)] = state
        self._undo.append((kind_of(value), state.restore))
        self._waiting.append((grad, False))
        if self._new(attributes := vars(value)):
            self._remember_dict(attributes)

    def _saved(self, value: Tensor) -> Tensor:
        """Return a copy of a tensor: the earlier one, if it is the same bit for bit."""
        earlier = self._earlier.get(id(value))
        plain = value.layout is torch.strided and not value.is_nested
        if plain and earlier is not None and earlier.value is value and same_bits(value, earlier.saved):
            return earlier.saved
        return value.detach().clone()

    def _remember_array(self, value: np.ndarray) -> None:
        if isinstance(value, np.memmap):  # a file
            return
        saved = value.copy()
        self._undo.append(
            (kind_of(value), functools.partial(restore_array, value, saved, value.flags.writeable))
        )
        if value.dtype.hasobject and value.size <= _LARGE:
            self._waiting += [(item, False) for item in value.flat]


def keyed_by(model: nn.Module, ids: Container[int]) -> list[Any]:
    """Return the dicts and sets that a model's modules hold with tensors for keys, or with their ids.

    Those of an optimizer are left out, since its parameter groups go on holding the original tensors.

    Args:
        model: the model.
        ids: of the tensors that count.
    """
    found: list[Any] = []
    seen: dict[int, Any] = {}
    waiting = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if (kind := type(value)) not in _ATOMS and (kind not in _PLAIN or value)
    ]
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in _ATOMS or (kind in _PLAIN and not value):
            continue
        if isinstance(value, _NOT_KEYED) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, (dict, *_CONTAINERS)):
            if not 0 < len(value) <= _LARGE:
                continue
            if isinstance(value, (dict, set)) and any(_key_id(key) in ids for key in value):
                found.append(value)
            waiting += base_of(value).values(value) if isinstance(value, dict) else list(value)
        elif may_hold_state(value):
            waiting += [*getattr(value, "__dict__", {}).values(), *(v for _, v in slot_values(value))]
    return found


def rekey(container: Any, new: Mapping[int, Tensor]) -> None:
    """Put other tensors, or their ids, in the place of those that are the keys of a dict or set.

    Args:
        container: the dict or set; its order is kept.
        new: the tensors by the ids of those whose places they take.
    """

    def changed(key: Any) -> Any:
        tensor = new.get(_key_id(key))
        return key if tensor is None else id(tensor) if type(key) is int else tensor

    if isinstance(container, set):
        keys = [changed(key) for key in container]
        set.clear(container)
        set.update(container, keys)
    else:
        keys, values = entries(container)
        refill_dict(container, [changed(key) for key in keys], values)


def _key_id(key: Any) -> int:
    return key if type(key) is int else id(key)


# ------------------------------------------------------------------------------ what functions refer to


def _has_state(value: Any) -> bool:
    """Whether a value that a function refers to is remembered."""
    kinds = (nn.Module, Tensor, torch.optim.Optimizer, types.FunctionType, types.MethodType)
    return isinstance(value, kinds) or generator_undo(value) is not None


def _referred_to(code: Any) -> Iterator[Any]:
    """Yield what a function, bound method or partial refers to, and the items of containers among it."""
    if isinstance(code, types.MethodType):
        held: list[Any] = [code.__self__, code.__func__]
    elif isinstance(code, functools.partial):
        held = [code.func, *code.args, *code.keywords.values()]
    else:
        held = [*(code.__defaults__ or ()), *(code.__kwdefaults__ or {}).values(), *vars(code).values()]
        held += [value for _, value in cells_of(code)]
    for value in held:
        yield value
        if isinstance(value, dict) and len(value) <= _LARGE:
            yield from value.values()
        elif isinstance(value, (list, tuple)) and len(value) <= _LARGE:
            yield from value
