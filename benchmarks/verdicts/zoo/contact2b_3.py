"""Models that look suspicious, but train: linear attention, a finite tokeniser, an equilibrium, complex
filters, a mixture density."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .data import clusters, factors, grammar, normal, setup, token_loss, uniform
from .registry import FLOAT32, Setup, healthy


class LinearAttention(nn.Module):
    """Causal attention with a positive feature map, by running sums and their normalizer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, dim) to the same."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        memory = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
        total = torch.einsum("bthk,bthk->bth", q, k.cumsum(1)).unsqueeze(-1)
        return self.out((torch.einsum("bthk,bthkv->bthv", q, memory) / (total + 1e-6)).reshape(b, t, d))


class LinearTransformer(nn.Module):
    """A language model of pre-norm blocks with linear attention; the blocks begin as the identity."""

    def __init__(self, words: int, dim: int, depth: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, dim), nn.Parameter(0.02 * torch.randn(64, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))
        self.attention = nn.ModuleList(LinearAttention(dim, 2) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim)) for _ in range(depth)
        )
        for attention in self.attention:
            nn.init.zeros_(attention.out.weight)  # type: ignore[union-attr]
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, words)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, time, words) of tokens (batch, time)."""
        h = self.embed(tokens) + self.place[: tokens.shape[1]]
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            h = h + attention(self.norms[2 * i](h))
            h = h + mlp(self.norms[2 * i + 1](h))
        return self.head(self.norm(h))


@healthy(
    "contact2b-linear-attention",
    source="https://arxiv.org/abs/2210.10340",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def linear_attention(width: int) -> Setup:
    """A normalized linear transformer whose attention outputs begin at zero, so that queries, keys and values
    get no gradient in the first step, and whose normalizer grows with the length; it trains."""
    return setup(LinearTransformer(16, width, 3), grammar(16, length=32), token_loss, 3e-3)


class FiniteTokenizer(nn.Module):
    """An autoencoder whose code is rounded to a few levels, with a straight-through gradient."""

    def __init__(self, size: int, width: int, levels: list[int]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, len(levels)))
        self.decoder = nn.Sequential(nn.Linear(len(levels), width), nn.SiLU(), nn.Linear(width, size))
        self.register_buffer("reach", (torch.tensor(levels).float() - 1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of (batch, size)."""
        half: Tensor = self.reach  # type: ignore[assignment]
        bounded = torch.tanh(self.encoder(x)) * half
        code = bounded + (bounded.round() - bounded).detach()
        return self.decoder(code / half)


