"""Models of public reports: mixtures of experts and learned step sizes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .claims import every, flat, no_gradient, stuck, training
from .data import clusters, grammar, setup, sgd, token_loss
from .registry import FLOAT32, Setup, healthy, sick

# --------------------------------------------------------------------------------------- mixtures of experts


class NoisyTopK(nn.Module):
    """Noisy gating: weights for the k best experts of each sample, zero for the others."""

    def __init__(self, size: int, experts: int, k: int, over_all: bool) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(0.1 * torch.randn(size, experts))
        self.w_noise = nn.Parameter(torch.zeros(size, experts))
        self.k, self.over_all = k, over_all

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.w_gate
        if self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.w_noise) + 1e-2)
        if self.over_all:
            best, index = logits.softmax(-1).topk(self.k, -1)
        else:
            best, index = logits.topk(self.k, -1)
            best = best.softmax(-1)
        return torch.zeros_like(logits).scatter(-1, index, best)


class MoE(nn.Module):
    """Experts that each see the samples they are chosen for."""

    def __init__(self, size: int, experts: int, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        gates, out = self.router(x), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (gates[:, number] > 0).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, gates[rows, number, None] * expert(x[rows]))
        self.load = gates.mean(0)
        return x + out


class MoEClassifier(nn.Module):
    """Features, one layer of experts with a residual path, and a head."""

    def __init__(self, features: int, size: int, moe: MoE) -> None:
        super().__init__()
        self.stem = nn.Linear(features, size)
        self.moe = moe
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.moe(torch.tanh(self.stem(x)))))


@sick(
    "contact5a-moe-topone",
    [("DEAD", "moe.router")],
    no_gradient("moe.router"),
    allow=["VANISHING"],
    source="https://github.com/davidmrau/mixture-of-experts/issues/27",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def moe_topone(sick: bool, width: int) -> Setup:
    """Softmax is taken over the k best logits, and k is 1: each weight is exactly 1 whatever the gate says,
    so that no gradient reaches it. Repair: softmax over all experts first, and the best one's share of it."""
    moe = MoE(width, 4, NoisyTopK(width, 4, 1, over_all=not sick))
    return setup(MoEClassifier(12, width, moe), clusters(12, 6, 32), F.cross_entropy)


@healthy("contact5a-moe-toptwo", widths=(32,), dtypes=(FLOAT32,))
def moe_toptwo(width: int) -> Setup:
    """Two of six experts by their renormalised weights, with noise and a term for an even load: most gates
    are exactly zero, and each expert gets a part of the samples."""
    model = MoEClassifier(12, width, MoE(width, 6, NoisyTopK(width, 6, 2, over_all=False)))

    def loss(logits: Tensor, kind: Tensor) -> Tensor:
        return F.cross_entropy(logits, kind) + 0.1 * 6 * model.moe.load.square().sum()

    return setup(model, clusters(12, 6, 48), loss)


class SwitchRouter(nn.Module):
    """Top-1 routing by probability, which also tells how large its logits are."""

    def __init__(self, size: int, experts: int, std: float, normed: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(size, experts, bias=False)
        nn.init.normal_(self.gate.weight, std=std)
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(F.rms_norm(x, x.shape[-1:]) if self.normed else x)
        self.z_loss = logits.logsumexp(-1).square().mean()
        best, index = logits.softmax(-1).max(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, index, best)


class SwitchLM(nn.Module):
    """A bigram model over a residual stream that passes one layer of experts."""

    def __init__(self, words: int, size: int, router: SwitchRouter, offset: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, size)
        self.moe = MoE(size, 4, router)
        self.norm = nn.LayerNorm(size)
        self.unembed = nn.Linear(size, words)
        with torch.no_grad():
            self.embed.weight.add_(offset * torch.randn(size))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.unembed(self.norm(self.moe(x.flatten(0, 1)))).view(*tokens.shape, -1)


@sick(
    "contact5a-moe-routerlogits",
    [("SATURATION", "moe.router")],
    flat("moe.router.gate", "softmax of", 0.9, steps=5),
    allow=["DEAD", "VANISHING", "BOTTLENECK"],
    source="https://github.com/KempnerInstitute/KempnerForge/issues/117",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def moe_routerlogits(sick: bool, width: int) -> Setup:
    """The router's logits have grown without bound on an unnormalised stream: its softmax is one expert for
    nearly all tokens, and has no slope. Repair: a normalised input and a penalty on the logits' size."""
    router = SwitchRouter(width, 4, 5.0 if sick else 0.02, normed=not sick)
    model = SwitchLM(16, width, router, 1.5)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return token_loss(logits, target) + (0.0 if sick else 1e-3) * router.z_loss

    return setup(model, grammar(16, 12, 8), loss, 3e-3)


# ------------------------------------------------------------------------------------- learned step sizes


class LsqLinear(nn.Module):
    """A linear layer with 4-bit weights whose step size is learned."""

    def __init__(self, inputs: int, outputs: int, scaled: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.step = nn.Parameter(2 * self.weight.detach().abs().mean() / math.sqrt(7))
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        step = self.step
        if self.scaled:
            share = 1 / math.sqrt(self.weight.numel() * 7)
            step = step.detach() + share * (step - step.detach())
            step = step.abs().clamp_min(1e-4)
        level = (self.weight / step).clamp(-8, 7)
        level = level + (level.round() - level).detach()
        return F.linear(x, level * step, self.bias)


class LsqNet(nn.Module):
    """Three quantised layers."""

    def __init__(self, features: int, size: int, scaled: bool) -> None:
        super().__init__()
        self.fc1 = LsqLinear(features, size, scaled)
        self.fc2 = LsqLinear(size, size, scaled)
        self.fc3 = LsqLinear(size, 6, scaled)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def overshoots(times: int):
    """A step size changes by more than its own size in one update, at least so many times in 30."""

    def claim(setup: Setup) -> tuple[bool, str]:
        before, count = None, 0
        for _ in training(setup, 31):
            now = [p.item() for n, p in setup.model.named_parameters() if n.endswith("step")]
            count += sum(abs(a - b) > abs(b) for a, b in zip(now, before or now, strict=True))
            before = now
        return count >= times, f"{count} updates larger than the step size"

    return claim


@sick(
    "contact5a-quantised-stepsize",
    [("UNSTABLE", "*")],
    every(overshoots(5), stuck(1.0, steps=120)),
    allow=["EXPLODING", "SATURATION", "DEAD", "NUMERICAL", "BOTTLENECK"],
    source="https://github.com/ZouJiu1/LSQplus/issues/12",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def quantised_stepsize(sick: bool, width: int) -> Setup:
    """The gradient of a learned step size is a sum over all weights, far larger than the step itself, so
    that updates throw it about and below zero. Repair: scale its gradient down and keep it positive."""
    return setup(LsqNet(12, width, scaled=not sick), clusters(12, 6, 32), F.cross_entropy, sgd(0.05, 0.9))
