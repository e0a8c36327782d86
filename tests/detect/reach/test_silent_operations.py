"""DEAD parts that are multiplied by zeros: spikes that never come, masks of zeros, blocks nobody takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

MEDIUM = IssueSeverity.MEDIUM


def kinds() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 16)
    return x, x[:, :4].argmax(1)


def dead(model: nn.Module) -> tuple[set[str], str]:
    """The layers told to be DEAD, and the first cause's."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    report = gf.diagnose(model, kinds, F.cross_entropy, optimizer=optimizer, seed=0)
    found = {i.layer for i in report.issues if i.issue_type is IssueType.DEAD and i.severity >= MEDIUM}
    first = next(iter(report.causes), None)
    return found, first.layer if first is not None and found else ""


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return (v > 0).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (v,) = ctx.saved_tensors
        return grad / (1 + 5 * v.abs()) ** 2


class Spiking(nn.Module):
    """One layer of neurons that leak, and fire above a threshold; the loss has a surrogate slope."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.enter, self.leave, self.threshold = nn.Linear(16, 32), nn.Linear(32, 4), threshold

    def forward(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(len(x), 32), torch.zeros(len(x), 4)
        for _ in range(6):
            v = 0.9 * v + self.enter(x)
            spikes = _Spike.apply(v - self.threshold)
            v, out = v - spikes * self.threshold, out + self.leave(spikes)
        return out / 6


@pytest.mark.parametrize(("threshold", "sick"), [(200.0, True), (1.0, False)])
def test_spikes_that_never_come_are_told_at_the_neurons(threshold: float, sick: bool) -> None:
    torch.manual_seed(0)
    found, first = dead(Spiking(threshold))
    assert found == ({"enter", "leave"} if sick else set())
    assert first == ("enter" if sick else "")


class Pruned(nn.Module):
    """A branch whose weight is masked."""

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.register_buffer("mask", (torch.rand(32, 32) < kept).float())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        branch = F.linear(h, self.branch.weight * self.get_buffer("mask"), self.branch.bias)
        return self.last(h + torch.relu(branch))


@pytest.mark.parametrize(("kept", "sick"), [(0.0, True), (0.3, False)])
def test_a_mask_of_zeros_alone_is_told(kept: float, sick: bool) -> None:
    torch.manual_seed(0)
    assert dead(Pruned(kept))[0] == ({"branch"} if sick else set())


class Turn(nn.Module):
    """Gives sin|w|/|w| w, by a formula with a guard at zero or by one whose slope is right there."""

    def __init__(self, guarded: bool) -> None:
        super().__init__()
        self.guarded = guarded

    def forward(self, w: Tensor) -> Tensor:
        size = w.square().sum(-1, keepdim=True)
        near = size < 1e-12
        angle = torch.where(near, 1.0, size).sqrt()
        if not self.guarded:
            return 1 + torch.where(near, 1 - size / 6, angle.sin() / angle) * w
        return 1 + torch.where(near, 0.0, angle).sin() * (w / angle)


class Turned(nn.Module):
    """Scales features by one of two turns that start at zero, or away from it."""

    def __init__(self, guarded: bool, start: float = 0.0) -> None:
        super().__init__()
        self.turn, self.last = Turn(guarded), nn.Linear(16, 4)
        self.shift = nn.Parameter(torch.zeros(16))
        self.omega = nn.Parameter(torch.full((2, 16), start))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x * self.turn(self.omega[(x[:, 0] > 0).long()]) + self.shift)


@pytest.mark.parametrize(
    ("guarded", "start", "sick"), [(True, 0.0, True), (True, 0.1, False), (False, 0.0, False)]
)
def test_a_parameter_that_starts_where_its_function_is_guarded(
    guarded: bool, start: float, sick: bool
) -> None:
    torch.manual_seed(0)
    assert dead(Turned(guarded, start))[0] == ({"omega"} if sick else set())


class Block(nn.Module):
    """A residual block, with a side result that only the next block takes."""

    def __init__(self, side: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.side = nn.Linear(16, 16) if side else None

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x + state)
        aside = state if self.side is None else torch.tanh(self.side(h))
        return x + self.down(torch.relu(self.up(h))), aside


class Stack(nn.Module):
    """Blocks, of which the output is taken, or that of the last but one."""

    def __init__(self, early: bool, side: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(side) for _ in range(3))
        self.head, self.early = nn.Linear(16, 4), early

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = torch.zeros_like(x), [x]
        for block in self.blocks:
            x, state = block(x, state)
            outputs.append(x)
        return self.head(outputs[-2 if self.early else -1])


def test_a_whole_block_that_nobody_takes_is_told_and_a_part_of_the_last_one_is_not() -> None:
    torch.manual_seed(0)
    found, _ = dead(Stack(early=True, side=False))
    assert found == {f"blocks.2.{part}" for part in ("norm", "up", "down")}
    assert dead(Stack(early=False, side=True))[0] == set()
