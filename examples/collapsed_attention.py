"""A small GPT on sums in English whose scores are multiplied by √d, not divided, and its repair.

    python examples/collapsed_attention.py
    gradflow diagnose examples/collapsed_attention.py

The text, read character by character, is all sums of two numbers below a hundred, spelt out, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.pipelines import transformer

LENGTH, WIDTH, HEADS, BLOCKS, BATCH = 64, 128, 2, 2, 16


ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spelt(number: int) -> str:
    """Return the name of a number below two hundred."""
    if number >= 100:
        return "one hundred" + (f" and {spelt(number - 100)}" if number > 100 else "")
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")


def text() -> tuple[Tensor, int]:
    """Return the text as numbers, and how many different characters it has."""
    order = torch.randperm(100 * 100, generator=torch.Generator().manual_seed(0)).tolist()
    pairs = (divmod(number, 100) for number in order)
    characters = "\n".join(f"{spelt(a)} plus {spelt(b)} is {spelt(a + b)}." for a, b in pairs)
    alphabet = {character: i for i, character in enumerate(sorted(set(characters)))}
    return torch.tensor([alphabet[character] for character in characters]), len(alphabet)


class Attention(nn.Module):
    """Causal self-attention; `power` is that of the head's width in the factor of the scores."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = (WIDTH // HEADS) ** power

    def forward(self, x: Tensor) -> Tensor:
        """Return what each position takes from those before it, shape (batch, time, width)."""
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(batch, time, WIDTH))


class Block(nn.Module):
    """A transformer block with its norms before the branches."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(power)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream with both branches added."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A language model of characters."""

    def __init__(self, num_characters: int, power: float) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(num_characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(power) for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_characters)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the scores of the next character at every position."""
        x = self.embed(characters) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss(scores: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy."""
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def made(power: float) -> tuple[Any, ...]:
    """Return a model, a function that draws the next batch, the loss and an optimizer."""
    torch.manual_seed(0)
    numbers, num_characters = text()
    model = GPT(num_characters, power)
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(numbers) - LENGTH - 1, (BATCH,), generator=generator)
        windows = numbers[starts[:, None] + torch.arange(LENGTH + 1)]
        return windows[:, :-1], windows[:, 1:]

    return model, batch, loss, torch.optim.AdamW(model.parameters(), lr=1e-3)


def build() -> tuple[Any, ...]:
    """Return the sick model: q · k × √d."""
    return made(0.5)


def repaired() -> tuple[Any, ...]:
    """Return the repair: q · k / √d."""
    return made(-0.5)


def compare(**builders: Callable[[], tuple[Any, ...]]) -> None:
    """Print what gradflow says of each model, and the entropy of its attention."""
    for name, builder in builders.items():
        model, batches, loss_fn, optimizer = builder()
        report = gf.diagnose(model, batches, loss_fn, optimizer=optimizer, pipeline=transformer(), seed=0)
        print(f"{name}: {'no illness found' if report.ok else 'sick'}")
        for cause in report.causes:
            print(f"  cause: {cause.issue_type.value} in {cause.layer}: {cause.mechanism}")
        for issue in report.issues:
            print(f"  issue: {issue.severity.value} {issue.issue_type.value} in {issue.layer}")
        for layer, stats in report.record.transformer.stats.items():
            print(f"  {layer}: {stats.mean_entropy:.2f} nats, {stats.entropy_share:.0%} of what it may have")
    print(f"equal weights would have {sum(math.log(t + 1) for t in range(LENGTH)) / LENGTH:.2f} nats")


if __name__ == "__main__":
    compare(sick=build, repaired=repaired)
