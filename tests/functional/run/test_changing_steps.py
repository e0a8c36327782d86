"""Steps that differ from one another: in the size of the batch, and in the parameters that train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8, 8, 8, 3), (8, 8, 3), (4, 4, 4, 5, 6, 7, 7, 8, 8, 2), (3, 8)])
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_the_shape_is_that_of_the_last_step(sizes: tuple[int, ...], transform: Any) -> None:
    batches = [torch.randn(n, 4) for n in sizes]
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh())
    record = gf.analyze(model, batches, mean_square, transform=transform)
    for name in ("0", "1"):
        assert record[name].shape == (sizes[-1], 2)
        assert record[name].num_elements.tolist() == [2 * n for n in sizes]


def test_another_shape_of_as_many_elements_is_told_apart() -> None:
    shapes = [(2, 6, 4)] * 6 + [(3, 4, 4)]
    record = gf.analyze(nn.Sequential(nn.Linear(4, 2)), [torch.randn(s) for s in shapes], mean_square)
    assert record["0"].shape == (3, 4, 2)


def test_a_layer_that_skips_the_last_steps_has_the_shape_of_its_own_last_one() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if len(x) < 3 else self.a(self.b(x))

    record = gf.analyze(Sometimes(), [torch.randn(n, 4) for n in (8, 8, 8, 8, 8, 5, 2)], mean_square)
    assert (record["a"].shape, record["b"].shape) == ((2, 4), (5, 4))


class Alternating(nn.Module):
    """Trains one of its parts at a step, by a schedule."""

    def __init__(self, schedule: list[str]) -> None:
        super().__init__()
        self.u, self.v, self.w = (nn.Linear(4, 4) for _ in range(3))
        self.schedule, self.step = schedule, 0

    def forward(self, x: Tensor) -> Tensor:
        for name, part in self.named_children():
            part.requires_grad_(name in self.schedule[self.step])
        self.step += 1
        return self.w(torch.tanh(self.v(torch.tanh(self.u(x)))))


def plain(model: Alternating, x: Tensor) -> Iterator[dict[str, float]]:
    for _ in model.schedule:
        for p in model.parameters():
            p.grad = None
        mean_square(model(x)).backward()
        yield {n: math.nan if p.grad is None else float(p.grad.norm()) for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "schedule",
    [["u", "v"] * 5, ["uv", "vw", "uw"] * 4, ["w"] * 6 + ["v"] * 3, ["u", "uv", "uvw", "vw", "w"] * 2],
)
def test_the_gradient_is_that_of_the_parameter_that_trains(schedule: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Alternating(schedule), torch.randn(8, 4)
    record = gf.analyze(model, [x] * len(schedule), mean_square)
    torch.manual_seed(0)
    expected = list(plain(Alternating(schedule), x))
    for parameter in record.parameters:
        norms = [step[parameter.name] for step in expected]
        np.testing.assert_allclose(parameter.grad_norm, norms, rtol=1e-5)
        assert parameter.reached.tolist() == [not math.isnan(n) for n in norms]
