"""Recurrent layers that are found by themselves: what `gradflow.automatic` measures of them.

NOTE [Cheaper through time]
A recurrent layer is unrolled beside the model, step by step, which takes longer than its own kernel. So where
nobody has asked for it, it is measured at the first and the last step alone, on `SAMPLES` samples that stand
for all, with the eigenvalues of the transition at one moment and without Lyapunov exponent and rms of the
states, on which no verdict rests. Of a layer that is called many times in a step, the first `CALLS` calls are
measured.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from gradflow.functional.measurement import Session, some_of
from gradflow.functional.recurrent.measurement import RecurrenceSession
from gradflow.functional.recurrent.numbers import Budget, CallNumbers
from gradflow.functional.tap.calls import Call

SAMPLES, CALLS = 8, 4
TOLERANCE = 0.05  # of the spectral radius, which no verdict rests on: off by 2 percent at most of 9


@attrs.frozen
class AutomaticRecurrence:
    """Like `recurrence()`, where the first step runs a recurrent layer; see NOTE [Cheaper through time]."""

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return _AutomaticSession(
            modules, Budget(samples=SAMPLES, points=1, steps=0, states=False, tolerance=TOLERANCE)
        )


class _AutomaticSession(RecurrenceSession):
    def __init__(self, modules: Mapping[str, nn.Module], budget: Budget) -> None:
        super().__init__(modules, budget)
        self._thinned: dict[str, None] = {}
        self._left_out: set[str] = set()

    def listens(self, *, end: bool) -> bool:
        return end and bool(self._keys)

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if isinstance(self._modules[call.module], nn.RNNBase):
            calls = collections.Counter(heard.call.module for heard in self._fused.values())
            if calls[call.module] >= CALLS:
                self._left_out.add(call.module)
                return
        super().entered(call, args, kwargs)

    def _thin(self, call: Call, numbers: CallNumbers) -> None:
        self._thinned.setdefault(f"{numbers.num_samples} of {numbers.batch} samples")

    def fields(self) -> Mapping[str, Any]:
        return super().fields() if self._keys else {}

    def notes(self) -> Sequence[str]:
        return super().notes() if self._keys else ()

    def found(self) -> Sequence[str]:
        if not self._keys:
            return ()
        seen = [
            f"{'a loop over ' if key.loop else ''}{key.type} in {key.module or 'the model'}"
            for key in self._keys.values()
        ]
        text = f"recurrence, since {some_of(dict.fromkeys(seen))} ran; at the first and the last step"
        if self._thinned:
            text += f", on {' and '.join(self._thinned)}"
        text += ", its transition at one moment"
        if self._left_out:
            text += f", the first {CALLS} calls of {some_of(sorted(self._left_out))}"
        return (text,)
