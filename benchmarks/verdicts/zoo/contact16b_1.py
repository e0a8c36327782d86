"""Trainings after public reports: sequence-to-sequence, text, autoencoders, experts, rendering, flows."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, fades_in_time, flat, growing, no_gradient, training
from .data import Sample, adam, choice, clusters, factors, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


def silent_after(module: str, share: float, *, after: int = 15, batches: int = 5) -> Claim:
    """After some steps more than a share of a module's units fires in no sample of the next batches."""

    def claim(ready: Setup) -> tuple[bool, str]:
        fired: list[Tensor] = []
        for number, step in enumerate(training(ready, after + batches, (module,))):
            if number >= after:
                fired.append((step.outputs[module].detach() > 0).flatten(0, -2).any(0))
        seen = 1 - float(torch.stack(fired).any(0).float().mean())
        return seen > share, f"after {after} steps {seen:.0%} of the units of {module} never fire"

    return claim


def worst_above(value: float, *, steps: int = 20) -> Claim:
    """Within some steps the loss is above a value, or no number."""

    def claim(ready: Setup) -> tuple[bool, str]:
        worst = max(step.loss if math.isfinite(step.loss) else math.inf for step in training(ready, steps))
        return worst > value, f"largest loss in {steps} steps = {worst:.3g}"

    return claim


def starts_above(value: float) -> Claim:
    """The very first loss is above a value."""

    def claim(ready: Setup) -> tuple[bool, str]:
        first = next(iter(training(ready, 1))).loss
        return first > value, f"first loss = {first:.4g}"

    return claim


# --------------------------------------------------------------------------- sequence-to-sequence


class Translator(nn.Module):
    """A recurrent encoder whose last state starts a recurrent decoder that is taught the right words."""

    def __init__(self, words: int, width: int, gather: bool) -> None:
        super().__init__()
        self.gather = gather
        self.source, self.target = nn.Embedding(words, width), nn.Embedding(words, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, source: Tensor, shifted: Tensor) -> Tensor:
        """Return the scores of each next word."""
        states, last = self.encoder(self.source(source))
        if self.gather:
            ends = (source != 0).sum(1) - 1
            last = states[torch.arange(len(source)), ends][None]
        return self.head(self.decoder(self.target(shifted), last.contiguous())[0])


def padded_pairs(words: int, length: int, number: int = 24) -> Sample:
    """Two or three words and an end mark, padded with zeros to the longest; the target renames the words."""
    rename = 2 + torch.randperm(words - 2, generator=seeded(31))

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        source = torch.zeros(number, length, dtype=torch.long)
        body = 2 + choice(g, words - 2, number, 3)
        short = uniform(g, number) < 0.5
        source[:, :3], source[:, 3] = body, 1
        source[short, 2], source[short, 3] = 1, 0
        target = torch.where(source > 1, rename[(source - 2).clamp_min(0)], source)[:, :5]
        shifted = torch.cat([torch.ones(number, 1, dtype=torch.long), target[:, :-1]], 1)
        return (source, shifted), target

    return sample


@sick(
    "contact16b-seq2seq-padstate",
    [("VANISHING", "encoder")],
    fades_in_time("encoder", 1e-3, sound=4),
    allow=("BOTTLENECK",),
    source="https://github.com/pytorch/tutorials/issues/3643",
    **ONE,
)
def padstate(sick: bool, width: int) -> Setup:
    """The encoder's state for the decoder is taken after all the padding of a batch, so hardly any gradient
    comes back to the words in front of it, and the padding is scored too. Repair: the state at the last word,
    and no loss on padding."""
    words = 14

    def loss(output: Tensor, target: Tensor) -> Tensor:
        ignored = -100 if sick else 0
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=ignored)

    return setup(Translator(words, width, gather=not sick), padded_pairs(words, 32), loss, 1e-2)


# ---------------------------------------------------------------------------- text classification


