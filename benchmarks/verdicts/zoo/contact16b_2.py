"""Trainings after public reports: binary nets, meta and continual learning, memories, sharing, norms."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .claims import Claim, alike, every, growing, no_gradient, not_finite, rank_below, training
from .contact16b_1 import ONE, starts_above, worst_above
from .data import (
    Sample,
    choice,
    clusters,
    grammar,
    seeded,
    setup,
    sgd,
    stack,
    surface,
    textures,
    token_loss,
    uniform,
)
from .registry import Setup, sick

# ------------------------------------------------------------------------------------ binary nets


class Sign(nn.Module):
    """Plus or minus one, with the gradient of a clipped identity."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the signs, plus for zero."""
        clipped = x.clamp(-1, 1)
        return torch.where(x >= 0, 1.0, -1.0) + clipped - clipped.detach()


class BinaryLinear(nn.Linear):
    """Weights of one bit, with a scale for each output and straight-through gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the binary weights."""
        scale = self.weight.detach().abs().mean(1, keepdim=True)
        binary = scale * torch.where(self.weight >= 0, 1.0, -1.0)
        return F.linear(x, binary + self.weight - self.weight.detach(), self.bias)


class Squared(nn.Module):
    """The square of what is above zero, or the square with its sign kept."""

    def __init__(self, signed: bool) -> None:
        super().__init__()
        self.signed = signed

    def forward(self, x: Tensor) -> Tensor:
        """Return the squares."""
        return x * x.abs() if self.signed else x.relu().square()


