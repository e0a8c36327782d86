"""The effective rank of a gradient, against closed forms and singular values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow.functional import effective_rank


def test_a_rank_one_gradient_has_rank_one() -> None:
    u, v = torch.randn(9, 1), torch.randn(1, 5)
    assert effective_rank(u @ v) == pytest.approx(1.0, abs=1e-6)
    assert effective_rank((u @ v).double() * 1e-200) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_an_orthogonal_gradient_has_the_rank_of_its_width(shape: tuple[int, int]) -> None:
    q = torch.linalg.qr(torch.randn(max(shape), min(shape), dtype=torch.float64))[0]
    q = q if shape[0] >= shape[1] else q.T
    assert effective_rank(q) == pytest.approx(min(shape), rel=1e-9)
    assert effective_rank(1e3 * q) == pytest.approx(min(shape), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12), d=st.integers(1, 12), seed=st.integers(0, 10_000),
    spread=st.floats(0, 6), scale=st.sampled_from([1e-20, 1.0, 1e20]),
)  # fmt: skip
def test_it_lies_between_one_and_the_smaller_side_and_is_that_of_the_svd(
    n: int, d: int, seed: int, spread: float, scale: float
) -> None:
    torch.manual_seed(seed)
    g = torch.randn(n, d, dtype=torch.float64) * torch.logspace(0, -spread, d, dtype=torch.float64)
    rank = effective_rank(g * scale)
    assert 1.0 - 1e-9 <= rank <= min(n, d) * (1 + 1e-9)
    shares = torch.linalg.svdvals(g).square()
    shares = shares / shares.sum()
    expected = float(torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum()))
    assert rank == pytest.approx(expected, rel=1e-6)


def test_complex_gradients_have_a_rank_too() -> None:
    u, v = torch.randn(9, 1, dtype=torch.complex128), torch.randn(1, 5, dtype=torch.complex128)
    assert effective_rank(u @ v) == pytest.approx(1.0, abs=1e-9)
    q = torch.linalg.qr(torch.randn(9, 4, dtype=torch.complex128))[0]
    assert effective_rank(q) == pytest.approx(4.0)


def test_it_is_of_samples_by_features_wherever_the_features_are() -> None:
    g = torch.randn(3, 2, 4, 4)  # channels behind a convolution, features last in a sequence
    assert effective_rank(g, "Conv2d") == pytest.approx(effective_rank(g.movedim(1, -1).reshape(-1, 2)))
    assert effective_rank(g, "Linear") == pytest.approx(effective_rank(g.reshape(-1, 4)))
    assert effective_rank(g, "Conv2d") <= 2


def test_it_is_nan_where_there_is_none() -> None:
    values: list[Any] = [
        torch.zeros(3, 2),
        torch.tensor([[1.0, float("nan")]]),
        torch.full((2, 2), float("inf")),
    ]
    assert all(math.isnan(effective_rank(v)) for v in values)
    assert effective_rank(torch.randn(5)) == 1.0
    assert math.isnan(effective_rank(torch.zeros(5)))
