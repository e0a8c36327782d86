"""The five networks that costs are measured on, and what a plain training step of each is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Workload(NamedTuple):
    """A model, one batch, and the loss of its output."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[[Any], Tensor]

    def loss(self) -> Tensor:
        """Return the loss of a plain forward pass."""
        batch = self.batch
        return self.loss_fn(self.model(**batch) if isinstance(batch, dict) else self.model(batch))

    def plain_step(self, then: Callable[[Tensor], object] | None = None) -> None:
        """Run forward, loss and backward as in any training loop, and let go of the gradients.

        They are gone in the end so that two steps side by side find the same free memory.

        Args:
            then: called with the loss when the gradients are there.
        """
        loss = self.loss()
        loss.backward()
        if then is not None:
            then(loss)
        self.model.zero_grad()


def classification(num_classes: int, rows: int) -> Callable[[Tensor], Tensor]:
    target = torch.randint(0, num_classes, (rows,))
    return lambda output: F.cross_entropy(output.reshape(-1, num_classes), target)


def mlp() -> Workload:
    widths = [784, 512, 512, 512, 10]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return Workload(nn.Sequential(*layers[:-1]), torch.randn(64, 784), classification(10, 64))


class Block(nn.Module):
    """A basic block of ResNet (He et al., 2016)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inner != outer:
            self.skip = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.skip(x))


def resnet18() -> Workload:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inner = 64
    for outer, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inner, outer, stride), Block(outer, outer, 1)]
        inner = outer
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return Workload(nn.Sequential(*layers), torch.randn(16, 3, 32, 32), classification(10, 16))


def encoder() -> Workload:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Linear(256, 10))
    return Workload(model, torch.randn(8, 64, 256), classification(10, 512))


class Tagger(nn.Module):
    """An LSTM of two layers with a linear head on every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 256, 2, batch_first=True), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def lstm() -> Workload:
    return Workload(Tagger(), torch.randn(16, 64, 64), classification(10, 1024))


def gpt2() -> Workload:
    from transformers import GPT2Config, GPT2LMHeadModel  # type: ignore[import-not-found]

    tokens = torch.randint(0, 50257, (1, 256))
    model = GPT2LMHeadModel(GPT2Config())
    return Workload(model, {"input_ids": tokens, "labels": tokens}, lambda output: output.loss)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "encoder": encoder,
    "lstm": lstm,
    "gpt2": gpt2,
}

DESCRIPTIONS = {
    "mlp": "MLP 784-512-512-512-10, batch 64",
    "resnet18": "ResNet-18 for 32 x 32 images, batch 16",
    "encoder": "transformer encoder, 6 layers, d = 256, 8 x 64 tokens",
    "lstm": "LSTM, 2 layers of 256, 16 sequences of 64 steps",
    "gpt2": "GPT-2 small (124 million parameters), 1 x 256 tokens",
}


def build(name: str) -> Workload:
    """Return a workload, the same every time."""
    torch.manual_seed(0)
    return WORKLOADS[name]()
