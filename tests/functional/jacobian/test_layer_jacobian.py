"""Jacobians of layers: against torch.func.jacrev, plain autograd and central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.functional import Jacobian
from tests.functional.jacobian.models import (
    Attention,
    Recurrent,
    Residual,
    fingerprint,
    naive,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


CASES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 3)), "1", (3, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 2)), "1", (2, 2, 5, 5)),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), "1", (3, 4)),
    "batch_norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), "1", (5, 4)),
    "in_place": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True)), "1", (5, 4)),
    "attention": (Attention, "attention", (2, 3, 4)),
    "attention_eval": (lambda: Attention().eval(), "attention", (2, 3, 4)),
    "attention_weights": (lambda: Attention(need_weights=True), "attention", (2, 3, 4)),
    "block": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), "", (2, 3, 4)),
    "block_eval": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), "", (2, 3, 4)),
    "lstm": (lambda: Recurrent(batch_first=True, num_layers=2), "layer", (2, 3, 3)),
    "lstm_seq_first": (lambda: Recurrent(bidirectional=True), "layer", (3, 2, 3)),
    "gru": (lambda: Recurrent(nn.GRU), "layer", (3, 2, 3)),
    "whole": (Residual, "", (3, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_products_equal_plain_autograd_and_jacrev(case: str) -> None:
    make, layer, shape = CASES[case]
    model, x = make(), torch.randn(shape)
    point, expected = naive(model, layer, x)
    before = fingerprint(model)
    function = gf.layer_function(model, layer, x)
    torch.testing.assert_close(function.point, point)
    jacobian = function.jacobian()
    torch.testing.assert_close(jacobian.dense(), expected, rtol=1e-4, atol=1e-5)
    reverse = torch.func.jacrev(function)(function.point).reshape(jacobian.shape)
    torch.testing.assert_close(reverse, expected, rtol=1e-4, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(function.point.shape, generator=generator)
    u = torch.randn(function.value.shape, generator=generator)
    output, pushed = gf.layer_jvp(model, layer, x, v)
    torch.testing.assert_close(output, function(function.point))
    torch.testing.assert_close(pushed.reshape(-1), expected @ v.reshape(-1), rtol=1e-4, atol=1e-4)
    _, pulled = gf.layer_vjp(model, layer, x, u)
    torch.testing.assert_close(pulled.reshape(-1), u.reshape(-1) @ expected, rtol=1e-4, atol=1e-4)
    assert fingerprint(model) == before


@pytest.mark.parametrize("case", CASES)
def test_jvp_equals_central_differences(case: str) -> None:
    make, layer, shape = CASES[case]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    function = gf.layer_function(model, layer, x)
    v = torch.randn_like(function.point)
    h = 1e-5
    difference = (function(function.point + h * v) - function(function.point - h * v)) / (2 * h)
    _, pushed = gf.layer_jvp(model, layer, x, v)
    torch.testing.assert_close(pushed, difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_a_function_takes_every_transform(case: str) -> None:
    make, layer, shape = CASES[case]
    function = gf.layer_function(make(), layer, torch.randn(shape))
    jacobian = function.jacobian()
    expected = jacobian.dense()
    v = torch.randn_like(function.point)
    jacobian.jvp(v)  # torch warns of its own deprecated calls where a process begins with torch.func.jvp
    pushed: Any = torch.func.jvp(function, (function.point,), (v,))[1]
    torch.testing.assert_close(pushed.reshape(-1), expected @ v.reshape(-1), rtol=1e-4, atol=1e-4)
    if layer == "layer":
        return  # vmap has no rule for recurrent layers
    batched: Any = torch.func.vmap(function, randomness="same")(torch.stack([function.point, function.point]))
    torch.testing.assert_close(batched[1], function.value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gain_is_the_frobenius_norm(case: str) -> None:
    make, layer, shape = CASES[case]
    model, x = make(), torch.randn(shape)
    expected = naive(model, layer, x)[1]
    for distribution in ("rademacher", "gaussian"):
        found = gf.layer_gain(model, layer, x, num_probes=64, seed=1, distribution=distribution)
        assert (found.n_out, found.n_in) == tuple(expected.shape)
        assert found.gain == pytest.approx(
            float(expected.norm()) / found.n_in**0.5, abs=max(4 * found.standard_error, 1e-5)
        )
        assert found.frobenius_norm == pytest.approx(found.gain * found.n_in**0.5)
        assert 0 <= found.standard_error < 0.2 * found.gain


def test_standard_error_is_the_spread_of_the_gain() -> None:
    model, x = nn.Sequential(nn.Linear(20, 3)), torch.randn(1, 20)
    runs = [gf.layer_gain(model, "0", x, num_probes=8, seed=seed) for seed in range(60)]
    spread = float(np.std([run.gain for run in runs]))
    assert np.mean([run.standard_error for run in runs]) == pytest.approx(spread, rel=0.3)
    assert np.isnan(gf.layer_gain(model, "0", x, num_probes=1).standard_error)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sample", ["auto", "all"])
def test_spectrum_equals_the_svd(case: str, sample: Any) -> None:
    make, layer, shape = CASES[case]
    model, x = make(), torch.randn(shape)
    whole = naive(model, layer, x)[1].double()
    dense = gf.layer_spectrum(model, layer, x, sample=sample)
    mixing = case == "batch_norm"
    if sample == "all" or mixing:
        expected = torch.linalg.svdvals(whole)
        assert dense.sample is None
    else:
        second = case in ("lstm_seq_first", "gru")
        size = shape[1] if second else shape[0]
        blocks = whole.reshape(
            *_split(whole.shape[0], size, second, shape), *_split(whole.shape[1], size, second, shape)
        )
        block = blocks[:, 0, :, :, 0, :]
        expected = torch.linalg.svdvals(block.reshape(whole.shape[0] // size, whole.shape[1] // size))
        assert dense.sample == 0
    assert dense.method == "dense"
    assert dense.is_complete
    np.testing.assert_allclose(dense.singular_values, expected, rtol=1e-4, atol=1e-5)
    top = gf.layer_spectrum(model, layer, x, k=3, sample=sample, method="iterative", seed=0)
    assert top.converged
    np.testing.assert_allclose(top.singular_values, expected[:3], rtol=1e-3)
    assert (np.abs(top.singular_values - expected[:3].numpy()) <= top.residuals + 1e-4).all()


def _split(number: int, size: int, second: bool, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (before, samples, after) of a side, by the axis of the samples."""
    before = shape[0] if second else 1
    return before, size, number // size // before


