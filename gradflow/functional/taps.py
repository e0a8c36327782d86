"""Taps: for the length of a context, every module's `forward` is led past a recorder.

The `forward` in a module's instance dict is swapped and put back, exceptions included; the class, the
module's hooks and `__call__` are not touched, so the user's own hooks run as ever.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.functional.recorder import Recorder

# NOTE [One run at a time]
# A run depends on states that all threads of a process share: the random generators of torch, numpy and
# Python, the default dtype, the stance of `torch.compile`, and the very modules of the model, into which
# its working copies are swapped. Two runs at once would draw each other's random numbers and put back each
# other's states. So one thread at a time runs, whatever its model, and the others wait; a run within a run
# (of a loss that analyses something itself) goes on. What other threads do with those states in the
# meantime, or with the model, cannot be kept apart: do not train or call a model while it is analysed.
_running = threading.RLock()


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Let one thread at a time run; see NOTE [One run at a time]."""
    with _running:
        yield


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Let models of `torch.compile` run as they were written: a compiler cannot see past our taps."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def tapped(recorder: Recorder) -> Iterator[None]:
    """Lead the calls of the recorder's modules past it, for the length of the context.

    The recorder is also told when a hook is put on a tensor.
    """
    missing = object()
    swapped: list[tuple[nn.Module, Any]] = []
    register_hook = Tensor.register_hook

    @functools.wraps(register_hook)
    def told_register_hook(self: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        recorder.hooked = True
        return register_hook(self, hook)

    try:
        Tensor.register_hook = told_register_hook
        for name, module in recorder.modules.items():
            swapped.append((module, module.__dict__.get("forward", missing)))
            module.__dict__["forward"] = _tapped_forward(recorder, name, module.forward)
        yield
    finally:
        Tensor.register_hook = register_hook
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
