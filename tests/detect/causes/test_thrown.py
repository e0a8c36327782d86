"""Which came first: steps that are too large, or a value that overflows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


class Couplings(nn.Module):
    """A flow of affine couplings, whose scales are exponentials."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        lasts = [nn.Linear(32, 6) for _ in range(depth)]
        for last in lasts:
            nn.init.zeros_(last.weight)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 32), nn.ReLU(), last) for last in lasts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = x.new_zeros(len(x))
        for net in self.nets:
            near, far = x.chunk(2, -1)
            scale, shift = net(near).chunk(2, -1)
            x, volume = torch.cat([far * scale.exp() + shift, near], -1), volume + scale.sum(-1)
        return x, volume


def first_cause(rate: float, far: int, scale: float) -> tuple[set[IssueType], IssueType | None]:
    torch.manual_seed(0)
    model, drawn = Couplings(6), [0]

    def batch() -> Tensor:
        drawn[0] += 1
        return (1e6 if drawn[0] > far else 1.0) * torch.randn(64, 6) + 2

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        latent, volume = output
        return scale * (0.5 * latent.square().sum(-1) + 6 - volume).mean() / 6

    optimizer = torch.optim.Adam(model.parameters(), rate)
    report = gf.diagnose(model, batch, loss, steps=20, optimizer=optimizer, seed=0)
    kinds = {IssueType(i.issue_type) for i in report.issues}
    return kinds, IssueType(report.causes[0].issue_type) if report.causes else None


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_a_rate_that_throws_an_exponential_into_infinity(scale: float) -> None:
    kinds, cause = first_cause(0.2, 1000, scale)
    assert {IssueType.UNSTABLE, IssueType.NUMERICAL} <= kinds
    assert cause is IssueType.UNSTABLE


def test_a_batch_that_overflows_in_a_calm_run() -> None:
    kinds, cause = first_cause(1e-3, 12, 1.0)
    assert IssueType.NUMERICAL in kinds
    assert cause is IssueType.NUMERICAL


class Far(Couplings):
    """Made for inputs far from zero, which one coupling makes larger and the next one larger still."""

    def __init__(self, depth: int, bounded: bool) -> None:
        super().__init__(depth)
        self.bounded = bounded
        for name, bias in self.named_parameters():
            if name.endswith("2.bias"):
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = x.new_zeros(len(x))
        for net in self.nets:
            near, far = x.chunk(2, -1)
            scale, shift = net(near).chunk(2, -1)
            scale = 0.3 * scale.tanh() if self.bounded else scale
            x, volume = torch.cat([far * scale.exp() + shift, near], -1), volume + scale.sum(-1)
        return x, volume


@pytest.mark.parametrize(("depth", "far", "bounded"), [(6, 100, False), (8, 30, False), (8, 30, True)])
def test_couplings_that_grow_from_one_to_the_next_until_one_overflows(
    depth: int, far: float, bounded: bool
) -> None:
    torch.manual_seed(0)
    model = Far(depth, bounded)

    def batch() -> Tensor:
        x = 2 * torch.randn(64, 6)
        x[:2] *= far
        return x

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        latent, volume = output
        return (0.5 * latent.square().sum(-1) + 6 - volume).mean()

    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    report = gf.diagnose(model, batch, loss, steps=20, optimizer=optimizer, seed=0)
    kinds = {IssueType(i.issue_type) for i in report.issues if i.severity.is_serious}
    if bounded:
        assert not kinds
    else:
        assert IssueType.NUMERICAL in kinds
        assert report.causes[0].issue_type is IssueType.EXPLODING
        assert report.causes[0].layer.startswith("nets")