class BagOfWords(nn.Module):
    """Mean of word vectors, a hidden layer, scores, and perhaps a softmax behind them."""

    def __init__(self, words: int, width: int, kinds: int, squash: bool) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(words, width)
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, kinds)
        self.softmax = nn.Softmax(-1) if squash else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the loss takes for scores."""
        return self.softmax(self.head(self.hidden(self.embed(tokens))))


def topics(words: int, kinds: int, common: float, number: int = 32, length: int = 16) -> Sample:
    """Sentences where a third of the words tells the topic, and one topic is far more common."""
    part = words // (2 * kinds)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = torch.where(uniform(g, number) < common, 0, choice(g, kinds, number))
        tokens = choice(g, words, number, length)
        telling = words // 2 + kind[:, None] * part + choice(g, part, number, length)
        return torch.where(uniform(g, number, length) < 0.35, telling, tokens), kind

    return sample


@sick(
    "contact16b-text-twosoftmax",
    [("SATURATION", "softmax")],
    flat("head", "softmax of", 0.6, steps=20),
    allow=("VANISHING", "BOTTLENECK"),
    source="https://github.com/illiterate/BertClassifier/issues/2",
    **ONE,
)
def twosoftmax(sick: bool, width: int) -> Setup:
    """A softmax stands in front of a cross entropy that has its own: the bounded scores drive the first one
    to its flat end, at the most common class, and the loss hardly falls. Repair: without the softmax."""
    model = BagOfWords(200, width, 6, squash=sick)
    return setup(model, topics(200, 6, 0.8), F.cross_entropy, 1e-2)


# ------------------------------------------------------------------------------------ autoencoders


class SparseCoder(nn.Module):
    """An overcomplete code of rectified units and a linear decoder."""

    def __init__(self, size: int, code: int) -> None:
        super().__init__()
        self.encoder = stack(linear=nn.Linear(size, code), act=nn.ReLU())
        self.decoder = nn.Linear(code, size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction and the code."""
        code = self.encoder(x)
        return self.decoder(code), code


def sparse_loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Return the squared error and a price on the code."""
    return F.mse_loss(output[0], target) + 2e-3 * output[1].abs().sum(-1).mean()


@sick(
    "contact16b-sae-deadfeatures",
    [("DEAD", "encoder")],
    silent_after("encoder", 0.4),
    allow=("UNSTABLE",),
    source="https://github.com/decoderesearch/SAELens/issues/67",
    **ONE,
)
def deadfeatures(sick: bool, width: int) -> Setup:
    """The rate is too high for a sparse autoencoder: within a few steps a large part of the features is
    driven below zero for every input and never fires again. Repair: a lower rate."""
    plain, mean = factors(width, 12), normal(seeded(32), width)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = plain(g)[0] + mean  # activations of a network are seldom centred
        return x, x

    return setup(SparseCoder(width, 4 * width), sample, sparse_loss, 0.05 if sick else 3e-3)


# ------------------------------------------------------------------------------ mixture of experts


class ThresholdGate(nn.Module):
    """Chooses all experts whose score is above a learned threshold."""

    def __init__(self, width: int, experts: int, through: bool) -> None:
        super().__init__()
        self.through = through
        self.score = nn.Linear(width, experts)
        self.threshold = nn.Parameter(torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return a mask of zeros and ones."""
        margin = self.score(x).sigmoid() - self.threshold.sigmoid()
        mask = (margin > 0).float()
        return mask + margin - margin.detach() if self.through else mask


