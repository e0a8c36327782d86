"""Quantile forecasts; and healthy models that somebody worried about, from public threads."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .claims import Claim, flat, huge, training
from .contact12b_1 import GPT
from .data import adam, choice, frozen, grammar, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick

# ---------------------------------------------------------------------------------- quantile functions


class Knots(nn.Module):
    """An MLP forecaster that gives a quantile function by its knots, each above the one before."""

    def __init__(self, past: int, width: int, horizon: int, knots: int, *, free: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(past, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.out = nn.Linear(width, horizon * knots)
        self.shape, self.free = (horizon, knots), free

    def forward(self, past: Tensor) -> Tensor:
        """Return the quantiles of every step of the horizon."""
        raw = self.out(self.mlp(past)).unflatten(-1, self.shape)
        rise = F.softplus(raw) + 1e-4
        first = raw[..., :1] if self.free else rise[..., :1]
        return torch.cat([first, rise[..., 1:]], -1).cumsum(-1)


def _frost(g: Generator) -> tuple[Tensor, Tensor]:
    phase = 6.3 * uniform(g, 32, 1) + torch.arange(14) / 2
    series = torch.sin(phase) - 3 + 0.2 * normal(g, 32, 14)
    return series[:, :10], series[:, 10:]


@sick(
    "contact12b-isqf-knots",
    [("SATURATION", "*")],
    flat("out", "sigmoid of", 0.5, steps=20),
    allow=["VANISHING"],
    source="https://github.com/Nixtla/neuralforecast/issues/1350",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def knots(sick: bool, width: int) -> Setup:
    """The first knot goes through a softplus like the rises between knots, so that no quantile is below zero;
    for temperatures below zero all of them are pushed to its flat end. Repair: leave the first knot free."""
    levels = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])

    def loss(output: Tensor, target: Tensor) -> Tensor:
        error = target[..., None] - output
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    return setup(Knots(10, width, 4, 5, free=not sick), _frost, loss, adam(1e-2))


# =============================================================================== healthy, though it worries


def negative(steps: int) -> Claim:
    """After some steps of training the loss is below zero."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps)
        return last.loss < 0, f"loss after {steps} steps = {last.loss:.3g}"

    return claim


class Agents(nn.Module):
    """Actors of several agents before a centralised critic that was trained elsewhere and stays."""

    def __init__(self, agents: int, observed: int, width: int) -> None:
        super().__init__()
        self.actors = nn.ModuleList(
            nn.Sequential(nn.Linear(observed, width), nn.ReLU(), nn.Linear(width, 2), nn.Tanh())
            for _ in range(agents)
        )
        self.critic = frozen(nn.Bilinear(agents * observed, 2 * agents, 1))

    def forward(self, observations: Tensor) -> Tensor:
        """Return the critic's value of what all agents do."""
        actions = [actor(observations[:, i]) for i, actor in enumerate(self.actors)]
        return self.critic(observations.flatten(1), torch.cat(actions, 1))[:, 0]


