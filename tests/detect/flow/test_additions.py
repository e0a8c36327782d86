"""New parts of a frozen model that start louder than what they are added to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

_WIDTH = 32


class Product(nn.Module):
    """A frozen layer, with a product of two narrow ones beside it."""

    def __init__(self, base: nn.Module, size: float) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(8 if base.in_features == 8 else _WIDTH, 4), nn.Linear(4, _WIDTH)
        nn.init.normal_(self.down.weight)
        nn.init.normal_(self.up.weight, std=size)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Side(nn.Module):
    """What is added to the output of a frozen part, made of it."""

    def __init__(self, base: nn.Module, size: float) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(_WIDTH, 64), nn.Linear(64, _WIDTH)
        nn.init.normal_(self.up.weight, std=size)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        return x + self.up(F.relu(self.down(x)))


def with_products(base: nn.Sequential, size: float) -> nn.Sequential:
    base[0], base[2] = Product(base[0], size), Product(base[2], size)
    return base


def with_side(base: nn.Sequential, size: float) -> nn.Sequential:
    return nn.Sequential(Side(base[:4], size), base[4])


def with_head(base: nn.Sequential, size: float) -> nn.Sequential:
    head = nn.Linear(_WIDTH, 6)
    nn.init.normal_(head.weight, std=size)
    return nn.Sequential(base[:4], head)


Build = Callable[[nn.Sequential, float], nn.Sequential]


def told(build: Build, size: float, scale: float, *, frozen: bool = True) -> dict[str, IssueSeverity]:
    torch.manual_seed(0)
    means = 2 * torch.randn(6, 8)
    base = nn.Sequential(
        nn.Linear(8, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 6)
    )
    optimizer = torch.optim.Adam(base.parameters(), 1e-2)
    for _ in range(100):
        kind = torch.randint(0, 6, (64,))
        optimizer.zero_grad()
        F.cross_entropy(base(means[kind] + 0.5 * torch.randn(64, 8)), kind).backward()
        optimizer.step()
    model = build(base.requires_grad_(not frozen), size)

    def sample() -> tuple[Tensor, Tensor]:
        kind = torch.randint(0, 6, (64,))
        return means[kind] + 0.5 * torch.randn(64, 8), 5 - kind

    def loss(scores: Tensor, kind: Tensor) -> Tensor:
        return scale * F.cross_entropy(scores, kind)

    trained = [p for p in model.parameters() if p.requires_grad]
    report = gf.diagnose(model, sample, loss, steps=8, optimizer=torch.optim.Adam(trained, 3e-3), seed=0)
    found = [i for i in report.issues if i.issue_type is IssueType.EXPLODING and "beside" in i.metrics]
    return {i.layer: i.severity for i in found}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("build", "layers"), [(with_products, {"0.up", "2.up"}), (with_side, {"0.up"})])
def test_parts_that_drown_a_frozen_model(build: Build, layers: set[str], scale: float) -> None:
    found = told(build, 1.0, scale)
    assert set(found) == layers
    assert min(found.values()) >= IssueSeverity.MEDIUM


@pytest.mark.parametrize("build", [with_products, with_side])
@pytest.mark.parametrize("size", [0.0, 0.01])
def test_parts_that_start_as_nothing(build: Build, size: float) -> None:
    assert not told(build, size, 1.0)


def test_loud_parts_that_nothing_frozen_reads() -> None:
    assert not told(with_head, 1.0, 1.0)
    assert not told(with_side, 1.0, 1.0, frozen=False)
