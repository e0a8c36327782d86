"""Rows of a last layer that a softmax leaves out: classes of other tasks, or something that is forgotten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf

Loss = Callable[[Tensor, Tensor], Tensor]


def told(loss: Loss, model: nn.Module | None = None) -> list[tuple[str, str]]:
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = 1.5 * torch.randn(5, 12, generator=g)

    def batch() -> tuple[Tensor, Tensor]:
        kind = torch.randint(5, (32,), generator=g)
        return centres[kind] + 0.5 * torch.randn(32, 12, generator=g), kind

    net = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 10)) if model is None else model
    found = gf.diagnose(net, batch, loss, steps=8, optimizer=torch.optim.Adam(net.parameters(), 3e-3))
    return [(i.layer, i.severity.value) for i in found.issues if i.issue_type is gf.IssueType.DEAD]


def cross_entropy(scores: Tensor, kind: Tensor) -> Tensor:
    return F.cross_entropy(scores[:, 5:] / 2, kind, label_smoothing=0.1)


def written_out(scores: Tensor, kind: Tensor) -> Tensor:
    return -scores.split(5, 1)[1].softmax(-1)[torch.arange(len(kind)), kind].log().mean()


@pytest.mark.parametrize("loss", [cross_entropy, written_out])
def test_classes_of_earlier_tasks(loss: Loss) -> None:
    assert told(loss) == [("2", "LOW")]


def squares(values: Tensor, kind: Tensor) -> Tensor:
    return F.mse_loss(values[:, 5:], F.one_hot(kind, 5).float())


def one_class(scores: Tensor, kind: Tensor) -> Tensor:
    return F.cross_entropy(scores[:, 9:], 0 * kind)


def both_ways(scores: Tensor, kind: Tensor) -> Tensor:
    return F.cross_entropy(scores[:, 5:], kind) + scores[:, 5:].square().mean()


@pytest.mark.parametrize("loss", [squares, one_class, both_ways])
def test_rows_that_are_no_alternatives(loss: Loss) -> None:
    assert any(severity in ("HIGH", "CRITICAL") for _, severity in told(loss))


class Halved(nn.Module):
    """Half of the features are cut off before a softmax inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.out = nn.Linear(12, 32), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(8 * self.lift(x)[:, 16:].softmax(-1))


def test_features_that_a_layer_behind_does_not_get() -> None:
    assert ("lift", "HIGH") in told(F.cross_entropy, Halved())
