"""Slopes in closed form, courses without a graph and gradients sent back: against autograd over the cells."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from gradflow.functional import Cell, levels_of, unroll
from gradflow.functional.model.setting import load_forward_mode
from gradflow.functional.recurrent.course import TOP, courses, sent_back
from gradflow.functional.recurrent.slopes import slopes_at
from gradflow.functional.recurrent.unroll import Layout, track_gradients
from tests.functional.recurrent.models import KINDS, inputs, layer

OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "two levels": {"num_layers": 2},
    "both directions": {"num_layers": 2, "bidirectional": True},
}


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", [*KINDS, "lstm, no bias", "gru, no bias", "projected"])
def test_products_with_slopes_are_those_of_forward_and_reverse_mode(name: str) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, proj_size=2).double() if name == "projected" else layer(name)
    level = levels_of(module)[0]
    drive = level.drive(random(5, 3))
    state = tuple(random(5, n, seed=n) for n in level.cell.sizes)
    new, slopes = slopes_at(level.cell, drive, state)
    v = tuple(random(5, n, seed=n + 10) for n in level.cell.sizes)
    load_forward_mode()
    again, pushed = torch.func.jvp(lambda *s: level.cell(drive, s)[0], state, v)
    again, pulled = torch.func.vjp(lambda d, *s: level.cell(d, s)[0], drive, *state)
    torch.testing.assert_close(new, again)
    torch.testing.assert_close(slopes.push(v), pushed)
    at_drive, *before = pulled(v)
    found, at = slopes.pull(v)
    torch.testing.assert_close(at, at_drive)
    torch.testing.assert_close(found, tuple(before))
    several = tuple(torch.stack([part, 2 * part]) for part in v)  # an axis of vectors in front
    torch.testing.assert_close(slopes.push(several)[0][1], 2 * pushed[0])
    torch.testing.assert_close(slopes.pull(several)[1][1], 2 * at_drive)


def test_what_a_rectifier_shuts_off_takes_no_infinity() -> None:
    cell = Cell(kind="relu", weight_hh=torch.ones(2, 2))
    _, slopes = slopes_at(cell, torch.tensor([[-9.0, 9.0]]), (torch.ones(1, 2),))
    assert slopes.pull((torch.tensor([[math.inf, 1.0]]),))[1].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("wiring", OPTIONS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_courses_and_gradients_are_those_of_the_unrolled_layer(name: str, wiring: str, packed: bool) -> None:
    """Two gradients at once, which one pass back each by autograd gives; of sequences that end apart too."""
    module, x, layout = layer(name, **OPTIONS[wiring]), inputs(6, 3), Layout()
    if packed:
        layout = Layout.of(module, given := pack_sequence([x[:6, 0], x[:4, 1], x[:2, 2]]))
        x = layout.steps(given.data)
    levels = levels_of(module)
    unrolled = unroll(levels, x.clone().requires_grad_(), alive=layout.alive)
    output, found = courses(levels, x, alive=layout.alive)
    here = torch.ones(x.shape[:2], dtype=torch.bool) if layout.alive is None else layout.alive
    torch.testing.assert_close(output[here], unrolled.output.detach()[here])
    at = [random(*output.shape, seed=seed) * here[..., None] for seed in (1, 2)]
    last = [tuple(random(*part.shape, seed=seed) for part in unrolled.last) for seed in (5, 6)]
    back = sent_back(found, torch.stack(at), tuple(torch.stack(parts) for parts in zip(*last, strict=True)))
    for k in range(2):
        for track, one, gradients in zip(
            unrolled.tracks, track_gradients(unrolled, at[k], last[k]), back, strict=True
        ):
            torch.testing.assert_close(gradients.h[k], one.h)
            assert (gradients.drive is None) is bool(
                track.level.index
            )  # of upper levels, it has been sent on
            if gradients.drive is not None:
                drive = gradients.drive[k].flip(0) if track.level.reverse else gradients.drive[k]
                torch.testing.assert_close(drive, one.drive)
            if one.c is not None and gradients.c is not None and layout.alive is None:
                torch.testing.assert_close(gradients.c[k], one.c)


def shrinking(scale: float, steps: int = 12) -> tuple[Any, Tensor]:
    """Return the courses of h' = scale · h in float32, and a gradient of 1 at the last step."""
    module = nn.RNN(1, 1, nonlinearity="relu")
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), (0.0, scale, 1.0, 0.0), strict=True):
            parameter.fill_(value)
    output, found = courses(levels_of(module), torch.zeros(steps, 1, 1))
    at = torch.zeros(1, *output.shape)
    at[0, -1] = 1.0
    return found, at


def test_what_decays_is_followed_past_the_end_of_float32_and_no_subnormal_number_is_made() -> None:
    found, at = shrinking(1e-4)
    (back,) = sent_back(found, at, (torch.zeros(1, 1, 1, 1),))
    assert back.exponent == TOP - 1
    norms = back.norms[0, :, 0]
    expected = [1e-4**k for k in range(11, -1, -1)]
    assert norms[1:].tolist() == pytest.approx(expected[1:], rel=1e-4)  # to 1e-40
    assert norms[0].item() == pytest.approx(1e-44, rel=1e-4)
    assert back.subnormal_share == pytest.approx(2 / 12)  # 1e-40 and 1e-44
    found, at = shrinking(0.1, 80)
    (far,) = sent_back(found, at, (torch.zeros(1, 1, 1, 1),))
    assert float(far.h[far.h != 0].abs().min()) >= torch.finfo(torch.float32).tiny
    assert float(far.norms[0, 0, 0]) == 0.0


def test_what_overflows_when_it_is_scaled_is_sent_back_as_it_is() -> None:
    found, at = shrinking(1e3)
    (back,) = sent_back(found, at, (torch.zeros(1, 1, 1, 1),))
    assert back.exponent == 0
    assert float(back.norms[0, 0, 0]) == pytest.approx(1e33)
