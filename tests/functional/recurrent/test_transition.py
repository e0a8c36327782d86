"""The state transition: Jacobians, eigenvalues and Lyapunov exponents against closed forms and torch.func."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from gradflow.functional import Cell, levels_of, lyapunov_exponents, spectral_radii, state_jacobians
from gradflow.functional.recurrent import transition as module_under_test

from .models import cells_of, layer


def at(name: str, samples: int = 3) -> tuple[nn.RNNBase, Tensor, tuple[Tensor, ...]]:
    module = layer(name)
    generator = torch.Generator().manual_seed(3)
    cell = levels_of(module)[0].cell
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    state = tuple(torch.randn(samples, n, generator=generator, dtype=torch.float64) for n in cell.sizes)
    return module, x, state


def by_torch(module: nn.RNNBase, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """The Jacobian of PyTorch's own cell by `torch.func.jacrev`, sample by sample."""
    cell, size = cells_of(module)[0], state[0].shape[-1]

    def step(s: Tensor) -> Tensor:
        new = cell(row, s if len(state) == 1 else (s[:size], s[size:]))
        return torch.cat(new, -1) if isinstance(new, tuple) else new

    rows = []
    for i in range(len(x)):
        row = x[i]
        rows.append(torch.func.jacrev(step)(torch.cat([part[i] for part in state], -1)))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["tanh", "relu", "lstm", "gru", "lstm, no bias"])
