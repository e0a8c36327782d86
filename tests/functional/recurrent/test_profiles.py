"""Gradients by step, of ∂L/∂h_t and by level, against loops over cells and plain autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.functional.recurrent.models import (
    KINDS,
    Loop,
    inputs,
    last_step,
    layer,
    looped,
    measured,
    only,
    weighed,
)


@pytest.mark.parametrize("name", KINDS)
def test_profiles_are_those_of_a_loop_over_cells(name: str) -> None:
    """Two levels, both directions, a loss that reads every output and the last states."""
    module = layer(name, num_layers=2, bidirectional=True)
    output, last, every = looped(module, inputs())
    expected = torch.autograd.grad(weighed((output, last)), [h for steps in every for h in steps])
    flat = torch.stack(expected).reshape(4, 6, -1).norm(dim=-1).numpy()
    record = only(measured(module, [inputs()], weighed))
    assert [level.level for level in record.levels] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    for level, norms in zip(record.levels, flat, strict=True):
        read = norms[::-1] if level.level.endswith("reverse") else norms
        np.testing.assert_allclose(level.gradient_profile, read[None], rtol=1e-9)
    assert record.state_error[0] < 1e-12
    assert (record.num_steps[0], record.read_share[0], record.heard_share[0]) == (6, 1.0, 1.0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("read", ["last", "every", "third"])
def test_a_loop_over_a_cell_gives_the_numbers_of_the_layer(name: str, read: str) -> None:
    def loss(result: Any) -> Tensor:
        output = result[0]
        return {"last": output[-1], "every": output, "third": output[2]}[read].square().sum()

    module = layer(name)
    fused = only(measured(module, [inputs()], loss))
    loop = only(measured(Loop(module), [inputs()], loss))
    assert (fused.loop, loop.loop, loop.name, loop.type) == (
        False,
        True,
        "cell",
        f"{type(module).__name__}Cell",
    )
    assert loop.read_share == pytest.approx(fused.read_share)
    assert loop.state_error[0] < 1e-12
    if read == "third":  # the calls behind the third step get no gradient: the sequence ends there
        assert loop.heard_share == pytest.approx(fused.heard_share)
    a, b = fused.levels[0], loop.levels[0]
    for field in ("gradient_profile", "state_profile", "readout_profile", "spectral_radius", "lyapunov"):
        np.testing.assert_allclose(getattr(b, field), getattr(a, field), rtol=1e-9, err_msg=field)
    np.testing.assert_allclose(b.hidden_rms, a.hidden_rms, rtol=1e-9)
    np.testing.assert_allclose(b.cell_rms, a.cell_rms, rtol=1e-9)
    assert [gate.name for gate in a.gates] == [gate.name for gate in b.gates]
    for one, other in zip(a.gates, b.gates, strict=True):
        np.testing.assert_allclose(other.mean, one.mean, rtol=1e-9)


def test_the_state_of_an_lstm_is_h_and_c() -> None:
    """The gradient at s_{t-1} is that at s_t, times the Jacobian of the step, where nothing else is read."""
    module = layer("lstm")
    level = only(measured(module, [inputs(samples=1)], last_step)).levels[0]
    from gradflow.functional import levels_of, state_jacobians, unroll

    (track,) = unroll(levels_of(module), inputs(samples=1)).tracks
    carried = torch.cat([2 * track.after[-1][0], torch.zeros_like(track.after[-1][1])], -1)[0]
    norms = [float(carried.detach().norm())]
    for t in reversed(range(1, 6)):
        before = tuple(part.detach() for part in track.before[t])
        carried = state_jacobians(track.level.cell, track.drive[t].detach(), before)[0].T @ carried
        norms.append(float(carried.detach().norm()))
    np.testing.assert_allclose(level.state_profile[0], norms[::-1], rtol=1e-9)
    np.testing.assert_allclose(level.readout_profile, level.state_profile)
    assert level.state_size == 8


@pytest.mark.parametrize("name", KINDS)
def test_the_readout_profile_is_that_of_the_last_step_whatever_else_is_read(name: str) -> None:
    module = layer(name, num_layers=2)

    def every(result: Any) -> Tensor:
        return last_step(result) + 3 * result[0][:-1].cos().sum()

    alone, among = (only(measured(module, [inputs()], loss)) for loss in (last_step, every))
    for a, b in zip(alone.levels, among.levels, strict=True):
        np.testing.assert_allclose(b.readout_profile, a.readout_profile, rtol=1e-9)
        assert not np.allclose(b.gradient_profile, a.gradient_profile, rtol=0.1)
    assert (alone.read_share[0], among.read_share[0]) == (pytest.approx(1 / 6), 1.0)


def test_the_last_states_are_read_too() -> None:
    module = layer("gru", num_layers=2, bidirectional=True)
    by_output = only(measured(module, [inputs()], lambda r: r[0][-1, :, :4].sum() + r[0][0, :, 4:].sum()))
    by_state = only(measured(module, [inputs()], lambda r: r[1][2:].sum()))
    for a, b in zip(by_output.levels, by_state.levels, strict=True):
        np.testing.assert_allclose(b.gradient_profile, a.gradient_profile, rtol=1e-9)
        np.testing.assert_allclose(b.readout_profile, a.readout_profile, rtol=1e-9)
    assert by_state.read_share[0] == pytest.approx(2 / 6)


def test_heard_steps_are_those_that_add_to_the_weights_gradient_in_float32() -> None:
    """A linear step of 0.11: its seventh power is below 1e-6, so that seven of twelve steps are heard."""
    module = nn.RNN(3, 4, nonlinearity="relu").double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.0)
        module.weight_hh_l0.copy_(0.11 * torch.eye(4, dtype=torch.float64))
        module.bias_ih_l0.fill_(1.0)
    one = only(measured(module, [inputs(12)], lambda r: r[0][-1].sum()))
    assert one.heard_share[0] == pytest.approx(7 / 12)
    level = one.levels[0]
    np.testing.assert_allclose(
        level.gradient_profile[0], 4.0 * 0.11 ** np.arange(11.0, -1.0, -1.0), rtol=1e-9
    )
    assert level.spectral_radius[0] == pytest.approx(0.11)
    assert level.lyapunov[0] == pytest.approx(math.log(0.11))
    middle = only(measured(module, [inputs(12)], lambda r: r[0][5].sum()))
    assert middle.heard_share[0] == 1.0  # what is behind the step that is read does not count
    assert middle.levels[0].gradient_profile.shape == (1, 6)


def test_the_other_direction_hears_the_early_steps() -> None:
    module = layer("tanh", bidirectional=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.1)
    forward = only(measured(module, [inputs(40)], lambda r: r[0][-1, :, :4].sum()))
    both = only(measured(module, [inputs(40)], lambda r: r[1].sum()))
    assert forward.heard_share[0] < 0.3
    assert both.heard_share[0] == pytest.approx(2 * forward.heard_share[0], abs=0.06)
