"""Models and options that are none, and exceptions of the user's code, which tell where they were."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.errors import ModelInputError, ModelNotCalledError, NoTrainableParametersError
from gradflow.functional import analyze, analyze_custom, layer_gain
from tests.functional.model.small import HuggingFaceLike, T, X, linear, mean_square
from tests.functional.naive import naive_step

# ------------------------------------------------------------------------------ models and forward passes


def test_a_model_that_is_none() -> None:
    for model, name in ((nn.Linear, "type"), (lambda x: x, "function"), (None, "NoneType")):
        with pytest.raises(
            ModelInputError, match=rf"model is a {name}, not a torch\.nn\.Module\. Pass the module"
        ):
            analyze(model, [X], mean_square)  # type: ignore[arg-type]
        with pytest.raises(ModelInputError, match=r"not a torch\.nn\.Module"):
            analyze_custom(model, lambda m, step: m(X), mean_square)  # type: ignore[arg-type]


def test_a_model_without_trainable_parameters() -> None:
    frozen = linear().requires_grad_(False)
    with pytest.raises(
        NoTrainableParametersError, match=r"none of the 2 parameters of Linear .*requires_grad_\(True\)"
    ):
        analyze(frozen, [X], mean_square)
    with pytest.raises(NoTrainableParametersError, match=r"none of the 0 parameters of ReLU"):
        analyze(nn.ReLU(), [X], mean_square)


def test_a_closure_that_calls_another_model() -> None:
    other = linear()
    with pytest.raises(
        ModelNotCalledError, match=r"no layer of Linear was called .*must call this very model"
    ):
        analyze_custom(linear(), lambda model, step: other(X), mean_square)


def test_a_closure_that_calls_a_copy() -> None:
    seen = r"no layer of Linear was called .* like the model itself, and are no part of it, were called"
    with pytest.raises(ModelNotCalledError, match=seen):
        analyze_custom(linear(), lambda model, step: copy.deepcopy(model)(X), mean_square)


def test_custom_forwards_take_a_function_and_a_loss_of_one_argument() -> None:
    with pytest.raises(ModelInputError, match=r"forward_fn is a Tensor; pass a function of \(model, step\)"):
        analyze_custom(linear(), X, mean_square)  # type: ignore[arg-type]
    with pytest.raises(ModelInputError, match=r"the loss takes the output alone; bind the target in it"):
        analyze_custom(linear(), lambda model, step: model(X), F.mse_loss)


def test_custom_forwards_are_told_the_step() -> None:
    steps: list[int] = []

    def forward(model: nn.Module, step: int) -> Tensor:
        steps.append(step)
        return model(X * (step + 1))

    record = analyze_custom(linear(), forward, mean_square, steps=3)
    assert steps == [0, 1, 2]
    expected = [float(naive_step(linear(), k * X, mean_square).loss) for k in (1, 2, 3)]
    np.testing.assert_allclose(record.losses, expected, rtol=1e-6)
    assert analyze_custom(linear(), lambda model, step: model(X).mean(), steps=1).steps == 1  # its own loss


# ----------------------------------------------------------------------- exceptions of the user's code


def test_an_exception_of_the_model_keeps_its_type_and_tells_where_it_was() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.check = nn.Linear(3, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor, number: Tensor) -> Tensor:
            return self.check(self.fc(x)) if number == 2 else self.fc(x)

    batches = [(X, torch.tensor(k)) for k in range(4)]
    with pytest.raises(
        RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(6x3 and 4x2\)"
    ) as caught:
        analyze(Picky(), batches, mean_square)
    (note,) = caught.value.__notes__
    assert note == ("gradflow: raised at step 2 in 'check'; the batch holds 0: float32[6, 3], 1: int64[].")
    assert any(entry.name == "forward" and "Picky" not in entry.name for entry in caught.traceback)


def test_an_exception_that_the_model_caught_is_not_where_another_one_was() -> None:
    class Trying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.wrong = nn.Linear(3, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.fc(x)

    model = Trying()
    record = analyze(model, [X] * 2, mean_square, steps=2)
    assert record["fc"].reached.all()

    def raising(y: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError) as caught:
        analyze(model, [X], raising)
    assert caught.value.__notes__ == ["gradflow: raised at step 0; the batch holds float32[6, 3]."]


def test_an_exception_of_the_loss_keeps_its_type_and_tells_the_shapes() -> None:
    class OddError(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(a, b)

    def raising(y: Tensor, t: Tensor) -> Tensor:
        raise OddError(1, 2)

    for transform in ("fused", "vjp"):
        with pytest.raises(OddError) as caught:
            analyze(linear(), [(X, T)], raising, transform=transform)
        assert caught.value.args == (1, 2)
        assert caught.value.__notes__ == [
            "gradflow: raised at step 0; the batch holds 0: float32[6, 3], 1: int64[6]."
        ]


def test_a_shape_mismatch_in_the_loss_shows_both() -> None:
    with pytest.raises(
        ValueError, match=r"Expected input batch_size \(6\) to match target batch_size \(5\)"
    ) as caught:
        analyze(linear(), [(X, T[:5])], nn.CrossEntropyLoss())
    assert "1: int64[5]" in caught.value.__notes__[0]


def test_an_exception_of_the_source_passes_as_it_is() -> None:
    def draw() -> Tensor:
        raise LookupError("no such file")

    with pytest.raises(LookupError, match="no such file"):
        analyze(linear(), draw, mean_square)


# ------------------------------------------------------------------------------------- options of a run


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": nn.CrossEntropyLoss}, ModelInputError, "class CrossEntropyLoss, not an instance"),
        ({"loss_fn": HuggingFaceLike}, ModelInputError, "class HuggingFaceLike, not an instance"),
        ({"seed": 2**70}, ValueError, r"seed must be a whole number from -2\*\*63 to 2\*\*64 - 1"),
        ({"seed": -(2**63) - 1}, ValueError, "seed must be a whole number"),
        ({"seed": 1.0}, ValueError, "seed must be a whole number .* got 1.0"),
        ({"seed": "1"}, ValueError, "seed must be a whole number"),
        ({"seed": True}, ValueError, "seed must be a whole number"),
        ({"steps": 2.0}, ValueError, "steps must be a whole number of at least 1, got 2.0"),
        ({"steps": np.int64(0)}, ValueError, "steps must be a whole number of at least 1"),
        ({"progress": 5}, ModelInputError, "progress is 5, which cannot be called"),
        ({"deepen": True}, ModelInputError, "deepen is True, which cannot be called"),
        ({"measurements": 5}, ModelInputError, "measurements holds 5, which is no measurement"),
        ({"measurements": None}, ModelInputError, "measurements holds None, which is no measurement"),
    ],
)
def test_an_option_of_the_wrong_kind_is_told(options: Any, error: type[Exception], message: str) -> None:
    given = {"loss_fn": nn.CrossEntropyLoss(), **options}
    with pytest.raises(error, match=message):
        analyze(linear(), [(X, T)] * 2, **given)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_any_kind_are_taken(number: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.5), linear())
    plain = analyze(model, [X] * 3, mean_square, steps=2, seed=3)
    assert analyze(model, [X] * 3, mean_square, steps=number(2), seed=number(3)) == plain
    for seed in (-(2**63), 2**64 - 1):
        assert analyze(model, [X], mean_square, seed=seed).steps == 1


@pytest.mark.parametrize("entry", ["analyze", "layer_gain"])
def test_inside_a_transform_of_the_users_wrapped_tensors_are_refused(entry: str) -> None:
    model = linear()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    outer: Any = {"grad": torch.func.grad, "vmap": torch.func.vmap}

    def run(x: Tensor) -> Any:
        return analyze(model, [x], mean_square) if entry == "analyze" else layer_gain(model, "", x)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            run(X)
            return model(X).sum()

    def of_parameters(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(Whole(), {f"model.{n}": p for n, p in given.items()}, ())

    def of_batch(x: Tensor) -> Tensor:
        run(x)
        return x.sum()

    message = "belongs to a transform of torch.func .* analyse outside of it"
    with pytest.raises(ModelInputError, match=f"'weight' {message}"):
        outer["grad"](of_parameters)(parameters)
    stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
    with pytest.raises(ModelInputError, match=f"'weight' {message}"):
        outer["vmap"](of_parameters)(stacked)
    for transform in outer.values():
        with pytest.raises(ModelInputError, match=f"a tensor of the batch {message}"):
            transform(of_batch)(torch.stack([X, X]) if transform is outer["vmap"] else X)
