"""Where a NaN or an Inf was born: layer, operation, phase, step, the range that went in, and the line."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradflow.functional import analyze
from gradflow.records import FlowRecord, NumericalRecord

INF = float("inf")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(4))
X[0] = torch.tensor([3.0, -3.0, 2.0, -2.0])  # both signs, whatever the seed


class Between(nn.Module):
    """Two layers of four, and a function between them; the first is the identity."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4))
            self.first.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


def masked_mean(h: Tensor) -> Tensor:
    mask = h > 1e9
    return h + (h * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


def all_masked(h: Tensor) -> Tensor:
    scores = h.masked_fill(torch.tensor([True, False, False, False, False, False])[:, None], -INF)
    return torch.softmax(scores, -1)


def in_place(h: Tensor) -> Tensor:
    h = h * 1.0
    h.log_()
    return h


def two_births(h: Tensor) -> Tensor:
    _ = torch.log(h.detach() * 0 - 1)  # reaches nothing
    return h / (h * 0)


# name -> (function, op, phase, value, smallest input, largest input)
low, high = float(X.min()), float(X.max())
CASES: dict[str, tuple[Callable[[Tensor], Tensor], str, str, str, float, float]] = {
    "sqrt at zero": (lambda h: torch.sqrt(h * 0), "sqrt", "backward", "inf", 0.0, 0.0),
    "exp overflows": (lambda h: torch.exp(h * 100), "exp", "forward", "inf", low * 100, high * 100),
    "masked mean": (masked_mean, "div", "forward", "nan", 0.0, 0.0),
    "log of negative": (lambda h: torch.log(h), "log", "forward", "nan", low, high),
    "hidden by where": (
        lambda h: torch.where(h > 0, h.sqrt(), h * 0), "sqrt", "backward", "nan", low, high,
    ),
    "softmax over nothing": (all_masked, "softmax", "forward", "nan", -INF, float(X[1:].max())),
    "inf times zero": (lambda h: (h + INF) * torch.zeros(4), "mul", "forward", "nan", 0.0, INF),
    "in place": (in_place, "log", "forward", "nan", low, high),
    "one over zero": (lambda h: h + 1 / (h * 0), "rdiv", "forward", "inf", 0.0, 0.0),
    "power": (lambda h: (h - h.max() - 1) ** 0.5, "pow", "forward", "nan", low - high - 1, -1.0),
    "two births": (two_births, "div", "forward", "inf", low, high),
}  # fmt: skip


def born(record: FlowRecord) -> Any:
    (found,) = record.numerics
    return found


SOURCE = Path(__file__).read_text().splitlines()


def line_of(found: NumericalRecord) -> str:
    """Return the source line that a certificate names, which must be one of this file."""
    file, _, number = found.line.rpartition(":")
    assert file == __file__
    return SOURCE[int(number) - 1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["fused", "vjp", "full"])
def test_the_birth_is_found(name: str, way: str) -> None:
    function, op, phase, value, smallest, largest = CASES[name]
    options: dict[str, Any] = {"detail": "full"} if way == "full" else {"transform": way}
    record = analyze(Between(function), [X], mean_square, steps=1, **options)
    found = born(record)
    assert (found.layer, found.layer_type, found.step) == ("first", "Linear", 0)
    assert (found.op, found.phase) == (op, phase)
    assert found.value == value
    np.testing.assert_allclose([found.input_min, found.input_max], [smallest, largest], rtol=1e-5)
    assert found.loss_finite == (phase == "backward") == bool(np.isfinite(record.losses[0]))
    sign = {"div": "/", "rdiv": "1 / (", "mul": "*", "pow": "**"}.get(op, op)
    assert sign in line_of(found)
    start = function.__code__.co_firstlineno
    assert start <= int(found.line.rpartition(":")[2]) <= start + 3


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n][2] == "backward"])
def test_a_backward_birth_leaves_the_loss_and_what_is_behind_it_in_order(name: str) -> None:
    record = analyze(Between(CASES[name][0]), [X], mean_square, steps=1)
    assert np.isfinite(record.losses).all()
    assert record["second"].grad_finite.all()
    assert record.parameter("second.weight").grad_finite.all()
    assert not record.parameter("first.weight").grad_finite.any()


def test_a_nan_in_the_input_is_told_as_such() -> None:
    batch = torch.where(X > 1, float("nan"), X)
    found = born(analyze(Between(torch.tanh), [batch], mean_square))
    assert (found.layer, found.op, found.phase, found.value) == ("first", "input", "input", "nan")
    assert math.isnan(found.input_min)
    assert found.line == ""

    class Two(Between):
        def forward(self, x: Tensor, *, extra: Tensor) -> Tensor:
            return super().forward(x) + extra

    found = born(analyze(Two(torch.tanh), [{"x": X, "extra": torch.tensor(INF)}], mean_square))
    assert (found.op, found.phase, found.value) == ("input.extra", "input", "inf")


