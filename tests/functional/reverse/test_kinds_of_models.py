"""Models that run transforms of their own, are complex, under autocast or compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradflow.functional import analyze
from tests.functional.naive import naive_step
from tests.functional.reverse.models import X, mean_square

# --------------------------------------------------------------------- transforms inside the model


class Inside(nn.Module):
    """Uses a transform of torch.func in its forward: a derivative by its input, a vmap, a jvp."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kind = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), kind

    def forward(self, x: Tensor) -> Tensor:
        def one(p: Tensor) -> Tensor:
            return torch.sigmoid(self.net(p)).squeeze(-1)

        if self.kind == "vmap of grad":
            inner = torch.func.vmap(torch.func.grad(one))(x).sum(-1)
        elif self.kind == "jvp":
            inner = torch.func.jvp(one, (x,), (torch.ones_like(x),))[1]
        else:
            inner = torch.func.vmap(one)(x)
        return inner if self.kind == "vmap alone" else inner + self.net(x).squeeze(-1)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("kind", ["vmap of grad", "jvp", "vmap", "vmap alone"])
@pytest.mark.parametrize("way", ["fused", "full", "vjp"])
def test_what_a_model_runs_in_transforms_of_its_own_is_left_alone(kind: str, way: str) -> None:
    options: dict[str, Any] = {"detail": "full"} if way == "full" else {"transform": way}
    record = analyze(Inside(kind), [X] * 3, mean_square, steps=3, **options)
    naive = Inside(kind)
    mean_square(naive(X)).backward()
    for parameter, (name, p) in zip(record.parameters, naive.named_parameters(), strict=True):
        assert p.grad is not None
        np.testing.assert_allclose(parameter.grad_norm, p.grad.norm(), rtol=1e-5, err_msg=name)
    # a model all of whose layers run inside is the layer; else there are the calls outside
    expected = [""] if kind == "vmap alone" else ["net.0", "net.1", "net.2"]
    assert [layer.name for layer in record] == expected
    assert all(layer.reached.all() for layer in record)
    assert record.never_called == ()


def test_a_nan_born_in_a_transform_of_the_models_own_breaks_nothing() -> None:
    class Faulty(Inside):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(lambda p: torch.log(-self.net(p).square()))(x)

    record = analyze(Faulty("vmap"), [X], mean_square)
    assert not np.isfinite(record.losses).any()


# ------------------------------------------------------------------------------ kinds of models


def test_complex_models_are_measured() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(4, 4, dtype=torch.complex128)
            self.b = nn.Linear(4, 2, dtype=torch.complex128)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.to(torch.complex128)).tanh()).abs()

    plain = Complex()
    mean_square(plain(X)).backward()
    for options in ({}, {"detail": "full"}, {"transform": "vjp"}):
        record = analyze(Complex(), [X], mean_square, **options)  # type: ignore[arg-type]
        for parameter, (_, p) in zip(record.parameters, plain.named_parameters(), strict=True):
            assert p.grad is not None
            np.testing.assert_allclose(parameter.grad_norm, p.grad.abs().square().sum().sqrt(), rtol=1e-10)


def test_autocast_inside_a_model_is_measured() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.net(x)

    naive = naive_step(Mixed(), X, lambda y: mean_square(y.float()))
    for options in ({}, {"detail": "full"}, {"transform": "vjp"}):
        record = analyze(Mixed(), [X], lambda y: mean_square(y.float()), **options)  # type: ignore[arg-type]
        for parameter in record.parameters:
            np.testing.assert_allclose(parameter.grad_norm, naive.parameter_norm(parameter.name), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_a_compiled_model_is_run_as_it_was_written_and_stays_compiled() -> None:
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    made: Any = torch.compile(model, backend=backend)
    made(X)
    assert compiled == [1]
    record, plain = (analyze(m, [X] * 2, mean_square, steps=2) for m in (made, model))
    assert [layer.name for layer in record] == [f"_orig_mod.{layer.name}" for layer in plain]
    for a, b in zip(record, plain, strict=True):
        np.testing.assert_array_equal(a.grad_norm, b.grad_norm)
    made(X)
    assert compiled == [1]  # neither by us nor anew
