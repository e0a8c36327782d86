"""The purity contract: whatever a run does, everything of the user's is put back bit for bit.

What may be changed by running a model: its module attributes (counters, stored activations, modes), the
global random states, the grad mode and the default dtype. Parameters and buffers are never touched: the
run works on copies that are swapped in.
"""

from __future__ import annotations

import collections
import contextlib
import random
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradflow.functional.torch_private import is_view, num_writes, stores


@contextlib.contextmanager
def preserved(*modules: nn.Module) -> Iterator[None]:
    """Put back, on any exit, the modules' attributes and the process's random and global states."""
    saved_modules = ModuleState(modules)
    saved_random = RandomState()
    grad_enabled, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad_enabled)
        torch.set_default_dtype(dtype)
        saved_random.restore()
        saved_modules.restore()


class RandomState:
    """The random states of torch (every initialised device), numpy and Python.

    Args:
        torch: whether torch's are remembered.
        host: whether numpy's and Python's are.
    """

    def __init__(self, *, torch: bool = True, host: bool = True) -> None:
        self._torch = _torch_states() if torch else None
        self._host = (np.random.get_state(), random.getstate()) if host else None

    def torch_moved(self) -> bool:
        """Whether any of torch's states has moved on since; False if they were not remembered."""
        if self._torch is None:
            return False
        now = _torch_states()
        return len(now) != len(self._torch) or not all(map(torch.equal, now, self._torch))

    def host_moved(self) -> bool:
        """Whether numpy's or Python's state has moved on since; False if they were not remembered."""
        if self._host is None:
            return False
        now: Any = np.random.get_state()
        then: Any = self._host[0]
        return now[2] != then[2] or not np.array_equal(now[1], then[1]) or random.getstate() != self._host[1]

    def restore(self) -> None:
        """Put the states back."""
        if self._torch is not None:
            _set_torch_states(self._torch)
        if self._host is not None:
            np.random.set_state(self._host[0])
            random.setstate(self._host[1])