def test_jacobians_and_radii_are_those_of_torch_func(name: str) -> None:
    module, x, state = at(name)
    level = levels_of(module)[0]
    found = state_jacobians(level.cell, level.drive(x), state)
    expected = by_torch(module, x, state)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    radii, residuals = spectral_radii(level.cell, level.drive(x), state)
    torch.testing.assert_close(radii, torch.linalg.eigvals(expected).abs().amax(-1))
    assert not residuals.any()


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_iteration_finds_what_the_whole_jacobian_has(
    kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = kind(4, 48).double()
    level = levels_of(module)[0]
    drive = level.drive(torch.randn(4, 4, dtype=torch.float64))
    state = tuple(0.3 * torch.randn(4, n, dtype=torch.float64) for n in level.cell.sizes)
    exact, _ = spectral_radii(level.cell, drive, state)
    monkeypatch.setattr(module_under_test, "DENSE_SIZE", 8)
    found, residuals = spectral_radii(level.cell, drive, state)
    assert (residuals <= module_under_test.TOLERANCE).all()
    torch.testing.assert_close(found, exact, rtol=2 * module_under_test.TOLERANCE, atol=0)


def test_the_iteration_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues on a circle, all of one modulus, cannot be told apart before the basis is complete."""
    monkeypatch.setattr(module_under_test, "DENSE_SIZE", 8)
    monkeypatch.setattr(module_under_test, "MOST_VECTORS", 20)
    cell = Cell(kind="identity", weight_hh=torch.eye(40, dtype=torch.float64).roll(1, 0))
    zeros = torch.zeros(1, 40, dtype=torch.float64)
    radii, residuals = spectral_radii(cell, zeros, (zeros,))
    assert float(residuals) > module_under_test.TOLERANCE
    assert abs(float(radii) - 1.0) <= float(residuals)
    monkeypatch.setattr(module_under_test, "MOST_VECTORS", 120)
    radii, residuals = spectral_radii(cell, zeros, (zeros,))
    assert float(radii) == pytest.approx(1.0, abs=1e-9)
    assert float(residuals) < 1e-9


@pytest.mark.parametrize("size", [4, 300])
def test_no_finite_jacobian_has_no_radius(size: int) -> None:
    cell = Cell(kind="identity", weight_hh=torch.full((size, size), math.nan))
    zeros = torch.zeros(2, size)
    radii, residuals = spectral_radii(cell, zeros, (zeros,))
    assert radii.isnan().all()
    assert residuals.isnan().all()


def orthogonal(size: int) -> Tensor:
    torch.manual_seed(5)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_lyapunov_exponent_of_a_scaled_orthogonal_recurrence_is_the_log_of_the_scale(scale: float) -> None:
    cell = Cell(kind="identity", weight_hh=scale * orthogonal(6))
    drive = torch.randn(40, 3, 6, dtype=torch.float64)
    exponents = lyapunov_exponents(cell, drive, (torch.zeros(3, 6, dtype=torch.float64),))
    torch.testing.assert_close(exponents, torch.full((3,), math.log(scale), dtype=torch.float64))


def test_lyapunov_exponent_of_a_relu_layer_held_above_zero() -> None:
    module = nn.RNN(2, 4, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(0.9 * torch.eye(4).roll(1, 0))  # positive states stay positive
        module.weight_ih_l0.abs_()
        module.bias_ih_l0.fill_(0.5)
        module.bias_hh_l0.zero_()
    level = levels_of(module)[0]
    drive = level.drive(torch.rand(30, 2, 2, dtype=torch.float64))
    exponents = lyapunov_exponents(level.cell, drive, (torch.zeros(2, 4, dtype=torch.float64),))
    torch.testing.assert_close(exponents, torch.full((2,), math.log(0.9), dtype=torch.float64))


@pytest.mark.parametrize("name", ["tanh", "lstm", "gru"])
def test_lyapunov_exponent_is_that_of_the_product_of_jacobians(name: str) -> None:
    module, _, state = at(name, samples=1)
    level = levels_of(module)[0]
    drive = level.drive(torch.randn(12, 1, 3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(9)
    found = lyapunov_exponents(level.cell, drive, state, generator=generator.manual_seed(9))
    s = torch.cat(state, -1)
    v = torch.randn(s.shape, generator=generator.manual_seed(9), dtype=torch.float64)
    v = v[0] / v.norm()
    for step in drive:
        v = state_jacobians(level.cell, step, tuple(s.split(level.cell.sizes, -1)))[0] @ v
        s = level.cell.flat(step, s)
    assert float(found) == pytest.approx(float(v.norm().log()) / 12, rel=1e-9)


def test_steps_that_do_not_count_leave_the_state_alone() -> None:
    module, _, state = at("gru")
    level = levels_of(module)[0]
    drive = level.drive(torch.randn(6, 3, 3, dtype=torch.float64))
    alive = torch.arange(6)[:, None] < torch.tensor([6, 4, 2])
    together = lyapunov_exponents(level.cell, drive, state, alive=alive)
    full = lyapunov_exponents(level.cell, drive[:4], state)
    assert float(together[1]) == pytest.approx(float(full[1]), rel=1e-12)


def test_the_global_random_state_is_left_alone() -> None:
    module, x, state = at("lstm")
    level = levels_of(module)[0]
    before = torch.get_rng_state()
    lyapunov_exponents(level.cell, level.drive(x)[None], state)
    spectral_radii(level.cell, level.drive(x), state)
    assert torch.equal(before, torch.get_rng_state())


def test_a_step_that_takes_everything() -> None:
    cell = Cell(kind="identity", weight_hh=torch.zeros(2, 2))
    assert lyapunov_exponents(cell, torch.zeros(3, 1, 2), (torch.ones(1, 2),)).tolist() == [-math.inf]


@pytest.mark.parametrize("name", ["tanh", "lstm", "gru"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_outside_does_not_matter(name: str, mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made in inference mode itself may be given too: it can carry no tangent of its own."""
    module, x, state = at(name)
    level = levels_of(module)[0]
    drive = level.drive(x).detach()

    def all_of_it(level: Any, drive: Tensor, state: tuple[Tensor, ...]) -> list[Tensor]:
        return [
            state_jacobians(level.cell, drive, state),
            *spectral_radii(level.cell, drive, state),
            lyapunov_exponents(level.cell, torch.stack([drive, drive]), state),
        ]

    expected = all_of_it(level, drive, state)
    with mode():
        own = levels_of(module)[0], drive.clone(), tuple(part.clone() for part in state)
        weights = {k: v.clone() for k, v in attrs.asdict(level.cell).items() if isinstance(v, Tensor)}
        cell = attrs.evolve(level.cell, **weights)
        made = attrs.evolve(level, cell=cell), own[1], own[2]
        found = [all_of_it(level, drive, state), all_of_it(*own), all_of_it(*made)]
        monkeypatch.setattr(module_under_test, "DENSE_SIZE", 0)
        radii = spectral_radii(own[0].cell, own[1], own[2])[0]
    for numbers in found:
        torch.testing.assert_close(numbers, expected)
    torch.testing.assert_close(radii, expected[1], rtol=0.02, atol=1e-6)
