"""Shares of units that never fire and of elements that are saturated, against their closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.functional import analyze
from gradflow.functional.analyze import analyzed
from gradflow.functional.run.run import Plan
from gradflow.records import ActivationRecord


class Behind(nn.Module):
    """A layer that hands its input on unchanged, and an activation behind it, as a function or a module."""

    def __init__(self, activation: Any, width: int, *, convolution: bool = False) -> None:
        super().__init__()
        self.layer = (
            nn.Conv2d(width, width, 1, bias=False) if convolution else nn.Linear(width, width, bias=False)
        )
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(width).view_as(self.layer.weight))
        if isinstance(activation, nn.Module):
            self.act = activation
        self.function = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.act(h) if hasattr(self, "act") else self.function(h)


def measured(
    activation: Any, *batches: Tensor, convolution: bool = False, **options: Any
) -> ActivationRecord:
    model = Behind(
        activation, batches[0].shape[1] if convolution else batches[0].shape[-1], convolution=convolution
    )
    record = analyze(model, list(batches), lambda y: y.square().mean(), steps=len(batches), **options)
    (found,) = record.activations
    return found


# a row per sample, a column per unit: fires in both, in one, in none, exactly at zero
RAMP = torch.tensor([[1.0, 2.0, -1.0, 0.0], [3.0, -2.0, -3.0, 0.0]])

RECTIFIERS: dict[str, tuple[Any, str]] = {
    "module": (nn.ReLU(), "relu"),
    "in place module": (nn.ReLU(inplace=True), "relu"),
    "F.relu": (F.relu, "relu"),
    "F.relu in place": (lambda h: F.relu(h, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    "method": (lambda h: h.relu(), "relu"),
    "method in place": (lambda h: h.relu_(), "relu"),
    "clamp": (lambda h: h.clamp(min=0), "clamp"),
    "clamp in place": (lambda h: torch.clamp_(h, 0.0), "clamp"),
    "relu6": (F.relu6, "relu6"),
    "relu6 module": (nn.ReLU6(), "relu6"),
}


@pytest.mark.parametrize("name", RECTIFIERS)
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_what_a_rectifier_lets_through(name: str, transform: Any) -> None:
    activation, op = RECTIFIERS[name]
    found = measured(activation, RAMP, transform=transform)
    assert found.num_units == 4
    assert found.never_fired == 2 / 4
    assert found.fired_share.tolist() == [3 / 8]
    assert np.isnan(found.saturated_share).all()
    assert np.isnan(found.always_saturated)
    np.testing.assert_allclose(found.input_rms, RAMP.square().mean().sqrt(), rtol=1e-6)
    assert (found.op, found.kind) == (op, "rectifier")
    module = isinstance(activation, nn.Module)
    assert found.functional is not module
    assert (found.name, found.layer) == (("act", "act") if module else (f"layer:{op}", "layer"))


# beyond |x| = 6 for the sigmoid and 3 for tanh the derivative is below 1 percent of its maximum
SIGMOID_EDGE = float(np.arccosh(199.0))  # y(1 − y) = 1/(2 + 2 cosh x) = 0.01/4
TANH_EDGE = float(np.arctanh(np.sqrt(0.99)))  # 1 − y² = 0.01
BOUNDED: dict[str, tuple[Any, str, float, float]] = {
    "sigmoid module": (nn.Sigmoid(), "sigmoid", -SIGMOID_EDGE, SIGMOID_EDGE),
    "torch.sigmoid": (torch.sigmoid, "sigmoid", -SIGMOID_EDGE, SIGMOID_EDGE),
    "sigmoid method in place": (lambda h: h.sigmoid_(), "sigmoid", -SIGMOID_EDGE, SIGMOID_EDGE),
    "tanh module": (nn.Tanh(), "tanh", -TANH_EDGE, TANH_EDGE),
    "F.tanh": (torch.tanh, "tanh", -TANH_EDGE, TANH_EDGE),
    "tanh method": (lambda h: h.tanh(), "tanh", -TANH_EDGE, TANH_EDGE),
    "hardtanh": (F.hardtanh, "hardtanh", -1.0, 1.0),
    "hardtanh with bounds": (nn.Hardtanh(-2.0, 0.5), "hardtanh", -2.0, 0.5),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid", -3.0, 3.0),
    "hardsigmoid module": (nn.Hardsigmoid(), "hardsigmoid", -3.0, 3.0),
    "clamp": (lambda h: h.clamp(-1.5, 1.5), "clamp", -1.5, 1.5),
    "clip by name": (lambda h: torch.clip(h, min=-1.5, max=1.5), "clamp", -1.5, 1.5),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_saturated(name: str) -> None:
    activation, op, low, high = BOUNDED[name]
    inside, eps = (low + high) / 2, 1e-2
    # columns: never, just inside, just outside below and above, outside in one sample only
    x = torch.tensor(
        [
            [inside, low + eps, low - eps, high + eps, high + 9],
            [inside, high - eps, high + eps, low - eps, inside],
        ]
    )
    found = measured(activation, x)
    assert found.saturated_share.tolist() == [pytest.approx(5 / 10)]
    assert found.always_saturated == pytest.approx(2 / 5)
    assert (found.op, found.kind, found.num_units) == (op, "bounded", 5)
    assert np.isnan(found.never_fired)
    assert np.isnan(found.fired_share).all()


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh])
def test_the_edge_is_one_percent_of_the_largest_derivative(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-9, 9, 2001).view(1, -1)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf).sum(), [leaf])
    expected = float((slope < 0.01 * slope.max()).double().mean())
    assert measured(function, x).saturated_share.tolist() == [pytest.approx(expected, abs=1e-3)]


@pytest.mark.parametrize("convolution", [False, True])
def test_units_are_channels_behind_a_convolution_and_features_elsewhere(convolution: bool) -> None:
    # 3 channels of 2 × 2: one fires in a corner of one sample only, one never, one everywhere
    x = -torch.ones(2, 3, 2, 2)
    x[1, 0, 1, 0] = 1.0
    x[:, 2] = 1.0
    if convolution:
        found = measured(F.relu, x, convolution=True)
        assert found.num_units == 3
        assert found.never_fired == pytest.approx(1 / 3)
        module = measured(nn.ReLU(inplace=True), x, convolution=True)
        assert module.never_fired == pytest.approx(1 / 3)
        stuck = measured(torch.tanh, 5 * x, convolution=True)
        assert (stuck.num_units, stuck.always_saturated) == (3, 1.0)
    else:
        sequence = x[:, :, 0, :]  # samples × positions × features, behind a linear layer
        found = measured(F.relu, sequence)
        assert (found.num_units, found.never_fired) == (2, 0.0)
    assert found.fired_share.tolist() == [
        pytest.approx(float((x > 0).double().mean()) if convolution else 2 * 2 / 12)
    ]


def test_behind_a_norm_and_a_pool_units_are_channels_still() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.MaxPool1d(2), nn.ReLU(), nn.Flatten(), nn.ReLU()
    )
    record = analyze(model, [torch.randn(4, 2, 8)], lambda y: y.square().mean())
    assert [a.num_units for a in record.activations] == [3, 12]


@pytest.mark.parametrize("activation", [F.relu, nn.ReLU()])
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_a_unit_that_fires_in_one_batch_of_ten_is_alive(activation: Any, transform: Any) -> None:
    batches = [-torch.ones(3, 4) for _ in range(10)]
    assert not Plan(steps=10).is_look(6)  # shares are not taken; firing is followed all the same
    batches[6][2, 1] = 0.5
    batches[0][0, 3] = 0.5
    found = measured(activation, *batches, transform=transform)
    assert found.never_fired == 2 / 4
    looked = [Plan(steps=10).is_look(step) for step in range(10)]
    assert (~np.isnan(found.fired_share)).tolist() == looked
    assert found.fired_share[0] == pytest.approx(1 / 12)
    assert found.fired_share[9] == 0.0
    assert (~np.isnan(found.input_rms)).tolist() == looked


def test_a_unit_saturated_in_all_samples_but_one_is_not_always_so() -> None:
    batches = [torch.full((3, 4), 9.0) for _ in range(4)]
    batches[3][1, 2] = 0.1
    found = measured(torch.tanh, *batches)
    assert found.always_saturated == 3 / 4
    np.testing.assert_allclose(found.saturated_share[[0, 1, 3]], [1.0, 1.0, 11 / 12])


def test_looks_are_the_first_the_last_and_powers_of_four() -> None:
    plan = Plan(steps=100)
    assert [step for step in range(100) if plan.is_look(step)] == [0, 1, 4, 16, 64, 99]
    plan = Plan(steps=20)  # the last follows 16 closely
    assert [step for step in range(20) if plan.is_look(step)] == [0, 1, 4, 19]
    assert Plan(steps=1).is_look(0)


def test_the_last_look_is_at_the_last_batch_where_there_are_fewer_than_steps() -> None:
    plan = Plan(steps=20, num_batches=12)
    assert [step for step in range(12) if plan.is_look(step)] == [0, 1, 4, 11]
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    record = analyze(model, [torch.ones(3, 2)] * 12, lambda y: y.square().mean())
    assert np.flatnonzero(~np.isnan(record["0"].output_rms)).tolist() == [0, 1, 4, 11]


def test_a_number_of_units_that_changes_cannot_be_told_apart() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x).flatten(1))

    batches = [torch.randn(2, 1, n) for n in (4, 6)]
    (found,) = analyze(Model(), batches, lambda y: y.mean(), steps=2).activations
    assert found.num_units == 0
    assert np.isnan(found.never_fired)
    assert np.isfinite(found.fired_share).all()


# ------------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize(
    "softmax",
    [
        nn.Softmax(-1),
        lambda h: F.softmax(h, -1),
        lambda h: h.softmax(dim=-1),
        lambda h: torch.softmax(h, dim=1),
    ],
    ids=["module", "function", "method", "torch"],
)  # fmt: skip
def test_a_softmax_is_saturated_where_one_alternative_has_all(softmax: Any) -> None:
    def trace(p: list[float]) -> float:
        return 1 - sum(v * v for v in p)

    edge = 0.01 * trace([1 / 3] * 3)
    rows, expected = [], []
    for top in (1 / 3, 0.9, 0.99, 0.996, 0.998, 0.9999, 1.0):
        p = [top, (1 - top) / 2, (1 - top) / 2]
        rows.append([np.log(max(v, 1e-30)) for v in p])
        expected.append(trace(p) < edge)
    found = measured(softmax, torch.tensor(rows, dtype=torch.float32))
    assert (found.kind, found.width, found.num_units) == ("softmax", 3, 0)
    assert found.saturated_share.tolist() == [pytest.approx(np.mean(expected))]
    assert 0 < np.mean(expected) < 1


def test_a_softmax_over_another_dimension() -> None:
    x = torch.tensor([[50.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # over rows: one column is saturated, one is flat
    found = measured(lambda h: h.softmax(0), x)
    assert (found.width, found.saturated_share.tolist()) == (3, [0.5])


def test_a_row_that_has_no_choice_is_not_saturated() -> None:
    mask = torch.full((4, 4), -float("inf")).triu(1)  # the first position may look at itself alone
    found = measured(lambda h: (h * 0 + mask).softmax(-1), torch.randn(4, 4))
    assert found.saturated_share.tolist() == [0.0]
    sharp = measured(lambda h: (h * 0 + mask + 60 * torch.eye(4)).softmax(-1), torch.randn(4, 4))
    assert sharp.saturated_share.tolist() == [3 / 4]


# ---------------------------------------------------------------------------------- whose it is


def test_activations_are_named_by_what_feeds_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.fc1(x))
            h = torch.tanh(torch.relu(self.fc2(h)) + h)
            return self.act(torch.relu(torch.relu(h)))

    record = analyze(Model(), [torch.randn(5, 4)] * 2, lambda y: y.mean(), steps=2)
    names = [(a.name, a.layer, a.functional) for a in record.activations]
    assert names == [
        ("act", "act", False),
        ("fc2:relu", "fc2", True),
        ("fc2:tanh", "fc2", True),
        ("fc2:relu@1", "fc2", True),
        ("fc2:relu@2", "fc2", True),
        ("act@1", "act@1", False),
    ]


def test_an_activation_in_a_layer_of_the_users_is_that_layers() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x @ self.weight) * x

    record = analyze(nn.Sequential(nn.Linear(4, 4), Gated()), [torch.randn(5, 4)], lambda y: y.mean())
    assert [(a.name, a.layer, a.kind) for a in record.activations] == [("1:sigmoid", "1", "bounded")]


def test_softmax_in_attention_is_the_attention_modules() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.query(x) @ self.key(x).mT).softmax(-1) @ self.value(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.out = SelfAttention(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attn(x))

    (found,) = analyze(Model(), [torch.randn(2, 5, 4)], lambda y: y.square().mean()).activations
    assert (found.name, found.layer, found.width) == ("attn:softmax", "attn", 5)


NONE: dict[str, Any] = {
    "a guard against zero": lambda h: h / h.abs().clamp(min=1e-6),
    "an upper bound alone": lambda h: h.clamp(max=1.0),
    "bounds that are tensors": lambda h: torch.clamp(h, torch.zeros(4), torch.ones(4)),
    "a leaky rectifier": F.leaky_relu,
    "a smooth one": F.gelu,
    "of what has no gradient": lambda h: h * torch.relu(h.detach()),
    "of integers": lambda h: h * torch.arange(4).clamp(0, 2),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_such_activation_is_not_recorded(name: str) -> None:
    x = torch.randn(5, 4) + 2.0
    record = analyze(Behind(NONE[name], 4), [x] * 2, lambda y: y.square().mean(), steps=2)
    assert record.activations == ()


def test_a_nan_in_one_batch_does_not_hide_what_a_unit_did_in_others() -> None:
    bad = torch.full((2, 4), float("nan"))
    found = measured(F.relu, RAMP, bad, RAMP)
    assert found.never_fired == 2 / 4


class Written(nn.Module):
    """Two layers; what the first has handed on is written to, or not, before the second takes it."""

    def __init__(self, times: float | None) -> None:
        super().__init__()
        self.first, self.second, self.times = nn.Linear(6, 6), nn.Linear(6, 6), times

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.times is not None:
            h.mul_(self.times)
        return self.second(h)


@pytest.mark.parametrize("times", [None, 1.0, 3.0])
@pytest.mark.parametrize("closely", [True, False])
def test_what_enters_a_layer_is_as_it_is_then(times: float | None, closely: bool) -> None:
    torch.manual_seed(0)
    model, x = Written(times), torch.randn(5, 6)
    plan = Plan(steps=2, closely=closely)
    first, second = analyzed(model, [x, x], lambda y: y.square().mean(), plan).layers
    np.testing.assert_allclose(second.input_rms, (times or 1.0) * first.output_rms, rtol=1e-6)
    np.testing.assert_allclose(first.input_rms, float(x.square().mean().sqrt()), rtol=1e-6)
