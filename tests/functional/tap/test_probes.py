"""Probes: identities to the model, statistics to us, and nothing in the way of autograd or torch.func."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from gradflow.functional import effective_rank, probe
from gradflow.functional.tap.probes import (
    Site,
    as_norm,
    eager_probe,
    is_probe,
    is_safe,
    magnitude,
    num_nonzero,
    safe_range,
    statistics_dtype,
)


def slot(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, requires_grad=True)


def site(*, exact: bool = True) -> Site:
    return Site(0, 0, exact)


# PyTorch's own, when forward mode is first used
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
PROBES: dict[str, Callable[..., Tensor]] = {"probe": probe, "eager": eager_probe}


# ------------------------------------------------------------------------------------ the identity


@pytest.mark.parametrize("kind", PROBES)
def test_it_is_the_identity_with_the_same_storage_and_no_view(kind: str) -> None:
    x = torch.randn(3, 4, requires_grad=True) * 1
    y = PROBES[kind](x, slot(), site())
    assert torch.equal(x, y)
    assert y is not x
    assert y.data_ptr() == x.data_ptr()
    assert not y._is_view()
    assert is_probe(y.grad_fn)
    assert not is_probe(x.grad_fn)


def slice_assignment(y: Tensor) -> Tensor:
    y[:, 1] = 0.5
    return y


def several(y: Tensor) -> Tensor:
    y.mul_(2.0)
    y += 1.0
    y[0] -= 0.5
    return torch.nn.functional.relu_(y)


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda y: y.relu_(),
    "+=": lambda y: y.add_(torch.ones(4)),
    "*=": lambda y: y.mul_(3.0),
    "slice assignment": slice_assignment,
    "masked_fill_": lambda y: y.masked_fill_(y > 0, 2.0),
    "several": several,
}


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_follows_may_be_done_in_place(kind: str, name: str) -> None:
    w = torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    weights = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)

    def loss(w: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x @ w
        kept = h
        if s is not None:
            h = PROBES[kind](h, s, site())
        else:
            kept.retain_grad()
            h = h.clone()
        return (IN_PLACE[name](h) * weights).sum(), kept

    leaf, s = w.clone().requires_grad_(), slot()
    value, _ = loss(leaf, s)
    gradient, squares = torch.autograd.grad(value, (leaf, s))
    naive = w.clone().requires_grad_()
    plain, kept = loss(naive, None)
    plain.backward()
    assert torch.equal(value, plain)
    assert naive.grad is not None
    assert kept.grad is not None
    assert torch.equal(gradient, naive.grad)
    np.testing.assert_allclose(squares.item(), kept.grad.norm().item(), rtol=1e-14)


@pytest.mark.parametrize("kind", [None, *PROBES])
def test_a_change_in_place_of_what_backward_needs_raises_as_plain_pytorch_does(kind: str | None) -> None:
    # exp saves its output; a probe with a version counter of its own would hide that it was changed
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    z = y if kind is None else PROBES[kind](y, slot(), site())
    assert z._version == y._version == 0
    z.mul_(2.0)
    assert z._version == y._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


# ----------------------------------------------------------------------------------- the statistic


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
@pytest.mark.parametrize("exact", [True, False])
def test_the_statistic_is_the_magnitude_and_the_gradient_passes_unchanged(
    kind: str, dtype: torch.dtype, exact: bool
) -> None:
    x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    g = torch.randn(5, 3, dtype=dtype)
    s = torch.zeros((), dtype=statistics_dtype(x, exact=exact), requires_grad=True)
    y = PROBES[kind](x, s, site(exact=exact))
    gradient, size = torch.autograd.grad(y, (x, s), g)
    assert torch.equal(gradient, g)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    squares = g.to(wide).abs().square().sum().item()
    double = exact or dtype == torch.float64
    assert size.dtype == (torch.float64 if double else torch.float32)
    expected = math.sqrt(squares) if double else squares
    np.testing.assert_allclose(size.item(), expected, rtol=1e-12 if exact else 1e-6)
    for other in (torch.float64, torch.float32):  # a slot tells by its own dtype which of the two it holds
        own = torch.zeros((), dtype=other, requires_grad=True)
        size = torch.autograd.grad(probe(x, own, site(exact=exact)), own, g)[0]
        np.testing.assert_allclose(as_norm(size).item(), math.sqrt(squares), rtol=1e-6)


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


def spread(dtype: torch.dtype, low: float, high: float, number: int, seed: int) -> Tensor:
    """Return numbers whose logarithms are even between two powers of ten, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.rand(number, generator=generator, dtype=torch.float64) * (high - low) + low
    signs = torch.randint(0, 2, (number,), generator=generator) * 2 - 1
    return (10.0**power * signs).to(dtype)


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


