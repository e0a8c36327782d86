"""Cases after public reports: low-rank adapters and the choice of an optimizer.

Each sick case keeps the structure and the mechanism of the report it names, at a size that trains in
milliseconds; its repair is the one that the report's thread found.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from .claims import no_gradient, rises, zero_at_first
from .data import grammar, normal, setup, token_loss
from .registry import FLOAT32, Setup, healthy, sick

# -------------------------------------------------------------------------------------------- adapters


class LowRank(nn.Module):
    """A frozen layer with a trained addition of low rank, which starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int = 4, scale: float = 4.0) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        self.scale = scale
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the addition."""
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


class DecoderBlock(nn.Module):
    """A decoder block whose query, value and first feed-forward layer are adapted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.v_proj = LowRank(width, width), LowRank(width, width)
        self.k_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up_proj, self.down_proj = LowRank(width, 2 * width), nn.Linear(2 * width, width)
        for part in (self.norm1, self.norm2, self.k_proj, self.o_proj, self.down_proj):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return states of the same shape (batch, tokens, width)."""
        h = self.norm1(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down_proj(F.silu(self.up_proj(self.norm2(x))))


class Adapted(nn.Module):
    """A frozen language model with adapters; its blocks may be computed again in the backward pass."""

    def __init__(self, words: int, width: int, again: bool, reentrant: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width).requires_grad_(False)
        self.blocks = nn.ModuleList(DecoderBlock(width) for _ in range(3))
        self.lm_head = LowRank(width, words)
        self.again, self.reentrant = again, reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, tokens, words)."""
        x = self.embed_tokens(tokens)
        for block in self.blocks:
            if self.again:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the report's log has them too
                    x = checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        return self.lm_head(x)


@sick(
    "contact3a-peft-lora_checkpointing",
    [("DEAD", "blocks")],
    no_gradient("blocks"),
    source="https://github.com/locuslab/open-unlearning/issues/178",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_checkpointing(sick: bool, width: int) -> Setup:
    """Blocks are computed again in the backward pass by the reentrant way, which gives them no gradient since
    what comes out of the frozen embedding needs none: only the adapter of the head trains. Repair: the way
    that is not reentrant."""
    model = Adapted(16, width, again=True, reentrant=sick)
    return setup(model, grammar(), token_loss, 1e-2)


@healthy(
    "contact3a-peft-lora_start",
    zero_at_first("blocks.0.q_proj.lora_A", "blocks.2.up_proj.lora_A", "lm_head.lora_A"),
    source="https://github.com/microsoft/LoRA/issues/120",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_start(width: int) -> Setup:
    """Adapters at their start: the second half of each is zero, so that the first half gets no gradient in
    the first step, most parameters are frozen, and it trains."""
    return setup(Adapted(16, width, again=False, reentrant=False), grammar(), token_loss, 1e-2)


# ------------------------------------------------------------------------------------------ optimizers


class Lion(Optimizer):
    """Steps of one size in every parameter, along the sign of a moving average of gradients."""

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do one step."""
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.sub_(group["lr"] * average.lerp(p.grad, 1 - fast).sign())
                average.lerp_(p.grad, 1 - slow)


class SliceAttention(nn.Module):
    """Attention between slices that the points of a surface are softly gathered in."""

    def __init__(self, width: int, slices: int = 8) -> None:
        super().__init__()
        self.norm, self.assign = nn.LayerNorm(width), nn.Linear(width, slices)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape (batch, points, width)."""
        h = self.norm(x)
        shares = self.assign(h).softmax(-1)
        slices = shares.transpose(1, 2) @ h / (shares.sum(1)[..., None] + 1e-5)
        q, k, v = self.qkv(slices).chunk(3, -1)
        mixed = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + self.out(shares @ mixed)
        return x + self.mlp(x)


class Surrogate(nn.Module):
    """The pressure on a car's surface, from the places and normals of its points."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lift = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(SliceAttention(width) for _ in range(3))
        self.head = nn.Linear(width, 1)

    def forward(self, points: Tensor) -> Tensor:
        """Return the pressure (batch, points) at points (batch, points, 6)."""
        x = self.lift(points)
        for block in self.blocks:
            x = block(x)
        return self.head(x).squeeze(-1)


@sick(
    "contact3a-optimizer-lion_rate",
    [("UNSTABLE", "*")],
    rises(5, steps=40),
    allow=["EXPLODING", "NUMERICAL", "SATURATION"],
    source="https://github.com/wandb/senpai/pull/2871",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lion_rate(sick: bool, width: int) -> Setup:
    """An optimizer whose steps have one size in every parameter gets a rate that is far too large for them:
    the loss rises to a multiple and gradients with it. Repair: the usual optimizer with its rate."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        normals = F.normalize(normal(g, 4, 48, 3), dim=-1)
        places = normals * torch.tensor([2.0, 1.0, 0.7])
        return torch.cat([places, normals], -1), normals[..., 0].square() - 0.5 * places[..., 2]

    def loss(output: Tensor, pressure: Tensor) -> Tensor:
        return ((output - pressure).norm(dim=1) / pressure.norm(dim=1)).mean()

    def optimizer(parameters: Iterable[Tensor]) -> Optimizer:
        return Lion(parameters, lr=3e-2) if sick else torch.optim.AdamW(parameters, lr=1e-3)

    return setup(Surrogate(width), sample, loss, optimizer)