@healthy(
    "contact12b-maddpg-negative",
    negative(30),
    source="https://github.com/xuehy/pytorch-maddpg/issues/10",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def maddpg(width: int) -> Setup:
    """Actor losses below zero that keep falling: the loss is the critic's value with a minus, and good
    policies have high values."""

    def loss(value: Tensor, offset: Tensor) -> Tensor:
        return (offset - value).mean()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return normal(g, 64, 3, 6), torch.tensor(0.3)

    return setup(Agents(3, 6, width), sample, loss, adam(3e-3))


class DurationFlow(nn.Module):
    """A stochastic duration predictor: affine couplings on two channels, steered by the text."""

    def __init__(self, phones: int, dim: int, flows: int = 4) -> None:
        super().__init__()
        self.emb = nn.Embedding(phones, dim)
        self.pre = nn.Conv1d(dim, dim, 3, padding=1)
        self.flows = nn.ModuleList(
            nn.Sequential(nn.Linear(dim + 1, dim), nn.GELU(), nn.Linear(dim, 2)) for _ in range(flows)
        )
        for flow in self.flows:
            nn.init.zeros_(flow[-1].weight)
            nn.init.zeros_(flow[-1].bias)

    def forward(self, text: Tensor, duration: Tensor) -> Tensor:
        """Return the negative log-likelihood of every phone's log duration and its companion."""
        h = F.gelu(self.pre(self.emb(text).transpose(1, 2))).transpose(1, 2)
        a, b = duration[..., :1], duration[..., 1:]
        logdet = torch.zeros_like(a)
        for flow in self.flows:
            shift, log_scale = flow(torch.cat([h, a], -1)).chunk(2, -1)
            b = (b - shift) * torch.exp(-log_scale)
            logdet = logdet - log_scale
            a, b = b, a
        return 0.5 * (a.square() + b.square()) + math.log(2 * math.pi) - logdet


@healthy(
    "contact12b-sdp-negative",
    negative(110),
    source="https://github.com/jaywalnut310/vits/issues/196",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def durations(width: int) -> Setup:
    """A duration loss that goes below zero: it is the negative log-likelihood of a density, which may be
    above one; the couplings' last layers start at zero, as flows do."""
    typical = normal(seeded(41), 12)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        text = choice(g, 12, 16, 10)
        spread = 0.1 * normal(g, 16, 10, 2)
        return (text, typical[text][..., None] * torch.tensor([1.0, 0.5]) + spread), torch.zeros(())

    return setup(DurationFlow(12, width), sample, lambda nll, _: nll.mean(), adam(1e-2))


class GlobalPointer(nn.Module):
    """Scores every span of a sentence for every relation by rotated queries and keys."""

    def __init__(self, words: int, dim: int, kinds: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.encoder = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)
        self.p_dense = nn.Linear(dim, 16)
        self.q_dense = nn.Linear(16, 2 * kinds)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores, (batch, kinds, begin, end)."""
        x = self.p_dense(self.encoder(self.embed(tokens))[0])
        q, k = x[..., ::2], x[..., 1::2]
        bias = self.q_dense(x).transpose(1, 2) / 2
        pairs = torch.einsum("bxd,byd->bxy", q, k) / 8**0.5
        scores = pairs[:, None] + bias[:, ::2, None] + bias[:, 1::2, :, None]
        return scores - 1e4 * torch.tril(torch.ones_like(scores[0, 0]), -1)


@healthy(
    "contact12b-gplinker-sum",
    huge("*", 50),
    source="https://github.com/xhw205/GPLinker_torch/issues/5",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def gplinker(width: int) -> Setup:
    """A loss of many hundreds at first, and a gradient to match: the multi-label loss is summed over
    relations and sentences and ranks a few spans above hundreds of others; it falls fast and the model
    works."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens = 4 + choice(g, 20, 32, 16)
        begin, kind, span = choice(g, 10, 32), choice(g, 4, 32), 2 + choice(g, 3, 32)
        row = torch.arange(32)
        tokens[row, begin], tokens[row, begin + span] = kind, kind
        target = torch.zeros(32, 4, 16, 16)
        target[row, kind, begin, begin + span] = 1
        return tokens, target

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        scores, target = scores.flatten(2), target.flatten(2)
        zero = torch.zeros_like(scores[..., :1])
        wrong = torch.cat([scores - 1e5 * target, zero], -1).logsumexp(-1)
        right = torch.cat([-scores - 1e5 * (1 - target), zero], -1).logsumexp(-1)
        return (wrong + right).sum()

    return setup(GlobalPointer(24, width, 4), sample, loss, adam(5e-3))


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that first scales all gradients down to a norm of at most one."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip, and take a step."""
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        super().step(closure)


def before_step(above: float) -> Claim:
    """Before the first step, which may clip it, the norm of all gradients is above a number."""

    def claim(setup: Setup) -> tuple[bool, str]:
        norm = next(training(setup, 1)).norm("*")
        return norm > above, f"gradient norm before the step = {norm:.3g}"

    return claim


@healthy(
    "contact12b-clip-reported",
    before_step(30),
    source="https://github.com/verl-project/verl/issues/2282",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def clipped(width: int) -> Setup:
    """The gradient norm that is reported is a hundred times what it is clipped to: it is the norm before
    clipping, of a loss summed over tokens, and every step that is taken is small."""

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")

    def make(parameters: Iterable[Tensor]) -> Optimizer:
        return ClippedAdamW(parameters, lr=3e-3)

    return setup(GPT(16, width), grammar(), summed, make)
