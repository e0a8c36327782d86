"""Probabilities at their ends by a prior, in front of a loss that takes their logarithm, or does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType

Loss = Callable[[Tensor, Tensor], Tensor]


def detector(kinds: int, prior: float) -> nn.Module:
    head = nn.Linear(32, kinds)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(head.bias, math.log(prior))
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), head)


def focal(floor: float) -> Loss:
    def loss(output: Tensor, kind: Tensor) -> Tensor:
        p, hit = output.sigmoid().clamp(floor, 1 - 1e-4), F.one_hot(kind, output.shape[1]).float()
        wrong = 0.25 * hit * (1 - p).square() * -p.log() + 0.75 * (1 - hit) * p.square() * -(1 - p).log()
        return wrong.sum() / len(kind)

    return loss


def squared(output: Tensor, kind: Tensor) -> Tensor:
    return F.mse_loss(output.sigmoid(), F.one_hot(kind, output.shape[1]).float())


def serious(kinds: int, prior: float, loss: Loss, steps: int) -> set[str]:
    torch.manual_seed(0)
    model, centres = detector(kinds, prior), torch.randn(4, 16)

    def sample() -> tuple[Tensor, Tensor]:
        kind = torch.randint(0, 4, (32,))
        return centres[kind] + 0.1 * torch.randn(32, 16), kind

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    report = gf.diagnose(model, sample, loss, steps=steps, optimizer=optimizer)
    found = [i for i in report.issues if i.issue_type is IssueType.SATURATION]
    return {"serious" if i.severity.is_serious else "low" for i in found}


@pytest.mark.parametrize(
    ("kinds", "prior", "loss", "found"),
    [
        (60, 6e-5, focal(1e-8), {"low"}),
        (100, 1e-4, focal(1e-9), {"low"}),
        (40, 6e-5, focal(1e-4), {"serious"}),
        (80, 1e-5, focal(1e-3), {"serious"}),
        (40, 6e-5, squared, {"serious"}),
    ],
)
def test_a_prior_before_a_logarithm(kinds: int, prior: float, loss: Loss, found: set[str]) -> None:
    assert serious(kinds, prior, loss, 16) == found
