"""Threads: one run at a time in a process, on models as they were written, and one thread a measurement.

NOTE [One thread a measurement]
What is measured is put down to layers by the order of their calls, by the numbers that autograd gives to the
nodes it makes, and by the transforms that are active. All three are kept by thread: calls of several threads
would be nested in one another at random, numbers would repeat, and a transform would take what another thread
computes for a constant, with a derivative of zero. So a call in another thread raises there, and again where
the measurement ends, in case the model has swallowed it: there is no result that could be wrong. Autograd has
threads of its own, in which a checkpoint runs its layers again; they work while the measuring thread waits
for them, and are left alone.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from gradflow.errors import OtherThreadError
from gradflow.functional.model.layers import led
from gradflow.functional.torch_private import in_reverse_pass, outside_transforms

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
def unless_busy() -> Iterator[bool]:
    """Be the one thread that runs, if no other does; tells whether that is so, and waits for nobody."""
    free = _running.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            _running.release()


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


@attrs.define(eq=False)
class OneThread:
    """The thread that measures, from which calls are expected; see NOTE [One thread a measurement]."""

    ident: int = attrs.field(factory=threading.get_ident)
    name: str = attrs.field(factory=lambda: threading.current_thread().name)
    error: OtherThreadError | None = None  # the first refusal

    def check(self, layer: str, kind: str) -> None:
        """Check that a layer is called in this thread, or in one of autograd's own.

        Args:
            layer: its name.
            kind: its class.

        Raises:
            OtherThreadError: if it is not.
        """
        if threading.get_ident() == self.ident or in_reverse_pass():
            return
        error = OtherThreadError.at(layer, kind, threading.current_thread().name, self.name)
        self.error = self.error or error
        raise error

    @contextlib.contextmanager
    def insisted(self) -> Iterator[None]:
        """Raise at the end of the context what was raised in another thread, if anything was."""
        try:
            yield
        except BaseException as error:
            if self.error is not None and error is not self.error:
                raise self.error from error
            raise
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def one_thread(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Refuse calls of modules in other threads, for the length of the context.

    Args:
        modules: by name.

    Raises:
        OtherThreadError: at the end, if there was such a call.
    """
    thread = OneThread()

    def check(name: str) -> None:
        thread.check(name, type(modules[name]).__name__)

    with thread.insisted(), led(modules, check):
        yield
