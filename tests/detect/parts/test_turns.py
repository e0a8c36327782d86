"""BOTTLENECK where sinusoids are made for other numbers than they are given; healthy where they turn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import still_sinusoids


class Sinusoid(nn.Module):
    def __init__(self, scale: float, features: int = 16) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("frequencies", torch.logspace(0, -4, features))

    def forward(self, t: Tensor) -> Tensor:
        angles = self.scale * t[..., None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


class Timed(nn.Module):
    def __init__(self, scale: float, features: int = 16) -> None:
        super().__init__()
        self.embed = Sinusoid(scale, features)
        self.mlp = nn.Sequential(nn.Linear(2 * features, 32), nn.SiLU(), nn.Linear(32, 4))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.embed(t))


def told(model: nn.Module, t: Tensor) -> list[str]:
    torch.manual_seed(0)
    target = torch.randn(*t.shape, 4)
    record = gf.analyze(
        model, lambda: t, lambda y: (y - target).square().mean(), steps=3,
        optimizer=torch.optim.Adam(model.parameters(), 1e-3),
    )  # fmt: skip
    return [issue.layer for issue in still_sinusoids()(record)]


TIMES = torch.rand(32, generator=torch.Generator().manual_seed(0))


def test_times_up_to_one_in_sinusoids_for_a_thousand_steps() -> None:
    assert told(Timed(1.0), TIMES) == ["embed"]


@pytest.mark.parametrize("scale", [2 * math.pi, 1000.0])
def test_sinusoids_that_turn(scale: float) -> None:
    assert told(Timed(scale), TIMES) == []


@pytest.mark.parametrize("t", [torch.full((32,), 0.3), torch.tensor([0.0, 1.0]), torch.arange(5.0)])
def test_one_time_for_all_two_and_positions(t: Tensor) -> None:
    assert told(Timed(1.0), t) == []


def test_a_few_angles_of_a_body() -> None:
    assert told(Timed(1.0, features=3), TIMES) == []


def test_the_span_is_of_the_fastest_feature() -> None:
    record = gf.analyze(Timed(1.0), [TIMES], lambda y: y.square().mean())
    (found,) = record.parts.turns
    assert (found.layer, found.num_features) == ("embed", 16)
    assert found.span == pytest.approx(float(TIMES.max() - TIMES.min()))
    assert found.num_different == len(set(TIMES.tolist()))
