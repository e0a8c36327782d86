"""Trainings after public reports: quantised and short numbers, and inputs of raw counts."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import every, flat, not_finite
from .contact14b_1 import ONE, unmoved, zeros
from .data import choice, clusters, normal, seeded, setup, sgd, stack, uniform
from .registry import Setup, sick

# ------------------------------------------------------------------------------------- short numbers


class Rounded(nn.Linear):
    """A linear layer with weights of few bits; rounded in place, or as seen by the forward pass alone."""

    def __init__(self, inputs: int, outputs: int, keep: bool) -> None:
        super().__init__(inputs, outputs)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        near = (self.weight.detach() * 16).round() / 16
        if self.keep:
            return F.linear(x, self.weight + (near - self.weight.detach()), self.bias)
        with torch.no_grad():
            self.weight.copy_(near)
        return F.linear(x, self.weight, self.bias)


@sick(
    "contact14b-quant-inplace",
    [("NUMERICAL", "quant")],
    every(unmoved("quant.first.weight"), unmoved("quant.second.weight"), unmoved("quant.head.weight")),
    allow=("DEAD",),
    source="https://github.com/ZLkanyo009/STBP-train-and-compression/issues/1",
    **ONE,
)
def quant_inplace(ill: bool, width: int) -> Setup:
    """Quantised training that writes the rounded weights over the real ones: every update is smaller than
    half a step of the grid and is rounded away, so the weights stay for ever. Repaired by a copy in full
    precision."""
    keep = not ill
    quant = stack(
        first=Rounded(12, width, keep),
        act=nn.ReLU(),
        second=Rounded(width, width, keep),
        act2=nn.ReLU(),
        head=Rounded(width, 6, keep),
    )
    return setup(stack(quant=quant), clusters(12, 6, spread=1.0), F.cross_entropy, sgd(0.05))


class Ternary(torch.autograd.Function):
    """Weights rounded to -s, 0 and s; the gradient passes inside the bounds, or at them too."""

    @staticmethod
    def forward(ctx, weight: Tensor, step: Tensor, bounds: bool) -> Tensor:
        whole = (weight / step).round()
        ctx.save_for_backward(whole.abs() <= 1 if bounds else whole.abs() < 1)
        return whole.clamp(-1, 1) * step

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


class TernaryLinear(nn.Linear):
    """A linear layer with ternary weights."""

    def __init__(self, inputs: int, outputs: int, bounds: bool) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("step", self.weight.detach().abs().max() / 1.4)
        self.bounds = bounds

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Ternary.apply(self.weight, self.step, self.bounds), self.bias)


@sick(
    "contact14b-qat-bounds",
    [("DEAD", "quant")],
    every(zeros("quant.one.weight", 0.5), zeros("quant.two.weight", 0.5)),
    allow=("SATURATION",),
    source="https://github.com/pytorch/ao/pull/4806",
    **ONE,
)
def qat_bounds(ill: bool, width: int) -> Setup:
    """Fake quantisation to few levels, where the clamp's gradient is zero at the bound itself: rounded
    weights lie exactly on a bound, so most of them get nothing and stay. Repaired by passing the gradient at
    the bounds."""
    quant = stack(
        one=TernaryLinear(width, width, not ill),
        act=nn.ReLU(),
        two=TernaryLinear(width, width, not ill),
    )
    model = stack(
        first=nn.Linear(12, width), act=nn.ReLU(), quant=quant, act2=nn.ReLU(), head=nn.Linear(width, 6)
    )
    return setup(model, clusters(12, 6, spread=1.0), F.cross_entropy, 2e-3)


class Favor(nn.Module):
    """Attention by positive random features, normalised by their sum, in a dtype of its own."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.register_buffer("features", normal(seeded(6), width, 2 * width))
        for layer in (self.q, self.k):
            nn.init.orthogonal_(layer.weight)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        def positive(y: Tensor) -> Tensor:
            y = y.to(self.dtype)
            return (y @ self.features.to(self.dtype) - y.square().sum(-1, keepdim=True) / 2).exp()

        q, k, v = positive(self.q(x)), positive(self.k(x)), self.v(x).to(self.dtype)
        total = q @ k.sum(1)[..., None]
        return ((q @ (k.transpose(1, 2) @ v)) / total).to(x.dtype)


class Reader(nn.Module):
    """One block of attention over tokens, and the class of the sequence."""

    def __init__(self, width: int, attention: nn.Module, kinds: int = 4) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, width), nn.LayerNorm(width)
        self.attention = attention
        self.head = nn.Linear(width, kinds)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head((x + self.attention(self.norm(x))).mean(1))


@sick(
    "contact14b-favor-half",
    [("NUMERICAL", "attention")],
    not_finite(),
    source="https://github.com/facebookresearch/xformers/issues/96",
    **ONE,
)
def favor_half(ill: bool, width: int) -> Setup:
    """Attention by random features in float16: the sum of the features, which divides, is below the least
    number of that dtype, and 0 / 0 makes the loss NaN at once. Repaired by float32 inside the attention."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 4, 16)
        tokens = choice(g, 16, 16, 10)
        return torch.where(uniform(g, 16, 10) < 0.4, 4 * kind[:, None] + choice(g, 4, 16, 10), tokens), kind

    attention = Favor(width, torch.float16 if ill else torch.float32)
    return setup(Reader(width, attention), sample, F.cross_entropy, 3e-3)


@sick(
    "contact14b-counts-softmax",
    [("SATURATION", "activ")],
    flat("activ", "softmax", 0.75),
    allow=("DEAD", "VANISHING", "EXPLODING", "NUMERICAL"),
    source="https://github.com/pytorch/pytorch/issues/31396",
    **ONE,
)
def counts_softmax(ill: bool, width: int) -> Setup:
    """Raw counts go into one linear layer with a softmax and binary cross entropy: the scores lie tens apart,
    the softmax is exactly 0 and 1, and no gradient comes through. Repaired by standardised inputs."""
    means = 10 + 80 * uniform(seeded(7), 3, 8 * width)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 3, 32)
        counts = torch.poisson(means[kind], generator=g)
        return counts if ill else (counts - 50) / 25, F.one_hot(kind, 3).float()

    model = stack(input=nn.Linear(8 * width, 3), activ=nn.Softmax(-1))
    return setup(model, sample, F.binary_cross_entropy, 1e-3)