@healthy(
    "contact2b-tokeniser-finite",
    source="https://github.com/lucidrains/vector-quantize-pytorch/issues/72",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tokeniser_finite(width: int) -> Setup:
    """A finite scalar tokeniser: its codes are rounded, at first mostly to the same few levels, and bounded
    by tanh; the straight-through gradient reaches the encoder and it trains."""
    return setup(FiniteTokenizer(16, width, [7, 7, 7, 5]), factors(16, 3), F.mse_loss, 5e-3)


class Equilibrium(nn.Module):
    """Solves z = tanh(W z + U x) without a graph, and gets its gradient by a second fixed point."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inject, self.cell = nn.Linear(inputs, width), nn.Linear(width, width, bias=False)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the next iterate."""
        weight = self.cell.weight
        return torch.tanh(z @ (0.8 * weight / weight.norm(2).clamp_min(0.8)).t() + x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the equilibrium (batch, width)."""
        x = self.inject(x)
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(25):
                z = self.step(z, x)
        z = self.step(z, x)
        if z.requires_grad:
            z0 = z.detach().requires_grad_()
            f0 = self.step(z0, x.detach())

            def solve(grad: Tensor) -> Tensor:
                g = grad
                for _ in range(15):
                    g = torch.autograd.grad(f0, z0, g, retain_graph=True)[0] + grad
                return g

            z.register_hook(solve)
        return z


@healthy(
    "contact2b-equilibrium-implicit",
    source="https://github.com/locuslab/deq/issues/11",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def equilibrium_implicit(width: int) -> Setup:
    """A deep equilibrium classifier: the solver runs without a graph and the point is found detached, but one
    step with the graph and a hook give the implicit gradient; it trains."""
    model = nn.Sequential()
    model.add_module("core", Equilibrium(12, width))
    model.add_module("head", nn.Linear(width, 5))
    return setup(model, clusters(12, 5), F.cross_entropy, 5e-3)


class ComplexFilter(nn.Module):
    """A learned complex gain for every frequency, with a threshold on the modulus."""

    def __init__(self, channels: int, bins: int) -> None:
        super().__init__()
        phase = 6.28 * torch.rand(channels, bins)
        self.gain = nn.Parameter(torch.polar(torch.ones_like(phase), phase))
        self.mix = nn.Linear(channels, channels, dtype=torch.cfloat)
        self.threshold = nn.Parameter(torch.full((channels, 1), -0.05))

    def forward(self, x: Tensor) -> Tensor:
        """Map a complex spectrum (batch, channels, bins) to the same."""
        x = self.mix((x * self.gain).transpose(1, 2)).transpose(1, 2)
        size = torch.sqrt(x.real.square() + x.imag.square() + 1e-8)
        return x * (F.relu(size + self.threshold) / size)


class SpectralNet(nn.Module):
    """Two complex filters on the spectrum of a signal, and a head on the moduli."""

    def __init__(self, channels: int, length: int, kinds: int) -> None:
        super().__init__()
        bins = length // 2 + 1
        self.lift = nn.Conv1d(1, channels, 5, padding=2)
        self.filters = nn.ModuleList(ComplexFilter(channels, bins) for _ in range(2))
        self.head = nn.Linear(channels * bins, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of signals (batch, 1, length)."""
        z = torch.fft.rfft(self.lift(x), norm="ortho")
        for layer in self.filters:
            z = layer(z)
        return self.head(torch.log1p(z.abs()).flatten(1))


@healthy(
    "contact2b-complex-spectrum",
    source="https://github.com/pytorch/pytorch/issues/96543",
    widths=(8,),
    dtypes=(FLOAT32,),
)
def complex_spectrum(width: int) -> Setup:
    """A complex-valued network on spectra: a threshold silences many frequencies and the moduli are near zero
    at most of them; with a small constant under the root all gradients are finite, and it trains."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = torch.randint(0, 4, (32,), generator=g)
        time = torch.arange(32)
        wave = torch.sin(0.4 * (1 + kind)[:, None, None] * time + 6.3 * uniform(g, 32, 1, 1))
        return wave + 0.2 * normal(g, 32, 1, 32), kind

    return setup(SpectralNet(width, 32, 4), sample, F.cross_entropy, 5e-3)


class MixtureDensity(nn.Module):
    """Mixture weights, means and scales of a scalar, from its condition."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.pi, self.mu = nn.Linear(width, parts), nn.Linear(width, parts)
        self.sigma = nn.Linear(width, parts)
        nn.init.uniform_(self.mu.bias, -2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of the weights, the means and the scales, each (batch, parts)."""
        h = self.body(x)
        return {"pi": self.pi(h), "mu": self.mu(h), "sigma": F.elu(self.sigma(h)) + 1 + 1e-2}


def mixture_loss(output: dict[str, Tensor], y: Tensor) -> Tensor:
    """Return the mean negative log likelihood of (batch, 1)."""
    z = (y - output["mu"]) / output["sigma"]
    part = -0.5 * z.square() - output["sigma"].log() - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(output["pi"].log_softmax(-1) + part, -1).mean()


@healthy(
    "contact2b-mixture-density",
    source="https://github.com/tonyduan/mixture-density-network/pull/4",
    steps=300,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def mixture_density(width: int) -> Setup:
    """A mixture density network for a curve that folds back: the loss goes below zero, scales get small and
    some parts hardly any weight, but with a floor under the scales and log-sum-exp it trains."""

    def sample(g: Generator) -> tuple[Any, Tensor]:
        y = 2 * uniform(g, 128, 1) - 1
        return y + 0.3 * torch.sin(6.28 * y) + 0.05 * normal(g, 128, 1), y

    return setup(MixtureDensity(width, 5), sample, mixture_loss, 5e-3)
