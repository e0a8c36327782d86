"""Curvature along the update: against finite differences of the loss, the full Hessian, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional.updates.curvature import curvature, curvature_along
from tests.functional.snapshots import content


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def batches(number: int = 6) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(32, 6, generator=g, dtype=torch.float64) for _ in range(number)]
    return [(x, x.sum(1, keepdim=True).sin()) for x in xs]


def hand(
    model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make one step, and return the parameters before and after it."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.zero_grad()
    F.mse_loss(model(batch[0]), batch[1]).backward()
    optimizer.step()
    return before, {n: p.detach().clone() for n, p in model.named_parameters()}


def loss_at(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    def loss_of(parameters: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, dict(parameters), (batch[0],)), batch[1])

    return loss_of


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.3),
    "Adam": lambda p: torch.optim.Adam(p, 0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.02),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_curvature_is_that_of_finite_differences_of_the_loss(name: str) -> None:
    model, batch = net(), batches()[0]
    before, after = hand(model, batch, OPTIMIZERS[name](model.parameters()))
    loss_of = loss_at(model, batch)
    found = curvature_along(loss_of, before, after, factors=(0.5, 2.0))

    def along(a: float) -> float:
        return float(loss_of({n: p + a * (after[n] - p) for n, p in before.items()}))

    h = 1e-3
    assert found.loss == pytest.approx(along(0), rel=1e-12)
    assert found.slope == pytest.approx((along(h) - along(-h)) / (2 * h), rel=1e-5)
    assert found.bend == pytest.approx((along(h) - 2 * along(0) + along(-h)) / h**2, rel=1e-4)
    assert found.actual == pytest.approx(along(1) - along(0), rel=1e-10)
    assert found.changes == pytest.approx((along(0.5) - along(0), along(2) - along(0)), rel=1e-10)
    assert found.how == "hessian-vector product"


def test_sharpness_of_plain_descent_is_the_rate_times_that_along_the_gradient() -> None:
    model, batch = net(), batches()[0]
    before, after = hand(model, batch, torch.optim.SGD(model.parameters(), 0.3))
    found = curvature_along(loss_at(model, batch), before, after, factors=())
    flat = torch.cat([p.reshape(-1) for p in before.values()])

    def of_flat(x: Tensor) -> Tensor:
        parts = torch.split(x, [p.numel() for p in before.values()])
        return loss_at(model, batch)(
            {n: q.view(p.shape) for (n, p), q in zip(before.items(), parts, strict=True)}
        )

    hessian: Any = torch.autograd.functional.hessian(of_flat, flat)
    (g,) = torch.autograd.grad(of_flat(leaf := flat.clone().requires_grad_()), leaf)
    assert found.sharpness == pytest.approx(0.3 * float(g @ hessian @ g / (g @ g)), rel=1e-8)
    assert found.predicted == pytest.approx(float(-0.3 * g @ g + 0.045 * g @ hessian @ g), rel=1e-8)


class Once(torch.autograd.Function):
    """A square whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_second_derivatives_it_is_a_difference_of_the_gradient(dtype: torch.dtype) -> None:
    x = torch.linspace(1, 2, 8).to(dtype)
    before, after = {"x": x}, {"x": x - 0.25 * x}
    found = curvature_along(lambda p: Once.apply(p["x"]).sum(), before, after, factors=())  # type: ignore[no-any-return]
    assert found.how == "central difference"
    assert found.why == "OnceBackward may hide its second derivative"
    u = after["x"].double() - x.double()
    rel = 1e-9 if dtype == torch.float64 else 0.05
    assert found.slope == pytest.approx(float((2 * x.double() * u).sum()), rel=rel)
    assert found.bend == pytest.approx(float((2 * u * u).sum()), rel=rel)


def test_fused_attention_has_no_second_derivative_and_is_measured_all_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 8, 16)
    w = {"w": torch.randn(16, 16) / 4}

    def loss_of(p: Mapping[str, Tensor]) -> Tensor:
        q = x @ p["w"]
        return F.scaled_dot_product_attention(q, x, x, is_causal=True).square().mean()

    g = torch.autograd.grad(loss_of({"w": (leaf := w["w"].clone().requires_grad_())}), leaf)[0]
    after = {"w": w["w"] - 5.0 * g}
    found = curvature_along(loss_of, w, after, factors=())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = curvature_along(loss_of, w, after, factors=())
    assert exact.how == "hessian-vector product"
    assert found.bend == pytest.approx(exact.bend, rel=0.02)


def test_a_linear_loss_does_not_bend() -> None:
    found = curvature_along(
        lambda p: p["x"].sum(), {"x": torch.ones(3)}, {"x": torch.zeros(3)}, factors=(1.0,)
    )
    assert (found.slope, found.bend, found.actual, found.best) == (-3.0, 0.0, -3.0, 1.0)
    assert (found.sharpness, found.predicted) == (0.0, -3.0)
    uphill = curvature_along(
        lambda p: p["x"].sum(), {"x": torch.ones(3)}, {"x": torch.ones(3) * 2}, factors=(1.0,)
    )
    assert math.isnan(uphill.sharpness)
    assert uphill.best == 0.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_measures_its_first_and_last_update(name: str) -> None:
    model, data = net(), batches()
    optimizer = OPTIMIZERS[name](model.parameters())
    before = content(vars(model)), content(optimizer.state), torch.get_rng_state()
    record = gf.analyze(model, data, nn.MSELoss(), optimizer=optimizer, measurements=[curvature()])
    assert (content(vars(model)), content(optimizer.state)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert record.updates is not None
    assert record.updates.num_updates == 5  # the update beyond the last batch is no part of the run
    first, last = record.updates.curves
    twin = net()
    theirs = OPTIMIZERS[name](twin.parameters())
    for i, batch in enumerate(data):
        parameters = hand(twin, batch, theirs)
        if i in (0, 5):
            expected, found = curvature_along(loss_at(twin, batch), *parameters), (first if i == 0 else last)
            assert found.step == i
            for field in ("loss", "slope", "bend", "actual"):
                assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-8)
            assert found.changes == pytest.approx(expected.changes, rel=1e-6, abs=1e-12)
    assert gf.FlowRecord.from_json(record.to_json()) == record


def test_the_same_random_state_and_buffers_are_used() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 1)).double()
    adam = torch.optim.Adam(model.parameters(), 1e-6)
    before = content(vars(model))
    record = gf.analyze(model, batches(), nn.MSELoss(), optimizer=adam, measurements=[curvature()])
    assert content(vars(model)) == before
    assert record.updates is not None
    for curve in record.updates.curves:  # a tiny step: no noise of dropout may show in it
        assert curve.actual == pytest.approx(curve.predicted, rel=1e-3)
        assert curve.actual < 0


def test_a_loss_that_differs_when_it_is_run_again_is_told() -> None:
    model, counted = net(), iter(range(1, 1000))
    record = gf.analyze(
        model, batches(), lambda y, target: F.mse_loss(y, target) * next(counted),
        optimizer=torch.optim.SGD(model.parameters(), 1e-3), measurements=[curvature()],
    )  # fmt: skip
    assert record.updates is not None
    assert record.updates.curves == ()
    assert any(
        "How the loss bends along an update could not be measured" in n for n in record.provenance.notes
    )


def test_without_an_optimizer_nothing_bends() -> None:
    assert gf.analyze(net(), batches(), nn.MSELoss(), measurements=[curvature()]).updates is None
