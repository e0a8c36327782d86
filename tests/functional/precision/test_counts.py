"""Shares read off the counted exponents against casts: PyTorch's, and exact rationals rounded by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradflow.functional.precision.counts import counted, histogram, row
from gradflow.records import ExponentHistogram
from gradflow.records.formats import FORMATS, NumberFormat, exponent_of, number_format

SHORT = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
SCALES = (1.0, 2.0**-3, 2.0**10, 65536.0, 2.0**24)


def histogram_of(*looks: Tensor) -> ExponentHistogram:
    found = histogram([row(counted(x)) for x in looks])
    assert found is not None
    return found


def by_cast(x: Tensor, name: str, scale: float) -> tuple[float, ...]:
    """Return the shares of zeros, subnormal numbers and lost ones, by casting the present entries."""
    x = x[(x != 0) & torch.isfinite(x)] * scale
    y = x.to(getattr(torch, name)).float()
    beyond = x.abs() > 464 if name == "float8_e4m3fn" else torch.isinf(y)
    tiny = torch.finfo(getattr(torch, name)).tiny
    lost = (y == 0, (y != 0) & (y.abs() < tiny), beyond)
    return tuple(int(chosen.sum()) / len(x) for chosen in lost)


def by_hand(value: float, known: NumberFormat, scale: float) -> str:
    """Return what becomes of a value, rounded to the nearest even number of a format as a fraction."""
    exact = abs(Fraction(value) * Fraction(scale))
    octave = max(math.frexp(float(exact))[1] - 1, known.least)
    unit = Fraction(2) ** (octave - known.mantissa)
    rounded = round(exact / unit) * unit  # Python rounds halves to even
    largest = (
        448
        if known.name == "float8_e4m3fn"
        else (2 - Fraction(2) ** -known.mantissa) * Fraction(2) ** known.most
    )
    if rounded > largest:
        return "overflow"
    return "underflow" if rounded == 0 else "subnormal" if rounded < Fraction(2) ** known.least else "normal"


def shares(found: ExponentHistogram, name: str, scale: float) -> tuple[float, ...]:
    ask = (found.underflow, found.subnormal, found.overflow)
    return tuple(question(name, scale=scale) for question in ask)


def borders() -> Tensor:
    """Return the numbers at which a cast changes its mind, and their neighbours, for all formats."""
    found = []
    for known in FORMATS.values():
        half = 2.0 ** (-known.mantissa - 1)
        places = [2.0 ** (known.least - known.mantissa - 1), 2.0**known.least * (1 - half), 2.0**known.least]
        if known.most < 200:
            places += [2.0**known.most * (2 - half), 2.0**known.most * 1.75, 464.0]
        for place in places:
            for scale in SCALES:
                if place / scale > 1e38:
                    continue
                at = np.float32(place / scale)
                found += [at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(np.inf))]
                found += [at * np.float32(1 + 2.0**-k) for k in range(1, 13)]
                found += [at * np.float32(1 - 2.0**-k) for k in range(1, 13)]
    x = torch.tensor(np.array(found))
    return x[torch.isfinite(x)]


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("scale", [s for s in SCALES if s >= 1])  # smaller ones round x · s itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shares_are_those_of_a_cast(dtype: torch.dtype, name: str, scale: float) -> None:
    random = torch.Generator().manual_seed(0)
    exponents = torch.randint(-149, 128, (50_000,), generator=random).double()
    wide = (torch.randn(50_000, generator=random, dtype=torch.float64) * 2**exponents).to(dtype)
    x = torch.cat([wide, -borders().to(dtype), borders().to(dtype), torch.zeros(7, dtype=dtype)])
    assert shares(histogram_of(x), name, scale) == by_cast(x.float(), name, scale)


@pytest.mark.parametrize("name", SHORT)
def test_shares_at_the_borders_are_those_of_exact_rounding(name: str) -> None:
    x = borders()
    x = x[x != 0]
    for scale in SCALES:
        told = [by_hand(value, FORMATS[name], scale) for value in x.tolist()]
        expected = tuple(told.count(what) / len(told) for what in ("underflow", "subnormal", "overflow"))
        assert shares(histogram_of(x), name, scale) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    st.sampled_from(SHORT),
    st.integers(-20, 40),
)
def test_any_floats_are_counted_as_exact_rounding_tells(values: list[float], name: str, k: int) -> None:
    found, scale = histogram_of(torch.tensor(values)), 2.0**k
    present = [value for value in values if value != 0 and math.isfinite(value)]
    assert found.num_zero.tolist() == [values.count(0.0)]
    assert found.num_infinite.tolist() == [sum(not math.isfinite(value) for value in values)]
    assert found.num_present() == len(present)
    told = [by_hand(value, FORMATS[name], scale) for value in present]
    if not present:
        assert math.isnan(found.underflow(name, scale=scale))
        return
    expected = tuple(told.count(what) / len(told) for what in ("underflow", "subnormal", "overflow"))
    assert shares(found, name, scale) == expected


@pytest.mark.parametrize("name", ["float16", "float8_e4m3fn", "float8_e5m2", "bfloat16"])
def test_double_precision_is_cast_by_way_of_single_precision(name: str) -> None:
    random = torch.Generator().manual_seed(1)
    exponents = torch.randint(-110, 100, (50_000,), generator=random).double()
    x = torch.randn(50_000, generator=random, dtype=torch.float64) * 2**exponents
    assert shares(histogram_of(x), name, 1.0) == by_cast(x, name, 1.0)


def test_double_precision_keeps_its_range() -> None:
    found = histogram_of(torch.tensor([1e-300, 5e-324, 1e300, 0.0, math.inf], dtype=torch.float64))
    assert (found.num_present(), found.num_zero[0], found.num_infinite[0]) == (3, 1, 1)
    assert found.smallest == 5e-324
    assert found.subnormal("float64") == pytest.approx(1 / 3)
    assert found.underflow("float32") == pytest.approx(2 / 3)
    assert found.underflow("float32", scale=2.0**1000) == 0
    assert found.overflow("float64", scale=2.0**1000) == pytest.approx(1 / 3)


def test_own_subnormal_numbers_of_single_precision() -> None:
    x = torch.tensor([1e-40, 1.1754944e-38, 1e-45, 1.0])
    assert histogram_of(x).subnormal("float32") == 0.5
    assert histogram_of(x).subnormal("float32", scale=2.0**30) == 0.0


@pytest.mark.parametrize("flushed", [False, True])
def test_subnormal_numbers_are_seen_where_the_processor_flushes_them(flushed: bool) -> None:
    x = torch.tensor([1e-40, 1.0])
    torch.set_flush_denormal(flushed)
    try:
        assert histogram_of(x).subnormal("float32") == 0.5
    finally:
        torch.set_flush_denormal(False)


def test_large_tensors_are_counted_by_pieces_in_any_layout() -> None:
    x = torch.randn(300, 700)
    whole, pieces = counted(x.t()), [counted(part) for part in x.split(7)]
    assert torch.equal(whole.counts, sum(pieces[1:], pieces[0]).counts)
    assert whole.num_elements == x.numel() == int(whole.counts.sum())
    assert torch.equal(counted(x.to_sparse()).counts, whole.counts)
    assert int(counted(torch.complex(x, -x)).counts.sum()) == 2 * x.numel()


def test_the_norm_that_is_lost_is_told_to_within_a_bin() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e-7
    found = histogram_of(x)
    lost = x[x.half() == 0].norm() / x.norm()
    assert lost / 1.5 < found.norm_lost("float16") < lost * 1.5
    assert found.norm_lost("float16", scale=2.0**16) == 0


def test_looks_are_kept_apart_and_together() -> None:
    found = histogram([row(counted(torch.tensor([1.0, 1e-9]))), None, row(counted(torch.tensor([1e-9])))])
    assert found is not None
    assert [found.underflow("float16", look=i) for i in (0, 2)] == [0.5, 1.0]
    assert math.isnan(found.underflow("float16", look=1))
    assert found.underflow("float16") == pytest.approx(2 / 3)
    assert histogram([None, None]) is None


def test_formats_and_scales_that_are_none() -> None:
    with pytest.raises(ValueError, match="expected a format of float64, .*got 'int8'"):
        number_format("int8")
    for scale in (0.0, -2.0, 3.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="loss scale that is a power of two"):
            exponent_of(scale)
    assert number_format(torch.float16) is FORMATS["float16"]
