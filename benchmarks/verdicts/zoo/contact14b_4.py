"""Trainings that look sick and are not, after public reports whose answer was that this is how it should
be."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, no_gradient, training, zero_at_first
from .contact14b_1 import ONE, Flow, gradient_of, nll
from .contact14b_3 import waves
from .data import choice, clusters, factors, frozen, normal, seeded, setup, stack, token_loss, trained
from .registry import Setup, healthy

# ------------------------------------------------------------------------------------- further claims


def below_zero(*, steps: int = 60) -> Claim:
    """The loss is negative after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps)
        return last.loss < 0, f"loss after {steps} steps = {last.loss:.3g}"

    return claim


def worse_with_norms(times: float) -> Claim:
    """The first loss is a multiple of what it is without the norms of queries and keys."""

    def claim(ready: Setup) -> tuple[bool, str]:
        batch = ready.make_batch()
        with torch.no_grad():
            first = ready.loss_fn(ready.model(batch)).item()
            for block in ready.model.blocks:
                block.q_norm, block.k_norm = nn.Identity(), nn.Identity()
            before = ready.loss_fn(ready.model(batch)).item()
        return first > times * before, f"first loss = {first:.3g}, without the norms {before:.3g}"

    return claim


def swells(module: str, times: float, *, steps: int = 40) -> Claim:
    """A module's mean output gets to a multiple of its first one."""

    def claim(ready: Setup) -> tuple[bool, str]:
        seen = [float(step.outputs[module].detach().mean()) for step in training(ready, steps, (module,))]
        return seen[-1] > times * seen[0], f"mean of {module} goes from {seen[0]:.3g} to {seen[-1]:.3g}"

    return claim


def deaf(prefix: str, part: int, other: int) -> Claim:
    """No gradient comes to the parameters under a prefix through one of the model's outputs, but through
    another."""

    def claim(ready: Setup) -> tuple[bool, str]:
        none, some = gradient_of(ready, part, prefix), gradient_of(ready, other, prefix)
        return (
            none == 0 < some,
            f"gradient of {prefix} through output {part} = {none:.2g}, {other} = {some:.2g}",
        )

    return claim


def all_zero(name: str) -> Claim:
    """A parameter is zero at the start, all of it."""

    def claim(ready: Setup) -> tuple[bool, str]:
        most = float(ready.model.get_parameter(name).detach().abs().max())
        return most == 0, f"largest number of {name} = {most:.2g}"

    return claim


# ------------------------------------------------------------------------------------- generative models


@healthy(
    "contact14b-healthy-negative",
    below_zero(),
    source="https://github.com/bayesiains/nflows/issues/76",
    **ONE,
)
def negative(width: int) -> Setup:
    """A flow on data of small spread, whose loss goes below zero and on: a density may well be above one."""
    data = factors(8, 3, noise=0.3)
    return setup(Flow(8, width, 4), lambda g: (0.3 * data(g)[0], None), nll, 5e-3)


class Divergence(nn.Module):
    """The divergence of codes from the prior, by sample."""

    def forward(self, mean: Tensor, spread: Tensor) -> Tensor:
        return 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(-1)


class VAE(nn.Module):
    """A variational autoencoder that samples with a generator of its own."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, 8))
        self.decoder = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, size))
        self.divergence = Divergence()
        self.g = seeded(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.encoder(x).chunk(2, -1)
        code = mean + normal(self.g, *mean.shape) * (spread / 2).exp()
        return self.decoder(code), self.divergence(mean, spread)


@healthy(
    "contact14b-healthy-divergence",
    swells("divergence", 5.0),
    source="https://github.com/facebookresearch/improved_vrnn/issues/4",
    **ONE,
)
def divergence(width: int) -> Setup:
    """A variational net whose divergence grows manifold at first: the code is being put to use, and the sum
    falls."""

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return (output[0] - target).square().sum(-1).mean() + 0.2 * output[1].mean()

    return setup(VAE(16, width), factors(16, 4), loss, 5e-3)


class Codebook(nn.Module):
    """The nearest entries of a codebook, which follows the moving averages of what falls to each."""

    def __init__(self, number: int, size: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(0.3 * normal(seeded(4), number, size), requires_grad=False)
        self.register_buffer("count", torch.ones(number))
        self.register_buffer("total", self.codes.detach().clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.cdist(z, self.codes).argmin(-1)
        code = self.codes[index].detach().clone()
        if self.training:
            with torch.no_grad():
                chosen = F.one_hot(index, len(self.codes)).to(z.dtype)
                self.count.lerp_(chosen.sum(0), 0.1)
                self.total.lerp_(chosen.T @ z, 0.1)
                self.codes.copy_(self.total / self.count.clamp_min(1e-3)[:, None])
        return z + (code - z).detach(), (z - code).square().mean()


class Quantised(nn.Module):
    """An autoencoder through a codebook."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, 4))
        self.codebook = Codebook(16, 4)
        self.decoder = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code, commitment = self.codebook(self.encoder(x))
        return self.decoder(code), commitment


@healthy(
    "contact14b-healthy-codebook",
    no_gradient("codebook"),
    source="https://github.com/lucidrains/vector-quantize-pytorch/issues/167",
    **ONE,
)
def codebook(width: int) -> Setup:
    """A codebook that asks for no gradient and gets none, and yet learns: by the moving averages of its
    codes."""

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(output[0], target) + 0.25 * output[1]

    return setup(Quantised(16, width), factors(16, 3), loss, 5e-3)


# ------------------------------------------------------------------------- probes, adapters, attention


