"""What stands behind a slope that is gone for good is told once: no VANISHING beside zeros, no rows alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf

F = nn.functional


class Cells(nn.Module):
    """A probability for each sample, whose loss clamps it."""

    def __init__(self, prior: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.squash = nn.Linear(10, 32), nn.Linear(32, 3), nn.Sigmoid()
        nn.init.constant_(self.second.bias, prior)

    def forward(self, x: Tensor) -> Tensor:
        return self.squash(self.second(F.relu(self.first(x))))


def focal(odds: Tensor, target: Tensor) -> Tensor:
    odds = odds.clamp(1e-4, 1 - 1e-4)
    right = torch.where(target > 0, odds, 1 - odds)
    return -((1 - right) ** 2 * right.log()).sum() / target.sum().clamp_min(1)


def rare() -> tuple[Tensor, Tensor]:
    x = torch.randn(128, 10)
    return x, (x[:, :3] > 1.6).float()


def types(model: nn.Module, draw: object, loss: object, optimizer: torch.optim.Optimizer) -> set[str]:
    report = gf.diagnose(model, draw, loss, optimizer=optimizer, steps=20)  # type: ignore[arg-type]
    return {issue.issue_type.value for issue in report.issues if issue.severity.is_serious}


@pytest.mark.parametrize("rate", [2.0, 10.0, 0.01])
def test_a_clamp_that_steps_throw_all_odds_under(rate: float) -> None:
    model = Cells(0.0)
    seen = types(model, rare, focal, torch.optim.SGD(model.parameters(), rate, momentum=0.9))
    assert "VANISHING" not in seen
    assert ("DEAD" in seen) is (rate > 1)


class Pairs(nn.Module):
    """A probability for each pair of nodes, by the product of what stands for them."""

    def __init__(self, gain: float, module: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 16)
        self.gain, self.decoder = gain, nn.Sigmoid() if module else torch.sigmoid

    def forward(self, x: Tensor) -> Tensor:
        z = self.gain * self.second(F.relu(self.first(x)))
        return self.decoder(z @ z.mT)


@pytest.mark.parametrize("module", [True, False])
@pytest.mark.parametrize("gain", [100.0, 1.0])
def test_a_decoder_at_its_ends_for_every_sample(gain: float, module: bool) -> None:
    torch.manual_seed(0)
    edges = torch.rand(20, 20) < 0.3

    def loss(odds: Tensor, _: Tensor) -> Tensor:
        found = -(odds[:, edges] + 1e-15).log().mean()
        return found - (1 - odds[:, ~edges] + 1e-15).log().mean()

    model = Pairs(gain, module)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = types(model, lambda: (torch.randn(4, 20, 8) + 1, torch.zeros(1)), loss, optimizer)
    assert "BOTTLENECK" not in seen
    assert ("SATURATION" in seen) is (gain > 1)
