"""Taps: for the length of a context, every module's `forward` is led past a recorder.

The `forward` in a module's instance dict is swapped and put back, exceptions included; the class, the
module's hooks and `__call__` are not touched, so the user's own hooks run as ever.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gradflow.functional.recorder import Recorder

_busy: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_busy_guard = threading.Lock()


@contextlib.contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Let one thread at a time analyse a model; another one waits."""
    with _busy_guard:
        lock = _busy.setdefault(model, threading.RLock())
    with lock:
        yield


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Let models of `torch.compile` run as they were written: a compiler cannot see past our taps."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def tapped(recorder: Recorder) -> Iterator[None]:
    """Lead the calls of the recorder's modules past it, for the length of the context."""
    missing = object()
    swapped: list[tuple[nn.Module, Any]] = []
    try:
        for name, module in recorder.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            swapped.append((module, module.__dict__.get("forward", missing)))
            module.__dict__["forward"] = _tapped_forward(recorder, name, module.forward)
        yield
    finally:
        for module, old in swapped:
            if old is missing:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def _tapped_forward(recorder: Recorder, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def tapped_forward(*args: Any, **kwargs: Any) -> Any:
        if not recorder.active:
            return forward(*args, **kwargs)
        return recorder.run(name, forward, args, kwargs)

    return tapped_forward
