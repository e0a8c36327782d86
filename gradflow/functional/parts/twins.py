"""Slices of a parameter, or rows of an output, that are equal to the bit, and whether gradients are too.

NOTE [Equal to the bit]
Rows are first compared by a few of their elements, which tells nearly all of them apart at next to no cost.
Only where that leaves at least half of them alike are they compared in full, as integers: so a sum that tells
two rows apart is exact, in whatever order it is taken.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

_PEEK = 8  # elements that rows are compared by at first
SAME = 1e-8  # of the squares of rows: what differs by no more is rounding
_ROUNDING = 1e-5  # of the root mean square, to which rows of an output are compared
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@attrs.frozen(eq=False)
class Twins:
    """Slices of a parameter that are equal.

    Args:
        axis: that the slices are numbered along.
        label: by slice the number of its kind, shape (slices,); −1 for slices of zeros.
        num_different: how many kinds there are, slices of zeros counted one by one.
    """

    axis: int
    label: Tensor
    num_different: int


def twins(weight: Tensor) -> list[Twins]:
    """Return by axis, 0 and 1, the slices that are equal, where at least half of them are copies.

    >>> twins(torch.randn(4, 3))
    []
    >>> [t.axis for t in twins(torch.randn(1, 3).expand(4, 3))]
    [0]
    """
    # Numbers of eight bits take no arithmetic.
    numbers = weight.is_floating_point() and weight.element_size() > 1
    if weight.dim() < 2 or not numbers or weight.is_complex():
        return []
    found = []
    for axis in (0, 1):
        slices = weight.detach().movedim(axis, 0)
        if len(slices) < 2 or slices[0].numel() < 2:
            continue
        rows = slices.flatten(1)
        if torch.unique(rows[:, 0].nan_to_num()).numel() * 2 > len(rows):  # as most: no two begin alike
            continue
        if torch.unique(_codes(rows[:, :_PEEK])).numel() * 2 > len(rows):
            continue
        codes = _codes(rows)
        kinds, label = torch.unique(codes, return_inverse=True)
        zero = codes == 0
        num_different = int(kinds.numel() - int(zero.any()) + zero.sum())
        if num_different * 2 <= len(slices):
            found.append(Twins(axis, label.masked_fill(zero, -1), num_different))
    return found


def _codes(rows: Tensor) -> Tensor:
    """Return a number for every row that is the same for equal rows, and 0 for rows of zeros."""
    rows = torch.where(rows == 0, torch.zeros_like(rows), rows)  # −0.0 is 0.0
    bits = rows.contiguous().view(_INTEGERS[rows.element_size()])
    odd = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int64) * 0x9E3779B97F4A7C1 | 1
    total = torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
    step = max(1, 2**20 // len(bits))
    for start in range(0, bits.shape[1], step):
        part = slice(start, start + step)
        mixed = bits[:, part].to(torch.int64) * odd[part]
        total += (mixed ^ (mixed >> 29)).mul(0xBF58476D1CE4E5B).sum(1)
    return total


def apart(found: Twins, gradient: Tensor) -> Tensor:
    """Return the largest distance of the gradients of two equal slices, over the larger one's norm; a scalar.

    NaN where the gradients of all of them are zero.
    """
    rows = gradient.movedim(found.axis, 0).flatten(1).float()
    label = found.label
    kept = label >= 0
    rows, label = rows[kept], label[kept]
    first = torch.full((int(label.max()) + 1,), len(label), device=label.device)
    first.scatter_reduce_(0, label, torch.arange(len(label), device=label.device), "amin")
    partner = rows[first[label]]
    counts = torch.bincount(label)
    copied = counts[label] > 1
    size = torch.maximum(rows.norm(dim=1), partner.norm(dim=1))[copied]
    distance = (rows - partner).norm(dim=1)[copied]
    if not bool((size > 0).any()):
        return torch.full((), torch.nan, device=rows.device)
    return torch.where(size > 0, distance / size, 0.0).max()


@attrs.frozen(eq=False)
class Rows:
    """Which rows of an output, shape (samples, rows, features), are equal within their sample.

    Args:
        shape: of the output.
        label: by row the number of its kind, shape (samples · rows,).
        num_kinds: how many kinds there are, over all samples.
    """

    shape: tuple[int, ...]
    label: Tensor
    num_kinds: int

    def torn_share(self, output: Tensor, gradient: Tensor) -> Tensor:
        """Return the part of the gradient, in squares, that cancels between rows of one kind; a scalar.

        1 − (Σ over kinds ‖Σ g‖² / n) / Σ ‖g‖²: 0 where equal rows are pulled alike, 1 where pulled apart. NaN
        where the rows of one kind are not equal in this output. Nothing is read from the device.
        """
        apart = self.lost(output.detach())
        return torch.where(apart <= SAME, self.lost(gradient), torch.nan)

    def fits(self, output: Tensor) -> bool:
        """Whether an output has the same samples and rows, of features of its own."""
        return output.dim() == 3 and output.shape[:2] == self.shape[:2]

    def lost(self, values: Tensor) -> Tensor:
        """Return the part of the squares that is lost in the means over rows of one kind."""
        rows = values.flatten(0, 1).float()
        count = rows.new_zeros(self.num_kinds).index_add_(0, self.label, rows.new_ones(len(rows)))
        sums = rows.new_zeros(self.num_kinds, rows.shape[1]).index_add_(0, self.label, rows)
        left = rows - (sums / count[:, None])[self.label]
        return left.square().sum() / rows.square().sum()


def equal_rows(output: Tensor) -> Rows | None:
    """Return which rows of an output, shape (samples, rows, features), are equal; None where more than half
    of them differ. Rounding, which products over several rows leave, does not count."""
    rows = output.detach().flatten(0, 1).float()
    rows = (rows / (_ROUNDING * rows.square().mean().sqrt().clamp_min(1e-30))).round()
    codes = _codes(rows)
    sample = torch.arange(len(output), device=codes.device).repeat_interleave(output.shape[1])
    kinds, label = torch.unique(torch.stack([sample, codes], 1), dim=0, return_inverse=True)
    return Rows(tuple(output.shape), label, len(kinds)) if 2 * len(kinds) <= len(codes) else None


def is_same(one: Tensor | None, other: Tensor) -> bool:
    """Whether a tensor is the same one, or another over the same numbers, laid out alike.

    Of subclasses, and of other layouts, that is not asked: they may have no memory to tell by.
    """
    if type(one) is not Tensor or type(other) is not Tensor or one.layout is not other.layout:
        return one is other
    if one.layout is not torch.strided or one.shape != other.shape or one.stride() != other.stride():
        return one is other
    return one is other or one.data_ptr() == other.data_ptr()
