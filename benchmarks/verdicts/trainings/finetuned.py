"""Trainings that start from a trained net: adapters, frozen parts, prompts, and a rate for each layer."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .attention import Gpt, Layer
from .data import (
    accuracy,
    fitted,
    frozen,
    mean_loss,
    parameters,
    passages,
    pictures,
    rows,
    table,
    text,
    token_loss,
    training,
)
from .registry import Training, healthy
from .tables import mlp


class LowRank(nn.Module):
    """A frozen layer, and two thin ones beside it, the second of which starts at zero."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer, self.down = frozen(layer), nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added."""
        return self.layer(x) + 2 * self.up(self.down(x))


def dialect(g: Generator) -> tuple[Tensor, Tensor]:
    """Return passages in which the letters are swapped in pairs."""
    tokens, target = passages(24, 16)(g)
    pairs = text()[1] // 2 * 2
    return torch.where(tokens < pairs, tokens ^ 1, tokens), torch.where(target < pairs, target ^ 1, target)


@healthy("tuned-low-rank-gpt", 300, at_most=3.3, source="https://arxiv.org/abs/2106.09685")
def low_rank() -> Training:
    """A small GPT, trained on letters by this very script, learns a swapped alphabet by thin adapters."""
    model = Gpt(text()[1], 48, 2, 32)
    frozen(fitted(model, passages(24, 16), token_loss, 200))
    for block in model.blocks:
        assert isinstance(block, Layer)
        for name in ("q", "v", "out"):
            setattr(block.attention, name, LowRank(getattr(block.attention, name), 4))
        block.mlp = nn.Sequential(*(LowRank(p, 4) if isinstance(p, nn.Linear) else p for p in block.mlp))
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
    return training(model, dialect, token_loss, optimizer, mean_loss(dialect, token_loss), clip=1.0)


def halves() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return digits as pictures below five, and from five on, as (x, y, test x, test y) of either."""
    x, y, xt, yt = pictures()
    low = (x[y < 5], y[y < 5], xt[yt < 5], yt[yt < 5])
    high = (x[y >= 5], y[y >= 5] - 5, xt[yt >= 5], yt[yt >= 5] - 5)
    return low, high


def body() -> nn.Sequential:
    """Return two convolutions with batch norm."""
    first = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten())


class Still(nn.Module):
    """A frozen body that stays in evaluation mode, and a head."""

    def __init__(self, inner: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = frozen(inner), head

    def train(self, mode: bool = True) -> Still:
        """Set the mode of the head alone."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.body(x))


@healthy("tuned-new-head-on-frozen-body", 300, at_least=0.9)
def new_head() -> Training:
    """Convolutions that learned the digits below five, frozen, with a new head for those from five on."""
    low, high = halves()
    old = nn.Sequential(body(), nn.Linear(24 * 16, 5))
    fitted(old, rows(*low[:2]), F.cross_entropy, 200)
    model = Still(old[0], nn.Linear(24 * 16, 5))
    optimizer = torch.optim.SGD(parameters(model), lr=0.02, momentum=0.9)
    return training(model, rows(*high[:2]), F.cross_entropy, optimizer, accuracy(*high[2:]))


@healthy("tuned-slow-body-fast-head", 300, at_least=0.93)
def slow_body() -> Training:
    """The same body, trained on at a thirtieth of the head's rate; its first convolution is frozen."""
    low, high = halves()
    known = body()
    fitted(nn.Sequential(known, nn.Linear(24 * 16, 5)), rows(*low[:2]), F.cross_entropy, 200)
    frozen(known[0])
    model = nn.Sequential(known, nn.Linear(24 * 16, 5))
    groups = [{"params": parameters(model[0]), "lr": 1e-4}, {"params": parameters(model[1]), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    return training(model, rows(*high[:2]), F.cross_entropy, optimizer, accuracy(*high[2:]))


class Prompted(nn.Module):
    """A frozen net that reads a few learned numbers beside its input."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net, self.prompt = frozen(net), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x + self.prompt)


@healthy("tuned-prompt-alone", 300, at_least=0.85)
def prompt() -> Training:
    """A frozen classifier is given digits that are shifted, and learns one shift of its input to undo it."""
    x, y, xt, yt = table("digits")
    shift = torch.linspace(-1.5, 1.5, 64)
    net = fitted(mlp(64, 64, 10, act=nn.GELU), rows(x, y), F.cross_entropy, 400)
    model = Prompted(net, 64)
    optimizer = torch.optim.Adam(parameters(model), lr=2e-2)
    return training(model, rows(x + shift, y), F.cross_entropy, optimizer, accuracy(xt + shift, yt))


@healthy("tuned-adapted-normalisation", 400, at_least=0.85)
def biases() -> Training:
    """Only biases and normalisations of a net are trained, to read digits upside down."""
    x, y, xt, yt = table("digits")
    layers = [nn.Linear(64, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 96), nn.LayerNorm(96), nn.ReLU()]
    model = fitted(nn.Sequential(*layers, nn.Linear(96, 10)), rows(x, y), F.cross_entropy, 400)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.split(".")[0] in ("1", "4", "6"))
    optimizer = torch.optim.AdamW(parameters(model), lr=5e-3)
    return training(model, rows(x.flip(1), y), F.cross_entropy, optimizer, accuracy(xt.flip(1), yt))