def test_one_sample_by_index_and_what_a_spectrum_tells() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x = torch.randn(4, 3)
    found = gf.layer_spectrum(model, "1", x, sample=2)
    expected = np.sort(1 - np.tanh(model[0](x[2]).detach().numpy()) ** 2)[::-1]
    np.testing.assert_allclose(found.singular_values, expected, rtol=1e-5)
    assert (found.largest, found.smallest) == (found.singular_values[0], found.singular_values[-1])
    assert found.condition_number == pytest.approx(expected[0] / expected[-1], rel=1e-4)
    assert found.stable_rank == pytest.approx((expected**2).sum() / expected[0] ** 2, rel=1e-4)
    top = gf.layer_spectrum(model, "1", x, k=2, sample=2, method="iterative")
    assert not top.is_complete
    assert np.isnan(top.smallest)
    assert np.isnan(top.condition_number)


def test_large_layers_are_never_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(700, 600)), torch.randn(2, 700)
    monkeypatch.setattr(Jacobian, "dense", None)
    found = gf.layer_spectrum(model, "0", x, k=3, seed=0)
    expected = torch.linalg.svdvals(model[0].weight.detach())[:3]
    assert found.method == "iterative"
    np.testing.assert_allclose(found.singular_values, expected, rtol=2e-3)


def test_an_iteration_that_is_cut_short_says_so() -> None:
    model, x = nn.Sequential(nn.Linear(60, 60)), torch.randn(2, 60)
    found = gf.layer_spectrum(model, "0", x, k=3, method="iterative", max_products=10, seed=0)
    assert not found.converged
    assert found.num_products <= 20
    expected = torch.linalg.svdvals(model[0].weight.detach())[:3].numpy()
    assert (found.singular_values <= expected + 1e-5).all()