def _torch_states() -> list[Tensor]:
    """Return the state of the CPU, then those of the CUDA devices that are in use, then that of MPS."""
    cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else []
    mps = [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else []
    return [torch.get_rng_state(), *cuda, *mps]


def _set_torch_states(states: list[Tensor]) -> None:
    cpu, *others = states
    torch.set_rng_state(cpu)
    if torch.backends.mps.is_available():
        torch.mps.set_rng_state(others.pop())
    if others:
        torch.cuda.set_rng_state_all(others)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def seed_all(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


# NOTE [State outside buffers]
# A module may keep a counter, a list of activations, a plain tensor or an object of its own class. All are
# reached from its `__dict__`: shallow values are put back by restoring the dict; containers, tensors, arrays,
# generators and objects of user classes that it refers to are remembered with their contents and restored in
# place, so that other references to them see the old contents too. Parameters and buffers are skipped (they
# are swapped for copies) unless an attribute holds them as well; so are modules (each is remembered on its
# own), classes and functions.

_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size)
_LARGE = 10_000
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


class ModuleState:
    """All that the modules below some roots hold outside their parameters and buffers.

    Args:
        roots: the modules.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._seen: dict[int, Any] = {}  # keeps what it has seen alive, so that ids stay unique
        self._undo: list[Any] = []
        self._stores: set[int] = set()  # dicts of parameters and buffers: the dicts alone are remembered
        for root in roots:
            for module in root.modules():
                self._remember_module(module)

    def restore(self) -> None:
        """Put it back; may be done again."""
        for undo in reversed(self._undo):
            undo()

    def _new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = value
        return True

    def _remember_module(self, module: nn.Module) -> None:
        if not self._new(module):
            return
        parameters, buffers = stores(module)
        self._stores |= {id(parameters), id(buffers)}
        flags = [(p, p.requires_grad) for p in parameters.values() if p is not None]
        self._undo.append(lambda: [p.requires_grad_(flag) for p, flag in flags if p.requires_grad != flag])
        self._remember_dict(module.__dict__)

    def _remember_dict(self, mapping: dict[Any, Any]) -> None:
        saved = dict(mapping)

        def undo() -> None:
            if len(mapping) != len(saved) or any(
                k not in mapping or mapping[k] is not v for k, v in saved.items()
            ):
                mapping.clear()
                mapping.update(saved)

        self._undo.append(undo)
        if len(saved) > _LARGE or id(mapping) in self._stores:
            return
        for value in saved.values():
            self._remember(value)

    def _remember(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            for module in value.modules():
                self._remember_module(module)
            return
        if isinstance(value, (_ATOMS, _CODE)) or not self._new(value):
            return
        if isinstance(value, Tensor):
            self._remember_tensor(value)
        elif isinstance(value, dict):
            self._remember_dict(value)
        elif isinstance(value, (list, collections.deque, set, bytearray)):
            self._remember_container(value)
        elif isinstance(value, (tuple, frozenset)):
            for item in value:
                self._remember(item)
        else:
            self._remember_object(value)

    def _remember_tensor(self, value: Tensor) -> None:
        if value.is_meta or value.is_inference():
            return
        saved, version = value.detach().clone(), num_writes(value)
        leaf, flag, grad = value.is_leaf, value.requires_grad, value.grad if value.is_leaf else None

        def undo() -> None:
            if leaf and not value.is_leaf and not is_view(value):
                value.detach_()  # an operation in place had joined it to a graph
            if value.is_leaf:
                if value.requires_grad != flag:
                    value.requires_grad_(flag)
                value.grad = grad
            same = value.shape == saved.shape and value.dtype == saved.dtype
            if num_writes(value) != version or not same or not _same_bits(value, saved):
                with torch.no_grad():
                    if same:
                        value.copy_(saved)
                    else:
                        value.data = saved.clone()

        self._undo.append(undo)

    def _remember_container(self, value: Any) -> None:
        saved = list(value)

        def undo() -> None:
            if len(value) != len(saved) or any(a is not b for a, b in zip(value, saved, strict=True)):
                value.clear()
                value.update(saved) if isinstance(value, set) else value.extend(saved)

        self._undo.append(undo)
        if not isinstance(value, bytearray) and len(saved) <= _LARGE:  # a data set, not state
            for item in saved:
                self._remember(item)

    def _remember_object(self, value: Any) -> None:
        if isinstance(value, np.ndarray):
            saved = value.copy()
            self._undo.append(lambda: np.copyto(value, saved) if value.flags.writeable else None)
        elif isinstance(value, np.random.RandomState):
            legacy = value.get_state()
            self._undo.append(lambda: value.set_state(legacy))
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", bits))
        elif isinstance(value, random.Random):
            internal = value.getstate()
            self._undo.append(lambda: value.setstate(internal))
        elif _is_users(value):
            self._remember_slots(value)
            if isinstance(attributes := getattr(value, "__dict__", None), dict):
                self._remember_dict(attributes)

    def _remember_slots(self, value: Any) -> None:
        """Remember attributes without a dict, as classes of `attrs` and `dataclass(slots=True)` keep them."""
        declared = [vars(cls).get("__slots__", ()) for cls in type(value).__mro__]
        names = [n for names in declared for n in ([names] if isinstance(names, str) else names)]
        saved = {n: getattr(value, n) for n in names if not n.startswith("__") and hasattr(value, n)}

        def undo() -> None:
            for name, old in saved.items():
                if getattr(value, name, None) is not old:
                    object.__setattr__(value, name, old)

        if saved:
            self._undo.append(undo)
        for item in saved.values():
            self._remember(item)


def _is_users(value: Any) -> bool:
    return not type(value).__module__.startswith(("torch.", "networkx."))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal bit for bit, where PyTorch can compare their kind."""
    if a.layout is torch.sparse_coo:
        return torch.equal(a._indices(), b._indices()) and _same_bits(a._values(), b._values())
    return a.layout is not torch.strided or torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    """Return a view in which NaN equals NaN, where the dtype has one of the same size."""
    same = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    tensor = tensor.detach()
    if tensor.is_complex() or tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor
    return tensor.view(same[tensor.element_size()]) if tensor.dim() else tensor.reshape(1)
