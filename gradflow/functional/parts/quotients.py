"""Divisions by numbers of which some are next to nothing beside the others, such as a target near zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import source_layer
from gradflow.records import QuotientRecord

_DIVIDES = frozenset(("div", "div_", "divide", "divide_", "true_divide", "true_divide_", "__truediv__"))
_SMALL = 1e-4  # of the largest divisor; what is smaller is set against the others


@attrs.define(eq=False)
class Quotients:
    """Hears the divisions of one step whose divisors carry no gradient, outside of layers without parts."""

    _recorder: Recorder
    _heard: list[tuple[str, Tensor]] = attrs.field(factory=list)

    def hear(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Return what takes the numbers of a division from its output; None for any other function."""
        if getattr(func, "__name__", "") not in _DIVIDES or self._recorder.innermost_leaf() is not None:
            return None
        above = args[0] if args else kwargs.get("input")
        below = args[1] if len(args) > 1 else kwargs.get("other")
        if not isinstance(above, Tensor) or not isinstance(below, Tensor):
            return None
        if not above.requires_grad or below.requires_grad or below.numel() < 2 or below.is_complex():
            return None
        layer = source_layer(self._recorder, above)
        divisor = below.detach().abs()

        def note(out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
                self._heard.append((layer, _numbers(out.detach().abs(), divisor)))

        return note

    def read(self) -> list[QuotientRecord]:
        """Return the numbers of each division, in order."""
        return [
            QuotientRecord(layer=layer, small_share=share, smallest=smallest, excess=excess)
            for layer, numbers in self._heard
            for share, smallest, excess in [numbers.tolist()]
        ]


def _numbers(quotient: Tensor, divisor: Tensor) -> Tensor:
    """Return the share of small divisors, the smallest one, and what is divided by them over what is not.

    Where a quotient is zero or not finite, nothing was divided; the means of the others are compared, taken
    in units of the largest one, so that no sum overflows.
    """
    quotient, divisor = torch.broadcast_tensors(quotient.float(), divisor.float())
    counts = torch.isfinite(quotient) & (quotient > 0)
    small = counts & (divisor <= _SMALL * torch.where(counts, divisor, 0.0).max())
    quotient = torch.where(counts, quotient, 0.0)
    quotient = quotient / quotient.max()
    within, beside = (
        torch.where(these, quotient, 0.0).sum() / these.sum() for these in (small, counts & ~small)
    )
    least = torch.where(small, divisor, float("inf")).min()
    return torch.stack([small.sum() / counts.sum(), least, within / beside])
