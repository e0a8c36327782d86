"""What is measured of parts: blocks, norm layers, fused matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional.parts.blocks import passes, siblings
from gradflow.functional.parts.weights import as_drawn, epsilon_of, is_fused, thirds, variance
from gradflow.records import FlowRecord


class Residual(nn.Module):
    """x + share · W x, or W x alone."""

    def __init__(self, share: float = 1.0, skip: bool = True) -> None:
        super().__init__()
        self.norm, self.fc, self.share, self.skip = nn.LayerNorm(8), nn.Linear(8, 8), share, skip

    def forward(self, x: Tensor) -> Tensor:
        branch = self.share * self.fc(self.norm(x))
        return x + branch if self.skip else branch


class Overwriting(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.fc(self.norm(x.clone())))


def record_of(*blocks: nn.Module, steps: int = 2) -> FlowRecord:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), *blocks, nn.Linear(8, 1))
    return gf.analyze(net, lambda: torch.randn(16, 4), lambda y: y.square().mean(), steps=steps)


def test_siblings_are_numbered_in_one_parent_and_of_one_class() -> None:
    block: Callable[[], nn.Module] = Residual
    net = nn.ModuleDict(
        {
            "many": nn.ModuleList([block() for _ in range(3)]),
            "few": nn.ModuleList([block() for _ in range(2)]),
            "leaves": nn.ModuleList([nn.Linear(2, 2) for _ in range(4)]),
            "empty": nn.ModuleList([nn.Sequential(nn.ReLU()) for _ in range(4)]),
        }
    )
    assert siblings(dict(net.named_modules())) == {"many.0": "many", "many.1": "many", "many.2": "many"}


def test_what_a_block_keeps_and_adds_is_that_of_a_plain_run() -> None:
    torch.manual_seed(1)
    blocks = [Residual(), Residual(share=0.1), Residual(skip=False)]
    record = record_of(*blocks, steps=1)
    torch.manual_seed(0)
    first, _ = nn.Linear(4, 8), nn.Linear(8, 1)
    x = first(torch.randn(16, 4)).detach()
    for block, found in zip(blocks, record.parts.blocks, strict=True):
        y = block(x).detach()
        assert found.added[0] == pytest.approx(float((y - x).square().mean().sqrt()), rel=1e-5)
        assert found.kept[0] == pytest.approx(float((x * y).sum() / (x * x).sum()), rel=1e-4)
        assert found.growth[0] == pytest.approx(float(y.norm() / x.norm()), rel=1e-5)
        x = y
    assert [b.passes for b in record.parts.blocks] == [True, True, False]
    assert record.parts.blocks[0].type == "Residual"
    assert [(b.name, b.group) for b in record.parts.blocks] == [("1", ""), ("2", ""), ("3", "")]


def test_a_block_that_changes_its_input_in_place_is_not_measured() -> None:
    record = record_of(Overwriting(), Overwriting(), Overwriting())
    assert all(math.isnan(v) for b in record.parts.blocks for v in (*b.kept, *b.added))
    assert [b.passes for b in record.parts.blocks] == [None] * 3


def test_the_record_survives_json() -> None:
    record = record_of(Residual(), Residual(), Residual())
    again = FlowRecord.from_json(record.to_json())
    assert again.parts == record.parts
    assert again.parts.blocks[0].passes is True
    assert record.parts.steps == (0, 1)


@pytest.mark.parametrize(
    ("norm", "shape", "axes"),
    [
        (nn.LayerNorm(6), (4, 5, 6), (-1,)),
        (nn.LayerNorm((5, 6)), (4, 5, 6), (-2, -1)),
        (nn.BatchNorm1d(6), (16, 6), (0,)),
        (nn.BatchNorm2d(3), (4, 3, 5, 5), (0, 2, 3)),
        (nn.GroupNorm(1, 4), (3, 4, 5), (1, 2)),
        (nn.InstanceNorm2d(3), (4, 3, 5, 5), (2, 3)),
    ],
)
def test_the_variance_is_that_of_what_is_normalised(
    norm: nn.Module, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.manual_seed(0)) * torch.linspace(0.5, 2, shape[1]).view(
        -1, *[1] * (len(shape) - 2)
    )
    assert epsilon_of(norm) == 1e-5
    assert float(variance(norm, x)) == pytest.approx(float(x.var(axes, unbiased=False).median()), rel=1e-5)


def test_an_rms_norm_has_a_mean_square() -> None:
    x = 3.0 + torch.randn(7, 6, generator=torch.manual_seed(0))
    assert epsilon_of(nn.RMSNorm(6, eps=1e-6)) == 1e-6
    expected = float(x.square().mean(-1).median())
    assert float(variance(nn.RMSNorm(6, eps=1e-6), x)) == pytest.approx(expected)


def test_what_is_no_norm_has_no_epsilon() -> None:
    assert epsilon_of(nn.Linear(2, 2)) is None
    assert epsilon_of(nn.RMSNorm(6)) is None  # the smallest number of the dtype: a guard


def test_thirds_of_a_fused_matrix() -> None:
    weight = torch.cat([torch.full((4, 4), float(v)) for v in (1, 2, 3)])
    assert is_fused(weight)
    assert not is_fused(weight.T)
    assert thirds(weight).tolist() == [1.0, 2.0, 3.0]


def test_what_was_drawn_looks_drawn_and_what_was_trained_does_not() -> None:
    torch.manual_seed(0)
    kurtosis, dispersion = as_drawn(torch.rand(300, 100) - 0.5).tolist()
    assert kurtosis == pytest.approx(1.8, rel=0.03)
    assert 0.7 < dispersion < 1.4
    rows = torch.randn(300, 100) * torch.linspace(0.8, 1.2, 300)[:, None]
    assert as_drawn(rows).tolist()[1] > 2.0


def test_a_way_past_the_weights() -> None:
    torch.manual_seed(0)
    x, fc = torch.randn(3, 4, requires_grad=True) * 1.0, nn.Linear(4, 4)
    norm = nn.LayerNorm(4)
    assert passes(x, norm(x + fc(x))) is True
    assert passes(x, x * fc(x).sigmoid()) is True
    assert passes(x, fc(norm(x)).relu()) is False
    assert passes(x.detach(), fc(x)) is None
