"""A healthy model stays healthy when the scale of the loss, batch, width, depth, dtype or seed changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradflow as gf


class Residual(nn.Module):
    """x + conv(relu(bn(conv(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn(self.conv1(x))))


class Tagger(nn.Module):
    """An LSTM read at every step."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(12, width, min(depth, 2), batch_first=True), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).mean(1)


def mlp(width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(12, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def resnet(width: int, depth: int) -> nn.Module:
    blocks = [Residual(width) for _ in range(depth)]
    ends = [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, *ends)


def gpt(width: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, F.gelu, batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(12, width), blocks, nn.LayerNorm(width), nn.Linear(width, 4), Mean())


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


KINDS: dict[str, tuple[Callable[[int, int], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (12,)),
    "ResNet": (resnet, (3, 6, 6)),
    "GPT": (gpt, (5, 12)),
    "LSTM": (Tagger, (9, 12)),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    batch=st.sampled_from([16, 64]),
    width=st.sampled_from([16, 32, 64]),
    depth=st.integers(2, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    adam=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_healthy_stays_healthy(
    kind: str, scale: float, batch: int, width: int, depth: int, dtype: torch.dtype, adam: bool, seed: int
) -> None:
    make, shape = KINDS[kind]
    torch.manual_seed(seed)
    model = make(width, depth).to(dtype)
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, *shape, generator=g)

    def draw() -> Any:
        y = torch.randint(0, 4, (batch,), generator=g)
        return (centres[y] + torch.randn(batch, *shape, generator=g)).to(dtype), y

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return scale * F.cross_entropy(output.float(), target)

    optimizer = torch.optim.Adam(model.parameters()) if adam else None
    report = gf.diagnose(model, draw, loss, steps=12, optimizer=optimizer)
    serious = [str(i).splitlines()[0] for i in report.issues if i.severity > gf.IssueSeverity.LOW]
    assert serious == []
