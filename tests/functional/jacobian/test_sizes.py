"""Every size: no elements, one, those on either side of a chunk, scalars, no sample and one sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradflow.errors import ModelInputError
from gradflow.functional import (
    Jacobian,
    field_jacobian,
    gradient_noise,
    jacobian_between,
    layer_function,
    layer_gain,
    layer_jvp,
    layer_spectrum,
    layer_vjp,
    per_sample_gradients,
    vector_field,
)

# the matrix is made 64 rows at a time, behind the first
SIDES = st.sampled_from([0, 1, 2, 3, 63, 64, 65, 66, 128, 129, 130])
SHAPES = st.one_of(
    SIDES.map(lambda n: (n,)), st.just(()), st.lists(st.integers(0, 4), min_size=2, max_size=3)
)


def seeded(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def references(function: Any, point: Tensor) -> list[Tensor]:
    """Return the matrix twice, by autograd's own loop and by `jacrev`, which both refuse an empty output."""
    value = function(point)
    if not value.numel():
        return [point.new_zeros(0, point.numel())]
    found = [torch.autograd.functional.jacobian(function, point), torch.func.jacrev(function)(point)]
    return [m.reshape(value.numel(), point.numel()) for m in found]  # type: ignore[union-attr]


def check(jacobian: Jacobian, function: Any) -> None:
    """Hold all that a Jacobian tells against its matrix."""
    n_out, n_in = jacobian.shape
    matrix = jacobian.dense()
    for expected in references(function, jacobian.point):
        torch.testing.assert_close(matrix, expected)
    v, u = torch.ones_like(jacobian.point), torch.ones_like(jacobian.value)
    torch.testing.assert_close(jacobian.jvp(v).reshape(-1), matrix @ v.reshape(-1))
    torch.testing.assert_close(jacobian.vjp(u).reshape(-1), matrix.T @ u.reshape(-1))
    values = np.linalg.svd(matrix.numpy(), compute_uv=False) if min(n_out, n_in) else np.zeros(0)
    for method in ("auto", "dense", "iterative"):
        found = jacobian.spectrum(min(n_out, n_in) or 1, method=method, tolerance=1e-10)
        assert (found.converged, found.is_complete) == (True, True)
        np.testing.assert_allclose(found.singular_values, values, atol=1e-8, rtol=1e-6)
    assert jacobian.singular_values().shape == (min(n_out, n_in),)
    assert jacobian.singular_values(1).shape == (min(n_out, n_in, 1),)
    gain = jacobian.gain(num_probes=2)
    if not n_in:
        assert math.isnan(gain.gain)
        assert math.isnan(gain.standard_error)
    elif n_in == 1 or not n_out:  # ±1 is every direction that there is
        np.testing.assert_allclose(gain.frobenius_norm, float(matrix.norm()))
        assert gain.standard_error < 1e-12
    condition = jacobian.condition_number()
    if len(values):
        np.testing.assert_allclose(condition, values[0] / values[-1], rtol=1e-6)
    else:
        assert math.isnan(condition)
        assert jacobian.spectrum().largest == 0.0
        assert math.isnan(jacobian.spectrum().stable_rank)


@settings(max_examples=60, deadline=None)
@given(entering=SHAPES, leaving=SHAPES)
def test_a_jacobian_of_any_size(entering: Any, leaving: Any) -> None:
    point, weight = seeded(*entering), seeded(math.prod(leaving), math.prod(entering))

    def function(x: Tensor) -> Tensor:
        return (weight @ x.reshape(-1)).sin().reshape(leaving)

    check(Jacobian(function, point), function)


LINEAR = st.tuples(*[st.sampled_from([0, 1, 2, 64, 65])] * 2, st.sampled_from([None, 0, 1, 3]))