class Probed(nn.Module):
    """Two views' embeddings with a predictor, and a linear probe of the classes on detached features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width))
        self.project = nn.Sequential(nn.ReLU(), nn.Linear(width, 16))
        self.probe = nn.Linear(width, 8)

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(torch.cat([one, two]))
        a, b = F.normalize(self.project(features), dim=-1).chunk(2)
        return a @ b.T / 0.2, self.probe(features.detach())[: len(one)]


@healthy(
    "contact14b-healthy-probe",
    deaf("encoder", 1, 0),
    source="https://github.com/vturrisi/solo-learn/issues/135",
    **ONE,
)
def probe(width: int) -> Setup:
    """Contrastive pretraining with a classifier beside it that watches: its features are detached, so that
    labels do not reach the encoder, which learns by the views alone."""
    points = clusters(16, 8)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, kind = points(g)
        return (x + 0.3 * normal(g, *x.shape), x + 0.3 * normal(g, *x.shape)), kind

    def loss(output: tuple[Tensor, Tensor], kind: Tensor) -> Tensor:
        return F.cross_entropy(output[0], torch.arange(len(kind))) + F.cross_entropy(output[1], kind)

    return setup(Probed(width), sample, loss, 3e-3)


class LowRank(nn.Module):
    """A frozen linear layer with a correction of low rank, which starts at nothing."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = frozen(layer)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * self.up(self.down(x))


@healthy(
    "contact14b-healthy-lora-first",
    zero_at_first("hidden.down", "second.down"),
    source="https://github.com/huggingface/peft/issues/793",
    **ONE,
)
def lora_first(width: int) -> Setup:
    """Low-rank fine-tuning to other labels: the second matrix is zero, so the first gets a gradient of
    exactly zero in the first step, and only in that one."""
    points = clusters(12, 6)
    model = stack(
        hidden=nn.Linear(12, width),
        act=nn.GELU(),
        second=nn.Linear(width, width),
        act2=nn.GELU(),
        head=nn.Linear(width, 6),
    )
    trained(setup(model, points, F.cross_entropy, 5e-3), 80)
    model.hidden, model.second = LowRank(model.hidden, 4), LowRank(model.second, 4)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, kind = points(g)
        return x, (kind + 1) % 6

    return setup(model, sample, F.cross_entropy, 1e-2)


class Causal(nn.Module):
    """Causal attention of four heads; queries and keys may be normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = self.q_norm(q) @ self.k_norm(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.out((scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Reader(nn.Module):
    """A language model of two blocks of causal attention, with learnt positions that start at zero."""

    def __init__(self, words: int, width: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.blocks = nn.ModuleList(Causal(width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, words))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x)


def echoes(g: Generator) -> tuple[Tensor, Tensor]:
    """Return sequences that say everything twice, and the next tokens, the first half of which are not
    asked."""
    half = choice(g, 12, 32, 6)
    tokens = torch.cat([half, half], 1)
    following = tokens[:, 1:].clone()
    following[:, :5] = -100
    return tokens[:, :-1], following


@healthy(
    "contact14b-healthy-places",
    all_zero("place"),
    source="https://github.com/karpathy/minGPT/pull/62",
    **ONE,
)
def places(width: int) -> Setup:
    """A language model whose position embeddings are all zero at the start: they get gradients and learn at
    once."""
    return setup(Reader(12, width, 11), echoes, token_loss, 1e-2)


@healthy(
    "contact14b-healthy-qk-norm",
    worse_with_norms(5.0),
    source="https://github.com/ByteDance-Seed/Bagel/issues/22",
    **ONE,
)
def qk_norm(width: int) -> Setup:
    """A pretrained language model that is given new norms for queries and keys: it starts at a loss far above
    the one it had, and is back in some steps."""
    model = Reader(12, width, 11)
    trained(setup(model, echoes, token_loss, 2e-2, seed=1), 140)
    for block in model.blocks:
        block.q_norm, block.k_norm = nn.LayerNorm(width // 4), nn.LayerNorm(width // 4)
    return setup(model, echoes, token_loss, 3e-3)


# ------------------------------------------------------------------------------------- meta-learning


class FirstOrder(nn.Module):
    """A net that learns a task by some steps of its own, without the gradient of those steps' gradients."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
        self.second_order = False

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        answers = []
        for task in range(len(x)):
            weights = dict(self.net.named_parameters())
            for _ in range(4):
                fit = F.mse_loss(torch.func.functional_call(self.net, weights, x[task]), y[task])
                grads = torch.autograd.grad(fit, list(weights.values()))
                self.second_order |= any(g.requires_grad for g in grads)
                weights = {n: w - 0.02 * g for (n, w), g in zip(weights.items(), grads, strict=True)}
            answers.append(torch.func.functional_call(self.net, weights, query[task]))
        return torch.stack(answers)


def cut_inside() -> Claim:
    """The inner steps' gradients are constants to the outer loss, whose own gradient is there all the
    same."""

    def claim(ready: Setup) -> tuple[bool, str]:
        step = next(training(ready, 1))
        cut = not ready.model.second_order
        return cut and step.norm(
            "net"
        ) > 0, f"inner gradients cut: {cut}; outer gradient = {step.norm('net'):.2g}"

    return claim


@healthy(
    "contact14b-healthy-first-order",
    cut_inside(),
    source="https://github.com/dragen1860/MAML-Pytorch/issues/59",
    **ONE,
)
def first_order(width: int) -> Setup:
    """Meta-learning whose inner gradients carry no graph: the first-order approximation, which trains as
    well."""
    return setup(FirstOrder(width), waves, F.mse_loss, 1e-2)
