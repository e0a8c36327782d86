"""Attention models that look suspicious and are well."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import flat
from .data import Setup, choice, grammar, series, setup, textures, token_loss, uniform
from .registry import healthy
from .transformer import WORDS, Block, Language


@healthy("transformer-ok-tied-and-scaled", source="https://arxiv.org/abs/1904.10509")
def ok_tied(width: int) -> Setup:
    """Six blocks whose branches start at a root of the depth, and a head that is the embedding."""
    net = Language(width, [Block(width) for _ in range(6)])
    for block in net.blocks:
        for layer in (block.attention.out, block.mlp.down):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(12))
    nn.init.normal_(net.embed.weight, std=0.05)
    net.head.weight = net.embed.weight
    return setup(net, grammar(WORDS), token_loss, 3e-3)


@healthy("transformer-ok-first-token-sees-itself", flat("blocks.0.attention.weights", "softmax", 0.05))
def ok_first_token(width: int) -> Setup:
    """Under a causal mask the first token can attend to itself only: its softmax is one, with no gradient."""
    return setup(Language(width, [Block(width)]), grammar(WORDS, 6, 24), token_loss, 5e-3)


@healthy("transformer-ok-post-norm-of-three", source="https://arxiv.org/abs/1706.03762")
def ok_post_norm(width: int) -> Setup:
    """Three post-norm blocks of PyTorch's own encoder at a small rate: shallow enough to need no warm-up."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.position = nn.Embedding(WORDS, width), nn.Embedding(12, width)
            layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(width, WORDS)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
            mask = torch.full((12, 12), -math.inf).triu(1).to(h.dtype)
            return self.head(self.encoder(h, mask=mask))

    return setup(Encoder(), grammar(WORDS), token_loss, 2e-3)


@healthy("transformer-ok-class-token", falls_to=0.85, source="https://arxiv.org/abs/2010.11929")
def ok_class_token(width: int) -> Setup:
    """Only the class token is read out, so in the last block the other tokens' own branch gets nothing."""

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, 2, stride=2)
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
            self.blocks = nn.Sequential(*[Block(width) for _ in range(3)])
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.patches(x).flatten(2).transpose(1, 2)
            h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.position
            return self.head(self.norm(self.blocks(h)[:, 0]))

    return setup(Vision(), textures(), F.cross_entropy, 3e-3)


@healthy("transformer-ok-masked-words", steps=200, falls_to=0.85)
def ok_masked_words(width: int) -> Setup:
    """Masked language modelling: one token in six is asked for, all other outputs get no gradient."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.position = nn.Embedding(9, width), nn.Embedding(12, width)
            self.blocks, self.norm = nn.Sequential(*[Block(width) for _ in range(2)]), nn.LayerNorm(width)
            self.head = nn.Linear(width, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.norm(self.blocks(self.embed(tokens) + self.position.weight)))

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        words = (choice(g, 8, 32, 1) + torch.arange(12)) % 8
        asked = uniform(g, 32, 12) < 0.16
        asked[:, 3] = True
        return words.masked_fill(asked, 8), words.masked_fill(~asked, -100)

    return setup(Net(), sample, token_loss, 3e-3)


@healthy("transformer-ok-key-padding", steps=150)
def ok_key_padding(width: int) -> Setup:
    """PyTorch's own attention with keys hidden by -inf: hidden tokens get no gradient, and no row is
    empty."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, width)
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            h = self.embed(x)
            h = self.norm(h + self.attention(h, h, h, key_padding_mask=hidden, need_weights=False)[0])
            shown = (~hidden)[..., None].to(h.dtype)
            return self.head((h * shown).sum(1) / shown.sum(1))

    inner = series(12, 32)

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, y = inner(g)
        return (x, torch.arange(12) >= 4 + choice(g, 8, 32, 1)), y

    return setup(Net(), sample, F.cross_entropy, 5e-3)
