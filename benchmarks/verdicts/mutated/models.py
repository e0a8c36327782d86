"""Three small transformers, written out by hand so that each of their parts can be broken by itself.

`Gpt` has a fused projection, norms before the branches and its attention written out; `Bert` projections of
their own, norms behind the sums, padding and fused attention; `Llama` RMS norms, rotary positions and a
gated branch. What a fault changes besides weights is an attribute of the part, with the right value as its
default.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, BLOCKS, WORDS, LENGTH = 32, 4, 4, 24, 32


class Attention(nn.Module):
    """What attentions have in common: `scaled`, `causal` and `padded` say what they heed."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.scaled, self.causal, self.padded, self.heads = True, causal, True, HEADS

    def split(self, x: Tensor) -> Tensor:
        """Return x of shape (batch, time, width) as (batch, heads, time, width / heads)."""
        batch, time, width = x.shape
        return x.view(batch, time, self.heads, width // self.heads).transpose(1, 2)

    def hidden(self, time: int, pad: Tensor | None) -> Tensor:
        """Return which keys (last axis) a query must not see."""
        hidden = torch.zeros(1, 1, time, time, dtype=torch.bool)
        if self.causal:
            hidden = hidden | torch.ones(time, time, dtype=torch.bool).triu(1)
        if pad is not None and self.padded:
            hidden = hidden | pad[:, None, None, :]
        return hidden


class FusedAttention(Attention):
    """Queries, keys and values of one projection; scores and softmax written out."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__(causal)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """Return the output for x of shape (batch, time, width)."""
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1)
        if self.scaled:
            scores = scores / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(self.hidden(x.shape[1], pad), -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class SeparateAttention(Attention):
    """Queries, keys and values of three projections; fused attention; rotary positions if asked for."""

    def __init__(self, causal: bool = False, rotary: bool = False, bias: bool = True) -> None:
        super().__init__(causal)
        self.rotary = rotary
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.v, self.out = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """Return the output for x of shape (batch, time, width)."""
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        mask = ~self.hidden(x.shape[1], pad)
        scale = None if self.scaled else 1.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotated(x: Tensor) -> Tensor:
    """Return x of shape (batch, heads, time, size) turned by its positions."""
    half = x.shape[-1] // 2
    speeds = 100.0 ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[-2])[:, None] * speeds
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Gated(nn.Module):
    """The gated branch of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the branch adds."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mlp(nn.Module):
    """The usual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the branch adds."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Two branches, each with a norm, before it or behind the sum.

    `skip` multiplies what goes past a branch, `share` what the branch adds, and `always` is a dropout that
    eval mode does not switch off.
    """

    def __init__(
        self, attn: nn.Module, mlp: nn.Module, norms: tuple[nn.Module, nn.Module], post: bool
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norms[0], attn, norms[1], mlp
        self.drop = nn.Dropout(0.05)
        self.post, self.skip, self.share, self.always = post, 1.0, 1.0, 0.0

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """Return what follows x of shape (batch, time, width)."""
        if self.post:
            x = self.norm1(self.joined(x, self.attn(x, pad)))
            return self.norm2(self.joined(x, self.mlp(x)))
        x = self.joined(x, self.attn(self.norm1(x), pad))
        return self.joined(x, self.mlp(self.norm2(x)))

    def joined(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return the stream with what a branch adds to it, after dropout."""
        branch = self.drop(branch)
        if self.always:
            branch = F.dropout(branch, self.always)
        if self.share != 1.0:
            branch = self.share * branch
        if self.skip == 0.0:
            return branch
        return branch + (x if self.skip == 1.0 else self.skip * x)


class Transformer(nn.Module):
    """Tokens, `positions` if they are learned, blocks, a last norm, and a head for every token or for all."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.positioned = kind, True
        self.embed = nn.Embedding(WORDS + 1, WIDTH, padding_idx=WORDS if kind == "bert" else None)
        self.position = nn.Embedding(LENGTH, WIDTH) if kind != "llama" else None
        self.blocks = nn.ModuleList([block(kind) for _ in range(BLOCKS)])
        self.norm = nn.Identity() if kind == "bert" else norm(kind)
        self.head = nn.Linear(WIDTH, 4 if kind == "bert" else WORDS, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else 0.15)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores for tokens of shape (batch, time)."""
        pad = tokens == WORDS if self.kind == "bert" else None
        h = self.embed(tokens)
        if self.position is not None and self.positioned:
            h = h + self.position(torch.arange(tokens.shape[1]))
        for each in self.blocks:
            h = each(h, pad)
        h = self.norm(h)
        return self.head(h[:, 0] if self.kind == "bert" else h)


def norm(kind: str) -> nn.Module:
    """Return a norm layer of a kind of model."""
    return nn.RMSNorm(WIDTH, eps=1e-6) if kind == "llama" else nn.LayerNorm(WIDTH)


def block(kind: str) -> Block:
    """Return a block of a kind of model."""
    norms = norm(kind), norm(kind)
    if kind == "gpt":
        return Block(FusedAttention(), Mlp(), norms, post=False)
    if kind == "bert":
        return Block(SeparateAttention(), Mlp(), norms, post=True)
    return Block(SeparateAttention(causal=True, rotary=True, bias=False), Gated(), norms, post=False)
