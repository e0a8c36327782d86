"""Gradients and activations of any size that their dtype can hold are measured as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.functional import analyze
from tests.functional.naive import naive_step
from tests.models import squares

STEPS = 9


def norm(x: Tensor) -> float:
    """Return a norm with no square out of range."""
    x = x.detach().double()
    largest = float(x.abs().max())
    return largest * float((x / largest).norm()) if largest else 0.0


def scaled(factors: dict[int, float]) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Return batches, and a loss that is scaled by a factor at some steps."""
    x, step = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), [-1]

    def batches() -> Tensor:
        step[0] += 1
        return x

    return batches, lambda y: y.double().square().mean() * factors.get(step[0], 1.0)


class Wide(nn.Module):
    """A large output, which is probed, and small ones, whose gradients are captured."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 40_000), nn.Linear(40_000, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:
            h: Any = checkpoint(self.first, x.requires_grad_(), use_reentrant=True)
        else:
            h = self.first(x)
        return self.last(torch.tanh(h))


@pytest.mark.parametrize("factor", [1e-16, 1e-19, 1e-20, 1e-25, 1e-30, 1e17, 1e25])
@pytest.mark.parametrize("at", [3, 5, 8])
def test_a_step_whose_squares_leave_single_precision(factor: float, at: int) -> None:
    """Between looks, and at one: squares that underflow in part, altogether, or overflow."""
    torch.manual_seed(0)
    model = Wide()
    batches, loss = scaled({at: factor})
    record = gf.analyze(model, batches, loss, steps=STEPS)
    h = model.first(batches())
    y = model.last(torch.tanh(h))
    h.retain_grad(), y.retain_grad()
    (y.double().square().mean() * factor).backward()
    for name, value in (("first", h), ("last", y)):
        assert record[name].grad_norm[at] == pytest.approx(norm(value.grad), rel=1e-5)
        np.testing.assert_allclose(
            np.delete(record[name].grad_norm, at), record[name].grad_norm[0], rtol=1e-5
        )
    for parameter in record.parameters:
        grad = model.get_parameter(parameter.name).grad
        assert parameter.grad_norm[at] == pytest.approx(norm(grad), rel=1e-5)


@pytest.mark.parametrize("transform", ["fused", "vjp"])
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_in_every_way_of_measuring(transform: Any, detail: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 300), nn.Tanh(), nn.Linear(300, 4))
    factors = {3: 1e-20, 4: 3e-21, 5: 1e-12}
    batches, loss = scaled(factors)
    record = gf.analyze(model, batches, loss, steps=STEPS, transform=transform, detail=detail)
    for layer in record:
        expected = [layer.grad_norm[0] * factors.get(step, 1.0) for step in range(STEPS)]
        np.testing.assert_allclose(layer.grad_norm, expected, rtol=1e-5)
    if record.graph_record is not None and detail == "full" and transform == "fused":
        between = [e for e in record.graph_record.edges if e.source != "input" and e.target in record]
        assert len(between) == 2
        for edge in between:
            expected = [edge.flow[0] * factors.get(step, 1.0) for step in range(STEPS)]
            np.testing.assert_allclose(edge.flow, expected, rtol=1e-5, err_msg=f"{edge.source} {edge.target}")


def test_inside_a_reentrant_checkpoint() -> None:
    """Its steps are not run again, so its sums are exact from the first to the last."""
    torch.manual_seed(0)
    batches, loss = scaled({5: 1e-19})
    record = gf.analyze(Wide(reentrant=True), batches, loss, steps=STEPS)
    for layer in record:
        assert layer.grad_norm[5] == pytest.approx(1e-19 * layer.grad_norm[0], rel=1e-5)


def test_activations_that_shrink_and_grow() -> None:
    """Inputs and outputs, and what enters an activation, at looks in which they were in range before."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    factors = [1.0, 1.0, 1.0, 1.0, 1e-21, 1.0, 1.0, 1.0, 1.0, 1.0, 1e20]
    model = nn.Sequential(nn.Linear(16, 300, bias=False), nn.Tanh(), nn.Linear(300, 4))
    for p in model.parameters():
        p.data = p.data.double().float()
    record = gf.analyze(model, [x * f for f in factors], lambda y: y.sum(), steps=len(factors))
    root = norm(x) / 512**0.5
    for step in (0, 1, 4, 10):
        assert record["0"].input_rms[step] == pytest.approx(factors[step] * root, rel=1e-5)
        assert record["0"].output_rms[step] == pytest.approx(
            factors[step] * record["0"].output_rms[0], rel=1e-5
        )
        tanh = record.activations[0]
        assert tanh.input_rms[step] == pytest.approx(record["0"].output_rms[step], rel=1e-5)
    assert record["0"].output_variation[4] == pytest.approx(record["0"].output_variation[0], rel=1e-4)


