"""The function of a layer leaves everything as it was, and what it cannot do is an error that tells why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import ModelCallError, ModelInputError, ModelNotCalledError, UnknownLayerError
from tests.functional.jacobian.models import Attention, Residual, Stateful, fingerprint


def measures(model: nn.Module, x: Tensor) -> list[Callable[[], Any]]:
    return [
        lambda: gf.layer_function(model, "norm", x)(torch.randn(6, 4, generator=torch.Generator())),
        lambda: gf.layer_jvp(model, "drop", x),
        lambda: gf.layer_vjp(model, "act", x),
        lambda: gf.layer_gain(model, "", x, seed=1),
        lambda: gf.layer_spectrum(model, "head", x, seed=1),
        lambda: gf.jacobian_between(model, "linear", "head", x).spectrum(2, method="iterative", seed=0),
        lambda: gf.jacobian_between(model, None, "", x).dense(),
    ]


@pytest.mark.parametrize("number", range(7))
def test_everything_is_put_back(number: int) -> None:
    model, x = Stateful(), torch.randn(6, 3)
    model(x).sum().backward()
    model.drop.eval()
    kept = x.clone()
    before = fingerprint(model)
    measures(model, x)[number]()
    assert fingerprint(model) == before
    assert torch.equal(x, kept)


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("at", [1, 2, 3])
def test_everything_is_put_back_when_it_raises(number: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Stateful(), torch.randn(6, 3)
    runs = 0

    def failing(self: nn.Module, h: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs >= at:
            raise ZeroDivisionError("at the head")
        return nn.functional.linear(h, self.weight, self.bias)

    monkeypatch.setattr(nn.Linear, "forward", failing)
    before = fingerprint(model)
    with contextlib.suppress(ZeroDivisionError, ModelInputError, ModelCallError):
        measures(model, x)[number]()
    assert runs >= 1
    assert fingerprint(model) == before


def test_what_the_model_raises_is_raised_with_a_note() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="positional argument") as caught:
        gf.layer_gain(model, "0", (torch.randn(2, 3), torch.randn(2)))
    assert "leave the target out" in caught.value.__notes__[0]
    assert "[2, 3]" in caught.value.__notes__[0]


def test_names_that_are_not_there() -> None:
    model, x = Attention(), torch.randn(1, 3, 4)
    with pytest.raises(UnknownLayerError, match="no entry named 'atention'. The nearest of .*attention"):
        gf.layer_gain(model, "atention", x)
    with pytest.raises(
        ModelNotCalledError, match=r"'attention.out_proj'.*not called.*then ask for 'attention'"
    ):
        gf.layer_gain(model, "attention.out_proj", x)
    with pytest.raises(
        ModelNotCalledError, match=r"'inner@1' asks for call number 1.*calls it 1 time.*'inner' at"
    ):
        gf.layer_gain(model, "inner@1", x)
    with pytest.raises(ModelNotCalledError, match="'act@2' asks for call number 2.*'act@1' at most"):
        gf.layer_gain(Residual(), "act@2", torch.randn(1, 5))
    unused = nn.Sequential(nn.Linear(2, 2))
    unused.add_module("extra", nn.Linear(2, 2))
    unused.forward = lambda x: unused[0](x)  # type: ignore[method-assign]
    with pytest.raises(ModelNotCalledError, match="'extra'.*Its parent, the model, may use"):
        gf.layer_gain(unused, "extra", torch.randn(1, 2))


def test_inputs_that_have_no_jacobian() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    ids = torch.tensor([[1, 2]])
    with pytest.raises(
        ModelInputError, match=r"'0' .Embedding. has no floating-point.*jacobian_between.model, '0'"
    ):
        gf.layer_gain(model, "0", ids)
    assert gf.jacobian_between(model, "0", "1", ids).shape == (4, 6)

    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    with pytest.raises(ModelInputError, match="Choice. returns no floating-point tensor .int64"):
        gf.layer_gain(Choice(), "", torch.randn(2, 3))
    with pytest.raises(ModelInputError, match="model is a function, not a torch.nn.Module"):
        gf.layer_gain(lambda x: x, "", torch.randn(2))  # type: ignore[arg-type]
    with pytest.raises(ModelInputError, match="lazy module"):
        gf.layer_gain(nn.LazyLinear(2), "", torch.randn(2, 3))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_modules_are_refused() -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ModelInputError, match="'0' is a TorchScript module"):
        gf.layer_gain(nn.Sequential(scripted), "0", torch.randn(1, 2))


def test_a_layer_that_is_no_function_of_its_input() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return x * len(calls)

    calls: list[int] = []

    with pytest.raises(ModelInputError, match="gives another output when it is run again"):
        gf.layer_function(Counting(), "", torch.ones(2))


def test_bad_options() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(4, 3)
    with pytest.raises(ValueError, match="num_probes must be a whole number of at least 1, got 0"):
        gf.layer_gain(model, "0", x, num_probes=0)
    with pytest.raises(ValueError, match="distribution must be 'rademacher' or 'gaussian', got 'uniform'"):
        gf.layer_gain(model, "0", x, distribution="uniform")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be a whole number"):
        gf.layer_spectrum(model, "0", x, k=0)
    with pytest.raises(ValueError, match="method must be 'auto', 'dense' or 'iterative', got 'svd'"):
        gf.layer_spectrum(model, "0", x, method="svd")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="sample must be 'auto', 'all' or the index of a sample, got 'first'"
    ):
        gf.layer_spectrum(model, "0", x, sample="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mixes the samples of the batch, as BatchNorm"):
        gf.layer_spectrum(model, "0", x, sample=0)
    with pytest.raises(ValueError, match="sample 4 of .*there are 4"):
        gf.layer_spectrum(model.eval(), "0", x, sample=4)
    with pytest.raises(
        ValueError, match=r"the tangent must be shaped as the input of 0, \(4, 3\); got \(3,\)"
    ):
        gf.layer_jvp(model, "0", x, torch.ones(3))
    with pytest.raises(ValueError, match=r"the cotangent must be shaped as the output of 0, .* got float"):
        gf.layer_vjp(model, "0", x, 1.0)  # type: ignore[arg-type]
