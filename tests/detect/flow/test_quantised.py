"""Quantisers that give the same for all samples, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType

Rounding = Callable[[Tensor], Tensor]


def straight(x: Tensor, y: Tensor) -> Tensor:
    return y.detach() + x - x.detach()


def signs(x: Tensor) -> Tensor:
    return straight(x.clamp(-1, 1), torch.where(x >= 0, 1.0, -1.0))


def of_square(x: Tensor) -> Tensor:
    return signs(x.square())


def of_sigmoid(x: Tensor) -> Tensor:
    return signs(x.sigmoid())


def one_step(x: Tensor) -> Tensor:
    return straight(x, (x * 1e-3).round() + 2.0)


def ternary(x: Tensor) -> Tensor:
    return straight(x, x.round().clamp(-1, 1))


class Block(nn.Module):
    """A rounded hidden layer beside a skip: as a function, or as a module."""

    def __init__(self, width: int, rounding: Rounding) -> None:
        super().__init__()
        self.up, self.rounding, self.down = nn.Linear(width, 24), rounding, nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.rounding(self.up(x)))


class Rounded(nn.Module):
    """A rounding as a module."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        return self.rounding(x)


class Gate(nn.Module):
    """Units that a gate lets through, all of them at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score, self.out = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.score.bias, 9.0)

    def forward(self, x: Tensor) -> Tensor:
        opened = straight(self.score(x), (self.score(x) > 0).float())
        return x + self.out(opened * x)


class Timed(nn.Module):
    """One time for the whole batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lift, self.time = nn.Linear(1, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.rand(1, 1).expand(len(x), 1)
        return x + self.time(self.lift(at).relu())


class Picked(nn.Module):
    """The first position of every sample, which is the same for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lift, self.mark = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        marked = torch.stack([torch.ones_like(x), x], 1)
        return x + self.mark(self.lift(marked)[:, 0])


def told(block: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], rate: float = 3e-3) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), block, nn.Linear(16, 3))

    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 8)
        return x, x[:, :3].argmax(1) if loss is F.cross_entropy else x[:, :3].sin()

    optimizer = torch.optim.AdamW(model.parameters(), rate)
    report = gf.diagnose(model, sample, loss, steps=10, optimizer=optimizer)
    return [i.layer for i in report.issues if i.severity.is_serious and i.issue_type is IssueType.BOTTLENECK]


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize("rounding", [of_square, of_sigmoid, one_step])
def test_what_is_rounded_to_a_constant(loss: Callable[[Tensor, Tensor], Tensor], rounding: Rounding) -> None:
    assert told(Block(16, rounding), loss) == ["1.up"]
    assert told(Block(16, Rounded(rounding)), loss) == ["1.rounding"]


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize(
    "block",
    [
        Block(16, signs),
        Block(16, Rounded(ternary)),
        Block(16, nn.Sigmoid()),
        Gate(16),
        Timed(16),
        Picked(16),
        nn.Identity(),
    ],
)
def test_what_still_tells_samples_apart(loss: Callable[[Tensor, Tensor], Tensor], block: nn.Module) -> None:
    assert told(block, loss) == []


def test_weights_of_zero_are_no_quantiser() -> None:
    block = Block(16, torch.relu)
    nn.init.zeros_(block.down.weight)
    nn.init.ones_(block.down.bias)
    assert told(block, F.mse_loss, rate=1e-9) == []


def test_a_sigmoid_at_its_ends_is_no_quantiser() -> None:
    block = Block(16, nn.Sigmoid())
    nn.init.constant_(block.up.bias, 9.0)
    assert told(block, F.mse_loss) == []


def test_a_large_bias_is_no_quantiser() -> None:
    block = Block(16, torch.relu)
    nn.init.constant_(block.down.bias, 1e4)
    assert "1.up" not in told(block, F.mse_loss)
