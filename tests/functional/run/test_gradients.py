"""Norms of gradients against `loss.backward()` and retained gradients, by every way of measuring."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.functional import analyze
from gradflow.records import FlowRecord
from tests.functional.naive import Naive, naive_step
from tests.models import CASES, Case, squares

# torch.func has no sparse gradients, and takes another kernel for attention, which drops out other elements
VJP_TOO = [name for name in CASES if name not in ("sparse", "transformer with dropout")]


def measured(case: Case, model: nn.Module, batch: Any, **options: Any) -> FlowRecord:
    """Return the record of three steps on the same batch and the same random numbers."""

    def draw() -> Any:
        torch.manual_seed(3)
        return batch if isinstance(batch, Tensor) else tuple(batch)

    return analyze(model, draw, case.loss, steps=3, **options)


def expected(case: Case, batch: Any, dtype: torch.dtype | None = None) -> Naive:
    model = case.build().to(dtype)
    torch.manual_seed(3)
    return naive_step(model, batch, case.loss)


def is_layer(name: str, model: nn.Module) -> bool:
    """The definition of the design: owns a parameter directly, or has no child modules."""
    module = model.get_submodule(name.split("@")[0])
    parametrized = hasattr(module, "parametrizations")
    return parametrized or any(True for _ in module.parameters(False)) or not any(module.children())


def check_against(record: FlowRecord, naive: Naive, *, rtol: float, steps: range = range(3)) -> None:
    for step in steps:
        for layer in record:
            np.testing.assert_allclose(
                layer.grad_norm[step], naive.output_norm(layer.name), rtol=rtol, err_msg=layer.name
            )
            sizes = [t.numel() for t in naive.outputs[layer.name]]
            assert layer.num_elements[step] == sum(sizes), layer.name
            arrived = any(t.grad is not None for t in naive.outputs[layer.name])
            assert layer.reached[step] == arrived, layer.name
        for parameter in record.parameters:
            np.testing.assert_allclose(
                parameter.grad_norm[step],
                naive.parameter_norm(parameter.name),
                rtol=rtol,
                err_msg=parameter.name,
            )
        np.testing.assert_allclose(record.losses[step], float(naive.loss), rtol=rtol)


@pytest.mark.parametrize("name", CASES)
def test_cheap_norms_are_those_of_a_plain_backward_pass(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batch()
    record, naive = measured(case, model, batch), expected(case, batch)
    assert record.provenance.transform == "fused"
    # the vectors of a spectral norm move on with every step, and its output with them
    steps = range(1) if name == "parametrized" else range(3)
    check_against(record, naive, rtol=2e-6, steps=steps)
    layers = {call for call in naive.outputs if is_layer(call, model)}
    if name == "borrowing":
        layers.add("0")  # uses its child's parameters without calling it, and so is the layer
    assert {layer.name for layer in record} == layers
    assert [p.name for p in record.parameters] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("name", CASES)
def test_first_step_equals_plain_backward_to_the_bit(name: str) -> None:
    # the first step is summed in double precision: bit-equal gradients have norms equal to rounding
    case = CASES[name]
    model, batch = case.build(), case.batch()
    rtol = (
        1e-7 if name == "sparse" else 1e-12
    )  # repeated rows of a sparse gradient are added in another order
    check_against(measured(case, model, batch), expected(case, batch), rtol=rtol, steps=range(1))


@pytest.mark.parametrize("name", VJP_TOO)
def test_vjp_agrees_with_fused(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batch()
    fused, vjp = (measured(case, model, batch, transform=t) for t in ("fused", "vjp"))
    assert (fused.provenance.transform, vjp.provenance.transform) == ("fused", "vjp")
    assert_same_numbers(fused, vjp, rtol=1e-5)


@pytest.mark.parametrize("name", VJP_TOO)
def test_vjp_agrees_with_fused_in_double_precision(name: str) -> None:
    case = CASES[name]
    model, batch = case.build().double(), doubled(case.batch())
    fused, vjp = (measured(case, model, batch, transform=t) for t in ("fused", "vjp"))
    assert fused.provenance.dtypes == ("float64",)
    assert_same_numbers(fused, vjp, rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_full_detail_agrees_with_cheap(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batch()
    cheap, full = (measured(case, model, batch, detail=d) for d in ("cheap", "full"))
    assert_same_numbers(cheap, full, rtol=1e-5)
    assert full.graph_record is not None
    assert full.graph_record.steps == (0, 1, 2)


@pytest.mark.parametrize("name", ["relu functions", "resnet", "lstm", "attention", "siamese", "loop"])
def test_double_precision_agrees_with_plain_backward(name: str) -> None:
    case = CASES[name]
    model, batch = case.build().double(), doubled(case.batch())
    check_against(measured(case, model, batch), expected(case, batch, torch.float64), rtol=1e-12)


@pytest.mark.parametrize("name", ["sigmoid functions", "relu modules", "siamese", "tied"])
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_bfloat16_is_measured_in_wider_sums(name: str, transform: str) -> None:
    case = CASES[name]
    batch = case.batch()
    model = case.build().bfloat16()
    batch = converted(batch, torch.bfloat16)
    record, naive = measured(case, model, batch, transform=transform), expected(case, batch, torch.bfloat16)
    assert record.provenance.dtypes == ("bfloat16",)
    check_against(record, naive, rtol=1e-6)


def assert_same_numbers(a: FlowRecord, b: FlowRecord, *, rtol: float) -> None:
    """Everything that both ways measure is equal; names, flags and counts exactly."""
    assert [x.name for x in a] == [x.name for x in b]
    np.testing.assert_allclose(a.losses, b.losses, rtol=rtol)
    for x, y in zip(a, b, strict=True):
        assert (x.type, x.call, x.shape, x.parameters) == (y.type, y.call, y.shape, y.parameters)
        for flag in ("called", "reached", "grad_finite", "output_finite", "num_elements", "grad_zero"):
            np.testing.assert_array_equal(getattr(x, flag), getattr(y, flag), err_msg=f"{x.name} {flag}")
        for number in ("grad_norm", "output_rms", "output_zero_share", "output_variation", "input_rms"):
            np.testing.assert_allclose(
                getattr(x, number), getattr(y, number), rtol=rtol, atol=1e-12, err_msg=f"{x.name} {number}"
            )
    for p, q in zip(a.parameters, b.parameters, strict=True):
        assert (p.name, p.layer, p.trainable) == (q.name, q.layer, q.trainable)
        np.testing.assert_array_equal(p.reached, q.reached, err_msg=p.name)
        np.testing.assert_allclose(p.grad_norm, q.grad_norm, rtol=rtol, err_msg=p.name)
        np.testing.assert_allclose(p.norm, q.norm, rtol=rtol, err_msg=p.name)
    assert [x.name for x in a.activations] == [x.name for x in b.activations]


def converted(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, tuple):
        return tuple(converted(b, dtype) for b in batch)
    return batch.to(dtype) if batch.is_floating_point() else batch


def doubled(batch: Any) -> Any:
    return converted(batch, torch.float64)


# ------------------------------------------------------------------ closed form and central differences


@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_a_chain_of_two_layers_by_hand(detail: str) -> None:
    # L = mean over 3·2 outputs of (W2 (W1 x))²: g2 = 2 y / 6, g1 = g2 W2, ∂L/∂W = gᵀ h, all by hand
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    w1, w2 = (p.detach() for p in model.parameters())
    h = x @ w1.T
    g2 = 2 * (h @ w2.T) / 6
    g1 = g2 @ w2
    record = analyze(model, [x], lambda y: y.square().mean(), detail=detail)
    np.testing.assert_allclose(record["1"].grad_norm, g2.norm(), rtol=1e-13)
    np.testing.assert_allclose(record["0"].grad_norm, g1.norm(), rtol=1e-13)
    np.testing.assert_allclose(record.parameter("1.weight").grad_norm, (g2.T @ h).norm(), rtol=1e-13)
    np.testing.assert_allclose(record.parameter("0.weight").grad_norm, (g1.T @ x).norm(), rtol=1e-13)
    np.testing.assert_allclose(record["0"].grad_rms, g1.norm() / math.sqrt(15), rtol=1e-13)
    np.testing.assert_allclose(record["0"].output_rms, h.square().mean().sqrt(), rtol=1e-13)
    np.testing.assert_allclose(record["0"].input_rms, x.square().mean().sqrt(), rtol=1e-13)
    centred = (h - h.mean(0)).norm() / h.norm()
    np.testing.assert_allclose(record["0"].output_variation, centred, rtol=1e-10)
    np.testing.assert_allclose(record.parameter("0.weight").norm, w1.norm(), rtol=1e-13)


@pytest.mark.parametrize("name", ["sigmoid functions", "attention", "lstm"])
def test_parameter_gradients_against_central_differences(name: str) -> None:
    case = CASES[name]
    model, batch = case.build().double(), doubled(case.batch())
    record = measured(case, model, batch)
    step = 1e-5
    for parameter, (param_name, values) in zip(record.parameters, model.named_parameters(), strict=True):
        numbers = []
        flat = values.data.view(-1)
        for i in range(min(len(flat), 12)):
            sides = []
            for sign in (1, -1):
                kept = flat[i].item()
                flat[i] = kept + sign * step
                with torch.no_grad():
                    sides.append(float(case.loss(model(batch))))
                flat[i] = kept
            numbers.append((sides[0] - sides[1]) / (2 * step))
        (exact,) = torch.autograd.grad(case.loss(model(batch)), [values])
        np.testing.assert_allclose(numbers, exact.view(-1)[:12], rtol=1e-5, atol=1e-9, err_msg=param_name)
        np.testing.assert_allclose(parameter.grad_norm[0], exact.norm(), rtol=1e-12)


# ------------------------------------------------------------------------------------- what is not reached


def test_an_unused_output_is_not_reached_and_others_are() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.spare(x)
            return self.used(x)

    for transform in ("fused", "vjp"):
        record = analyze(Spare(), [torch.randn(4, 3)] * 2, squares, steps=2, transform=transform)
        assert record["spare"].called.all()
        assert not record["spare"].reached.any()
        assert np.isnan(record["spare"].grad_norm).all()
        assert not record["spare"].grad_zero.any()
        assert record["used"].reached.all()
        # autograd knows no path to it; torch.func gives zeros for what it has not met
        if transform == "fused":
            assert not record.parameter("spare.weight").reached.any()


def test_a_frozen_layer_is_measured_and_its_parameters_are_not_reached() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    x = torch.randn(5, 3)
    record, naive = analyze(model, [x], squares, steps=1), naive_step(model, x, squares)
    check_against(record, naive, rtol=1e-12, steps=range(1))
    assert [p.name for p in record.parameters if not p.trainable] == ["2.weight", "2.bias"]
    assert not record.parameter("2.weight").reached.any()
    assert record["2"].reached.all()


def test_calls_that_come_and_go_are_told_apart() -> None:
    case = CASES["loop"]
    model = case.build()
    x, _ = case.batch()
    batches = [(x, torch.tensor(n)) for n in (1, 3, 0, 2)]
    record = analyze(model, batches, squares, steps=4)
    assert record["cell"].called.tolist() == [True, True, False, True]
    assert record["cell@2"].called.tolist() == [False, True, False, False]
    assert record["cell@1"].num_elements.tolist() == [0, 25, 0, 25]
    for step, batch in enumerate(batches):
        naive = naive_step(model, batch, squares)
        for layer in record:
            if layer.called[step]:
                np.testing.assert_allclose(layer.grad_norm[step], naive.output_norm(layer.name), rtol=1e-5)
            else:
                assert np.isnan(layer.grad_norm[step])
        np.testing.assert_allclose(
            record.parameter("cell.weight").grad_norm[step], naive.parameter_norm("cell.weight"), rtol=1e-5
        )


def test_zero_share_of_a_parameter_gradient_counts_exact_zeros() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]))
        model[2].weight.fill_(1.0)
    x = torch.tensor(
        [[1.0, 2.0, 0.0], [3.0, 1.0, 0.0]]
    )  # units 0 and 2 fire, 1 and 3 do not; input 2 is zero
    record = analyze(model, [x], lambda y: y.mean(), steps=1)
    assert record.parameter("0.weight").grad_zero_share.tolist() == [pytest.approx(8 / 12)]
    assert record.parameter("2.weight").grad_zero_share.tolist() == [pytest.approx(2 / 4)]
    assert record["1"].output_zero_share.tolist() == [0.5]


def test_a_loss_that_uses_parameters_and_methods_of_the_model_sees_the_working_copies() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)

    def loss(output: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return output.square().mean() + penalty + model[0](x).abs().mean()

    class Loss(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, output: Tensor) -> Tensor:
            return self.scale / 2.0 * loss(output)

    naive = naive_step(model, x, lambda y: torch.zeros(()) + y.sum() * 0)  # only for the names
    plain = torch.autograd.grad(loss(model(x)), list(model.parameters()))
    for function in (loss, Loss(model)):
        for transform in ("fused", "vjp"):
            record = analyze(model, [x], function, steps=1, transform=transform)
            assert [p.name for p in record.parameters] == list(naive.parameters)
            for parameter, gradient in zip(record.parameters, plain, strict=True):
                np.testing.assert_allclose(parameter.grad_norm[0], gradient.double().norm(), rtol=1e-6)


def test_a_loss_module_with_parameters_of_its_own_is_differentiated_and_left_alone() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(0.3))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.seen += 1
            return F.mse_loss(output, target) * self.log_scale.exp() - self.log_scale

    model, x, t = nn.Linear(3, 2), torch.randn(5, 3), torch.randn(5, 2)
    loss = Weighted()
    record = analyze(model, [(x, t)] * 3, loss, steps=3)
    (exact,) = torch.autograd.grad(loss(model(x), t), [model.weight])
    np.testing.assert_allclose(record.parameter("weight").grad_norm, exact.norm(), rtol=1e-6)
    assert loss.seen == 1  # by the line above alone
    assert loss.log_scale.grad is None


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3


def test_what_a_custom_function_made_may_be_dropped_in_a_later_step() -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Triple.apply(super().forward(x))  # type: ignore[return-value]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.calls = nn.Linear(3, 2), Layer(3, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            dropped = self.second(x)
            return self.first(x) + (dropped if self.calls == 1 else 0)

    model, x = Model(), torch.randn(5, 3)
    record = analyze(model, [x] * 20, squares, steps=20)
    (output,) = torch.autograd.grad(squares(y := model.first(x) + model.second(x)), [y])
    np.testing.assert_allclose(record["second"].grad_norm[0], output.norm(), rtol=1e-6)
    assert record["second"].reached.tolist() == [True] + [False] * 19
    assert record["first"].reached.all()