def test_a_parameter_that_is_not_finite_is_told_as_such() -> None:
    model = Between(torch.tanh)
    with torch.no_grad():
        model.second.weight[1, 1] = -INF
    found = born(analyze(model, [X], mean_square))
    assert (found.layer, found.op, found.phase, found.value) == (
        "second",
        "second.weight",
        "parameter",
        "inf",
    )


def test_weight_norm_of_zeros() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.normed(x))  # here

    model = Model()
    with torch.no_grad():
        model.normed.parametrizations.weight.original1.zero_()
    found = born(analyze(model, [X], mean_square))
    assert (found.layer, found.layer_type, found.phase, found.value) == (
        "normed", "ParametrizedLinear", "forward", "nan",
    )  # fmt: skip
    assert "norm" in found.op
    assert found.input_min == 0.0
    assert line_of(found).endswith("# here")


def test_a_birth_in_a_loss_of_the_users_is_found_in_the_loss() -> None:
    def loss(y: Tensor) -> Tensor:
        probability = torch.sigmoid(y * 1e6)
        return -torch.log(probability).mean()  # here

    found = born(analyze(Between(torch.tanh), [X], loss))
    assert (found.layer, found.op, found.phase, found.value) == ("second", "log", "forward", "inf")
    assert (found.input_min, found.input_max) == (0.0, 1.0)
    assert line_of(found).endswith("# here")


def test_no_line_is_named_where_no_code_of_the_users_ran() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.fill_(1e38)
    found = born(analyze(model, [(X.abs() * 100, torch.zeros(6, 1))], nn.MSELoss()))
    assert (found.layer, found.phase, found.line) == ("0", "forward", "")


