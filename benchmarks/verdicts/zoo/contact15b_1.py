"""Cases after public reports: speech, recommenders, custom functions, quantisation, recurrent networks."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import fades_in_time, fading, huge, no_gradient, not_finite
from .data import choice, clusters, normal, seeded, setup, sgd, stack, surface, uniform
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}

# ------------------------------------------------------------------------ speech: the targets' codebook


class Codes(nn.Module):
    """Choose one entry per frame with a hard softmax whose gradient is the soft one's."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.logits = nn.Linear(width, number)
        self.entries = nn.Linear(number, width, bias=False)
        nn.init.normal_(self.entries.weight)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        soft = self.logits(frames).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
        return self.entries(hard + soft - soft.detach()), soft


class MaskedSpeech(nn.Module):
    """Features, a context network over masked features, and quantised features as what is to be found."""

    def __init__(self, width: int, cut: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width))
        self.mask = nn.Parameter(torch.zeros(width))
        self.context = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.quantizer = Codes(width, 16)
        self.head = nn.Linear(width, width)
        self.cut = cut

    def forward(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        frames = self.features(sound)
        targets, soft = self.quantizer(frames)
        if self.cut:
            targets = targets.detach()
        hidden = torch.arange(sound.shape[1]) % 3 == 1
        found = self.head(self.context(torch.where(hidden[:, None], self.mask, frames))[0])
        scores = F.normalize(found, dim=-1) @ F.normalize(targets, dim=-1).mT / 0.2
        return scores[:, hidden], soft.mean((0, 1))


def utterances(g: Generator) -> tuple[Tensor, Tensor]:
    """Give pieces of three frames of one sound each, and the places of the frames that will be hidden."""
    sounds = normal(seeded(151), 10, 6)
    kinds = torch.stack([torch.randperm(10, generator=g)[:5] for _ in range(16)])
    x = sounds[kinds].repeat_interleave(3, 1) * 1.5
    return x + 0.2 * normal(g, *x.shape), (torch.arange(5) * 3 + 1).expand(16, -1)


def find(output: tuple[Tensor, Tensor], places: Tensor) -> Tensor:
    """Return the contrastive loss over the frames of an utterance, and the loss of little used codes."""
    scores, used = output
    spread = 1 + (used * (used + 1e-9).log()).sum() / math.log(len(used))
    return F.cross_entropy(scores.flatten(0, 1), places.flatten()) + 0.1 * spread


@sick(
    "contact15b-speech-targets",
    [("DEAD", "quantizer.entries")],
    no_gradient("quantizer.entries"),
    source="https://github.com/facebookresearch/fairseq2/pull/731",
    **ONE,
)
def speech_targets(sick: bool, width: int) -> Setup:
    """The quantised targets of a masked speech model are detached, though the contrastive loss is all that
    teaches the codebook: its entries never get a gradient (the choice does, from the diversity loss).
    Repair: leave the targets in the graph."""
    return setup(MaskedSpeech(width, sick), utterances, find, 5e-3)


# ---------------------------------------------------------------- recommender: a fused weighted sum of rows


class Bag(torch.autograd.Function):
    """Sum rows of a table with a weight each; the backward may forget the weights."""

    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor, weights: Tensor, whole: bool) -> Tensor:
        ctx.save_for_backward(table, rows, weights)
        ctx.whole = whole
        return (table[rows] * weights[..., None]).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, rows, weights = ctx.saved_tensors
        each = (grad[:, None] * weights[..., None]).flatten(0, 1)
        to_table = torch.zeros_like(table).index_add_(0, rows.flatten(), each)
        to_weights = (table[rows] * grad[:, None]).sum(-1) if ctx.whole else None
        return to_table, None, to_weights, None


class Basket(nn.Module):
    """Rate a user by the items seen, weighted by an importance that comes from how each was seen."""

    def __init__(self, width: int, whole: bool) -> None:
        super().__init__()
        self.items = nn.Embedding(40, width)
        self.importance = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid())
        self.top = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.whole = whole

    def forward(self, rows: Tensor, how: Tensor) -> Tensor:
        return self.top(Bag.apply(self.items.weight, rows, self.importance(how)[..., 0], self.whole))


