"""Sinusoids of what is given: how far they turn over the samples and positions of a batch.

NOTE [Turns]
A number is embedded as sines and cosines of its products with fixed frequencies, so that the fast ones tell
near numbers apart and the slow ones far ones. Over what the data hold, the fast ones must turn. An angle that
runs over less than a quarter of a turn gives a sine that is as good as straight; where the fastest does, all
features move together, and the embedding tells of the number what one feature would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.processes.shards import is_distributed
from gradflow.functional.tap.recorder import Recorder
from gradflow.records import TurnsRecord

_SINUSOIDS = frozenset(("sin", "cos", "sin_", "cos_"))
_FEWEST = 8  # features; fewer may be a clock, or the angles of a body


@attrs.define(eq=False)
class Turns:
    """Hears sines and cosines of angles without a gradient, features along the last axis."""

    _recorder: Recorder
    _heard: dict[tuple[str, int], Tensor] = attrs.field(factory=dict)

    def hear(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Keep how far the angles of a sinusoid run."""
        x = args[0] if args else None
        if getattr(func, "__name__", "") not in _SINUSOIDS or not isinstance(x, Tensor) or x.requires_grad:
            return
        if x.dim() < 2 or x.shape[-1] < _FEWEST or not x.is_floating_point() or is_distributed(x):
            return
        running = self._recorder.running()
        key = (running[-1].module if running else "", x.shape[-1])
        numbers = _numbers(x.detach().flatten(0, -2))
        known = self._heard.get(key)
        self._heard[key] = numbers if known is None else torch.maximum(known, numbers)

    def read(self) -> list[TurnsRecord]:
        """Return the numbers, by module and number of features."""
        return [
            TurnsRecord(layer=layer, num_features=features, span=span, num_different=int(different))
            for (layer, features), numbers in self._heard.items()
            for span, different in [numbers.tolist()]
        ]


def _numbers(angles: Tensor) -> Tensor:
    """Return how far the fastest feature's angle runs, and how many different ones it has."""
    spans = (angles.amax(0) - angles.amin(0)).double()
    fastest = angles.index_select(1, spans.argmax().reshape(1)).flatten().sort().values
    return torch.stack([spans.max(), (fastest.diff() > 0).sum().double() + 1])
