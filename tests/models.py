"""Small models with their batches and losses: every kind of wiring that a measurement has to get right.

A `Case` builds the same model and batch every time. Losses are means of squares against a target unless the
model says otherwise, so that gradients are of ordinary size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, one batch for it, and a loss of the output."""

    make: Callable[[], nn.Module]
    draw: Callable[[], Any]
    loss: Callable[[Any], Tensor]

    def build(self) -> nn.Module:
        """Return the model, the same every time."""
        torch.manual_seed(7)
        return self.make()

    def batch(self) -> Any:
        """Return the batch, the same every time."""
        torch.manual_seed(8)
        return self.draw()


GUESSES = 4  # of which the loss is asked after the last step: outputs as they are, shuffled, averaged, silent
ANSWERS = 2  # more at most, where one output for all meets the loss: one drawn at random, and its opposite


def squares(output: Tensor) -> Tensor:
    """Return a loss that weighs every output differently, so that no gradient is symmetric."""
    flat = output.flatten(1) if output.dim() > 1 else output
    return (flat * torch.linspace(-1.0, 1.0, flat.shape[-1], dtype=flat.dtype)).square().mean()


class FunctionalMLP(nn.Module):
    """Linear layers with activations applied as functions."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor], widths: tuple[int, ...] = (6, 12, 8, 3)
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def module_mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    """Linear layers with activation modules."""
    return nn.Sequential(nn.Linear(6, 12), activation(), nn.Linear(12, 8), activation(), nn.Linear(8, 3))


def small_cnn() -> nn.Module:
    """Convolutions with batch norm, in-place ReLU, pooling and dropout."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(6 * 16, 3),
    )


class ResNetBlock(nn.Module):
    """The basic block, written as torchvision writes it: in-place ReLU and `out += identity`."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A stem, two basic blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.block1, self.block2 = ResNetBlock(), ResNetBlock()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM or GRU of two layers between an input and an output layer."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inp = nn.Linear(3, 5)
        self.rnn = kind(5, 6, num_layers=2, batch_first=True)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(self.inp(x))
        h = state[0] if isinstance(state, tuple) else state
        return self.out(y[:, -1] + h[0])


class Attention(nn.Module):
    """`nn.MultiheadAttention`, whose output projection is used without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.out(h + self.attention(h, h, h, need_weights=False)[0])


class TiedLanguageModel(nn.Module):
    """Embedding and output layer share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


class Siamese(nn.Module):
    """One encoder that is called on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.head = nn.Linear(3, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.encoder(left) - self.encoder(right)).abs())


class Loop(nn.Module):
    """A layer that is called as often as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.cell, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        h = self.inp(x)
        for _ in range(int(times)):
            h = torch.tanh(self.cell(h))
        return self.out(h)


class Borrowing(nn.Module):
    """A parent that uses a child's parameters without calling the child, and owns none itself."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.projection.weight, self.projection.bias))


class DictOutput(nn.Module):
    """A layer that returns a mapping with one tensor twice, and one that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = x @ self.weight
        return {"y": y, "again": y, "spare": (x @ self.weight).exp()}


class WithDict(nn.Module):
    """A model around `DictOutput`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = DictOutput(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        return self.out(found["y"] * found["again"])


def sparse_bag() -> nn.Module:
    """An embedding with sparse gradients before a dense layer."""
    return nn.Sequential(nn.Embedding(20, 5, sparse=True), nn.Flatten(), nn.Linear(15, 2))


def weight_normed() -> nn.Module:
    """Layers with weight norm and spectral norm, as parametrizations."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(8, 5)),
        nn.Linear(5, 2),
    )


def old_weight_norm() -> nn.Module:
    """Weight norm in its older form, by a pre-hook that sets an attribute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))


def transformer(dropout: float) -> nn.Module:
    """PyTorch's own encoder layer."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2))


def images() -> Tensor:
    return torch.randn(5, 2, 8, 8)


CASES: dict[str, Case] = {
    "sigmoid functions": Case(lambda: FunctionalMLP(torch.sigmoid), lambda: torch.randn(5, 6), squares),
    "relu functions": Case(lambda: FunctionalMLP(F.relu), lambda: torch.randn(5, 6), squares),
    "sigmoid modules": Case(lambda: module_mlp(nn.Sigmoid), lambda: torch.randn(5, 6), squares),
    "relu modules": Case(lambda: module_mlp(nn.ReLU), lambda: torch.randn(5, 6), squares),
    "cnn": Case(small_cnn, images, squares),
    "resnet": Case(ResNet, images, squares),
    "lstm": Case(lambda: Recurrent(nn.LSTM), lambda: torch.randn(4, 7, 3), squares),
    "gru": Case(lambda: Recurrent(nn.GRU), lambda: torch.randn(4, 7, 3), squares),
    "transformer": Case(lambda: transformer(0.0), lambda: torch.randn(4, 5, 3), squares),
    "transformer with dropout": Case(lambda: transformer(0.1), lambda: torch.randn(4, 5, 3), squares),
    "attention": Case(Attention, lambda: torch.randn(4, 5, 3), squares),
    "tied": Case(TiedLanguageModel, lambda: torch.randint(0, 11, (3, 5)), squares),
    "siamese": Case(Siamese, lambda: (torch.randn(5, 4), torch.randn(5, 4)), squares),
    "loop": Case(Loop, lambda: (torch.randn(5, 4), torch.tensor(3)), squares),
    "borrowing": Case(
        lambda: nn.Sequential(Borrowing(), nn.Linear(6, 2)), lambda: torch.randn(5, 4), squares
    ),
    "mapping": Case(WithDict, lambda: torch.randn(5, 4), squares),
    "sparse": Case(sparse_bag, lambda: torch.randint(0, 20, (6, 3)), squares),
    "parametrized": Case(weight_normed, lambda: torch.randn(5, 6), squares),
    "old weight norm": Case(old_weight_norm, lambda: torch.randn(5, 6), squares),
}
