"""How a process that fails, or is gone, is told of."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def is_broken_line(error: BaseException) -> bool:
    """Whether an error may be that of a collective whose other end is gone."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    words = ("closed by peer", "Timed out", "timed out", "gloo", "NCCL", "Broken pipe", "reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def falls_silent(
    store: Any, rank: int, other: int, stop: threading.Event, *, silence: float, beat: float
) -> bool:
    """Give signs of life and watch those of another process; return whether these have stayed away.

    Args:
        store: of the analysis, which both write to.
        rank: of this process among those of the analysis.
        other: of the one that is watched.
        stop: set when the analysis is over.
        silence: seconds without a sign after which a process is taken for dead.
        beat: seconds between two signs.
    """
    last, since = 0, time.monotonic()
    while not stop.is_set():
        store.add(f"life/{rank}", 1)
        now = store.add(f"life/{other}", 0)
        if now != last or not now:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > silence and not store.check(["over"]):
            return True
        stop.wait(beat)
    return False


def take_leave(store: Any, size: int, *, patience: float) -> None:
    """Wait until the processes that live have heard why the analysis ends: who leaves may hold the store.

    Args:
        store: of the analysis, in which `lost` counts the processes that are gone.
        size: how many processes there were.
        patience: seconds after which those are left alone that are held up in a collective.
    """
    end = time.monotonic() + patience
    with contextlib.suppress(RuntimeError):  # the store is gone
        heard = store.add("heard", 1)
        while heard < size - store.add("lost", 0) and time.monotonic() < end:
            time.sleep(0.02)
            heard = store.add("heard", 0)


def gone(rank: int, silence: float) -> str:
    """Return what is said of a process that has given no sign of life for so many seconds."""
    return (
        f"process {rank} of the analysis is gone: it gave no sign of life for {silence:.0f} seconds, as one "
        "that was killed does (by hand, or by the system for lack of memory). The analysis ends on all "
        "processes."
    )


def some(ranks: Sequence[int]) -> str:
    """Return ranks in words, four at most."""
    shown = ", ".join(map(str, ranks[:4]))
    return shown + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
