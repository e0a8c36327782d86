"""Embeddings that a loss of distances draws together, and which stay at its margin; and those that do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType

Loss = Callable[[Tensor, Tensor], Tensor]


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


def net(size: int, width: int, depth: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [m for _ in range(depth - 1) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(size, width), nn.ReLU(), *hidden, nn.Linear(width, 16), Unit())


def of_kinds(size: int, noise: float) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return what draws four samples each of eight of sixteen kinds."""
    centres = torch.randn(16, size, generator=torch.Generator().manual_seed(5))

    def draw() -> tuple[Tensor, Tensor]:
        kind = torch.randperm(16)[:8].repeat_interleave(4)
        return centres[kind] + noise * torch.randn(32, size), kind

    return draw


def distances(rows: Tensor) -> Tensor:
    return ((rows[:, None] - rows[None]).square().sum(-1) + 1e-12).sqrt()


def hardest(margin: float, squared: bool = False) -> Loss:
    def loss(rows: Tensor, kind: Tensor) -> Tensor:
        far, same = distances(rows), kind[:, None] == kind
        far = far.square() if squared else far
        worst, best = far.masked_fill(~same, 0).amax(1), far.masked_fill(same, 1e9).amin(1)
        return (worst - best + margin).relu().mean()

    return loss


def smooth(rows: Tensor, kind: Tensor) -> Tensor:
    far, same = distances(rows), kind[:, None] == kind
    return F.softplus(far.masked_fill(~same, 0).amax(1) - far.masked_fill(same, 1e9).amin(1)).mean()


def every(rows: Tensor, kind: Tensor) -> Tensor:
    far, same = distances(rows), kind[:, None] == kind
    chosen = (same & ~torch.eye(len(kind)).bool())[:, :, None] & ~same[:, None, :]
    return (far[:, :, None] - far[:, None, :] + 0.2).relu()[chosen].mean()


def among(temperature: float) -> Loss:
    """Return the loss that picks rows of the same kind among all others, by their likeness."""

    def loss(rows: Tensor, kind: Tensor) -> Tensor:
        own = torch.eye(len(kind)).bool()
        scores = (rows @ rows.T / temperature).masked_fill(own, -1e9)
        same = (kind[:, None] == kind) & ~own
        return -((scores.log_softmax(1) * same).sum(1) / same.sum(1)).mean()

    return loss


def collapses(model: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]], loss: Loss, rate: float) -> bool:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    report = gf.diagnose(model, draw, loss, steps=20, optimizer=optimizer, seed=0)
    return any(i.issue_type is IssueType.BOTTLENECK and i.severity.is_serious for i in report.issues)


@pytest.mark.parametrize("loss", [hardest(0.2), hardest(0.5), hardest(0.3, squared=True), smooth])
@pytest.mark.parametrize(("size", "width", "depth"), [(24, 64, 1), (40, 32, 2)])
def test_the_hardest_of_hard_data(loss: Loss, size: int, width: int, depth: int) -> None:
    assert collapses(net(size, width, depth), of_kinds(size, 1.8), loss, 1e-2)


@pytest.mark.parametrize("loss", [hardest(0.3), smooth])
@pytest.mark.parametrize("depth", [2, 4])
def test_large_first_steps_throw_them_apart_before(loss: Loss, depth: int) -> None:
    model = net(16, 32, depth)[:-1]
    assert collapses(model, of_kinds(16, 1.8), loss, 3e-2)


@pytest.mark.parametrize(
    ("loss", "noise", "rate"),
    [
        (hardest(0.2), 0.3, 1e-3),
        (hardest(0.2), 0.3, 1e-2),
        (hardest(0.2), 1.5, 1e-3),  # slow steps, which have not drawn them together
        (smooth, 0.3, 3e-2),
        (smooth, 1.5, 1e-3),
        (every, 1.5, 1e-2),
        (every, 1.5, 3e-2),
        (among(0.07), 1.5, 1e-2),
        (among(0.01), 1.5, 1e-2),
        (among(0.01), 4.0, 1e-2),  # too sharp, and smaller likenesses would cost less
    ],
)
def test_losses_that_keep_them_apart(loss: Loss, noise: float, rate: float) -> None:
    assert not collapses(net(24, 64), of_kinds(24, noise), loss, rate)


def test_the_lowest_loss_of_outputs_drawn_together() -> None:
    draw, model, loss = of_kinds(24, 1.8), net(24, 64), hardest(0.2)
    torch.manual_seed(1)
    batch = draw()
    known = gf.analyze(model, lambda: batch, loss, steps=1).knowledge
    assert known is not None
    with torch.no_grad():
        rows = model(batch[0])
        naive = [
            float(loss(rows.mean(0) + s * (rows - rows.mean(0)), batch[1])) for s in (0.5, 0.125, 1 / 32)
        ]
    assert known.drawn == pytest.approx(min(naive), rel=1e-5)
    assert known.drawn > known.averaged
