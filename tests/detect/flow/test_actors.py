"""Actors that a learned critic judges: raw states put their actions at the ends of their range."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


class Agent(nn.Module):
    """An actor with a bounded output, and a critic that learns from tried actions and judges the actor's."""

    def __init__(self, squash: Callable[[], nn.Module], gain: float, width: int = 32) -> None:
        super().__init__()
        last = nn.Linear(width, 2)
        last.weight.data *= gain
        self.actor = nn.Sequential(
            nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last, squash()
        )
        self.critic = nn.Sequential(nn.Linear(14, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, raw: Tensor, state: Tensor, tried: Tensor) -> tuple[Tensor, Tensor]:
        value = self.critic(torch.cat([state, tried], 1))
        fixed = {name: p.detach() for name, p in self.critic.named_parameters()}
        judged = torch.cat([state, self.actor(raw)], 1)
        return value, torch.func.functional_call(self.critic, fixed, (judged,))


def judged(
    unit: float, squash: Callable[[], nn.Module], *, seed: int, gain: float = 1.0, before: int = 0
) -> gf.Report:
    torch.manual_seed(seed)
    model = Agent(squash, gain)
    w = torch.randn(12, 2, generator=torch.Generator().manual_seed(34)) / math.sqrt(12)

    def sample() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        state, tried = torch.randn(64, 12), 2 * torch.rand(64, 2) - 1
        return (unit * state, state, tried), -(tried - torch.tanh(state @ w)).square().sum(1, keepdim=True)

    def loss(output: tuple[Tensor, Tensor], reward: Tensor) -> Tensor:
        return F.mse_loss(output[0], reward) - 0.1 * output[1].mean()

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(before):
        inputs, reward = sample()
        optimizer.zero_grad()
        loss(model(*inputs), reward).backward()
        optimizer.step()
    optimizer.zero_grad()
    return gf.diagnose(model, sample, loss, optimizer=optimizer)


@pytest.mark.parametrize(
    ("unit", "squash", "seed", "gain"),
    [
        (180.0, nn.Tanh, 0, 1.0),
        (180.0, nn.Tanh, 1, 1.0),  # 84 percent of the pull leads further out, by chance
        (1000.0, nn.Tanh, 2, 1.0),
        (180.0, nn.Sigmoid, 0, 1.0),
        (1.0, nn.Tanh, 0, 80.0),
    ],
)
def test_actions_that_scale_puts_at_their_ends(
    unit: float, squash: Callable[[], nn.Module], seed: int, gain: float
) -> None:
    first = judged(unit, squash, seed=seed, gain=gain).causes[0]
    assert (first.issue_type, first.layer) == (IssueType.SATURATION, "actor.5")
    assert first.issues[0].severity.is_serious


@pytest.mark.parametrize(("unit", "before"), [(1.0, 0), (1.0, 300), (5.0, 0), (5.0, 300)])
@pytest.mark.parametrize("seed", [0, 1])
def test_actions_within_their_range(unit: float, before: int, seed: int) -> None:
    """The two numbers that a critic is handed are its data's, whatever bounds them: no narrow place."""
    assert judged(unit, nn.Tanh, seed=seed, before=before).ok
