"""The function of a layer: what is varied, what is held, and derivatives that are hard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn

import gradflow as gf
from gradflow.errors import ModelCallError, ModelInputError
from tests.functional.jacobian.models import (
    Cached,
    Checkpointed,
    Memory,
    NewSquare,
    OldSquare,
    Residual,
    Squared,
    Stateful,
    naive,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------- what is varied, and where


def test_calls_are_told_apart() -> None:
    model, x = Residual(), torch.randn(2, 5)
    for call, name in enumerate(["act", "act@1"]):
        point, expected = naive(model, "act", x, call=call)
        function = gf.layer_function(model, name, x)
        torch.testing.assert_close(function.point, point)
        torch.testing.assert_close(function.jacobian().dense(), expected)


def test_one_argument_of_several() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.attention(x, key=memory, value=memory.clone(), need_weights=False)[0]

    model, x, memory = Cross(), torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    attention = model.attention
    default = gf.layer_function(model, "attention", (x, memory))
    torch.testing.assert_close(default.point, x)
    for argument in ("key", "value"):
        function = gf.layer_function(model, "attention", (x, memory), argument=argument)
        torch.testing.assert_close(function.point, memory)
        calls = {"key": lambda m: attention(x, m, memory)[0], "value": lambda m: attention(x, memory, m)[0]}
        reference: Any = torch.autograd.functional.jacobian(calls[argument], memory)
        torch.testing.assert_close(
            function.jacobian().dense(), reference.reshape(12, 20).detach(), rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(gf.layer_function(model, "", (x, memory), argument=1).point, memory)
    torch.testing.assert_close(
        gf.layer_function(model, "", {"x": x, "memory": memory}, argument="x").point, x
    )
    torch.testing.assert_close(gf.layer_function(model, "", (x, memory), argument="memory").point, memory)
    with pytest.raises(ModelInputError, match=r"argument 'mask' of 'attention'.*named key, value"):
        gf.layer_function(model, "attention", (x, memory), argument="mask")
    with pytest.raises(ModelInputError, match="argument 7 of the model .Cross.: .*2 positional"):
        gf.layer_function(model, "", (x, memory), argument=7)


def test_packed_sequences() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            packed = rnn.pack_padded_sequence(x, torch.tensor([3, 2]))
            return self.layer(packed)[0].data

    model, x = Packed(), torch.randn(3, 2, 3)
    function = gf.layer_function(model, "layer", x)
    assert (tuple(function.point.shape), tuple(function.value.shape)) == ((5, 3), (5, 4))
    dense = function.jacobian().dense()
    h = 1e-2
    v = torch.randn_like(function.point)
    difference = (function(function.point + h * v) - function(function.point - h * v)) / (2 * h)
    torch.testing.assert_close(dense @ v.reshape(-1), difference.reshape(-1), rtol=1e-2, atol=1e-3)


def test_dropout_draws_the_mask_that_it_drew_in_the_model() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 50, bias=False), nn.Dropout(0.5))
    x = torch.ones(4, 50)
    function = gf.layer_function(model, "2", x, seed=3)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x).detach(), function.value)
    torch.testing.assert_close(function(function.point), function.value)
    diagonal = function.jacobian().dense().diagonal()
    torch.testing.assert_close(diagonal.reshape(4, 50) * function.point, function.value)
    assert set(diagonal.tolist()) == {0.0, 2.0}


def test_results_are_the_same_for_the_same_seed() -> None:
    model, x = Stateful(), torch.randn(6, 3)
    for measure in (gf.layer_gain, gf.layer_spectrum):
        assert measure(model, "head", x, seed=5) == measure(model, "head", x, seed=5)
    first, second = (gf.layer_jvp(model, "head", x, seed=5)[1] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, gf.layer_jvp(model, "head", x, seed=6)[1])
    assert float(gf.layer_jvp(nn.Identity(), "", x)[1].norm()) == pytest.approx(1.0)
    assert float(gf.layer_vjp(nn.Identity(), "", x)[1].norm()) == pytest.approx(1.0)


def test_the_model_runs_once_and_then_the_layer_alone() -> None:
    class Counted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(1)
            return super().forward(x)

    runs: list[int] = []
    model = Counted(nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5))
    gf.layer_spectrum(model, "2", torch.ones(2, 4))
    assert len(runs) == 1


def test_probes_come_from_a_stream_of_their_own() -> None:
    from gradflow.functional.jacobian.singular import make_generator

    for seed in (0, 7, 2**62):
        own, model = make_generator(seed), torch.Generator().manual_seed(seed)
        assert not torch.equal(torch.rand(8, generator=own), torch.rand(8, generator=model))
    own, again = make_generator(None), make_generator(None)
    drawn = torch.rand(8, generator=own)
    assert torch.equal(drawn, torch.rand(8, generator=again))
    assert not torch.equal(drawn, torch.rand(8))
    assert not torch.equal(drawn, torch.rand(8, generator=make_generator(None)))


def test_probes_are_independent_of_the_dropout_masks() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5)), torch.ones(1, 4000)
    for seed in range(3):
        gain = gf.layer_gain(model, "0", x, seed=seed, distribution="gaussian").gain
        assert gain == pytest.approx(2**0.5, rel=0.06)
    torch.manual_seed(0)
    assert gf.layer_gain(model, "0", x, distribution="gaussian").gain == pytest.approx(2**0.5, rel=0.06)


def test_a_layer_that_depends_on_what_lies_on_it_is_run_in_the_model() -> None:
    model, x = Memory(), torch.randn(2, 3)
    function = gf.layer_function(model, "gate", x)
    torch.testing.assert_close(function(function.point), model(x).detach())
    expected = torch.diag(model.inner(x).sigmoid().detach().reshape(-1))
    torch.testing.assert_close(function.jacobian().dense(), expected)


def test_a_cache_that_is_passed_along_does_not_grow() -> None:
    model, x = Cached(), torch.randn(2, 3)
    weight = model.one.linear.weight.detach()
    jacobian = gf.layer_function(model, "one@1", x).jacobian()
    for _ in range(2):
        torch.testing.assert_close(jacobian.dense()[:3, :3], weight)
    torch.testing.assert_close(jacobian.value, model(x).detach())


def test_parametrized_weights_and_weight_norm() -> None:
    for wrap in (parametrizations.orthogonal, parametrizations.spectral_norm, parametrizations.weight_norm):
        model = nn.Sequential(wrap(nn.Linear(4, 4, bias=False)))
        dense = gf.layer_function(model, "0", torch.randn(1, 4)).jacobian().dense()
        torch.testing.assert_close(dense, model.eval()[0].weight.detach(), rtol=1e-2, atol=1e-3)


def test_a_function_stays_what_it_is_while_the_model_trains_on() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval(), torch.randn(2, 3)
    function, between = gf.layer_function(model, "0", x), gf.jacobian_between(model, None, "", x)
    kept = function(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model.train()
    assert torch.equal(function(x), kept)
    torch.testing.assert_close(between.jvp(x), kept - model[0].bias.detach())
    assert model.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_outside_does_not_matter(context: Any) -> None:
    model, x = Residual(), torch.randn(2, 5)
    expected = naive(model, "third", x)[1]
    with context():
        y = torch.randn(2, 5) + 0 * x
        jacobian = gf.layer_function(model, "third", y).jacobian()
        torch.testing.assert_close(jacobian.dense(), expected)
        jacobian.jvp(y)
        gf.layer_gain(model, "third", y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)).to(dtype), torch.randn(2, 4, dtype=dtype)
    assert gf.layer_jvp(model, "0", x)[1].dtype == dtype
    found = gf.layer_spectrum(model, "0", x, k=2, method="iterative")
    expected = torch.linalg.svdvals(model[0].weight.detach().double())[:2]
    np.testing.assert_allclose(found.singular_values, expected, rtol=0.05)


# ------------------------------------------------------------------------------------ hard derivatives


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: Squared(NewSquare), ""),
        (lambda: Squared(OldSquare), ""),
        (Checkpointed, ""),
    ],
)
def test_every_way_to_a_product_gives_the_same(make: Any, layer: str) -> None:
    model, x = make(), torch.randn(2, 3)
    expected = naive(model, layer, x)[1]
    jacobian = gf.layer_function(model, layer, x).jacobian()
    v = torch.randn(2, 3)
    torch.testing.assert_close(jacobian.dense(), expected)
    torch.testing.assert_close(jacobian.jvp(v).reshape(-1), expected @ v.reshape(-1))
    torch.testing.assert_close(jacobian.jvp(2 * v).reshape(-1), 2 * expected @ v.reshape(-1))


def test_a_derivative_that_does_not_exist() -> None:
    class Once(OldSquare):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * grads[0]

    model, x = Squared(Once), torch.randn(2, 3)
    assert gf.layer_vjp(model, "", x)[1].shape == (2, 3)
    with pytest.raises(
        ModelCallError, match="no derivative of the model can be taken: .* Give a custom autograd"
    ):
        gf.layer_jvp(model, "", x)


def test_an_output_that_does_not_depend_on_the_input() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(2)

    jacobian = gf.layer_function(Constant(), "", torch.randn(3)).jacobian()
    assert not jacobian.dense().any()
    assert gf.layer_gain(Constant(), "", torch.randn(3)).gain == 0
    assert gf.layer_spectrum(Constant(), "", torch.randn(3), method="iterative", k=1).largest == 0
