"""Everything that a run could have changed, as plain values that compare."""

from __future__ import annotations

import collections
import random
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SLOT = types.MemberDescriptorType
_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device)


class Seen(dict[int, str]):
    """The paths to what was met, by id; what was met is kept alive, so that no id is used again."""

    def add(self, value: Any, path: str) -> None:
        self[id(value)] = path
        vars(self).setdefault("alive", []).append(value)


def content(value: Any, seen: Seen | None = None, path: str = "") -> Any:
    """Return what a value holds, to any depth, with the identity of every mutable object in it.

    What was met before is told by the path to it alone, so that cycles end.
    """
    seen = Seen() if seen is None else seen
    if isinstance(value, _ATOMS):
        return (type(value).__name__, repr(value))
    if id(value) in seen:
        return ("seen", seen[id(value)])
    seen.add(value, path)
    if isinstance(value, Tensor):
        return _tensor(value, seen, path)
    if isinstance(value, np.ndarray):
        return ("array", id(value), value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, torch.Generator):
        return ("generator", id(value), bytes(value.get_state().numpy()))
    if isinstance(value, np.random.Generator):
        return ("generator", id(value), repr(value.bit_generator.state))
    if isinstance(value, np.random.RandomState):
        return ("generator", id(value), repr([np.asarray(v).tolist() for v in value.get_state()]))
    if isinstance(value, random.Random):
        return ("generator", id(value), hash(value.getstate()))
    if isinstance(value, dict):
        keys = [id(k) if isinstance(k, Tensor) else repr(k) for k in value]
        items = [(k, content(v, seen, f"{path}[{k!r}]")) for k, v in zip(keys, value.values(), strict=True)]
        own = getattr(value, "__dict__", None)
        return ("dict", id(value), items, content(own, seen, f"{path}.__dict__") if own else ())
    if isinstance(value, (list, tuple, collections.deque)):
        return (
            type(value).__name__,
            id(value),
            [content(v, seen, f"{path}[{i}]") for i, v in enumerate(value)],
        )
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, id(value), sorted(map(repr, value)))
    if isinstance(value, types.FunctionType):  # of what it refers to, modules alone
        cells = [c.cell_contents for c in value.__closure__ or () if isinstance(c.cell_contents, nn.Module)]
        return ("function", id(value), [content(m, seen, f"{path}.cell") for m in cells])
    slots = [m for k in type(value).__mro__ for m in vars(k).values() if isinstance(m, _SLOT)]
    if slots and not type(value).__module__.startswith(("torch", "builtins", "collections")):
        held = [content(_slot(m, value), seen, f"{path}.{m.__name__}") for m in slots]
        return ("slots", id(value), held)
    inner = getattr(value, "__dict__", None)
    if isinstance(inner, dict) and not isinstance(value, type):
        return (type(value).__name__, id(value), content(inner, seen, f"{path}.__dict__"))
    return (type(value).__name__, id(value))


def _slot(member: Any, value: Any) -> Any:
    try:
        return member.__get__(value)
    except AttributeError:
        return None


def _tensor(value: Tensor, seen: Seen, path: str) -> Any:
    held = value.detach()
    if held.is_nested:
        return (
            "nested",
            id(value),
            [_tensor(part, seen, f"{path}[{i}]")[2:5] for i, part in enumerate(held.unbind())],
        )
    parts = [held._indices(), held._values()] if held.is_sparse else [held]
    # a clone, since a tensor that was once seen by NumPy can no longer be resized
    raw = [p.contiguous().clone().view(-1).view(torch.uint8).numpy().tobytes() for p in parts]
    grad = content(value.grad, seen, f"{path}.grad") if value.is_leaf else None
    own = content(vars(value), seen, f"{path}.__dict__")
    return ("tensor", id(value), tuple(value.shape), str(value.dtype), raw, value.requires_grad, grad, own)


def process() -> dict[str, Any]:
    """Return the global states: random numbers, grad mode, default dtype."""
    return {
        "torch": bytes(torch.get_rng_state().numpy()),
        "numpy": repr([np.asarray(v).tolist() for v in np.random.get_state()]),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
    }


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Return everything of a model, an optimizer and the process that must be as before."""
    found = {"model": content(model), "process": process()}
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        found[f"version of {name}"] = p._version
    if optimizer is not None:
        states = [(id(p), content(state)) for p, state in optimizer.state.items()]
        found["optimizer"] = (states, content(optimizer.param_groups), sorted(vars(optimizer)))
    return found


def difference(a: Any, b: Any, path: str = "") -> str:
    """Return where two snapshots differ first, '' if nowhere."""
    if type(a) is type(b) and isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{path}/{k}"))), "")
    if type(a) is type(b) and isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{path}: {str(a)[:300]} became {str(b)[:300]}"
        return next(
            (d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := difference(x, y, f"{path}/{i}"))),
            "",
        )
    return "" if a == b else f"{path}: {str(a)[:200]} became {str(b)[:200]}"