def test_a_module_of_its_own_is_the_layer_of_its_operations() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.std(0)

    model = nn.Sequential(nn.Linear(4, 4), Norm(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about one sample's degrees of freedom
        found = born(analyze(model, [X[:1]], mean_square))
    assert (found.layer, found.layer_type, found.op) == ("1", "Norm", "std")
    assert line_of(found).endswith("x.std(0)")


class Faulty(torch.autograd.Function):
    """Divides by zero in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / 0.0


def test_a_function_of_the_users_whose_backward_fails_is_told_by_its_name() -> None:
    found = born(analyze(Between(lambda h: torch.tanh(Faulty.apply(h.sin()))), [X], mean_square))
    assert (found.layer, found.op, found.phase, found.value) == ("first", "faulty", "backward", "inf")
    assert found.line == ""


def test_a_backward_birth_inside_a_layer_is_that_layers() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(x * 0) + x

    model = nn.Sequential(nn.Linear(4, 4), Root(), nn.Linear(4, 2))
    found = born(analyze(model, [X], mean_square))
    assert (found.layer, found.layer_type, found.op, found.phase) == ("1", "Root", "sqrt", "backward")
    assert line_of(found).strip().startswith("return torch.sqrt")


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_one_bad_batch_of_twenty_leaves_the_other_nineteen_as_they_are(transform: Any) -> None:
    def function(h: Tensor) -> Tensor:
        return torch.sqrt(h.abs() - 1e-3 * (h.abs().max() > 50))

    good = [X * (1 + i / 20) for i in range(20)]
    bad = [x * 1e5 if i == 7 else x for i, x in enumerate(good)]
    bad[7] = bad[7].clone()
    bad[7][2, 2] = 0.0  # the square root of a negative number, in this batch alone
    model = Between(function)
    record = analyze(model, bad, mean_square, transform=transform)
    plain = analyze(model, good, mean_square, transform=transform)
    found = born(record)
    assert (found.step, found.op, found.phase, found.layer) == (7, "sqrt", "forward", "first")
    np.testing.assert_allclose(found.input_min, -1e-3)
    others = np.arange(20) != 7
    assert np.isfinite(record.losses).tolist() == others.tolist()
    np.testing.assert_allclose(record.losses[others], plain.losses[others], rtol=1e-6)
    for layer, good_layer in zip(record, plain, strict=True):
        assert layer.grad_finite.tolist() == others.tolist()
        np.testing.assert_allclose(layer.grad_norm[others], good_layer.grad_norm[others], rtol=1e-5)
    for p, q in zip(record.parameters, plain.parameters, strict=True):
        assert p.grad_finite.tolist() == others.tolist()
        np.testing.assert_allclose(p.grad_norm[others], q.grad_norm[others], rtol=1e-5)


def test_a_nan_in_every_step_is_traced_a_few_times_only() -> None:
    record = analyze(Between(torch.log), [X] * 10, mean_square, steps=10)
    assert [found.step for found in record.numerics] == [0, 1, 2]
    assert not np.isfinite(record.losses).any()
    assert not record.parameter("first.weight").grad_finite.any()


# ----------------------------------------------------------------------------- what is no birth


def causal(h: Tensor) -> Tensor:
    q = h.view(6, 2, 2)
    scores = q @ q.transpose(1, 2) + torch.full((2, 2), -INF).triu(1)
    return (scores.softmax(-1) @ q).flatten(1)


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "a causal mask that is added": causal,
    "a mask that is filled in": lambda h: h.masked_fill(h > 1, -INF).softmax(-1),
    "an infinity that is clamped": lambda h: (1 / (h * 0).detach()).clamp(-1, 1) * h + h,
    "a NaN that is replaced": lambda h: torch.log(h).nan_to_num() + h,
    "a maximum with -inf": lambda h: torch.maximum(h, torch.full_like(h, -INF)),
    "a branch that is not taken": lambda h: torch.where(h > 0, h.clamp(min=1e-6).sqrt(), h),
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_an_infinity_that_harms_nobody_has_no_certificate(name: str, detail: Any) -> None:
    record = analyze(Between(HARMLESS[name]), [X] * 2, mean_square, steps=2, detail=detail)
    assert record.numerics == ()
    assert all(layer.grad_finite.all() for layer in record)


@pytest.mark.parametrize("name", ["a causal mask that is added", "a mask that is filled in"])
def test_a_mask_is_not_blamed_for_what_is_born_elsewhere(name: str) -> None:
    found = born(analyze(Between(lambda h: HARMLESS[name](h) / (h * 0)), [X], mean_square))
    assert (found.op, found.phase) == ("div", "forward")


def test_attention_with_a_row_that_may_look_nowhere() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).view(2, 3, 4)
            allowed = torch.tensor([[True, True, True], [False, False, False], [True, True, True]])
            mask = torch.zeros(3, 3).masked_fill(~allowed, -INF)
            scores = q @ q.transpose(1, 2) / 2 + mask
            return self.out(torch.softmax(scores, -1) @ q)

    found = born(analyze(Attending(), [X], mean_square))
    assert (found.layer, found.op, found.phase, found.value) == ("q", "softmax", "forward", "nan")
    assert found.input_min == -INF


class Composed(nn.Module):
    """A weight that is divided by the length of its rows, and a low-rank layer that it holds and adds."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.base, self.low = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(4))
        with torch.no_grad():
            self.base.weight.copy_(weight)
            self.low.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.low.weight
        return x @ (self.scale[:, None] * weight / weight.norm(dim=1, keepdim=True).detach()).t()


def test_a_weight_that_a_layer_composes_before_it_calls_anything_is_its_own() -> None:
    zero_row = torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    model = nn.Sequential(Composed(torch.eye(4)), Composed(zero_row), nn.Linear(4, 2))
    birth = analyze(model, [X], mean_square).numerics[0]
    assert (birth.layer, birth.phase, birth.value) == ("1", "forward", "nan")


class Averaged(nn.Module):
    """A linear layer of the mean over what a mask keeps, which may be nothing."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.lin, self.first = nn.Linear(4, 4), first

    def forward(self, x: Tensor) -> Tensor:
        given = x if self.first else self.lin(x)
        kept = (given.detach() > 1e6).to(x.dtype)
        mean = (given * kept).sum(0) / kept.sum(0) + 0 * given
        return self.lin(mean) if self.first else mean


@pytest.mark.parametrize(("first", "place"), [(True, "pool"), (False, "pool.lin")])
@pytest.mark.parametrize("before", [nn.Identity, lambda: nn.Linear(4, 4)])
def test_what_a_module_computes_before_it_calls_anything_is_born_in_it(
    before: Any, first: bool, place: str
) -> None:
    model = nn.Sequential()
    model.add_module("enter", before())
    model.add_module("pool", Averaged(first))
    record = analyze(model, [torch.randn(5, 4)], lambda out: out.square().mean())
    (birth,) = record.numerics
    assert (birth.layer, birth.op) == (place, "div")


class LeftOut(nn.Module):
    """Attention over rows of which the first sees no key, or sees itself, in front of a classifier."""

    def __init__(self, how: str, *, own: bool) -> None:
        super().__init__()
        self.key, self.head, self.how, self.own = nn.Linear(4, 4), nn.Linear(4, 3), how, own

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.ones(6, 6).tril().bool()
        seen[0, 0] = self.own
        scores = self.key(x) @ x.T
        masked = scores.masked_fill(~seen, -INF)
        if self.how == "added":
            masked = scores + torch.zeros(6, 6).masked_fill(~seen, -INF)
        y = self.head(x + masked.softmax(-1) @ x)
        return torch.where(torch.arange(6)[:, None] > 0, y, 0.0) if self.how == "where" else y


@pytest.mark.parametrize("how", ["filled", "added", "where", "chosen"])
def test_what_the_loss_leaves_out_is_born_where_it_was_made_and_not_where_it_comes_back(how: str) -> None:
    target = torch.tensor([-100, 0, 1, 2, 0, 1])

    def loss(y: Tensor) -> Tensor:
        if how == "chosen":
            return nn.functional.cross_entropy(y[1:], target[1:])
        return nn.functional.cross_entropy(y, target)

    found = born(analyze(LeftOut(how, own=False), lambda: X, loss, steps=1))
    assert (found.layer, found.op, found.phase, found.value) == ("key", "softmax", "forward", "nan")
    assert found.loss_finite
    assert not analyze(LeftOut(how, own=True), lambda: X, loss, steps=1).numerics
