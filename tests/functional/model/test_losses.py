"""Losses: how many arguments they take, where the model has its own, and what is no loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.errors import LossError, ModelInputError
from gradflow.functional import analyze
from tests.functional.model.small import HuggingFaceLike, T, X, Y, linear, mean_square
from tests.functional.naive import naive_step

# --------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        nn.NLLLoss(),
        lambda output, target: F.cross_entropy(output, target),
    ],
    ids=["module", "function", "another module", "lambda"],
)
def test_a_loss_of_two_arguments_takes_pairs(loss: Callable[..., Tensor]) -> None:
    record = analyze(linear(), [(X, T)] * 2, loss, steps=2)
    np.testing.assert_allclose(record.losses, float(loss(linear()(X).detach(), T)), rtol=1e-6)


def test_a_loss_with_options_is_counted_by_what_it_needs() -> None:
    def one(output: Tensor, weight: float = 2.0, *, power: int = 2) -> Tensor:
        return weight * output.pow(power).mean()

    def two(output: Tensor, target: Tensor, weight: float = 2.0) -> Tensor:
        return weight * F.mse_loss(output, target)

    def all_optional(output: Tensor | None = None) -> Tensor:
        assert output is not None
        return output.square().mean()

    class Loss:
        def __call__(self, output: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(output, target)

        def method(self, output: Tensor) -> Tensor:
            return output.square().mean()

    y = linear()(X).detach()
    for loss in (one, all_optional, lambda *outputs: outputs[0].square().mean(), Loss().method):
        np.testing.assert_allclose(analyze(linear(), [X], loss).losses, float(loss(y)), rtol=1e-6)
    for loss in (two, Loss()):
        np.testing.assert_allclose(analyze(linear(), [(X, Y)], loss).losses, float(loss(y, Y)), rtol=1e-6)


OWN: dict[str, Callable[[Tensor], Any]] = {
    "a scalar": lambda y: y.square().mean(),
    "one element": lambda y: y.square().mean().reshape(1, 1),
    "an attribute": lambda y: HuggingFaceLike(y.square().mean(), y),
    "a key": lambda y: {"loss": y.square().mean(), "logits": y},
    "the first of a tuple": lambda y: (y.square().mean(), y),
}


@pytest.mark.parametrize("kind", OWN)
def test_without_a_loss_the_models_own_is_taken(kind: str) -> None:
    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return OWN[kind](super().forward(x))

    torch.manual_seed(0)
    model = Model(3, 2)
    record = analyze(model, [X])
    expected = naive_step(linear(), X, mean_square)
    np.testing.assert_allclose(record.losses, float(expected.loss), rtol=1e-6)
    np.testing.assert_allclose(
        record.parameter("weight").grad_norm, expected.parameter_norm("weight"), rtol=1e-6
    )


def test_the_own_loss_of_a_mapping_batch_with_labels() -> None:
    class Model(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> HuggingFaceLike:
            logits = super().forward(x)
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return HuggingFaceLike(loss, logits)

    assert analyze(Model(3, 2), [{"x": X, "labels": T}]).steps == 1
    with pytest.raises(
        LossError, match=r"its output holds none: HuggingFaceLike with .*float32\[6, 2\].*labels"
    ):
        analyze(Model(3, 2), [{"x": X}])


def test_a_loss_of_one_element_is_a_scalar() -> None:
    record = analyze(linear(), [X], lambda y: y.square().mean().reshape(1, 1))
    np.testing.assert_allclose(record.losses, float(mean_square(linear()(X).detach())), rtol=1e-6)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, r"a batch must be a pair \(inputs, target\); got a Tensor of 6: float32\[6, 3\]"),
        ((X, X, T), r"got a tuple of 3: 0: float32\[6, 3\], 1: .*Regroup it, `\(\(x1, x2\), y\)`"),
        ({"x": X, "y": T}, r"got a dict of 2: x: float32\[6, 3\], y: int64\[6\]"),
        (3.5, r"got a float: no tensor \(float\)"),
    ],
)
def test_a_loss_of_two_arguments_and_a_batch_that_is_no_pair(batch: Any, message: str) -> None:
    with pytest.raises(ModelInputError, match=message):
        analyze(linear(), [batch], nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.tensor(1.0), r"loss_fn is a Tensor, which cannot be called\. Pass the function"),
        ("mse", r"loss_fn is a str, which cannot be called"),
        (lambda: X.sum(), r"cannot tell how to call the loss <lambda>: .* and this one takes 0"),
        (lambda a, b, c: a, r"it must take one argument \(the output\) or two .* and this one takes 3"),
        (nn.TripletMarginLoss(), r"cannot tell how to call the loss TripletMarginLoss: .* takes 3"),
        (torch.sum, r"cannot tell how to call the loss sum: .*has no signature\. Wrap it"),
    ],
)
def test_losses_that_cannot_be_called(loss: Any, message: str) -> None:
    with pytest.raises(ModelInputError, match=message):
        analyze(linear(), [X], loss)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y: y.square(), r"the loss has shape \(6, 2\), not one number\. Reduce it: `\.mean\(\)`"),
        (lambda y: y.mean().item(), r"the loss is a float, not a tensor\. .*no `\.item\(\)`"),
        (lambda y: None, r"the loss is a NoneType, not a tensor"),
        (lambda y: (y > 0).sum(), r"the loss has dtype torch\.int64; a gradient needs a floating-point loss"),
        (lambda y: y.new_empty(0), r"the loss has shape \(0,\), not one number"),
    ],
)
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_losses_that_are_none(loss: Any, message: str, transform: Any) -> None:
    with pytest.raises(LossError, match=message):
        analyze(linear(), [X], loss, transform=transform)


def test_a_model_whose_output_holds_no_loss() -> None:
    with pytest.raises(
        LossError, match=r"loss_fn=None means .* its output holds none: Tensor with float32\[6, 2\]"
    ):
        analyze(linear(), [X])


def test_a_loss_that_loses_its_gradient_later_is_data_and_no_error() -> None:
    calls = iter(range(9))
    record = analyze(linear(), [X] * 3, lambda y: (y.detach() if next(calls) == 1 else y).mean(), steps=3)
    assert record[""].reached.tolist() == [True, False, True]
    assert record.parameter("weight").reached.tolist() == [True, False, True]