class TopAnyExperts(nn.Module):
    """As many experts for each sample as its gate lets through."""

    def __init__(self, size: int, width: int, kinds: int, through: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(size, width)
        self.gate = ThresholdGate(width, 4, through)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(4)
        )
        self.head = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        x = self.embed(x)
        mask = self.gate(x)
        mixed = sum(mask[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return self.head(x + mixed / mask.detach().sum(-1, keepdim=True).clamp_min(1))


@sick(
    "contact16b-moe-threshold",
    [("DEAD", "gate")],
    no_gradient("gate"),
    source="https://github.com/LINs-lab/DynMoE/issues/6",
    **ONE,
)
def threshold(sick: bool, width: int) -> Setup:
    """Experts are chosen by comparing scores with learned thresholds, and nothing else of the gate reaches
    the output, so neither scores nor thresholds get a gradient. Repair: straight through the comparison."""
    return setup(TopAnyExperts(12, width, 6, through=not sick), clusters(12, 6), F.cross_entropy, 3e-3)


# -------------------------------------------------------------------------------- neural rendering


class Field(nn.Module):
    """Density and colour along rays, put together to pixels over a black background."""

    def __init__(self, width: int, rectify: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(18, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.sigma = stack(head=nn.Linear(width, 1), act=nn.ReLU() if rectify else nn.Softplus())
        self.colour = stack(head=nn.Linear(width, 3), act=nn.Sigmoid())

    def forward(self, points: Tensor) -> Tensor:
        """Return the pixel of each ray from its points, (rays, points, 3)."""
        waves = [f(k * points) for k in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)]
        features = self.trunk(torch.cat(waves, -1))
        thick = self.sigma(features)[..., 0] * (4 / points.shape[1])
        seen = torch.exp(-(thick.cumsum(1) - thick))
        weights = seen * (1 - torch.exp(-thick))
        return (weights[..., None] * self.colour(features)).sum(1)


def rays(number: int = 48, points: int = 12) -> Sample:
    """Rays along the third axis through a coloured ball; the target is what is seen of it."""
    depths = torch.linspace(-1, 1, points)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        place = 2 * uniform(g, number, 2) - 1
        path = torch.cat([place[:, None].expand(-1, points, -1), depths.expand(number, -1)[..., None]], -1)
        inside = (place.square().sum(-1) < 0.8).float()[:, None]
        colour = torch.stack([0.5 + 0.4 * place[:, 0], 0.5 + 0.4 * place[:, 1], torch.ones(number)], -1)
        return path, inside * colour

    return sample


@sick(
    "contact16b-nerf-blank",
    [("DEAD", "sigma")],
    no_gradient("trunk", "sigma", "colour"),
    allow=("SATURATION",),
    source="https://github.com/munshisanowarraihan/nerf-meta/issues/3",
    **ONE,
)
def blank(sick: bool, width: int) -> Setup:
    """The density is rectified and starts, by bad luck, below zero everywhere: the picture is blank and no
    parameter gets a gradient. Repair: softplus for the density."""
    model = Field(width, rectify=sick)
    nn.init.constant_(model.sigma.head.bias, -1.0)
    return setup(model, rays(), F.mse_loss, 5e-3)


# -------------------------------------------------------------------------- flows of point clouds


class PointFlow(nn.Module):
    """Moves the points of a cloud along a learned velocity, by fourth-order steps."""

    def __init__(self, width: int, bounded: bool) -> None:
        super().__init__()
        first, last = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (first, last):
            nn.init.kaiming_normal_(layer.weight)
        self.field = nn.Sequential(first, nn.Softplus(), last, nn.Tanh() if bounded else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Return where the points are at the end."""
        step = 0.25
        for _ in range(16):
            a = self.field(x)
            b = self.field(x + step / 2 * a)
            c = self.field(x + step / 2 * b)
            x = x + step / 6 * (a + 2 * b + 2 * c + self.field(x + step * c))
        return x


@sick(
    "contact16b-ode-unbounded",
    [("EXPLODING", "flow")],
    growing("lift", "flow", 30.0),
    allow=("UNSTABLE", "NUMERICAL"),
    source="https://github.com/stevenygd/PointFlow/issues/4",
    **ONE,
)
def unbounded(sick: bool, width: int) -> Setup:
    """The velocity of a continuous flow is not bounded, so over the time of integration points and gradients
    grow without limit. Repair: a tanh at the end of the velocity."""
    model = stack(
        lift=nn.Linear(3, width), flow=PointFlow(width, bounded=not sick), lower=nn.Linear(width, 3)
    )

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 3)
        return x, 2 * x / x.norm(dim=-1, keepdim=True)

    return setup(model, sample, F.mse_loss, adam(2e-3))