class Two(nn.Module):
    """A layer with several outputs, whose norms are joined."""

    class Split(nn.Module):
        """Two outputs of one matrix."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.weight, x @ self.weight.T

    def __init__(self) -> None:
        super().__init__()
        self.split, self.out = self.Split(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(x)
        return self.out(a) + self.out(2 * b)


@pytest.mark.parametrize("power", [-300, -200, -163, -100, 0, 100, 150, 170, 290])
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_double_precision_over_its_range(power: int, detail: Any) -> None:
    torch.manual_seed(0)
    model, x = Two().double(), torch.randn(8, 4, dtype=torch.float64)

    def loss(y: Tensor) -> Tensor:
        return (y * 10.0**power).sum()

    record = gf.analyze(model, [x] * 6, loss, steps=6, detail=detail)
    naive = naive_step(model, x, loss)
    for layer in record:
        expected = np.hypot.reduce([norm(t.grad) for t in naive.outputs[layer.name] if t.grad is not None])
        np.testing.assert_allclose(layer.grad_norm, expected, rtol=1e-12, err_msg=layer.name)
        assert layer.grad_finite.all()
    for parameter in record.parameters:
        grad = model.get_parameter(parameter.name).grad
        assert grad is not None
        np.testing.assert_allclose(parameter.grad_norm, norm(grad), rtol=1e-12, err_msg=parameter.name)
        assert parameter.grad_finite.all()
    assert not record.numerics
    if detail == "full" and record.graph_record is not None:
        for edge in (e for e in record.graph_record.edges if e.source != "input"):
            assert np.isfinite(edge.flow).all()
            assert (edge.flow > 0).all()
        for node in record.graph_record.nodes:
            if node.name in record:
                np.testing.assert_allclose(node.grad_norm, record[node.name].grad_norm, rtol=1e-12)


def test_a_gradient_that_fades_over_many_layers_is_not_zero() -> None:
    torch.manual_seed(0)
    blocks = [layer for _ in range(75) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
    model = nn.Sequential(*blocks).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.02)
    x = torch.randn(8, 8, dtype=torch.float64)
    record = gf.analyze(model, [x] * 3, lambda y: y.sum())
    model(x).sum().backward()
    for parameter in record.parameters:
        grad = model.get_parameter(parameter.name).grad
        assert grad is not None
        np.testing.assert_allclose(parameter.grad_norm, norm(grad), rtol=1e-10)
        assert (parameter.grad_norm > 0).all()


class Scaled(nn.Module):
    """Two layers, the first behind a gradient that is scaled on its way back."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.scale)


WAYS = [("fused", "cheap"), ("fused", "full"), ("vjp", "cheap")]


@pytest.mark.parametrize(("transform", "detail"), WAYS)
def test_a_tiny_gradient_is_not_zero_and_a_zero_one_is(transform: str, detail: str) -> None:
    options: dict[str, Any] = {"steps": 3, "transform": transform, "detail": detail}
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for scale in (1e-30, 0.0):
        torch.manual_seed(0)
        model = Scaled(scale)
        record = analyze(model, [x] * 3, squares, **options)
        (exact,) = torch.autograd.grad(squares(model(x)), [model.first.bias])
        if scale:
            assert 0 < float(exact.double().norm()) < 1e-28
            np.testing.assert_allclose(
                record.parameter("first.bias").grad_norm, exact.double().norm(), rtol=1e-5
            )
            assert (record["first"].grad_norm > 0).all()
            assert (record["first"].grad_norm < 1e-28).all()
        else:
            assert (record["first"].grad_norm == 0).all()
            assert (record.parameter("first.bias").grad_norm == 0).all()
            assert (record.parameter("first.bias").grad_zero_share == [1, 1, 1]).all()
        assert (record["first"].grad_zero == (scale == 0)).all()
        assert not record["second"].grad_zero.any()
        assert record["first"].reached.all()


@pytest.mark.parametrize(("transform", "detail"), WAYS)
def test_a_huge_finite_gradient_is_not_infinite(transform: str, detail: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    options: dict[str, Any] = {"steps": 4, "transform": transform, "detail": detail}
    record = analyze(model, [x] * 4, lambda y: y.mean() * 1e25, **options)
    naive = naive_step(model, x, lambda y: y.mean() * 1e25)
    for layer in record:
        assert layer.grad_finite.all()
        np.testing.assert_allclose(layer.grad_norm, naive.output_norm(layer.name), rtol=1e-6)
    for parameter in record.parameters:
        assert parameter.grad_finite.all()
        np.testing.assert_allclose(parameter.grad_norm, naive.parameter_norm(parameter.name), rtol=1e-6)
    assert record.numerics == ()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_a_gradient_that_jumps_in_one_step_is_summed_right_in_that_step(scale: float) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    scales = [1.0, 1.0, scale, 1.0, scale, 1.0, scale, 1.0, scale, 1.0, scale, 1.0]
    batches = [(x, torch.tensor(s)) for s in scales]
    record = analyze(model, batches, lambda y, s: squares(y) * s, steps=12)
    once = float(record["0"].grad_norm[0])
    np.testing.assert_allclose(record["0"].grad_norm, once * np.array(scales), rtol=1e-5)
    weight = record.parameter("0.weight").grad_norm
    np.testing.assert_allclose(weight, float(weight[0]) * np.array(scales), rtol=1e-5)
    assert not record["0"].grad_zero.any()
    assert record["0"].grad_finite.all()


@pytest.mark.parametrize(("transform", "detail"), WAYS)
def test_an_infinite_gradient_is_told_from_a_finite_one(transform: str, detail: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    batches = [(x, torch.tensor(factor)) for factor in (1.0, float("inf"), 1.0)]
    record = analyze(
        model, batches, lambda y, factor: y.mean() * factor, steps=3, transform=transform, detail=detail
    )
    assert record["1"].grad_finite.tolist() == [True, False, True]
    assert record.parameter("1.bias").grad_finite.tolist() == [True, False, True]


def test_a_step_that_cannot_be_run_again_keeps_the_numbers_of_its_first_time() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    factors = iter([1.0, float("inf"), 1.0, 1.0])  # the loss draws on it, so the second run is another
    record = analyze(model, [x] * 3, lambda y: y.mean() * next(factors), steps=3)
    assert np.isfinite(record.losses).tolist() == [True, False, True]
    assert record["1"].grad_finite.tolist() == [True, False, True]
    assert any("Step 1 gave another loss when it was run again" in note for note in record.provenance.notes)
