"""Jacobians as linear maps: end to end through a model, their singular values, and the iteration itself."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import ModelInputError, ModelNotCalledError, UnknownLayerError
from gradflow.functional import Jacobian, Spectrum
from gradflow.functional.jacobian.singular import top_singular_values
from tests.functional.jacobian.models import Residual


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def chain(depth: int, width: int = 6, *, orthogonal: bool = True) -> nn.Sequential:
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
    for layer in model:
        if orthogonal:
            nn.init.orthogonal_(layer.weight)  # type: ignore[arg-type]
    return model


# ------------------------------------------------------------------------------------ end to end


def test_an_orthogonal_chain_is_an_isometry() -> None:
    model, x = chain(20), torch.randn(3, 6)
    jacobian = gf.jacobian_between(model, "0", "19", x)
    np.testing.assert_allclose(jacobian.singular_values(), np.ones(18), atol=1e-5)
    assert jacobian.condition_number() == pytest.approx(1.0, abs=1e-4)
    assert jacobian.gain(num_probes=4).gain == pytest.approx(1.0, abs=1e-5)
    for k in (1, 4):  # one eigenspace of six dimensions: a single vector would see one of them
        top = jacobian.of_sample(1).spectrum(k, method="iterative", seed=0)
        assert top.converged
        np.testing.assert_allclose(top.singular_values, np.ones(k), atol=1e-5)
    for layer in ("0", "7", "19"):
        assert gf.layer_spectrum(model, layer, x).condition_number == pytest.approx(1.0, abs=1e-5)
    random = gf.jacobian_between(chain(20, orthogonal=False), "0", "19", x)
    assert random.of_sample(0).condition_number() > 100


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("first", "third"),
        ("act", "third"),
        ("second", "act@1"),
        ("act", "second"),
        (None, ""),
        ("act@1", ""),
        (None, "first"),
    ],
)
def test_between_equals_jacrev_of_the_part_between(source: str | None, target: str) -> None:
    model, x = Residual(), torch.randn(2, 5)
    first, second, third = model.first, model.second, model.third
    h = first(x).tanh().detach()

    def part(z: Tensor) -> Tensor:
        act = first(z).tanh() if source is None else z.tanh() if source == "first" else z
        if target == "first":
            return first(z)
        if target == "second":
            return second(act)
        if source == "second":
            return z.tanh()
        inner = z if source == "act@1" else second(act).tanh()
        return third((h if source == "act@1" else act) + inner)

    start = {None: x, "first": first(x), "act": h, "second": second(h), "act@1": second(h).tanh()}[
        source
    ].detach()
    jacobian = gf.jacobian_between(model, source, target, x)
    expected = torch.func.jacrev(part)(start).reshape(jacobian.shape).detach()
    torch.testing.assert_close(jacobian.point, start)
    torch.testing.assert_close(jacobian.dense(), expected)
    v, u = torch.randn_like(start), torch.randn_like(jacobian.value)
    torch.testing.assert_close(jacobian.jvp(v).reshape(-1), expected @ v.reshape(-1))
    torch.testing.assert_close(jacobian.vjp(u).reshape(-1), u.reshape(-1) @ expected)
    np.testing.assert_allclose(jacobian.singular_values(3), torch.linalg.svdvals(expected)[:3], rtol=1e-4)
    assert jacobian.name == f"{source or 'input'} -> {target or 'output'}"


def test_the_model_runs_no_further_than_the_target() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.autograd.forward_ad._current_level >= 0 or x.requires_grad:
                raise AssertionError("not to be reached")
            return x

    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Broken())
    gf.jacobian_between(model, "0", "1", torch.randn(1, 3)).dense()


def test_a_target_that_does_not_depend_on_the_source_has_a_zero_jacobian() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model, x = Two(), torch.randn(1, 2)
    jacobian = gf.jacobian_between(model, "a", "b", x)
    assert not jacobian.dense().any()
    assert not jacobian.jvp(x).any()
    assert np.isnan(jacobian.condition_number())
    with pytest.raises(
        ModelInputError, match=r"target 'a' .Linear. has returned before the source 'b'.*Swap.*'a@1'"
    ):
        gf.jacobian_between(model, "b", "a", x)
    torch.testing.assert_close(gf.jacobian_between(model, "a", "a", x).dense(), torch.eye(2))


def test_endpoints_that_are_not_there() -> None:
    model, x = chain(2), torch.randn(1, 6)
    with pytest.raises(UnknownLayerError, match="no entry named '2'"):
        gf.jacobian_between(model, "0", "2", x)
    with pytest.raises(ModelNotCalledError, match="'0@3' asks for call number 3"):
        gf.jacobian_between(model, "0@3", "1", x)


def test_a_model_that_branches_on_what_is_varied() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h) if h.sum() < 100 else h

    jacobian = gf.jacobian_between(Branching(), "a", "b", torch.randn(1, 2))
    with pytest.raises(
        ModelNotCalledError, match="'b' .Linear. was called in the first pass .* but not in a later"
    ):
        jacobian.function(torch.full((1, 2), 1e3))


# ------------------------------------------------------------------------------------ the linear map


def test_a_function_of_ones_own() -> None:
    matrix = torch.randn(4, 3)
    jacobian = Jacobian(lambda x: matrix @ x, torch.zeros(3), name="A")
    assert jacobian.shape == (4, 3)
    assert repr(jacobian) == "Jacobian(A, (3,) -> (4,))"
    torch.testing.assert_close(jacobian.dense(), matrix)
    torch.testing.assert_close(Jacobian(lambda x: matrix.T @ x, torch.zeros(4)).dense(), matrix.T)
    torch.testing.assert_close(jacobian.singular_values(), torch.linalg.svdvals(matrix.double()))
    assert isinstance(jacobian.spectrum(2), Spectrum)


def test_what_is_too_large_is_refused_with_the_way_out() -> None:
    jacobian = Jacobian(torch.sin, torch.zeros(5000))
    with pytest.raises(ValueError, match="dense: .*5000 × 5000 = 2.50e.07 elements.*of_sample"):
        jacobian.dense()
    with pytest.raises(ValueError, match="all singular values of .* too large to take whole.*k=5"):
        jacobian.singular_values()
    with pytest.raises(ValueError, match="the condition number of .* too large"):
        jacobian.condition_number()
    np.testing.assert_allclose(jacobian.singular_values(2, seed=0), [1, 1], atol=1e-6)


def test_an_operation_without_a_batching_rule_is_taken_row_by_row() -> None:
    class NoVmap(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * 3

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            pass

        @staticmethod
        def backward(ctx, grad):
            return NoVmap.apply(grad)

    jacobian = Jacobian(NoVmap.apply, torch.ones(4))
    torch.testing.assert_close(jacobian.dense(), 3 * torch.eye(4))


def test_samples_that_mix_in_either_direction_are_not_told_apart() -> None:
    x = torch.randn(5, 2)
    assert Jacobian(torch.tanh, x).sample_axis() == 0
    assert Jacobian(lambda x: x + x[2], x).sample_axis() is None  # all others look at the one in the middle
    assert Jacobian(lambda x: x.index_add(0, torch.tensor([2]), x[:1]), x).sample_axis() is None
    assert Jacobian(lambda x: x.sum(0), x).sample_axis() is None
    assert Jacobian(lambda x: x - x.mean(0), x).sample_axis((0, 1)) == 1
    with pytest.raises(ValueError, match="mixes the samples of the batch"):
        Jacobian(lambda x: x + x[2], x).of_sample(0)


def test_values_that_are_not_finite_are_reported_as_such() -> None:
    for method in ("dense", "iterative"):
        found = Jacobian(torch.sqrt, torch.tensor([0.0, 1.0])).spectrum(2, method=method)
        assert np.isnan(found.singular_values).all()
        assert not found.converged


def test_no_convergence_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    matrix = torch.randn(80, 80)
    jacobian = Jacobian(lambda x: matrix @ x, torch.zeros(80))
    with caplog.at_level(logging.WARNING, logger="gradflow"):
        jacobian.singular_values(3, method="iterative", max_products=8, seed=0)
    assert "have not converged" in caplog.text


def test_a_singular_jacobian_has_an_infinite_condition_number() -> None:
    found = Jacobian(lambda x: x * torch.tensor([1.0, 0.0]), torch.ones(2)).spectrum()
    assert found.condition_number == np.inf
    assert np.isnan(Jacobian(lambda x: 0 * x, torch.ones(2)).spectrum().stable_rank)


# ------------------------------------------------------------------------------------ the iteration


def iterate(matrix: Tensor, k: int, *, tolerance: float = 1e-6, max_products: int = 4000):
    return top_singular_values(
        lambda v: matrix @ v,
        lambda u: matrix.T @ u,
        matrix.new_zeros(matrix.shape[1]),
        k=k,
        generator=torch.Generator().manual_seed(0),
        tolerance=tolerance,
        max_products=max_products,
    )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(0, 40), seed=st.integers(0, 10**6),
    k=st.integers(1, 6), power=st.floats(0, 3),
)  # fmt: skip
def test_the_iteration_equals_the_svd(
    rows: int, columns: int, rank: int, seed: int, k: int, power: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, dtype=torch.float64, generator=generator)
    right = torch.randn(rank, columns, dtype=torch.float64, generator=generator)
    scale = torch.arange(1, rank + 1, dtype=torch.float64) ** -power
    matrix = (left * scale) @ right
    k = min(k, rows, columns)
    found = iterate(matrix, k)
    expected = torch.linalg.svdvals(matrix)[:k]
    assert found.converged
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-6 * max(1.0, float(expected[0])))


@pytest.mark.parametrize("multiplicity", [1, 3, 50])
def test_equal_singular_values_are_all_found(multiplicity: int) -> None:
    left, right = (torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64)).Q for _ in range(2))
    values = torch.cat(
        [torch.full((multiplicity,), 2.0), torch.linspace(1.9, 0, 300 - multiplicity)]
    ).double()
    found = iterate(left @ torch.diag(values) @ right, 5)
    assert found.converged
    torch.testing.assert_close(found.values, values[:5], rtol=1e-6, atol=0)


def test_a_flat_spectrum_takes_restarts_and_its_residuals_bound_the_error() -> None:
    matrix = torch.randn(400, 400, dtype=torch.float64)
    found = iterate(matrix, 4, tolerance=1e-4)
    expected = torch.linalg.svdvals(matrix)[:4]
    assert found.converged
    assert found.num_products > 150  # the basis holds 64
    assert bool(((found.values - expected).abs() <= found.residuals + 1e-9).all())
