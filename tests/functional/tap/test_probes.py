"""Probes: identities to the model, statistics to us, and nothing in the way of autograd or torch.func."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from gradflow.functional import probe
from gradflow.functional.tap.probes import eager_probe, is_probe
from gradflow.functional.tap.sums import as_norm, statistics_dtype
from tests.functional.tap.sites import site, slot

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