def baskets(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Give six items each with how they were seen, and the sum of the worth of those seen for long."""
    worth = normal(seeded(152), 40)
    rows, how = choice(g, 40, 64, 6), normal(g, 64, 6, 4)
    return (rows, how), (worth[rows] * (how[..., 0] > 0)).sum(1, keepdim=True)


@sick(
    "contact15b-recommender-bag",
    [("DEAD", "importance")],
    no_gradient("importance"),
    source="https://github.com/meta-pytorch/torchrec/pull/4602",
    **ONE,
)
def recommender_bag(sick: bool, width: int) -> Setup:
    """A fused bag of embeddings takes a weight per item, and its backward returns None for the weights: the
    network that makes them never learns, while the table does. Repair: return the weights' gradient."""
    return setup(Basket(width, not sick), baskets, F.mse_loss, 5e-3)


# -------------------------------------------------------------- quantisation: calibrated, never quantised


class LearnedStep(nn.Module):
    """Fake quantisation to four bits with a learned step, once it is enabled."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.25))
        self.enabled = enabled
        self.register_buffer("largest", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        if not self.enabled:
            return x
        level = x / self.scale
        level = level.clamp(-7, 7)
        return (level + (level.round() - level).detach()) * self.scale


@sick(
    "contact15b-quantisation-calibrating",
    [("DEAD", "quant1"), ("DEAD", "quant2")],
    no_gradient("quant1", "quant2"),
    source="https://github.com/ModelTC/MQBench/issues/259",
    **ONE,
)
def quantisation_calibrating(sick: bool, width: int) -> Setup:
    """Only the calibration of learnable fake quantisers was enabled, not the quantisation: they watch the
    range and pass their input through, so that their steps are never used and never learn. Repair: enable
    the quantisation before training."""
    model = stack(
        quant1=LearnedStep(not sick),
        fc1=nn.Linear(8, width),
        act=nn.ReLU(),
        quant2=LearnedStep(not sick),
        fc2=nn.Linear(width, 6),
    )
    return setup(model, clusters(8, 6, number=32), F.cross_entropy, 5e-3)


# ------------------------------------------------------------------- recurrent: how much of a sequence is 1


class Share(nn.Module):
    """An LSTM, and a number from its last output or from the mean of all."""

    def __init__(self, width: int, last: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, batch_first=True)
        with torch.no_grad():
            self.lstm.bias_hh_l0.zero_()
            self.lstm.bias_ih_l0.zero_()
            self.lstm.bias_ih_l0[width : 2 * width] = 1.0
        self.out = nn.Linear(width, 1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        states = self.lstm(x)[0]
        return self.out(states[:, -1] if self.last else states.mean(1))


def steps_of_one(g: Generator) -> tuple[Tensor, Tensor]:
    """Give sequences of zeros and then ones, and the share of ones."""
    share = 0.4 + 0.6 * uniform(g, 16, 1)
    return (torch.linspace(0, 1, 120) >= 1 - share).float()[..., None], share


@sick(
    "contact15b-recurrent-share",
    [("VANISHING", "lstm")],
    fades_in_time("lstm", 1e-6, sound=20),
    allow=("BOTTLENECK", "SATURATION"),
    source="https://datascience.stackexchange.com/questions/67599",
    **ONE,
)
def recurrent_share(sick: bool, width: int) -> Setup:
    """An LSTM shall tell which share of a long sequence is not zero from its last state, whose gradient is
    gone long before it reaches the early steps: nearly the same answer for all. Repair: read the mean of all
    states."""
    return setup(Share(width, sick), steps_of_one, F.mse_loss, 3e-3)


# ----------------------------------------------------------------- regression: small uniform weights, deep


@sick(
    "contact15b-regression-uniform",
    [("VANISHING", "*")],
    fading("fc1", "fc7", 1e-3),
    allow=("BOTTLENECK", "DEAD"),
    source="https://github.com/SilasMarvin/dnns-from-scratch-in-zig/pull/7",
    **ONE,
)
def regression_uniform(sick: bool, width: int) -> Setup:
    """A ReLU network of eight layers whose weights begin as small uniform numbers whatever the width: the
    gradient shrinks by a factor per layer. Repair: weights after He."""
    sizes = [8] + [width] * 7
    model = nn.Sequential()
    for i, (before, after) in enumerate(itertools.pairwise(sizes), 1):
        model.add_module(f"fc{i}", nn.Linear(before, after))
        model.add_module(f"act{i}", nn.ReLU())
    model.add_module("out", nn.Linear(width, 1))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.uniform_(layer.weight, -0.1, 0.1)
            nn.init.zeros_(layer.bias)
            if not sick:
                nn.init.kaiming_normal_(layer.weight)
    return setup(model, surface(8, 64), F.mse_loss, sgd(0.01, 0.9))


# --------------------------------------------------------------- embeddings: normalised rows that are zero


class Towers(nn.Module):
    """Users and items as directions; the score of each user of the batch for each item."""

    def __init__(self, width: int, zero: bool) -> None:
        super().__init__()
        self.users = nn.Embedding(48, width)
        self.items = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width))
        nn.init.normal_(self.users.weight, std=0.1)
        if zero:
            nn.init.zeros_(self.users.weight)

    def forward(self, who: Tensor, what: Tensor) -> Tensor:
        return F.normalize(self.users(who), dim=-1) @ F.normalize(self.items(what), dim=-1).T / 0.1


def visits(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Give distinct users with an item each near their taste; each belongs to its own item."""
    taste = 2 * normal(seeded(153), 48, 8)
    who = torch.randperm(48, generator=g)[:24]
    return (who, taste[who] + 0.5 * normal(g, 24, 8)), torch.arange(24)


@sick(
    "contact15b-embedding-zero",
    [("EXPLODING", "users")],
    huge("users", 1e6),
    allow=("UNSTABLE", "NUMERICAL"),
    source="https://github.com/pytorch/pytorch/issues/184575",
    **ONE,
)
def embedding_zero(sick: bool, width: int) -> Setup:
    """New users begin as rows of zeros, which are normalised: the gradient of a zero vector's direction is
    one over epsilon, 1e12, and Adam's second moment does not forget it. Repair: begin with small random
    rows."""
    return setup(Towers(width, sick), visits, F.cross_entropy, 1e-2)


# ----------------------------------------------------------------- diffusion: the mean over no sample at all


class Denoiser(nn.Module):
    """Tell the noise of a picture at a level of noise, and where the picture is not normal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(17, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.noise, self.marks = nn.Linear(width, 16), nn.Linear(width, 16)

    def forward(self, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(torch.cat([noisy, level], -1))
        return self.noise(h), self.marks(h)


def defects(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Give four noisy signals, most with a defect, their noise, the defects and which are good."""
    good = uniform(g, 4) < 0.4
    where = (uniform(g, 4, 16) < 0.2).float() * (~good)[:, None]
    clean = torch.sin(torch.arange(16) / 2 + 6.3 * uniform(g, 4, 1)) + 3 * where
    level, noise = uniform(g, 4, 1), normal(g, 4, 16)
    return (clean * (1 - level) + noise * level, level), (noise, where, good)


@sick(
    "contact15b-diffusion-empty",
    [("NUMERICAL", "*")],
    not_finite(20, loss=True),
    source="https://github.com/HuiZhang0812/DiffusionAD/issues/32",
    **ONE,
)
def diffusion_empty(sick: bool, width: int) -> Setup:
    """The loss of the noise is the mean over the normal samples of a batch of four, and some batch has none:
    the mean of nothing is NaN. Repair: divide the sum by at least one."""

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        noise, where, good = target
        errors = (output[0] - noise).square().mean(-1)
        mean = errors[good].mean() if sick else (errors * good).sum() / good.sum().clamp_min(1)
        return mean + F.binary_cross_entropy_with_logits(output[1], where)

    return setup(Denoiser(width), defects, loss, 5e-3)
