"""Models that give the terms of their loss themselves: runs that rise are told, and those that learn not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


class Entropic(nn.Module):
    """Actor, critic and temperature; gives the losses of all three.

    Args:
        actions: how many there are.
        wanted: the entropy that the policy is to keep, as a part of the largest.
        scale: of rewards.
    """

    def __init__(self, actions: int, wanted: float, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wanted, self.scale = wanted * math.log(actions), scale
        self.actor = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, actions))
        self.critic = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, actions))
        self.log_alpha = nn.Parameter(torch.tensor([math.log(scale)]))
        self.goal = nn.Buffer(torch.randn(6, actions))

    def forward(self, state: Tensor, action: Tensor, after: Tensor) -> Tensor:
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            log_next = self.actor(after).log_softmax(-1)
            reward = 2 * self.scale * (state @ self.goal).tanh().gather(1, action[:, None])[:, 0]
            worth = (log_next.exp() * (self.critic(after) - alpha * log_next)).sum(-1)
        values = self.critic(state)
        critic = F.mse_loss(values.gather(1, action[:, None])[:, 0], reward + 0.9 * worth)
        log_policy = self.actor(state).log_softmax(-1)
        policy = log_policy.exp()
        actor = (policy * (alpha * log_policy - values.detach())).sum(-1).mean()
        entropy = -(policy * log_policy).sum(-1).mean().detach()
        return torch.cat(
            [critic[None], actor[None] + 5 * self.scale, self.log_alpha * (entropy - self.wanted)]
        )


def told(actions: int, wanted: float, scale: float, rate: float) -> bool:
    model, generator = Entropic(actions, wanted, scale), torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        action = torch.randint(actions, (64,), generator=generator)
        return torch.randn(64, 6, generator=generator), action, torch.randn(64, 6, generator=generator)

    rest = [p for p in model.parameters() if p is not model.log_alpha]
    optimizer = torch.optim.Adam([{"params": rest, "lr": 3e-3}, {"params": [model.log_alpha], "lr": rate}])
    report = gf.diagnose(model, batch, lambda terms: terms.sum(), steps=24, optimizer=optimizer)
    return any(i.issue_type is IssueType.UNSTABLE and i.severity.is_serious for i in report.issues)


@pytest.mark.parametrize(
    ("actions", "scale", "rate"), [(4, 1.0, 0.1), (3, 1.0, 0.15), (6, 1.0, 0.1), (4, 10.0, 0.1)]
)
def test_a_temperature_that_runs_away_from_an_entropy_out_of_reach(
    actions: int, scale: float, rate: float
) -> None:
    assert told(actions, 1.0, scale, rate)


@pytest.mark.parametrize("actions", [3, 4, 6])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("wanted", [0.4, 0.9])
def test_a_temperature_that_finds_its_level(actions: int, scale: float, wanted: float) -> None:
    assert not told(actions, wanted, scale, 0.1)
