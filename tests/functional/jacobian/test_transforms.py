"""Measurements inside transforms of `torch.func`: plain numbers of plain tensors, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow import functional
from gradflow.errors import ModelInputError
from gradflow.functional import (
    jacobian_between,
    layer_function,
    layer_gain,
    layer_jvp,
    layer_spectrum,
    layer_vjp,
)
from tests.functional.jacobian.models import fingerprint

# PyTorch's own, when forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

OUTER: dict[str, Any] = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(POINT),
    "vjp": lambda f: torch.func.vjp(f, POINT)[1](f(POINT))[0],
    "jvp": lambda f: torch.func.jvp(f, (POINT,), (POINT,))[1],
    "vmap": lambda f: torch.func.vmap(f)(POINT[None]),
    "grad in vmap": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(POINT[None]),
    "jacrev": lambda f: torch.func.jacrev(f)(POINT),
}
POINT = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
RNN = nn.RNN(3, 3)
INNER: dict[str, Any] = {  # what the transform differentiates is passed, or held
    "layer_jvp, batch": lambda m, x: layer_jvp(m, "", x, POINT)[1],
    "layer_jvp, tangent": lambda m, x: layer_jvp(m, "", POINT, x)[1],
    "layer_vjp, batch": lambda m, x: layer_vjp(m, "", x, POINT)[1],
    "layer_vjp, cotangent": lambda m, x: layer_vjp(m, "", POINT, x)[1],
    "layer_function": lambda m, x: layer_function(m, "", x).value,
    "layer_gain": lambda m, x: x * layer_gain(m, "", x).gain,
    "layer_spectrum": lambda m, x: x * layer_spectrum(m, "", x).largest,
    "jacobian_between": lambda m, x: jacobian_between(m, None, "", x).vjp(POINT),
    "per_sample_gradients": lambda m, x: gf.per_sample_gradients(m, x, lambda y: y.sum())["0.weight"],
    "gradient_noise, held by the loss": lambda m, x: (
        x * gf.gradient_noise(m, POINT, lambda y: (y * x[0]).sum()).noise_scale
    ),
    "vector_field": lambda m, x: x * gf.vector_field(m, lambda y: y.sum(), x).divergence,
    "a Jacobian's point": lambda m, x: functional.Jacobian(torch.sin, x).vjp(POINT),
    "a Jacobian's cotangent": lambda m, x: functional.Jacobian(torch.sin, POINT).vjp(x),
    "held by a Jacobian's function": lambda m, x: functional.Jacobian(lambda z: z * x, POINT).vjp(POINT),
    "a parameter": lambda m, x: torch.func.functional_call(Gained(m), {"model.0.bias": x[0]}, (POINT,)),
    "hidden_gradients": lambda m, x: gf.hidden_gradients(RNN, x[None], lambda r: r[0].sum())["l0"],
}


class Gained(nn.Module):
    """Multiplies by the gain of a model, with the parameters that it has at the moment."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return x * layer_gain(self.model, "", x).gain


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", INNER)
def test_what_an_outer_transform_follows_is_refused(outer: str, inner: str) -> None:
    """The result would be a constant to it, with a derivative of zero."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    before = fingerprint(model)
    with pytest.raises(ModelInputError, match="belongs to a transform of `?torch.func`?"):
        OUTER[outer](lambda x: INNER[inner](model, x))
    assert fingerprint(model) == before


@pytest.mark.parametrize("outer", [name for name in OUTER if name != "jacrev"])
def test_numbers_of_what_it_does_not_follow_are_as_ever(outer: str) -> None:
    """A gain of a model at plain values is the same constant inside of a transform."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    jacobian = jacobian_between(model, None, "", POINT)

    def factors() -> list[float]:
        return [
            layer_gain(model, "", POINT, seed=1).gain,
            float(layer_vjp(model, "0", POINT, POINT)[1].sum()),
            layer_spectrum(model, "", POINT, method="iterative", sample="all", seed=1).largest,
            gf.gradient_noise(model, POINT, lambda y: y.sum(), seed=1).noise_scale,
            gf.vector_field(model, lambda y: y.sum(), POINT, seed=1).divergence,
            float(jacobian.jvp(POINT).sum()),
            jacobian.gain(seed=1).gain,
            float(jacobian.dense().sum()),
        ]

    expected, found = factors(), []

    def function(x: Tensor) -> Tensor:
        found.append(factors())
        return x * found[-1][0]

    OUTER[outer](function)
    for numbers in found:
        np.testing.assert_allclose(numbers, expected, rtol=1e-5)
    np.testing.assert_allclose(factors(), expected, rtol=1e-5)  # what was kept in there is no transform's
