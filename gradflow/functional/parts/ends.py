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

    def outputs(self, *, read: bool, share: float = 0.5) -> list[Tensor]:
        """Return the outputs whose gradients are wanted.

        Args:
            read: whether values may be read from the device: then only those at their ends.
            share: of the elements that are at an end, from which an output is.
        """
        if read and self._heard:
            shares = torch.stack([_at_end(op, y.detach()).float().mean().cpu() for _, op, y in self._heard])
            self._heard = [one for one, s in zip(self._heard, shares.tolist(), strict=True) if s >= share]
        return [y for *_, y in self._heard]

    def weigh(self, found: Sequence[Tensor | None]) -> None:
        """Take what the gradients of the outputs say."""
        for (layer, op, y), gradient in zip(self._heard, found, strict=True):
            if gradient is not None:
                at_end = _at_end(op, y.detach())
                pull = torch.where(at_end, -gradient * (y.detach() - _MIDDLE[op]).sign(), 0.0)
                pull = pull.double() if pull.device.type != "mps" else pull.float()
                sums = [pull.clamp_min(0).sum(), pull.abs().sum(), at_end.to(pull.dtype).mean()]
                self._numbers.append((layer, op, torch.stack(sums)))
        self._heard = []

    def read(self, share: float = 0.5) -> list[EndsRecord]:
        """Return one record for every place and kind whose outputs are at their ends."""
        sums: dict[tuple[str, str], list[float]] = {}
        for layer, op, numbers in self._numbers:
            out, pull, at_end = numbers.tolist()
            if at_end >= share:
                kept = sums.setdefault((layer, op), [0.0, 0.0])
                kept[0], kept[1] = kept[0] + out, kept[1] + pull
        return [
            EndsRecord(layer=layer, op=op, wanted_share=out / pull if pull > 0 else float("nan"))
            for (layer, op), (out, pull) in sums.items()
        ]


def _at_end(op: str, y: Tensor) -> Tensor:
    """Return where the slope is below a percent of the largest that it can be."""
    slope = 4 * y * (1 - y) if op == "sigmoid" else 1 - y * y
    return slope < SATURATED
