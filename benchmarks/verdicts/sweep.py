"""Healthy models stay healthy whatever the seed: fifty each of four kinds, with and without training steps.

    python benchmarks/verdicts/sweep.py [--seeds 50]

An MLP, a ResNet, a GPT and an LSTM at PyTorch's own initialisation are diagnosed with parameters held fixed,
and with twenty steps of Adam at its usual rate. Prints every issue above LOW, and the count; exit status 1 if
there is any.
"""

from __future__ import annotations

import argparse
import collections
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf


class Residual(nn.Module):
    """A basic block with batch norm and an in-place addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += x
        return F.relu(out)


class GPT(nn.Module):
    """A small decoder: token and position embeddings, pre-norm blocks, causal attention."""

    def __init__(self, vocabulary: int = 40, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(depth)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, t: Tensor) -> Tensor:
        length = t.shape[1]
        h = self.tokens(t) + self.positions(torch.arange(length))
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            n = self.norms[2 * i](h)
            h = h + attention(n, n, n, attn_mask=mask, need_weights=False)[0]
            h = h + mlp(self.norms[2 * i + 1](h))
        return self.head(self.norms[-1](h))


class Tagger(nn.Module):
    """Embedding, two layers of LSTM, a head at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(20, 24), nn.LSTM(24, 32, 2, batch_first=True)
        self.head = nn.Linear(32, 20)

    def forward(self, t: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(t))[0])


def mlp() -> nn.Module:
    """Five layers of ReLU."""
    layers: list[nn.Module] = []
    for a, b in ((20, 64), (64, 64), (64, 64), (64, 64)):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 5))


def resnet() -> nn.Module:
    """A stem, four residual blocks and a head."""
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(*stem, *(Residual(16) for _ in range(4)), *ends)


def blobs(shape: tuple[int, ...], classes: int, g: torch.Generator) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a source of noisy prototypes."""
    centres = torch.randn(classes, *shape, generator=g)

    def draw() -> tuple[Tensor, Tensor]:
        y = torch.randint(0, classes, (32,), generator=g)
        return centres[y] + torch.randn(32, *shape, generator=g), y

    return draw


def sequences(vocabulary: int, length: int, g: torch.Generator) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a source of sequences in which the next token is mostly a function of the present one."""

    def draw() -> tuple[Tensor, Tensor]:
        t = torch.randint(0, vocabulary, (16, length + 1), generator=g)
        keep = torch.rand(16, length + 1, generator=g) < 0.9
        for i in range(1, length + 1):
            t[:, i] = torch.where(keep[:, i], (7 * t[:, i - 1] + 1) % vocabulary, t[:, i])
        return t[:, :-1], t[:, 1:]

    return draw


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over all tokens."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Any], Any]] = {
    "MLP": (mlp, lambda g: blobs((20,), 5, g), F.cross_entropy),
    "ResNet": (resnet, lambda g: blobs((3, 8, 8), 4, g), F.cross_entropy),
    "GPT": (GPT, lambda g: sequences(40, 16, g), token_loss),
    "LSTM": (Tagger, lambda g: sequences(20, 24, g), token_loss),
}


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50)
    seeds = parser.parse_args().seeds
    warnings.simplefilter("ignore")
    bad: collections.Counter[str] = collections.Counter()
    for kind, (make, source, loss_fn) in KINDS.items():
        for adam in (False, True):
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = make()
                draw = source(torch.Generator().manual_seed(seed))
                optimizer = torch.optim.Adam(model.parameters()) if adam else None
                report = gf.diagnose(model, draw, loss_fn, optimizer=optimizer)
                for issue in report.issues:
                    if issue.severity > gf.IssueSeverity.LOW:
                        bad[kind] += 1
                        print(f"{kind}, seed {seed}, Adam {adam}: {str(issue).splitlines()[0]}")
            print(
                f"{kind:7} {'twenty Adam steps' if adam else 'parameters fixed':18} {seeds} seeds", flush=True
            )
    print(f"issues above LOW: {sum(bad.values())}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
