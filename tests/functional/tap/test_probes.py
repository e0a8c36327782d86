"""Probes: identities to the model, statistics to us, and nothing in the way of autograd or torch.func."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    eager_probe,
    is_probe,
    is_safe,
    num_nonzero,
    statistics_dtype,
    sum_of_squares,
)


def slot(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, requires_grad=True)


def site(*, exact: bool = True) -> Site:
    return Site(0, 0, exact)


# PyTorch's own, when forward mode is first used
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
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
    np.testing.assert_allclose(squares.item(), kept.grad.square().sum().item(), rtol=1e-14)


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
def test_the_statistic_is_the_sum_of_squares_and_the_gradient_passes_unchanged(
    kind: str, dtype: torch.dtype, exact: bool
) -> None:
    x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    g = torch.randn(5, 3, dtype=dtype)
    s = torch.zeros((), dtype=statistics_dtype(x, exact=exact), requires_grad=True)
    y = PROBES[kind](x, s, site(exact=exact))
    gradient, squares = torch.autograd.grad(y, (x, s), g)
    assert torch.equal(gradient, g)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = g.to(wide).abs().square().sum().item()
    assert squares.dtype == (torch.float64 if exact or dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(squares.item(), expected, rtol=1e-12 if exact else 1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.integers(-30, 30), contiguous=st.booleans())
def test_exact_sums_neither_overflow_nor_underflow(seed: int, power: int, contiguous: bool) -> None:
    torch.manual_seed(seed)
    g = torch.randn(7, 3) * 10.0**power
    g = g if contiguous else g.mT.contiguous().mT
    expected = float(g.double().square().sum())
    np.testing.assert_allclose(float(sum_of_squares(g, exact=True)), expected, rtol=1e-12)
    if abs(power) <= 10:  # in the range that is called safe
        assert is_safe(np.array([expected]), np.array([g.numel()]))[0]
        np.testing.assert_allclose(float(sum_of_squares(g, exact=False)), expected, rtol=1e-5)
        x, s = torch.zeros(7, 3, requires_grad=True), torch.zeros((), requires_grad=True)
        _, fast = torch.autograd.grad(eager_probe(x, s, site(exact=False)), (x, s), g)
        np.testing.assert_allclose(fast.item(), expected, rtol=1e-5)
    if abs(power) >= 13:
        assert not is_safe(np.array([expected]), np.array([g.numel()]))[0]


def test_safe_is_a_matter_of_the_mean_and_not_of_the_number() -> None:
    squares = np.array([0.0, 1e-30, 1e-20, 1.0, 1e20, 1e30, np.inf, np.nan])
    assert is_safe(squares, np.ones(8)).tolist() == [False, False, True, True, True, False, False, False]
    assert is_safe(squares * 1e9, np.full(8, 1e9)).tolist() == is_safe(squares, np.ones(8)).tolist()


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
    expected = float(dense.double().square().sum())
    np.testing.assert_allclose(float(sum_of_squares(x, exact=exact)), expected, rtol=1e-5)


def test_a_slot_of_two_tells_reached_and_zero_from_never_reached() -> None:
    def loss(x: Tensor, s: Tensor, factor: float) -> Tensor:
        y = probe(x, s, site())
        return x.sum() if math.isnan(factor) else (y * factor).sum()

    x, s = torch.randn(3), torch.zeros(2, dtype=torch.float64)
    for factor, expected in ((2.0, [12.0, 1.0]), (0.0, [0.0, 1.0]), (float("nan"), [0.0, 0.0])):
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
EXPECTED = float((3 * torch.tanh(W).square()).square().sum())


def test_grad() -> None:
    gradient, squares = grad(cubic, argnums=(0, 1))(W, SLOT)
    torch.testing.assert_close(gradient, grad(lambda w: cubic(w, SLOT, probed=False))(W))
    np.testing.assert_allclose(squares, EXPECTED)


def test_vjp_scales_the_statistic_by_the_square_of_the_cotangent() -> None:
    _, pull = vjp(cubic, W, SLOT)
    np.testing.assert_allclose(pull(torch.tensor(3.0, dtype=torch.float64))[1], 9 * EXPECTED)


@FORWARD_MODE
def test_jvp_is_that_of_the_identity() -> None:
    tangent = torch.ones_like(W)
    plain = jvp(lambda w: cubic(w, SLOT, probed=False), (W,), (tangent,))
    probed = jvp(lambda w: cubic(w, SLOT), (W,), (tangent,))
    torch.testing.assert_close(probed, plain)


def test_vmap_of_grad_gives_a_statistic_per_sample() -> None:
    batch = torch.stack([W, 2 * W, -W])
    squares = vmap(grad(cubic, argnums=1), in_dims=(0, None))(batch, SLOT)
    expected = (3 * torch.tanh(batch).square()).square().sum(1)
    torch.testing.assert_close(squares, expected)


@FORWARD_MODE
def test_forward_over_reverse_and_reverse_over_reverse() -> None:
    plain = hessian(lambda w: cubic(w, SLOT, probed=False))(W)
    torch.testing.assert_close(hessian(lambda w: cubic(w, SLOT))(W), plain)
    torch.testing.assert_close(jacrev(grad(lambda w: cubic(w, SLOT)))(W), plain)
    # the statistic is itself differentiable: d/dw of Σ(3 tanh²)²
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
    expected = (2 * model(x)).square().sum(1).detach()
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
def test_exact_sums_of_squares_neither_underflow_nor_overflow(size: int, scale: float) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * scale
    expected = float(x.double().square().sum())
    assert float(sum_of_squares(x, exact=True)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [100, 20_000])
def test_exact_sums_of_squares_of_zeros_and_of_what_is_not_finite(size: int) -> None:
    x = torch.zeros(size)
    assert float(sum_of_squares(x, exact=True)) == 0.0
    for value in (float("nan"), float("inf")):
        x[size // 2] = value
        assert not np.isfinite(float(sum_of_squares(x, exact=True)))