def test_a_slot_of_two_tells_reached_and_zero_from_never_reached() -> None:
    def loss(x: Tensor, s: Tensor, factor: float) -> Tensor:
        y = probe(x, s, site())
        return x.sum() if math.isnan(factor) else (y * factor).sum()

    x, s = torch.randn(3), torch.zeros(2, dtype=torch.float64)
    for factor, expected in ((2.0, [math.sqrt(12.0), 1.0]), (0.0, [0.0, 1.0]), (float("nan"), [0.0, 0.0])):
        assert grad(loss, argnums=1)(x, s, factor).tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------- under torch.func


def cubic(w: Tensor, s: Tensor, *, probed: bool = True) -> Tensor:
    """A loss whose gradient at the probe is 3 z² with z = tanh(w)."""
    z = torch.tanh(w)
    if probed:
        z = probe(z, s, site())
    return z.pow(3).sum()


W = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SLOT = torch.zeros((), dtype=torch.float64)
EXPECTED = float((3 * torch.tanh(W).square()).norm())


def test_grad() -> None:
    gradient, norm = grad(cubic, argnums=(0, 1))(W, SLOT)
    torch.testing.assert_close(gradient, grad(lambda w: cubic(w, SLOT, probed=False))(W))
    np.testing.assert_allclose(norm, EXPECTED)


def test_vjp_scales_the_statistic_by_the_size_of_the_cotangent() -> None:
    _, pull = vjp(cubic, W, SLOT)
    np.testing.assert_allclose(pull(torch.tensor(-3.0, dtype=torch.float64))[1], 3 * EXPECTED)


@FORWARD_MODE
def test_jvp_is_that_of_the_identity() -> None:
    tangent = torch.ones_like(W)
    plain = jvp(lambda w: cubic(w, SLOT, probed=False), (W,), (tangent,))
    probed = jvp(lambda w: cubic(w, SLOT), (W,), (tangent,))
    torch.testing.assert_close(probed, plain)


def test_vmap_of_grad_gives_a_statistic_per_sample() -> None:
    batch = torch.stack([W, 2 * W, -W])
    norms = vmap(grad(cubic, argnums=1), in_dims=(0, None))(batch, SLOT)
    expected = (3 * torch.tanh(batch).square()).norm(dim=1)
    torch.testing.assert_close(norms, expected)


@FORWARD_MODE
def test_forward_over_reverse_and_reverse_over_reverse() -> None:
    plain = hessian(lambda w: cubic(w, SLOT, probed=False))(W)
    torch.testing.assert_close(hessian(lambda w: cubic(w, SLOT))(W), plain)
    torch.testing.assert_close(jacrev(grad(lambda w: cubic(w, SLOT)))(W), plain)
    # the statistic is itself differentiable: d/dw of ‖3 tanh²‖
    slope = grad(lambda w: grad(cubic, argnums=1)(w, SLOT))(W)
    numeric = []
    for i in range(4):
        step = torch.zeros_like(W)
        step[i] = 1e-6
        ends = [float(grad(cubic, argnums=1)(W + sign * step, SLOT)) for sign in (1, -1)]
        numeric.append((ends[0] - ends[1]) / 2e-6)
    np.testing.assert_allclose(slope, numeric, rtol=1e-6)


def test_under_functional_call_and_vmap_of_models() -> None:
    model = torch.nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], s: Tensor, x: Tensor) -> Tensor:
        y = probe(functional_call(model, parameters, (x,)), s, site())
        return y.square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    per_sample = vmap(grad(loss, argnums=1), in_dims=(None, None, 0))(parameters, SLOT, x)
    expected = (2 * model(x)).norm(dim=1).detach()
    torch.testing.assert_close(per_sample, expected)


def test_the_eager_form_is_not_for_torch_func() -> None:
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(lambda w: eager_probe(w, SLOT, site()).sum())(W)


@pytest.mark.parametrize("kind", PROBES)
def test_what_is_not_reached_costs_nothing_and_gives_none(kind: str) -> None:
    x, s = torch.randn(3, requires_grad=True), slot()
    PROBES[kind](x, s, site())
    assert torch.autograd.grad(x.sum(), (s,), allow_unused=True) == (None,)


# --------------------------------------------------------------------------------- effective rank


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (700, 900)])
def test_elements_that_are_not_zero_are_counted(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.relu(torch.randn(shape, generator=generator)).to(dtype)
    for view in (x, x.mT) if x.dim() == 2 else (x,):
        assert float(num_nonzero(view)) == float((view != 0).sum())


def test_tiny_numbers_are_not_zero() -> None:
    assert float(num_nonzero(torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e38]))) == 3


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
