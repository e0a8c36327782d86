"""Models, batches and losses for several processes, in float64, and the part that a process has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

Batch = tuple[Tensor, Tensor]
Case = tuple[nn.Module, list[Batch], Callable[..., Tensor]]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What PyTorch's does on a GPU, for a CPU: statistics of the joined batch."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        axes = [0, *range(2, x.dim())]
        number = torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype)
        sums = torch.cat([x.sum(axes), x.square().sum(axes), number[None]])
        if dist.is_initialized():
            sums = all_reduce(sums)
        mean, square = (part / sums[-1] for part in sums[:-1].chunk(2))
        shape = [1, -1, *(1 for _ in axes[1:])]
        scale = self.weight * (square - mean.square() + self.eps).rsqrt()
        return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


def ghost_norm(parts: int) -> type[nn.Module]:
    """Return a batch norm with statistics of each of some parts of the batch by itself."""

    class BatchNorm2d(nn.modules.batchnorm._BatchNorm):
        def forward(self, input: Tensor) -> Tensor:
            given = None, None, self.weight, self.bias, True, 0.0, self.eps
            return torch.cat([F.batch_norm(part, *given) for part in input.chunk(parts)])

    return BatchNorm2d


def mlp(kind: str) -> Case:
    torch.manual_seed(0)
    activation = nn.Sigmoid if kind == "sick" else nn.ReLU
    layers: list[nn.Module] = [nn.Linear(6, 16), activation()]
    for _ in range(5 if kind == "sick" else 1):
        layers += [nn.Linear(16, 16), activation()]
    model = nn.Sequential(*layers, nn.Linear(16, 3)).double()
    if kind == "sick":
        with torch.no_grad():
            model[0].bias[:4] = -50.0  # type: ignore[index,operator]
    return model, vectors(6), nn.CrossEntropyLoss()


def vectors(features: int, number: int = 5, size: int = 16) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, features, generator=random, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=random),
        )
        for _ in range(number)
    ]


class Block(nn.Module):
    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, norm: type[nn.Module], blocks: int = 2, width: int = 6) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, width, 3, padding=1, bias=False), norm(width)
        self.blocks = nn.Sequential(*(Block(width, norm) for _ in range(blocks)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def resnet(kind: str) -> Case:
    torch.manual_seed(0)
    kinds: dict[str, type[nn.Module]] = {"plain": nn.BatchNorm2d, "2": ghost_norm(2), "4": ghost_norm(4)}
    norm = kinds.get(kind, SyncBatchNorm)
    model = ResNet(norm).double()
    if kind == "sick":
        nn.init.zeros_(model.blocks[0].conv1.weight)  # type: ignore[union-attr,arg-type]
    random = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(8, 2, 5, 5, generator=random, dtype=torch.float64),
            torch.randint(0, 3, (8,), generator=random),
        )
        for _ in range(4)
    ]
    return model, batches, nn.CrossEntropyLoss()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width),
            heads,
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (a.view(n, t, self.heads, -1).transpose(1, 2) for a in self.qkv(x).chunk(3, -1))
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, d)
        )


class Layer(nn.Module):
    def __init__(self, width: int, feed: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, 2)
        self.norm2, self.feed = nn.LayerNorm(width), feed

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class GPT(nn.Module):
    """A small one, with an embedding of positions that every sample shares."""

    def __init__(
        self, feed: Callable[[], nn.Module], width: int = 8, length: int = 6, words: int = 11
    ) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, feed()) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word(tokens) + self.place(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.layers(x)))


def _feed(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def next_word(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def words(number: int = 4, size: int = 8) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 11, (size, 7), generator=random) for _ in range(number)]
    return [(tokens[:, :-1], tokens[:, 1:]) for tokens in drawn]


def gpt(kind: str) -> Case:
    torch.manual_seed(0)
    model = GPT(_feed).double()
    if kind == "sick":
        nn.init.constant_(model.layers[1].feed[0].bias, -60.0)  # type: ignore[union-attr,index,arg-type]
    return model, words(), next_word


class Mixture(nn.Module):
    """Experts, of which every token is sent to one.

    Args:
        skips: whether an expert without a token is not called.
    """

    def __init__(self, width: int = 8, number: int = 4, *, skips: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(width, number)
        self.experts = nn.ModuleList(_feed(width) for _ in range(number))
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(1)
            if len(rows) or not self.skips:
                out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, None])
        return out.view_as(x)


def mixture(kind: str) -> Case:
    torch.manual_seed(0)
    model = GPT(lambda: Mixture(skips=kind == "skips")).double()
    if kind == "sick":
        with torch.no_grad():
            model.layers[0].feed.router.weight.mul_(1e5)  # type: ignore[union-attr,operator]
    return model, words(), next_word


MODELS: dict[str, Callable[[str], Case]] = {"mlp": mlp, "resnet": resnet, "gpt": gpt, "mixture": mixture}


def part(batches: list[Batch], rank: int, size: int) -> list[Any]:
    """Return a process's own part of every batch."""
    return [tuple(t.chunk(size)[rank] for t in batch) for batch in batches]
