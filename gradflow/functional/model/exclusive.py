"""What all runs of a process share: one at a time, on models as they were written."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from gradflow.functional.torch_private import outside_transforms

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


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Let one thread at a time measure plain numbers, outside of the transforms of `torch.func` around it."""
    with exclusive(), outside_transforms():
        yield


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Let models of `torch.compile` run as they were written: a compiler cannot see past our taps."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
