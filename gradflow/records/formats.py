"""What number formats hold: where a cast makes zero, a subnormal number, or leaves the range.

NOTE [Bins that answer for every format and scale]
Casting |x| · 2^k to a format with M bits behind the point, normal numbers from 2^n and the largest exponent E
asks three questions, each with one border:

* does it become zero: |x| · 2^k ≤ 2^(n−M−1), half of the smallest number (a tie goes to the even one, zero);
* does it become a subnormal number: it is not zero, and |x| · 2^k < 2^n · (1 − 2^(−M−1));
* does it leave the range: |x| · 2^k ≥ 2^E · (2 − 2^(−M−1)), half a step above the largest number (the tie
  goes to the even one, which is beyond); for e4m3, whose largest is 448 and even, |x| · 2^k > 464.

A factor 2^k moves a border by k octaves and leaves its place in the octave. So nine bins in each octave,
parted at the places of all borders of all formats, hold all that has to be known: a share is a sum over
bins, exact for every format and every scale that is a power of two.

"Leaves the range" is said of what PyTorch's cast makes infinite in float16, bfloat16 and e5m2. In e4m3, which
has no infinity, the cast gives the largest number or, in older releases, NaN: it is as lost.
"""

from __future__ import annotations

import math
from typing import Any

import attrs

# Where the bins of an octave begin, as numbers of [1, 2): the first holds 1 alone, the fourth starts just
# above its border; see NOTE [Bins that answer for every format and scale].
BORDERS = (
    1.0, 1.0, 1.75, 1.8125, 1.875, 2 - 2.0**-7, 2 - 2.0**-8, 2 - 2.0**-10, 2 - 2.0**-11,
)  # fmt: skip
OPEN = (1, 3)  # bins without their own border
NUM_BINS = len(BORDERS)


@attrs.frozen
class NumberFormat:
    """A format of floating-point numbers.

    Args:
        name: as PyTorch calls it.
        mantissa: bits behind the point.
        least: exponent of the smallest normal number.
        most: exponent of the largest number.
        subnormal_bin: bin of the octave below the normal numbers from which rounding makes a normal one.
        infinite_bin: bin of the last octave from which rounding leaves the range.
    """

    name: str
    mantissa: int
    least: int
    most: int
    subnormal_bin: int
    infinite_bin: int


FORMATS = {
    known.name: known
    for known in (
        NumberFormat("float64", 52, -1022, 1023, NUM_BINS, NUM_BINS),
        NumberFormat("float32", 23, -126, 127, NUM_BINS, NUM_BINS),
        NumberFormat("bfloat16", 7, -126, 127, 5, 6),
        NumberFormat("float16", 10, -14, 15, 7, 8),
        NumberFormat("float8_e5m2", 2, -14, 15, 2, 4),
        NumberFormat("float8_e4m3fn", 3, -6, 8, 4, 3),
    )
}
"""By name, the formats that can be asked about."""


def number_format(name: Any) -> NumberFormat:
    """Return a format by its name, or by PyTorch's dtype.

    Raises:
        ValueError: if it is not one of `FORMATS`.

    >>> number_format("float16").mantissa
    10
    """
    text = str(name).removeprefix("torch.")
    if text not in FORMATS:
        raise ValueError(f"expected a format of {', '.join(FORMATS)}, got {name!r}.")
    return FORMATS[text]


def exponent_of(scale: float) -> int:
    """Return k of a loss scale 2^k.

    Raises:
        ValueError: if it is no power of two.

    >>> exponent_of(65536)
    16
    """
    mantissa, exponent = math.frexp(scale) if 0 < scale < math.inf else (0.0, 0)
    if mantissa != 0.5:
        raise ValueError(
            f"expected a loss scale that is a power of two, got {scale!r}: only those shift the exponents "
            "and change no digit. A GradScaler that doubles and halves from 65536 has no others."
        )
    return exponent - 1
