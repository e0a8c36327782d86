"""BOTTLENECK where samples are alike before a dropout, whose noise makes the outputs differ all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import Issue, IssueType

CENTRES = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
Function = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Layers with a function behind each, a dropout, and a head."""

    def __init__(self, function: Function, depth: int, width: int, share: float, *, norm: bool) -> None:
        super().__init__()
        sizes = [20] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.drop, self.head = nn.Dropout(share), nn.Linear(width, 5)
        self.function = [function]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.function[0](layer(x))
        return self.head(self.drop(self.norm(x)))


def told(
    function: Function, depth: int, width: int, share: float, scale: float = 1.0, *, norm: bool = False
) -> list[Issue]:
    """Return the serious issues of a model that tells five kinds apart, of inputs of a scale."""
    torch.manual_seed(1)
    model, drawn = Net(function, depth, width, share, norm=norm), torch.Generator().manual_seed(2)

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(5, (64,), generator=drawn)
        return scale * (CENTRES[y] + 0.7 * torch.randn(64, 20, generator=drawn)), y

    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    report = gf.diagnose(model, batch, F.cross_entropy, optimizer=optimizer)
    return [i for i in report.issues if i.severity.is_serious]


@pytest.mark.parametrize(
    ("function", "depth", "width", "share", "scale"),
    [
        (torch.sigmoid, 6, 32, 0.3, 1.0),
        (torch.sigmoid, 8, 64, 0.5, 1.0),
        (F.relu, 2, 32, 0.5, 0.0),
        (F.gelu, 3, 64, 0.1, 1e-4),
        (torch.tanh, 2, 48, 0.2, 1e-5),
    ],
)
def test_samples_that_are_alike_where_noise_comes_in(
    function: Function, depth: int, width: int, share: float, scale: float
) -> None:
    found = [i for i in told(function, depth, width, share, scale) if i.issue_type is IssueType.BOTTLENECK]
    assert [i.layer for i in found] == [f"layers.{depth - 1}"]
    assert found[0].metrics["dropout"] == "drop"
    assert found[0].metrics["variation"] < 1e-3


@pytest.mark.parametrize(
    ("function", "depth", "width", "share", "scale", "norm"),
    [
        (F.relu, 2, 32, 0.5, 1.0, False),
        (F.gelu, 4, 32, 0.5, 1.0, True),
        (torch.tanh, 3, 64, 0.3, 1.0, False),
        (F.relu, 8, 64, 0.3, 1.0, False),
        (torch.sigmoid, 2, 64, 0.3, 1.0, False),
        (F.relu, 2, 64, 0.3, 0.05, False),
    ],
)
def test_samples_that_differ_where_noise_comes_in(
    function: Function, depth: int, width: int, share: float, scale: float, norm: bool
) -> None:
    assert told(function, depth, width, share, scale, norm=norm) == []
