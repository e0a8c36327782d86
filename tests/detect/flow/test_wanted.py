"""Ends of a tanh or sigmoid that the loss asks for, and ends that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import EndsRecord, FlowRecord, IssueType


class Actor(nn.Module):
    """An actor, valued by a critic that prefers one end of every action."""

    def __init__(self, unit: float, functional: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        self.act = nn.Tanh()
        self.critic = nn.Linear(4, 2).requires_grad_(False)
        self.unit, self.functional = unit, functional

    def forward(self, x: Tensor) -> Tensor:
        raw = self.net(self.unit * x)
        action = torch.tanh(raw) if self.functional else self.act(raw)
        return (action * (0.2 * self.critic(x) + (2.0 if self.unit == 1 else 0.0))).sum(1)


def trained(unit: float, functional: bool, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Actor(unit, functional)
    optimizer = torch.optim.Adam(model.net.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-model(torch.randn(64, 4)).mean()).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def saturated(record: FlowRecord) -> bool:
    return any(i.issue_type is IssueType.SATURATION and i.severity.is_serious for i in gf.detect(record))


def is_saturated(model: nn.Module, batches: Any, loss: Callable[..., Tensor], optimizer: Any) -> bool:
    return saturated(gf.analyze(model, batches, loss, steps=8, optimizer=optimizer, seed=0))


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_actor_at_the_bound_that_is_best(functional: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model, optimizer = trained(1.0, functional, 300)
    record = gf.analyze(model, lambda: torch.randn(64, 4), lambda out: -out.mean(), steps=4,
                        optimizer=optimizer, seed=0)  # fmt: skip
    (ends,) = record.parts.ends
    assert ends.wanted_share > 0.99
    assert max(a.saturated_share[-1] for a in record.activations if a.kind == "bounded") > 0.5
    assert not saturated(record)


@pytest.mark.parametrize("functional", [True, False])
def test_an_actor_that_raw_observations_drive_to_its_ends(functional: bool) -> None:
    torch.manual_seed(0)
    model, optimizer = trained(300.0, functional, 0)
    assert is_saturated(model, lambda: torch.randn(64, 4), lambda out: -out.mean(), optimizer)


@pytest.mark.parametrize("squashed", [True, False])
def test_scores_that_are_squashed_twice_are_no_wanted_ends(squashed: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    model = nn.Sequential(net, nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 4)
        return x, (x[:, :1] > 0).float()

    loss = F.binary_cross_entropy_with_logits if squashed else F.binary_cross_entropy
    for _ in range(400):
        x, y = batch()
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    assert is_saturated(model, batch, loss, optimizer) == squashed


def test_the_share_is_that_of_the_pull_that_leads_further_out() -> None:
    x = torch.tensor([[9.0], [-9.0], [9.0], [0.1]])
    weight = torch.tensor([[-3.0], [2.0], [1.0], [50.0]])  # out by 3 and by 2, back by 1
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)

    def loss(out: Tensor) -> Tensor:
        return (torch.tanh(out) * weight).sum()

    record = gf.analyze(model, [x], loss)
    assert record.parts.ends == (EndsRecord(layer="", op="tanh", wanted_share=5 / 6),)
    assert FlowRecord.from_json(record.to_json()).parts.ends == record.parts.ends