class BinaryBlock(nn.Module):
    """A feed-forward block beside a skip, with binary weights and binary activations."""

    def __init__(self, width: int, signed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.before, self.up = Sign(), BinaryLinear(width, 2 * width)
        self.act, self.sign = Squared(signed), Sign()
        self.down = BinaryLinear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with what the block adds."""
        return x + self.down(self.sign(self.act(self.up(self.before(self.norm(x))))))


@sick(
    "contact16b-bnn-allplus",
    [("BOTTLENECK", "block")],
    alike("block.sign", 1e-6),
    allow=("SATURATION", "DEAD"),
    source="https://github.com/openai/parameter-golf/pull/1388",
    **ONE,
)
def allplus(sick: bool, width: int) -> Setup:
    """The activations are binarised behind a squared rectifier, which is never negative, so every sign is
    plus one and no information passes the block. Repair: a square that keeps its sign."""
    model = stack(
        lift=nn.Linear(8, width), block=BinaryBlock(width, signed=not sick), head=nn.Linear(width, 1)
    )
    return setup(model, surface(8, number=64), F.mse_loss, 5e-3)


# ----------------------------------------------------------------------- meta and continual learning


class Adapted(nn.Module):
    """A net that takes some gradient steps on each task's support set before it answers the queries."""

    def __init__(self, width: int, rate: float, clip: float | None) -> None:
        super().__init__()
        self.rate, self.clip = rate, clip
        self.net = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.net.append(nn.Linear(width, 1))

    def forward(self, support: Tensor, answers: Tensor, queries: Tensor) -> Tensor:
        """Return the adapted net's answers, (tasks, queries, 1)."""
        outputs = []
        for x, y, query in zip(support, answers, queries, strict=True):
            fast = dict(self.net.named_parameters())
            for _ in range(3):
                loss = F.mse_loss(functional_call(self.net, fast, (x,)), y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                scale = 1.0
                if self.clip is not None:
                    norm = torch.sqrt(sum(g.square().sum() for g in grads) + 1e-12)
                    scale = (self.clip / norm).clamp(max=1.0)
                fast = {n: p - self.rate * scale * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            outputs.append(functional_call(self.net, fast, (query,)))
        return torch.stack(outputs)


def waves(tasks: int = 4, shots: int = 10) -> Sample:
    """Sines of different height and phase: some points to adapt to, and some to be judged by."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        height, phase = 0.5 + 4.5 * uniform(g, tasks, 1, 1), math.pi * uniform(g, tasks, 1, 1)
        x = 10 * uniform(g, tasks, 2 * shots, 1) - 5
        y = height * torch.sin(x - phase)
        return (x[:, :shots], y[:, :shots], x[:, shots:]), y[:, shots:]

    return sample


@sick(
    "contact16b-maml-innerrate",
    [("UNSTABLE", "*")],
    worst_above(1000.0),
    allow=("EXPLODING", "NUMERICAL"),
    source="https://github.com/learnables/learn2learn/pull/244",
    **ONE,
)
def innerrate(sick: bool, width: int) -> Setup:
    """The rate of the adaptation to a task is too high for a shallow net, so the fast weights and with them
    the loss explode, and clipping outside does not help. Repair: the adaptation's gradients are clipped."""
    model = Adapted(width, 0.2, None if sick else 1.0)
    return setup(model, waves(3), F.mse_loss, 1e-2)


@sick(
    "contact16b-continual-oneclass",
    [("DEAD", "*")],
    no_gradient("*"),
    source="https://github.com/LAMDA-CL/PyCIL/issues/9",
    **ONE,
)
def oneclass(sick: bool, width: int) -> Setup:
    """Classes come one by one, and the loss is a cross entropy over the new classes alone: over a single one
    it is zero whatever the scores, and nothing gets a gradient. Repair: several new classes at a time."""
    known, new = 5, 1 if sick else 4
    centres = clusters(12, new)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, kind = centres(g)
        return x, known + kind

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output[:, known:], target - known)

    model = stack(
        trunk=nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        head=nn.Linear(width, known + new),
    )
    return setup(model, sample, loss, sgd(0.1, 0.9))


# ------------------------------------------------------------------------------ states and memories


class FastMemory(nn.Module):
    """A matrix for each sequence that a gradient step at every token teaches to recall values by keys."""

    def __init__(self, width: int, unit: bool) -> None:
        super().__init__()
        self.unit = unit
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.query, self.rate = nn.Linear(width, width, bias=False), nn.Linear(width, 1)
        self.read = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return what the memory recalls at every token, (batch, time, width)."""
        keys, values, queries = self.key(x), self.value(x), self.query(x)
        if self.unit:
            keys, queries = F.normalize(keys, dim=-1), F.normalize(queries, dim=-1)
        rates = self.rate(x).sigmoid()
        memory, recalled = x.new_zeros(len(x), x.shape[-1], x.shape[-1]), []
        for t in range(x.shape[1]):
            miss = torch.einsum("bij,bj->bi", memory, keys[:, t]) - values[:, t]
            memory = memory - rates[:, t, :, None] * miss[:, :, None] * keys[:, t, None]
            recalled.append(torch.einsum("bij,bj->bi", memory, queries[:, t]))
        return self.read(torch.stack(recalled, 1))


class MemoryModel(nn.Module):
    """Tokens, a normalised input to the memory beside a skip, scores."""

    def __init__(self, words: int, width: int, unit: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.memory, self.head = FastMemory(width, unit), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of each next token."""
        x = self.embed(tokens)
        return self.head(x + self.memory(self.norm(x)))


def grows_in_time(module: str, above: float) -> Claim:
    """The size of a module's output, (batch, time, features), at the end is a multiple of that at first."""

    def claim(ready: Setup) -> tuple[bool, str]:
        output = next(iter(training(ready, 1, (module,)))).outputs[module].detach().double()
        sizes = output.square().mean((0, 2)).sqrt()
        ratio = float(sizes[-4:].mean() / sizes[:4].mean())
        return not ratio < above, f"size of {module}, last steps / first = {ratio:.2g}"

    return claim


@sick(
    "contact16b-memory-diverges",
    [("EXPLODING", "memory")],
    grows_in_time("memory", 100.0),
    allow=("NUMERICAL", "UNSTABLE"),
    source="https://github.com/lucidrains/titans-pytorch/issues/29",
    **ONE,
)
def diverges(sick: bool, width: int) -> Setup:
    """A memory that learns at every token of a long sequence takes steps that are too large for the size of
    its keys, so what it recalls grows from token to token. Repair: keys and queries of unit length."""
    return setup(MemoryModel(12, width, unit=not sick), grammar(12, 36, 12), token_loss, 5e-3)


# ---------------------------------------------------------------- sharing, norms, initial values


class TinyBlock(nn.Module):
    """The mean of the past and a feed-forward layer, both beside a skip and behind a norm."""

    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.mix = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with what the block adds."""
        past = self.norm1(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        x = x + self.mix(past)
        return x + self.feed(self.norm2(x))


class TinyLanguageModel(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, words: int, width: int, depth: int, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(TinyBlock(width, norm) for _ in range(depth)))
        self.norm = norm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of each next token."""
        return self.head(self.norm(self.blocks(self.embed(tokens))))


@sick(
    "contact16b-tied-loudhead",
    [("EXPLODING", "head")],
    starts_above(3 * math.log(40)),
    allow=("SATURATION", "UNSTABLE"),
    source="https://github.com/karpathy/build-nanogpt/issues/89",
    **ONE,
)
def loudhead(sick: bool, width: int) -> Setup:
    """Embedding and head share a weight, and the head was given the embedding's, of unit normal numbers:
    scores and loss are huge from the start. Repair: the embedding gets the head's weight, which is small."""
    model = TinyLanguageModel(40, width, 2)
    if sick:
        model.head.weight = model.embed.weight
    else:
        model.embed.weight = model.head.weight
    return setup(model, grammar(40, 16, 16), token_loss, 5e-3)


class RootNorm(nn.Module):
    """Divides by the root mean square, with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input at unit size."""
        return self.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


class WrongRootNorm(RootNorm):
    """Divides by one over the root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input times its own size."""
        return self.gain * x / torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@sick(
    "contact16b-norm-rsqrt",
    [("EXPLODING", "blocks")],
    growing("embed", "norm", 30.0),
    allow=("UNSTABLE", "NUMERICAL", "SATURATION"),
    source="https://github.com/mosaicml/llm-foundry/issues/371",
    **ONE,
)
def rsqrt(sick: bool, width: int) -> Setup:
    """The norm divides by the reciprocal root of the mean square, that is, it multiplies by the size: what is
    large grows from block to block and the loss diverges. Repair: multiply by the reciprocal root."""
    model = TinyLanguageModel(16, width, 4, WrongRootNorm if sick else RootNorm)
    return setup(model, grammar(16, 16, 16), token_loss, 3e-3)


class OwnBatchNorm(nn.Module):
    """Normalises over the batch, with the unbiased variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised batch."""
        mean, variance = x.mean(0, keepdim=True), x.var(0, keepdim=True)
        return self.gain * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


@sick(
    "contact16b-batchnorm-single",
    [("NUMERICAL", "norm")],
    not_finite(3, loss=True),
    source="https://github.com/karpathy/makemore/issues/22",
    **ONE,
)
def single(sick: bool, width: int) -> Setup:
    """A batch norm with the unbiased variance is trained on batches of one sample, whose variance is nought
    by nought. Repair: batches of several samples."""
    model = stack(
        embed=nn.Embedding(16, 8),
        flat=nn.Flatten(),
        hidden=nn.Linear(24, width, bias=False),
        norm=OwnBatchNorm(width),
        act=nn.Tanh(),
        head=nn.Linear(width, 16),
    )
    follow = torch.randperm(16, generator=seeded(33))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, 16, 1 if sick else 32, 3)
        return tokens, follow[tokens[:, -1]]

    return setup(model, sample, F.cross_entropy, 1e-2)


@sick(
    "contact16b-init-uniform",
    [("BOTTLENECK", "*")],
    every(alike("hidden", 1e-5, dim=1), rank_below("hidden", 1.01, steps=20)),
    allow=("VANISHING", "DEAD"),
    source="https://github.com/HomericIntelligence/Mnemosyne/pull/1987",
    **ONE,
)
def uniform_fill(sick: bool, width: int) -> Setup:
    """All weights of a layer are filled with one number, so all channels and units do the same for ever, what
    comes back from the classes cancels at first, and the loss soon stops. Repair: random weights."""
    model = stack(
        conv=nn.Conv2d(3, width // 2, 3, padding=1),
        act1=nn.ReLU(),
        pool=nn.AvgPool2d(4),
        flat=nn.Flatten(),
        hidden=nn.Linear(2 * width, width),
        act2=nn.ReLU(),
        head=nn.Linear(width, 4),
    )
    if sick:
        for layer in (model.conv, model.hidden, model.head):
            nn.init.constant_(layer.weight, 0.05)
            nn.init.zeros_(layer.bias)
    return setup(model, textures(), F.cross_entropy, sgd(0.1, 0.9))
