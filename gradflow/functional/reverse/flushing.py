"""Subnormal numbers taken for zeros by the processor, for a while.

NOTE [The setting of a thread]
`torch.set_flush_denormal` sets a flag of the processor, for the thread that calls it, and no function tells
how it stands; a product that is subnormal does. Worker threads keep what they had when they were started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def flushes() -> bool:
    """Whether the processor is set to take subnormal results for zero, as `set_flush_denormal` does.

    >>> flushes()
    False
    """
    small = torch.full((1,), 1e-38, dtype=torch.float32, device="cpu")
    return not bool((small * 0.01).view(torch.int32).any())


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    """Have subnormal numbers taken for zeros in this thread, where the processor can; put back on exit.

    >>> with flushing():
    ...     inside = flushes()
    >>> flushes()
    False
    """
    before = flushes()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
