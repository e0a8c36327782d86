"""Divisions by numbers of which some are next to nothing beside the others, such as a target near zero, and
by a sum that cancels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import source_layer
from gradflow.records import QuotientRecord

_SUMS = frozenset(("sum", "mean"))
_DIVIDES = frozenset(("div", "div_", "divide", "divide_", "true_divide", "true_divide_", "__truediv__"))
_FEW = 8  # parts of a sum below which chance decides whether they cancel
_MOST = 64  # sums of a step that are kept
_SMALL = 1e-4  # of the largest divisor; what is smaller is set against the others


@attrs.define(eq=False)
class Quotients:
    """Hears the divisions of one step whose divisors carry no gradient, outside of layers without parts."""

    _recorder: Recorder
    _heard: list[tuple[str, Tensor]] = attrs.field(factory=list)
    _sums: list[tuple[Tensor, Tensor]] = attrs.field(factory=list)

    def hear(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Return what takes the numbers of a division from its output; None for any other function."""
        name = getattr(func, "__name__", "")
        if name not in _DIVIDES | _SUMS or self._recorder.innermost_leaf() is not None:
            return None
        above = args[0] if args else kwargs.get("input")
        if name in _SUMS:
            return self._sum_of(above)
        below = args[1] if len(args) > 1 else kwargs.get("other")
        if not isinstance(above, Tensor) or not isinstance(below, Tensor):
            return None
        if not above.requires_grad or below.requires_grad or below.is_complex():
            return None
        if below.dtype is torch.bool:
            return None
        summed = next((parts for total, parts in self._sums if total is below), None)
        if below.numel() < 2 and summed is None:
            return None
        layer = source_layer(self._recorder, above)
        if summed is not None:
            self._heard.append((layer, _cancelled(summed)))
            return None
        divisor = below.detach().abs()

        def note(out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
                self._heard.append((layer, _numbers(out.detach().abs(), divisor)))

        return note

    def _sum_of(self, parts: Any) -> Callable[[Any], None] | None:
        """Return what keeps one number together with what it is the sum or the mean of; None where that has a
        gradient, or cannot cancel."""
        if not isinstance(parts, Tensor) or parts.requires_grad or parts.numel() < _FEW:
            return None
        if not parts.is_floating_point() or len(self._sums) >= _MOST:
            return None

        def note(out: Any) -> None:
            if isinstance(out, Tensor) and out.numel() == 1:
                self._sums.append((out, parts))

        return note

    def read(self) -> list[QuotientRecord]:
        """Return the numbers of each division, in order."""
        return [
            QuotientRecord(
                layer=layer, small_share=share, smallest=smallest, excess=excess, cancelled=cancelled
            )
            for layer, numbers in self._heard
            for share, smallest, excess, cancelled in [numbers.tolist()]
            if share == share or cancelled == cancelled
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
    none = torch.full_like(least, float("nan"))
    return torch.stack([small.sum() / counts.sum(), least, within / beside, none])


def _cancelled(parts: Tensor) -> Tensor:
    """Return the size of a sum over what it is of parts whose signs are by chance, in the fourth place; NaN
    where all have one sign."""
    parts = parts.detach().float()
    parts = parts / parts.abs().max()
    both = (parts.min() < 0) & (parts.max() > 0)
    size = torch.where(both, parts.sum().abs() / parts.square().sum().sqrt(), float("nan"))
    none = torch.full_like(size, float("nan"))
    return torch.stack([none, none, none, size])
