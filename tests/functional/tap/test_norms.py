"""Norms and counts of gradients of any size, layout and dtype, against exact sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradflow.functional.tap.probes import eager_probe
from gradflow.functional.tap.sums import (
    as_norm,
    is_safe,
    magnitude,
    magnitudes,
    num_positive,
    num_zero,
    safe_range,
    squares_of,
)
from tests.functional.tap.sites import site, slot, spread

# ------------------------------------------------------------------------------- the range of numbers


def true_norm(x: Tensor) -> Fraction:
    """Return the square root of Σx² to some thirty digits, by exact arithmetic."""
    total = sum((Fraction(v) ** 2 for v in x.detach().double().reshape(-1).tolist()), Fraction(0))
    scale = 10 ** (40 + len(str(total.denominator)))
    return Fraction(math.isqrt(total.numerator * scale**2 // total.denominator), scale)


def assert_norm(found: Tensor | float, expected: Fraction, *, rtol: float) -> None:
    error = abs(Fraction(float(found)) - expected)
    # the smallest number that there is bounds what can be asked for next to zero
    assert error <= Fraction(rtol) * expected + Fraction(1, 2**1074), (float(found), float(expected))


POWERS = {  # of ten, from the smallest number that is not zero to near the largest
    torch.float64: (-323.0, 300.0),
    torch.float32: (-45.0, 37.0),
    torch.bfloat16: (-40.0, 37.0),
    torch.float16: (-7.5, 4.5),
    torch.complex128: (-323.0, 300.0),
}


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(list(POWERS)),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    number=st.sampled_from([1, 2, 7, 50]),
    seed=st.integers(0, 1000),
    stride=st.sampled_from([1, 2]),
)
def test_exact_norms_hold_the_whole_range(
    dtype: torch.dtype, ends: tuple[float, float], number: int, seed: int, stride: int
) -> None:
    least, most = POWERS[dtype]
    low, high = (least + share * (most - least) for share in sorted(ends))
    real = torch.float64 if dtype.is_complex else dtype
    x = spread(real, low, high, 2 * number * stride, seed)
    expected = true_norm(x[::stride] if not dtype.is_complex else x)
    given = torch.view_as_complex(x.view(-1, 2)) if dtype.is_complex else x[::stride]
    found = magnitude(given, exact=True)
    assert found.dtype == torch.float64
    assert_norm(found, expected, rtol=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    center=st.floats(0, 1),
    width=st.floats(0, 6),
    number=st.sampled_from([1, 3, 64, 500]),
    seed=st.integers(0, 1000),
)
def test_what_a_fast_sum_finds_in_the_safe_range_is_right(
    dtype: torch.dtype, center: float, width: float, number: int, seed: int
) -> None:
    least, most = POWERS[dtype]
    middle = least + center * (most - least)
    x = spread(dtype, max(middle - width, least), min(middle + width, most), number, seed)
    found = float(as_norm(magnitude(x, exact=False)))
    if is_safe(np.array([found]), np.array([number]))[0]:
        assert_norm(found, true_norm(x), rtol=1e-5)


@pytest.mark.parametrize("number", [10**3, 10**6])
def test_many_squares_that_underflow_beside_few_that_do_not(number: int) -> None:
    """The most that can be lost in the safe range: every small square comes to zero."""
    least, _ = safe_range(number)
    small = 1e-23
    assert float(torch.tensor(small).square()) == 0.0
    for above in (1.01, 3.0, 100.0):
        x = torch.full((number,), small)
        x[0] = above * least
        truth = math.sqrt((number - 1) * float(x[1]) ** 2 + float(x[0]) ** 2)
        found = float(as_norm(magnitude(x, exact=False)))
        assert is_safe(np.array([found]), np.array([number]))[0]
        assert found == pytest.approx(truth, rel=1e-6)


def test_partial_underflow_lies_outside_of_the_safe_range() -> None:
    lost = 0
    for power in np.arange(-25.0, -10.0, 0.125):
        x = torch.linspace(0.1, 3.0, 1000) * 10.0**power
        found, truth = float(as_norm(magnitude(x, exact=False))), float(x.double().norm())
        if found > 0 and abs(found / truth - 1) > 1e-4:
            lost += 1
            assert not is_safe(np.array([found]), np.array([1000]))[0]
    assert lost > 3


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.integers(-30, 30), contiguous=st.booleans())
def test_probes_neither_overflow_nor_underflow(seed: int, power: int, contiguous: bool) -> None:
    torch.manual_seed(seed)
    g = torch.randn(7, 3) * 10.0**power
    g = g if contiguous else g.mT.contiguous().mT
    x, s = torch.zeros(7, 3, requires_grad=True), slot()
    size = torch.autograd.grad(eager_probe(x, s, site()), s, g)[0]
    assert_norm(size, true_norm(g), rtol=1e-12)
    if abs(power) <= 10:  # in the range that is called safe
        assert is_safe(np.array([float(size)]), np.array([g.numel()]))[0]
        s = torch.zeros((), requires_grad=True)
        fast = torch.autograd.grad(eager_probe(x, s, site(exact=False)), s, g)[0]
        assert_norm(as_norm(fast), true_norm(g), rtol=1e-5)
    if abs(power) >= 13:
        assert not is_safe(np.array([float(size)]), np.array([g.numel()]))[0]


def test_safe_is_a_matter_of_the_mean_and_not_of_the_number() -> None:
    norms = np.array([0.0, 1e-15, 1e-10, 1.0, 1e10, 1e15, np.inf, np.nan])
    assert is_safe(norms, np.ones(8)).tolist() == [False, False, True, True, True, False, False, False]
    assert is_safe(norms * 1e5, np.full(8, 1e10)).tolist() == is_safe(norms, np.ones(8)).tolist()


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(4, 5, 6),
    "transposed": lambda: torch.randn(4, 5, 6).transpose(0, 2),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(8, 6)[::2, ::3],
    "expanded": lambda: torch.randn(5, 1).expand(5, 7),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "sparse, with repeated indices": lambda: torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 0]]), torch.tensor([1.0, 2.0, 5.0]), (3,)
    ),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sums_of_every_layout(name: str, exact: bool) -> None:
    x = LAYOUTS[name]()
    dense = x.to_dense() if x.layout is not torch.strided else x
    found = as_norm(magnitude(x, exact=exact))
    np.testing.assert_allclose(float(found), float(dense.double().norm()), rtol=1e-5)


# ------------------------------------------------------------------------------ counts, many pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (700, 900)])
def test_elements_that_are_zero_are_counted(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.relu(torch.randn(shape, generator=generator)).to(dtype)
    for view in (x, x.mT) if x.dim() == 2 else (x,):
        assert float(num_zero(view)) == float((view == 0).sum())


def test_tiny_numbers_are_not_zero() -> None:
    assert float(num_zero(torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e38]))) == 2


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1.0, 1e19, 1e30])
@pytest.mark.parametrize("size", [100, 20_000, 600_000])
def test_exact_norms_of_many_pieces(size: int, scale: float) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * scale
    for dtype in (torch.float32, torch.float64):
        found = float(magnitude(x.to(dtype), exact=True))
        assert found == pytest.approx(float(x.double().norm()), rel=1e-5)


@pytest.mark.parametrize("size", [100, 20_000])
def test_exact_norms_of_zeros_and_of_what_is_not_finite(size: int) -> None:
    x = torch.zeros(size)
    assert float(magnitude(x, exact=True)) == 0.0
    for value in (float("nan"), float("inf")):
        x[size // 2] = value
        assert not np.isfinite(float(magnitude(x, exact=True)))


def test_many_magnitudes_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(40, 30, generator=generator)
    every = [
        plain, plain.mT, plain[:, ::2], plain.double(), plain.half(), plain.bfloat16(), plain[0, 0],
        torch.zeros(0), plain.to_sparse(), torch.complex(plain, plain),
    ]  # fmt: skip
    for x, found in zip(every, magnitudes(every), strict=True):
        alone = magnitude(x, exact=False)
        assert (found.dtype, found.shape) == (alone.dtype, alone.shape)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=0)
    together = squares_of([plain, plain.half().float()])
    torch.testing.assert_close(together[0], plain.square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_num_positive(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, -0.0, 1.0], [-2.0, float("inf"), float("nan")]]).to(dtype)
    assert num_positive(x).tolist() == 2
    assert num_positive(x.mT).tolist() == 2
    assert torch.func.vmap(num_positive)(x).tolist() == [1, 1]


def test_num_zero_under_a_transform() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 4.0]])
    assert torch.func.vmap(num_zero)(x).tolist() == [1, 1, 0]
