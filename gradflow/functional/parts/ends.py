"""Bounded activations at their ends: does the loss want them there, or back?

NOTE [Wanted ends]
At an end the slope is gone, whatever the loss wants. What it wants is told by the gradient of what the
activation gives: where a step down the loss leads further out, the end is as near as the activation can come
to what is asked for, as an action whose best value is the bound, or a mask that is to hide all. Where it
leads back, or both ways alike, the activation is stuck there. The size of the gradient counts, not the number
of elements: those that the loss does not look at say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import SATURATED, source_layer
from gradflow.records import EndsRecord

_MIDDLE = {"sigmoid": 0.5, "tanh": 0.0}
_MOST = 64  # uses in a step; of loops, the first ones


@attrs.define(eq=False)
class Ends:
    """Hears the sigmoids and tanhs of one step."""

    _recorder: Recorder
    _heard: list[tuple[str, str, Tensor]] = attrs.field(factory=list)
    _numbers: list[tuple[str, str, Tensor]] = attrs.field(factory=list)

    def hear(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Return what keeps the output of a sigmoid or tanh; None for any other function."""
        op = getattr(func, "__name__", "")
        if op not in _MIDDLE or len(self._heard) >= _MOST:
            return None
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not x.requires_grad or not x.is_floating_point():
            return None
        leaf = self._recorder.innermost_leaf()
        layer = leaf.name if leaf is not None else source_layer(self._recorder, x)

        def note(out: Any) -> None:
            if isinstance(out, Tensor) and out.numel():
                self._heard.append((layer, op, out))

        return note

    def suspects(self, share: float = 0.5) -> list[Tensor]:
        """Return the outputs that are at their ends for the most part, whose gradients are wanted."""
        shares = [_at_end(op, y.detach()).float().mean() for _, op, y in self._heard]
        if not shares:
            return []
        seen = torch.stack([s.cpu() for s in shares]).tolist()
        self._heard = [one for one, s in zip(self._heard, seen, strict=True) if s >= share]
        return [y for *_, y in self._heard]

    def weigh(self, found: Sequence[Tensor | None]) -> None:
        """Take what the gradients of the suspects say."""
        for (layer, op, y), gradient in zip(self._heard, found, strict=True):
            if gradient is not None:
                pull = torch.where(
                    _at_end(op, y.detach()), -gradient * (y.detach() - _MIDDLE[op]).sign(), 0.0
                )
                pull = pull.double() if pull.device.type != "mps" else pull.float()
                self._numbers.append((layer, op, torch.stack([pull.clamp_min(0).sum(), pull.abs().sum()])))
        self._heard = []

    def read(self) -> list[EndsRecord]:
        """Return one record for every place and kind."""
        sums: dict[tuple[str, str], list[float]] = {}
        for layer, op, numbers in self._numbers:
            kept = sums.setdefault((layer, op), [0.0, 0.0])
            for i, value in enumerate(numbers.tolist()):
                kept[i] += value
        return [
            EndsRecord(layer=layer, op=op, wanted_share=out / all_of_it if all_of_it > 0 else float("nan"))
            for (layer, op), (out, all_of_it) in sums.items()
        ]


def _at_end(op: str, y: Tensor) -> Tensor:
    """Return where the slope is below a percent of the largest that it can be."""
    slope = 4 * y * (1 - y) if op == "sigmoid" else 1 - y * y
    return slope < SATURATED
