"""How the magnitudes of a tensor's entries are spread, in one pass over their bits.

NOTE [By bits]
A comparison with a subnormal number is slow on many processors, and where they are flushed to zero it is
wrong; so nothing here is computed with the entries as floats. The bits of a positive float, read as an
integer, are exponent and mantissa side by side. The upper eleven bits of the mantissa, and whether any below
them is set, tell the bin within the octave (NOTE [Bins that answer for every format and scale] in
`gradflow.records.formats`), by a table; the rest is a count. The mantissa of a subnormal number is an
integer of its own, whose float has the digits that are asked for, at an exponent that is known.

PyTorch casts double precision to shorter formats by way of float32. So its mantissa is first rounded as that
cast does it; the exponent keeps its range.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.records import ExponentHistogram
from gradflow.records.formats import BORDERS, NUM_BINS, OPEN

_PIECE = 2**16  # elements: what is made of them stays in the cache
_MANTISSA = 23  # bits, of float32
_DROPPED = 52 - _MANTISSA  # by the rounding of double precision
_TABLE = 11  # bits of the mantissa that the table takes


@attrs.frozen(eq=False)
class Counts:
    """The counts of one tensor, on its device.

    Args:
        dtype: the tensor's.
        num_elements: its entries.
        first: number of the first bin, of the record's numbering.
        counts: entries by bin, then exact zeros, then those that are not finite, shape (bins + 2,).
    """

    dtype: torch.dtype
    num_elements: int
    first: int
    counts: Tensor

    def __add__(self, other: Counts) -> Counts:
        number = self.num_elements + other.num_elements
        return Counts(self.dtype, number, self.first, self.counts + other.counts.to(self.counts.device))

    def over(self, exponent: int) -> Counts:
        """Return the counts of x · 2^−exponent."""
        return attrs.evolve(self, first=self.first - NUM_BINS * exponent)

    @property
    def num_present(self) -> int:
        """How many entries are finite and not zero."""
        return int(self.counts[:-2].sum())


@attrs.frozen
class _Layout:
    """The layout of a float's bits.

    Args:
        ints: integers of its size.
        sign: the mask that takes the sign away.
        bias: of the exponent.
        least: exponent of the last bit of a subnormal number.
    """

    ints: torch.dtype
    sign: int
    bias: int
    least: int


_SINGLE = _Layout(torch.int32, 2**31 - 1, 127, -149)
_DOUBLE = _Layout(torch.int64, 2**63 - 1, 1023, -1074)


def counted(x: Tensor) -> Counts:
    """Return how the magnitudes of a tensor's entries are spread; see NOTE [By bits].

    Args:
        x: of any shape and floating or complex dtype (real and imaginary parts are entries of their own).

    >>> found = counted(torch.tensor([0.0, 1.0, 3.0, 1e-40, float("nan")]))
    >>> found.num_elements, found.counts.sum().item(), found.counts[-2:].tolist()
    (5, 5, [1, 1])
    """
    x = x.detach()
    if x.layout is not torch.strided:
        x = x.coalesce().values() if x.layout is torch.sparse_coo else x.to_dense()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    flat, layout = x.resolve_neg().reshape(-1), _DOUBLE if x.dtype == torch.float64 else _SINGLE
    number = NUM_BINS * (layout.bias + 1 - layout.least)
    total = torch.zeros(number + 2, dtype=torch.int64, device=x.device)
    for piece in flat.split(_PIECE if x.is_cpu else max(flat.numel(), 1)):
        wide = piece if piece.dtype in (torch.float32, torch.float64) else piece.float()
        _add_bits(total, wide.contiguous().view(layout.ints) & layout.sign, layout)
    return Counts(x.dtype, flat.numel(), NUM_BINS * layout.least, total)


def _add_bits(total: Tensor, bits: Tensor, layout: _Layout) -> None:
    """Add the counts of one piece, whose bits without sign are given, to those of the tensor."""
    digits = bits
    if layout is _DOUBLE:
        even = (bits >> _DROPPED) & 1
        digits = (bits + ((1 << (_DROPPED - 1)) - 1) + even) >> _DROPPED
    places = _places(digits).add_((digits >> _MANTISSA).to(torch.int32), alpha=NUM_BINS)
    found = torch.bincount(places, minlength=NUM_BINS * 2 * (layout.bias + 1))
    # The first octave holds zeros and subnormal numbers, the last what is not finite.
    normal = found[NUM_BINS:-NUM_BINS]
    total[-2 - len(normal) : -2] += normal
    total[-1] += found[-NUM_BINS:].sum()
    if int(found[:NUM_BINS].sum()) == int(found[0]) and layout is _SINGLE:
        total[-2] += found[0]
        return
    small = bits[digits < 1 << _MANTISSA]
    present = small[small != 0]
    total[-2] += len(small) - len(present)
    mantissa = present.to(torch.float32).view(torch.int32)  # an integer, as a normal number
    places = _places(mantissa).add_((mantissa >> _MANTISSA) - _SINGLE.bias, alpha=NUM_BINS)
    total[:-2] += torch.bincount(places, minlength=len(total) - 2)


def _places(digits: Tensor) -> Tensor:
    """Return the bin within the octave, by the 23 bits of a mantissa."""
    low = _MANTISSA - _TABLE
    more = (digits & ((1 << low) - 1)).clamp_max_(1)
    key = ((digits >> low) & ((1 << _TABLE) - 1)).mul_(2).add_(more).to(torch.int32)
    return _table(digits.device).index_select(0, key)


@functools.cache
def _table(device: torch.device) -> Tensor:
    """Return the bin within the octave by the upper bits of a mantissa, twice: alone, and with more below."""
    exact = 1.0 + np.arange(2**_TABLE) / 2**_TABLE
    both = np.stack([exact, exact + 2.0 ** -(_TABLE + 1)], axis=1).reshape(-1)
    found = np.zeros(len(both), np.int32)
    for number, border in enumerate(BORDERS):
        reached = both > border if number in OPEN else both >= border
        found[reached] = number
    return torch.from_numpy(found).to(device)


@attrs.frozen(eq=False)
class Row:
    """The counts of one tensor at one look, on the host.

    Args:
        dtype: the tensor's.
        num_elements: its entries.
        num_zero: of them exact zeros.
        num_infinite: of them not finite.
        bins: how many are in each bin that holds some.
    """

    dtype: torch.dtype
    num_elements: int
    num_zero: int
    num_infinite: int
    bins: dict[int, int]


def row(found: Counts) -> Row:
    """Return counts as a row."""
    counts = found.counts.cpu().numpy()
    at = np.flatnonzero(counts[:-2])
    bins = dict(zip((at + found.first).tolist(), counts[at].tolist(), strict=True))
    return Row(found.dtype, found.num_elements, int(counts[-2]), int(counts[-1]), bins)


def histogram(looks: Sequence[Row | None]) -> ExponentHistogram | None:
    """Return the record of one tensor's counts at every look; None where there are none.

    Args:
        looks: by look, None where the tensor was not there.
    """
    known = [look for look in looks if look is not None]
    if not known:
        return None
    nothing = Row(known[0].dtype, 0, 0, 0, {})
    rows = [look or nothing for look in looks]
    bins = sorted(set().union(*(look.bins for look in rows)))
    return ExponentHistogram(
        dtype=str(known[-1].dtype).removeprefix("torch."),
        num_elements=np.array([look.num_elements for look in rows]),
        num_zero=np.array([look.num_zero for look in rows]),
        num_infinite=np.array([look.num_infinite for look in rows]),
        bins=tuple(bins),
        counts=np.array([[look.bins.get(i, 0) for i in bins] for look in rows], np.int64),
    )
