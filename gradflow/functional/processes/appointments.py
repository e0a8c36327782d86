"""A step at which processes are to meet, which one of them has asked for, without an exchange until then.

NOTE [Who asks in time]
The loss of a pipeline is known to its last stage alone, and all stages must look at the same step. So the
last one leaves in the store the number of the step after the next, and every process looks there at each of
its calls, which is a question to the store and no collective. All find it in time: a stage ends the passes
of a step when the gradients of that step have come back to it, and those left the last stage after its call
in the step before. So in a step all know what was asked for two steps earlier, wherever in a step they call,
and it makes no difference that some learn of it sooner.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from gradflow.functional.torch_private import default_store

AHEAD = 2  # steps, after which all know


class Appointment:
    """What processes have asked one another for since they met last.

    A store that does not answer ends no training: then nobody asks for anything.

    Args:
        ranks: of the processes.
        since: what tells this time from others, alike on all.
    """

    def __init__(self, ranks: Sequence[int], since: str) -> None:
        names = hashlib.sha256(repr(tuple(ranks)).encode()).hexdigest()[:16]
        self._store = PrefixStore(f"gradflow/appointments/{names}/{since}", default_store())

    def ask(self, step: int) -> None:
        """Ask, in a step, for the one after the next; the first who asks is heard."""
        with contextlib.suppress(RuntimeError):
            if self._store.add("asked", 1) == 1:
                self._store.set("step", str(step + AHEAD))
                self._store.check(["step"])  # the answer comes when it is there

    def since(self, step: int) -> int | None:
        """Return the step in which somebody asked for this one, or one before it; None if nobody did."""
        found: Any = None
        with contextlib.suppress(RuntimeError):
            found = int(self._store.get("step")) if self._store.check(["step"]) else None
        return found - AHEAD if found is not None and found <= step else None

    def over(self) -> None:
        """Forget what was asked for: all have met."""
        with contextlib.suppress(RuntimeError):
            for key in ("step", "asked"):
                self._store.delete_key(key)
