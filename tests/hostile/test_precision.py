"""Other precisions than float32: autocast, scaled losses, models in half and in double precision."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import ModelInputError
from tests.hostile.harness import check
from tests.models import CASES as MODELS
from tests.models import Case, squares


class Autocast(nn.Module):
    """Runs a model under autocast."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = MODELS[name].make(), dtype

    def forward(self, *args: Any) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            y = self.inner(*args)
        return y.float()


NAMES = ("relu modules", "cnn", "lstm", "transformer", "tied", "attention")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_inside_the_model(name: str, dtype: torch.dtype) -> None:
    case = Case(lambda: Autocast(name, dtype), MODELS[name].draw, squares)
    # a recurrent cell hands its last state out twice, and a transform decomposes what the kernels fuse
    check(case, vjp="agrees to 2e-2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_autocast_around_the_analysis(dtype: torch.dtype, detail: Any) -> None:
    case = MODELS["relu modules"]
    model, twin, batch = case.build(), case.build(), case.batch()
    with torch.autocast("cpu", dtype):
        record = gf.analyze(model, [batch] * 3, lambda y: squares(y.float()), detail=detail)
        squares(twin(batch).float()).backward()
    for p, q in zip(record.parameters, twin.parameters(), strict=True):
        assert q.grad is not None
        np.testing.assert_allclose(p.grad_norm, q.grad.double().norm(), rtol=1e-6)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["relu modules", "cnn", "siamese", "transformer", "gru"])
def test_models_in_another_precision(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]

    def draw() -> Any:
        batch = model.draw()
        return tuple(t.to(dtype) for t in batch) if isinstance(batch, tuple) else batch.to(dtype)

    # the gradient of a value that several read is added up in the precision of the model
    exact = dtype is torch.float64
    record = check(
        Case(lambda: model.make().to(dtype), draw, lambda y: squares(y.float() if not exact else y)),
        vjp="agrees" if exact else "agrees to 5e-2",
    )
    assert record.provenance.dtypes == (str(dtype).removeprefix("torch."),)


def test_mixed_precisions_in_one_model() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6).double(), nn.Linear(6, 6).bfloat16()
            self.c = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(self.a(x.double()).bfloat16()).float()))

    record = check(Case(Mixed, lambda: torch.randn(5, 6), squares))
    assert record.provenance.dtypes == ("bfloat16", "float32", "float64")


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10])
def test_a_scaled_loss(scale: float) -> None:
    case = MODELS["relu modules"]
    record = check(Case(case.make, case.draw, lambda y: squares(y) * scale))
    plain = check(case)
    for a, b in zip(record, plain, strict=True):
        np.testing.assert_allclose(a.grad_norm, b.grad_norm * scale, rtol=1e-6)


def test_a_loss_scaled_by_a_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    case = MODELS["relu modules"]

    def loss(y: Tensor) -> Tensor:
        return scaler.scale(squares(y))

    scaler.scale(torch.ones(()))  # makes its scale a tensor, as the first step of a training would
    state = copy.deepcopy(scaler.state_dict())
    check(Case(case.make, case.draw, loss))
    assert scaler.state_dict() == state


def test_a_scaled_loss_in_half_precision_that_overflows_is_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).half()
    batch = torch.randn(5, 6).half()
    report = gf.diagnose(model, [batch] * 3, lambda y: y.float().square().mean() * 2.0**40, steps=3)
    assert not report.record["2"].grad_finite.any()
    assert any(issue.issue_type.value == "NUMERICAL" for issue in report.issues)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 2).to(torch.float8_e4m3fn)])
def test_a_dtype_without_arithmetic_is_refused_by_pytorch_itself(make: Any) -> None:
    model = make()
    with pytest.raises((RuntimeError, NotImplementedError, ModelInputError)) as caught:
        gf.analyze(model, [torch.randn(3, 4).to(torch.float8_e4m3fn)], lambda y: y.float().mean())
    assert any("step 0" in note for note in getattr(caught.value, "__notes__", ()))
