"""Trainings of nets that attend: letters, pictures, pairs of sequences."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .data import (
    accuracy,
    choice,
    cosine,
    mean_loss,
    normal,
    passages,
    pictures,
    rows,
    scheduled,
    seeded,
    text,
    token_loss,
    training,
    uniform,
)
from .registry import Training, healthy


class Attention(nn.Module):
    """Attention of several heads, written out; keys and values may come from elsewhere."""

    def __init__(self, size: int, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.out, self.heads, self.causal = nn.Linear(size, size), heads, causal

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Return what each position of x sees of the memory, which is x itself by default."""
        memory = x if memory is None else memory
        q, k, v = (
            layer(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
        return self.out((score.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A block of a transformer, normalised first."""

    def __init__(self, size: int, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention, self.drop = Attention(size, causal=causal), nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape (batch, positions, features)."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Gpt(nn.Module):
    """Letters and places, blocks, and a head that shares the embedding's weights."""

    def __init__(self, letters: int, size: int, depth: int, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(letters, size), nn.Embedding(length, size)
        self.blocks = nn.ModuleList(Layer(size, causal=True, dropout=dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, letters, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, positions, letters)."""
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@healthy("attention-gpt-letters", 300, at_most=2.7)
def gpt() -> Training:
    """A small GPT with tied embeddings on Python's help, with warm-up, half a cosine and clipping."""
    model, sample = Gpt(text()[1], 48, 2, 32), passages(32, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    after = scheduled(optimizer, cosine(300, warm=30, floor=0.1))
    return training(
        model, sample, token_loss, optimizer, mean_loss(sample, token_loss), clip=1.0, after=after
    )


class Encoder(nn.Module):
    """PyTorch's own encoder over embedded tokens, read at the first position."""

    def __init__(self, words: int, size: int, length: int, outputs: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, size), nn.Parameter(0.02 * torch.randn(length, size))
        layer = nn.TransformerEncoderLayer(size, 4, 2 * size, 0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(size, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.body(self.embed(tokens) + self.place).mean(1))


@healthy("attention-encoder-post-norm", 600, at_least=0.9)
def encoder() -> Training:
    """PyTorch's encoder, normalised last, tells whether two words are both in the sentence."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, 16, 32, 10)
        return tokens, ((tokens < 2).any(1) & (tokens >= 14).any(1)).long()

    model = Encoder(16, 32, 10, 2)
    return training(model, sample, F.cross_entropy, 2e-3, accuracy(*sample(seeded(98))))


class Vit(nn.Module):
    """Patches of a picture, a token for the class, and blocks."""

    def __init__(self, size: int, depth: int) -> None:
        super().__init__()
        self.patch, self.first = nn.Conv2d(1, size, 2, 2), nn.Parameter(torch.zeros(1, 1, size))
        self.place = nn.Parameter(0.02 * torch.randn(17, size))
        self.blocks = nn.Sequential(*(Layer(size, dropout=0.05) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x)[:, 0]))


@healthy("attention-vit-digits", 450, at_least=0.9)
def vit() -> Training:
    """A vision transformer on digits, AdamW with warm-up and smoothed labels."""
    x, y, xt, yt = pictures()
    model = Vit(32, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, label_smoothing=0.05)

    after = scheduled(optimizer, cosine(450, warm=40, floor=0.05))
    return training(model, rows(x, y), loss, optimizer, accuracy(xt, yt), clip=1.0, after=after)


class Crossed(nn.Module):
    """Queries that attend to a set of (key, value) pairs."""

    def __init__(self, keys: int, values: int, size: int) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(keys, size), nn.Embedding(values, size)
        self.cross, self.norm = Attention(size), nn.LayerNorm(size)
        self.head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, values))

    def forward(self, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
        """Return logits of the value for each key that is asked for."""
        memory = self.norm(self.key(keys) + self.value(values))
        query = self.key(asked)
        return self.head(query + self.cross(query, memory))


@healthy("attention-cross-recall", 900, at_least=0.9)
def recall() -> Training:
    """Cross attention looks up which value belongs to a key in this very list."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        keys = torch.stack([torch.randperm(12, generator=g)[:6] for _ in range(32)])
        values, which = choice(g, 8, 32, 6), choice(g, 6, 32, 3)
        return (keys, values, keys.gather(1, which)), values.gather(1, which)

    model = Crossed(12, 8, 32)
    return training(model, sample, token_loss, 3e-3, accuracy(*sample(seeded(98))), clip=1.0)


class Whole(nn.Module):
    """PyTorch's encoder and decoder."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words + 1, size)
        self.place = nn.Parameter(0.1 * torch.randn(8, size))
        self.body = nn.Transformer(size, 2, 1, 1, 2 * size, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(size, words)

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        """Return logits for each word, given those before."""
        mask = nn.Transformer.generate_square_subsequent_mask(given.shape[1])
        parts = (self.embed(part) + self.place for part in (source, given))
        return self.head(self.body(*parts, tgt_mask=mask, tgt_is_causal=True))


@healthy("attention-sorting-encoder-decoder", 600, at_least=0.85)
def sorting() -> Training:
    """An encoder and a decoder sort numbers, with the schedule of the inverse square root."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        source = choice(g, 10, 32, 8)
        target = source.sort(1).values
        return (source, torch.cat([torch.full((32, 1), 10), target[:, :-1]], 1)), target

    model = Whole(10, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.98), eps=1e-9)
    after = scheduled(optimizer, lambda step: min((step + 1) / 50, math.sqrt(50 / (step + 1))))
    return training(model, sample, token_loss, optimizer, accuracy(*sample(seeded(98))), after=after)


class Perceiver(nn.Module):
    """Latent points that read a set, as in Perceiver."""

    def __init__(self, inputs: int, size: int, latents: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(inputs, size), nn.GELU(), nn.Linear(size, size))
        self.latents = nn.Parameter(torch.randn(latents, size))
        self.read, self.think = Attention(size), nn.Sequential(Layer(size), Layer(size))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 3)

    def forward(self, points: Tensor) -> Tensor:
        """Return logits of a set of points (batch, points, features)."""
        latents = self.latents.expand(len(points), -1, -1)
        latents = latents + self.read(latents, self.enter(points))
        return self.head(self.norm(self.think(latents)).mean(1))


@healthy("attention-perceiver-point-sets", 500, at_least=0.9)
def perceiver() -> Training:
    """Latent points read a set: is it a ring, a ball or a line? With a rate that starts over (cosine)."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind, angle = choice(g, 3, 32), 6.3 * uniform(g, 32, 20)
        ring = torch.stack([torch.cos(angle), torch.sin(angle)], -1)
        ball = 0.7 * normal(g, 32, 20, 2)
        turn = 6.3 * uniform(g, 32, 1, 1)
        line = torch.cat([torch.cos(turn), torch.sin(turn)], -1) * normal(g, 32, 20, 1)
        stacked = torch.stack([ring, ball, line])
        return stacked[kind, torch.arange(32)] + 0.05 * normal(g, 32, 20, 2), kind

    model = Perceiver(2, 24, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    after = scheduled(optimizer, lambda step: 0.55 + 0.45 * math.cos(math.pi * (step % 100) / 100))
    return training(model, sample, F.cross_entropy, optimizer, accuracy(*sample(seeded(98))), after=after)


class LinearAttention(nn.Module):
    """Causal attention whose weights are products of positive features."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape (batch, positions, features)."""
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        sums = torch.einsum("btd,bte->btde", k, v).cumsum(1)
        seen = torch.einsum("btd,btde->bte", q, sums) / (q * k.cumsum(1)).sum(-1, keepdim=True)
        x = x + self.out(seen)
        return x + self.mlp(x)


@healthy("attention-linear-kernel-letters", 250, at_most=2.8)
def linear_attention() -> Training:
    """Attention by a positive feature map and running sums, without a softmax."""
    letters, sample = text()[1], passages(24, 16)
    body = [LinearAttention(24), nn.LayerNorm(24), LinearAttention(24), nn.LayerNorm(24)]
    model = nn.Sequential(nn.Embedding(letters, 24), *body, nn.Linear(24, letters))
    return training(model, sample, token_loss, 3e-3, mean_loss(sample, token_loss), clip=1.0)


@healthy("attention-regression-in-context", 600, at_least=0.6)
def in_context() -> Training:
    """A transformer that is shown points of a new line every time and tells the next value."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        w, x = normal(g, 32, 1, 2), normal(g, 32, 8, 2)
        y = (w * x).sum(-1, keepdim=True)
        asked = torch.cat([x, torch.cat([torch.zeros(32, 1, 1), y[:, :-1]], 1)], -1)
        previous = torch.cat([torch.zeros(32, 1, 2), x[:, :-1]], 1)
        return torch.cat([asked, previous], -1), y

    blocks = [Layer(32, causal=True) for _ in range(2)]
    model = nn.Sequential(nn.Linear(5, 32), *blocks, nn.LayerNorm(32), nn.Linear(32, 1))
    x, y = sample(seeded(98))

    def late_part(net: nn.Module) -> float:
        return float(1 - F.mse_loss(net(x)[:, 4:], y[:, 4:]) / y[:, 4:].var())

    return training(model, sample, F.mse_loss, 3e-3, late_part, clip=1.0)
