"""Models of public reports: survival times, capsules, sentences that point into pictures, retrieval."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import every, flat, no_gradient, not_finite, stuck
from .data import Sample, choice, frozen, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, healthy, sick

# ---------------------------------------------------------------------------------------- survival times


class RiskNet(nn.Module):
    """Covariates of a patient to a log-risk."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.body = stack(fc_1=nn.Linear(features, size), act_1=nn.SELU(), fc_2=nn.Linear(size, size))
        self.head = nn.Linear(size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.selu(self.body(x)))[:, 0]


def patients(features: int, number: int, seen: float) -> Sample:
    """Covariates with (time, event) of each patient; a part of the events comes before the study ends."""
    weights = normal(seeded(61), features)
    weights = 4 * weights / weights.norm()

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = normal(g, number, features)
        time = -uniform(g, number).clamp_min(1e-6).log() / (x @ weights).exp()
        return x, (time, (uniform(g, number) < seen).float())

    return sample


@sick(
    "contact6a-survival-no_event",
    [("NUMERICAL", "*")],
    not_finite(20, loss=True),
    source="https://github.com/havakv/pycox/issues/124",
    steps=160,
    falls_to=0.9,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def survival_no_event(sick: bool, width: int) -> Setup:
    """The partial likelihood of a batch is divided by its number of events, and in a small batch of mostly
    censored patients there may be none: zero divided by zero. Repair: bound the number from below."""

    def loss(log_risk: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        time, event = target
        order = time.argsort(descending=True)
        log_risk, event = log_risk[order], event[order]
        likelihood = (log_risk - log_risk.logcumsumexp(0)) * event
        events = event.sum() if sick else event.sum().clamp_min(1.0)
        return -likelihood.sum() / events

    return setup(RiskNet(4, width), patients(4, 24, 0.07), loss, 1e-2)


class Hazards(nn.Module):
    """The chance of the event in every interval, given that there was none before."""

    def __init__(self, features: int, size: int, intervals: int) -> None:
        super().__init__()
        self.body = stack(fc_1=nn.Linear(features, size), act_1=nn.ReLU(), fc_2=nn.Linear(size, size))
        self.head = nn.Linear(size, intervals)
        self.hazard = nn.Sigmoid()
        nn.init.constant_(self.head.bias, -5.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.hazard(self.head(F.relu(self.body(x))))


@healthy("contact6a-survival-rare_hazard", flat("hazard", "sigmoid", 0.9), widths=(32,), dtypes=(FLOAT32,))
def survival_rare_hazard(width: int) -> Setup:
    """Hazards of a rare event: the bias of the last layer starts far below zero, as a base rate would put it,
    so nearly every sigmoid begins at its flat end, and the network learns who is at risk all the same."""
    weights = normal(seeded(62), 10) / 10**0.5

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 128, 10)
        chance = torch.sigmoid(6 * (x @ weights) - 8)[:, None].expand(128, 6)
        return x, (uniform(g, 128, 6) < chance).float()

    return setup(Hazards(10, width, 6), sample, F.binary_cross_entropy, 1e-2)


# ---------------------------------------------------------------------------------------------- capsules


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The 8 x 8 pictures of digits that come with scikit-learn, between 0 and 1, and what they show."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


def some_digits(number: int = 32) -> Sample:
    """Batches of the digits."""
    pictures, kinds = digits()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        rows = choice(g, len(kinds), number)
        return pictures[rows], kinds[rows]

    return sample


class Squash(nn.Module):
    """A vector's length to below one, its direction kept."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, s: Tensor) -> Tensor:
        square = (s.square() + self.eps).sum(-1, keepdim=True)
        return square * s / ((1.0 + square) * square.sqrt())


class PrimaryCapsules(nn.Module):
    """A convolution whose channels are grouped into vectors."""

    def __init__(self, channels: int, size: int, eps: float) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(channels, 4 * size, 1, bias=False)
        self.squash = Squash(eps)

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv(x).unflatten(1, (4, self.size))
        return self.squash(u.movedim(2, -1).flatten(1, 3))


class ClassCapsules(nn.Module):
    """One vector per class, agreed on in two rounds of routing."""

    def __init__(self, capsules: int, size: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(capsules, classes, 8, size))
        self.squash = Squash(1e-7)

    def forward(self, u: Tensor) -> Tensor:
        votes = torch.einsum("kcos,nks->nkco", self.weight, u)
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(2):
            v = self.squash((logits.softmax(2)[..., None] * votes).sum(1))
            logits = logits + (votes.detach() * v.detach()[:, None]).sum(-1)
        return (v.square().sum(-1) + 1e-9).sqrt()


@sick(
    "contact6a-capsule-squash",
    [("NUMERICAL", "primary")],
    not_finite(3),
    source="https://github.com/jindongwang/Pytorch-CapsuleNet/issues/7",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def capsule_squash(sick: bool, width: int) -> Setup:
    """The squashing of a capsule divides it by its length, and a capsule that sees an empty corner of the
    picture has none: zero divided by zero. Repair: a small number in the sum of squares."""
    model = stack(
        conv=nn.Conv2d(1, width, 2, stride=2, bias=False),
        act=nn.ReLU(),
        primary=PrimaryCapsules(width, 8, 0.0 if sick else 1e-7),
        classes=ClassCapsules(64, 8, 10),
    )

    def loss(lengths: Tensor, kind: Tensor) -> Tensor:
        there = F.one_hot(kind, 10).float()
        near, far = (0.9 - lengths).clamp_min(0.0).square(), (lengths - 0.1).clamp_min(0.0).square()
        return (there * near + 0.5 * (1 - there) * far).sum(1).mean()

    return setup(model, some_digits(), loss, 3e-3)


# ------------------------------------------------------------------- sentences that point into pictures


class GatedFusion(nn.Module):
    """What a sentence adds to the features of a picture, through a gate."""

    def __init__(self, size: int, zero_both: bool) -> None:
        super().__init__()
        self.look, self.words = nn.Conv2d(size, size, 1), nn.Linear(size, size)
        self.gate = stack(
            fc_1=nn.Linear(size, size, bias=False),
            act=nn.ReLU(),
            fc_2=nn.Linear(size, size, bias=False),
            squash=nn.Tanh(),
        )
        nn.init.zeros_(self.gate.fc_2.weight)
        if zero_both:
            nn.init.zeros_(self.gate.fc_1.weight)

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        both = self.look(x) * self.words(sentence)[..., None, None]
        gate = self.gate(both.movedim(1, -1)).movedim(-1, 1)
        return x + gate * both


class Pointed(nn.Module):
    """A picture and a sentence to the mask of what the sentence means."""

    def __init__(self, words: int, size: int, zero_both: bool) -> None:
        super().__init__()
        self.sentence = nn.Embedding(words, size)
        self.stage_1 = nn.Sequential(nn.Conv2d(3, size, 3, padding=1), nn.ReLU())
        self.fusion = GatedFusion(size, zero_both)
        self.stage_2 = nn.Sequential(nn.Conv2d(size, size, 3, padding=1), nn.ReLU())
        self.mask = nn.Conv2d(size, 1, 1)

    def forward(self, picture: Tensor, words: Tensor) -> Tensor:
        return self.mask(self.stage_2(self.fusion(self.stage_1(picture), self.sentence(words))))


def coloured(number: int = 16, size: int = 10) -> Sample:
    """Pictures of a red, a green and a blue square; a word names one of them, and the target is its mask."""
    line = torch.arange(size)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        corner = choice(g, size - 3, number, 3, 2)
        inside = (line >= corner[..., None]) & (line < corner[..., None] + 4)
        masks = (inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).float()
        word = choice(g, 3, number)
        picture = masks + 0.1 * normal(g, number, 3, size, size)
        return (picture, word), masks[torch.arange(number), word][:, None]

    return sample


@sick(
    "contact6a-referring-gate",
    [("DEAD", "fusion")],
    every(no_gradient("fusion", "sentence"), stuck(0.2)),
    source="https://github.com/yz93/LAVT-RIS/issues/25",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def referring_gate(sick: bool, width: int) -> Setup:
    """The gate through which the sentence joins the picture has two linear maps, and both start at zero, so
    neither ever gets a gradient and the gate stays shut. Repair: only the last one starts at zero."""
    return setup(Pointed(3, width, sick), coloured(), F.binary_cross_entropy_with_logits, 1e-2)


# ---------------------------------------------------------------------------------------------- retrieval


class LockedTowers(nn.Module):
    """A text tower that learns to meet a locked picture tower, under a sharp and fixed temperature."""

    def __init__(self, pictures: int, words: int, size: int) -> None:
        super().__init__()
        self.picture = frozen(nn.Sequential(nn.Linear(pictures, size), nn.Tanh(), nn.Linear(size, size)))
        self.text = nn.Sequential(nn.Linear(words, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
        self.logits = Scaled(100.0)

    def forward(self, picture: Tensor, text: Tensor) -> Tensor:
        a, b = F.normalize(self.picture(picture), dim=-1), F.normalize(self.text(text), dim=-1)
        return self.logits(b @ a.T)


class Scaled(nn.Module):
    """A fixed factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@healthy(
    "contact6a-retrieval-locked_sharp",
    flat("logits", "softmax of", 0.2, steps=1),
    widths=(32,),
    dtypes=(FLOAT32,),
)
def retrieval_locked_sharp(width: int) -> Setup:
    """Only the text tower learns, the other is locked by design, and cosines are multiplied by a hundred: the
    softmax is sharp, mostly wrong at first, and soon right."""
    to_picture, to_text = normal(seeded(63), 6, 24), normal(seeded(64), 6, 20)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        meaning = normal(g, 32, 6)
        text = meaning @ to_text + 0.1 * normal(g, 32, 20)
        return (meaning @ to_picture, text), torch.arange(32)

    return setup(LockedTowers(24, 20, width), sample, F.cross_entropy, 3e-3)