@settings(max_examples=40, deadline=None)
@given(sizes=LINEAR)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_any_size(sizes: tuple[int, int, int | None]) -> None:
    n_in, n_out, samples = sizes
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n_in, n_out).double())
    x = seeded(n_in) if samples is None else seeded(samples, n_in)
    weight = model[0].weight.detach()
    rows = 1 if samples is None else samples
    expected = torch.kron(torch.eye(rows, dtype=torch.float64), weight)
    for layer in ("", "0"):
        function = layer_function(model, layer, x)
        torch.testing.assert_close(function.jacobian().dense(), expected)
        for whole in references(model, x):
            torch.testing.assert_close(whole, expected)
        output, product = layer_jvp(model, layer, x, torch.ones_like(x))
        torch.testing.assert_close(product, (torch.ones_like(x) @ weight.T))
        output, product = layer_vjp(model, layer, x, torch.ones_like(output))
        torch.testing.assert_close(product, (torch.ones_like(output) @ weight))
        assert layer_jvp(model, layer, x)[1].shape == output.shape
        assert layer_vjp(model, layer, x)[1].shape == x.shape
        values = np.linalg.svd(weight.numpy(), compute_uv=False) if min(n_in, n_out) else np.zeros(0)
        for sample in ("auto", "all"):
            spectrum = layer_spectrum(model, layer, x, sample=sample)
            copies = rows if sample == "all" or not rows else 1
            np.testing.assert_allclose(
                np.sort(spectrum.singular_values), np.sort(np.repeat(values, copies)), atol=1e-12
            )
        gain = layer_gain(model, layer, x, num_probes=64)
        assert gain.n_in == x.numel()
        if x.numel():
            truth = float(expected.norm()) / math.sqrt(x.numel())
            assert abs(gain.gain - truth) <= 6 * gain.standard_error + 1e-12
    between = jacobian_between(model, None, "0", x)
    torch.testing.assert_close(between.dense(), expected)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_one_sample_or_one_step_before_the_samples(samples: int, steps: int) -> None:
    """An axis of length one is treated on its own by everything, and tells nothing."""
    model, x = nn.RNN(3, 2).double(), seeded(steps, samples, 3)
    spectrum = layer_spectrum(model, "", x)
    one = layer_spectrum(model, "", x[:, :1].clone(), sample="all")
    assert (spectrum.sample, spectrum.n_in, spectrum.n_out) == (0, steps * 3, steps * 2)
    np.testing.assert_allclose(spectrum.singular_values, one.singular_values, rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(1, 5), chunk=st.integers(1, 7), features=st.integers(0, 2))
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_gradients_of_any_number_of_samples_in_any_chunks(samples: int, chunk: int, features: int) -> None:
    model, x = nn.Linear(features, 1).double(), seeded(samples, features)

    def loss(y: Tensor) -> Tensor:
        return y.square().mean()

    expected = []
    for row in x:
        model.zero_grad()
        loss(model(row[None])).backward()
        expected.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    for method in ("vmap", "loop"):
        found = per_sample_gradients(model, x, loss, chunk_size=chunk, method=method)
        for name, of_samples in zip(found, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(found[name], torch.stack(of_samples))
    if samples == 1:
        with pytest.raises(ModelInputError, match="a variance needs two at least"):
            gradient_noise(model, x, loss, chunk_size=chunk)
        return
    noise = gradient_noise(model, x, loss, chunk_size=chunk)
    flat = torch.cat([torch.stack(g).reshape(samples, -1) for g in zip(*expected, strict=True)], 1)
    np.testing.assert_allclose(noise.total.trace, float(flat.var(0).sum()), rtol=1e-9)


def test_no_sample_is_refused() -> None:
    with pytest.raises(ModelInputError, match="no tensor with samples along its first axis"):
        per_sample_gradients(nn.Linear(2, 1), torch.zeros(0, 2), lambda y: y.sum())


def test_parameters_without_elements_have_no_noise() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none = nn.Parameter(torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            return x.sum() + self.none.sum()

    noise = gradient_noise(Empty(), torch.ones(3, 2), lambda y: y)
    assert (noise.total.trace, noise.total.squared_norm) == (0.0, 0.0)


@settings(max_examples=20, deadline=None)
@given(size=st.sampled_from([0, 1, 2, 64, 65, 66, 129]), probes=st.sampled_from([1, 2]))
def test_a_field_on_any_number_of_parameters(size: int, probes: int) -> None:
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Parameter(seeded(size))

    model = Point()

    def loss(m: Any) -> Tensor:
        return (m.at**4).sum()

    hessian = torch.diag(12 * model.at.detach() ** 2)
    torch.testing.assert_close(field_jacobian(model, loss).dense(), hessian)
    field = vector_field(model, loss, num_probes=probes, max_exact=1000)
    assert field.num_parameters == size
    np.testing.assert_allclose(field.divergence, float(12 * model.at.detach().square().sum()), atol=1e-12)
    assert field.curl < 1e-7
