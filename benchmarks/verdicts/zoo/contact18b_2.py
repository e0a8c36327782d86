"""Speech, distillation, series, tables and recommenders after public reports."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import fades_in_time, no_gradient, not_finite, rises, strong
from .data import Sample, choice, frozen, normal, seeded, setup, sgd, stack, two_sides, uniform
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------------------------------------ speech

SOUNDS, FRAMES, BINS = 8, 12, 16


class Converter(nn.Module):
    """A decoder from sounds and a speaker to a spectrogram."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sounds = nn.Embedding(SOUNDS, width)
        self.speaker = nn.Embedding(4, width)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.mel = nn.Linear(width, BINS)

    def forward(self, sounds: Tensor, speaker: Tensor) -> Tensor:
        """Return the frames."""
        hidden, _ = self.decoder(self.sounds(sounds) + self.speaker(speaker)[:, None])
        return self.mel(hidden)


def utterances(decibels: bool, number: int = 16) -> Sample:
    """Return sounds and speakers with the spectrogram, in decibels or normalised; sound 0 is silence."""
    g0 = seeded(51)
    spectra = -30 + 10 * normal(g0, SOUNDS, BINS)
    spectra[0] = -80.0
    voices = 4 * normal(g0, 4, BINS)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        sounds, speaker = choice(g, SOUNDS, number, FRAMES), choice(g, 4, number)
        mel = spectra[sounds] + voices[speaker][:, None] + normal(g, number, FRAMES, BINS)
        return (sounds, speaker), mel if decibels else (mel + 36) / 20

    return sample


def log_norm(mel: Tensor) -> Tensor:
    """Return the log energy of frames that are log spectra with a mean of -4 and a deviation of 4."""
    return (4 * mel - 4).exp().norm(dim=-1).log()


def voice_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the error of the frames and that of their log energy."""
    return F.l1_loss(output, target) + 0.1 * F.mse_loss(log_norm(output), log_norm(target))


@sick(
    "contact18b-speech-energy",
    [("NUMERICAL", "*")],
    not_finite(),
    source="https://github.com/yl4579/StyleTTS-VC/issues/10",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def speech_energy(sick: bool, width: int) -> Setup:
    """The energy term undoes a normalisation that these spectrograms, in decibels, never had: the exponential
    of a silent frame is zero, and its logarithm minus infinity. Normalising the frames repairs it."""
    return setup(Converter(width), utterances(sick), voice_loss, 1e-2)


# ------------------------------------------------------------------------------------ distillation


class Distilled(nn.Module):
    """A student beside its frozen teacher."""

    def __init__(self, width: int, kinds: int = 10) -> None:
        super().__init__()
        self.teacher = frozen(
            nn.Sequential(nn.Linear(16, 2 * width), nn.ReLU(), nn.Linear(2 * width, kinds, bias=False))
        )
        with torch.no_grad():
            self.teacher[2].weight.mul_(120)
        layers = [nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.student = nn.Sequential(*layers, nn.Linear(width, kinds))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's scores and the teacher's."""
        return self.student(x), self.teacher(x)


def points(number: int = 64) -> Sample:
    """Return normal features, without a target."""
    return lambda g: (normal(g, number, 16), None)


def same_scores(output: tuple[Tensor, Tensor], target: None) -> Tensor:
    """Return the squared distance of the scores."""
    return F.mse_loss(*output)


@sick(
    "contact18b-distill-logits",
    [("UNSTABLE", "*")],
    rises(3),
    allow=("EXPLODING", "NUMERICAL", "DEAD"),
    source="https://github.com/AberHu/Knowledge-Distillation-Zoo/issues/13",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def distill_logits(sick: bool, width: int) -> Setup:
    """The student is drawn to the teacher's raw scores, which are large, by their squared distance, with the
    rate and momentum of plain classification: its own scores run off. A twentieth of the rate repairs it."""
    return setup(Distilled(width), points(), same_scores, sgd(0.1 if sick else 0.005, 0.9))


# -------------------------------------------------------------------------------------- time series


class Forecast(nn.Module):
    """An LSTM over a window, and a head that reads its last state."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, window: Tensor) -> Tensor:
        """Return the forecast of each window."""
        return self.head(self.lstm(window)[0][:, -1])[:, 0]


def windows(dropped: bool, number: int = 16, size: int = 10) -> Sample:
    """Return windows of a series and of its value three days ago; the first three have no such value."""
    days = torch.arange(240)
    level = torch.sin(days / 5) + 0.5 * torch.sin(days / 2.3) + 0.1 * normal(seeded(52), 240)
    lagged = torch.cat([torch.full((3,), math.nan), level[:-3]])
    table = torch.stack([level, lagged], -1)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        start = choice(g, 226, number) + (3 if dropped else 0)
        rows = start[:, None] + torch.arange(size)
        return table[rows], level[start + size]

    return sample


@sick(
    "contact18b-series-lagged",
    [("NUMERICAL", "*")],
    not_finite(20, loss=True),
    source="https://github.com/bpkent/lstm-forecasting/issues/4",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def series_lagged(sick: bool, width: int) -> Setup:
    """The column of lagged values has no value in its first rows; the first batch that draws one of them
    turns the loss to NaN, and all weights with it. Leaving those rows out repairs it."""
    return setup(Forecast(width, 2), windows(not sick), F.mse_loss, 5e-3)


class Reader(nn.Module):
    """A plain recurrent network over words, read at its last state or at all of them."""

    def __init__(self, width: int, *, all_states: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.rnn = nn.RNN(width, width, batch_first=True)
        self.look = nn.Linear(width, 1) if all_states else None
        self.head = nn.Linear(width, 3)

    def forward(self, words: Tensor) -> Tensor:
        """Return the classes' scores."""
        states, _ = self.rnn(self.embed(words))
        if self.look is None:
            return self.head(states[:, -1])
        return self.head((self.look(states).softmax(1) * states).sum(1))


def long_texts(number: int = 32, length: int = 50) -> Sample:
    """Return long texts whose class is told by the words of their beginning."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 3, number)
        words = 9 + choice(g, 11, number, length)
        words[:, :8] = 3 * kind[:, None] + choice(g, 3, number, 8)
        return words, kind

    return sample


@sick(
    "contact18b-rnn-long",
    [("VANISHING", "rnn")],
    fades_in_time("rnn", 1e-3, sound=8),
    source="https://thecodeforge.io/ml-ai/rnn-lstm/",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rnn_long(sick: bool, width: int) -> Setup:
    """A plain recurrent network must carry what the first words say through forty more steps to its last
    state, and the gradient fades on the way back. A look at all states, by attention, repairs it."""
    return setup(Reader(width, all_states=not sick), long_texts(), F.cross_entropy, 5e-3)


# ------------------------------------------------------------------------------------------ tables


@sick(
    "contact18b-tabular-softmax",
    [("DEAD", "*")],
    no_gradient("*"),
    allow=("SATURATION",),
    source="https://github.com/FluxML/Flux.jl/issues/1546",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tabular_softmax(sick: bool, width: int) -> Setup:
    """A softmax over the only output is one whatever the input: the loss is the same in every epoch, and no
    weight gets a gradient. A sigmoid repairs it."""
    squash = nn.Softmax(-1) if sick else nn.Sigmoid()
    layers = {"linear1": nn.Linear(8, width), "act": nn.Sigmoid(), "linear2": nn.Linear(width, 1)}
    return setup(stack(**layers, squash=squash), two_sides(8, 64), F.mse_loss, 2e-2)


# ------------------------------------------------------------------------------------ recommenders

USERS, ITEMS = 24, 24


class Machine(nn.Module):
    """A factorisation machine over a user, an item and the user's numbers."""

    def __init__(self, width: int, numbers: int = 2) -> None:
        super().__init__()
        fields = USERS + ITEMS + numbers
        self.linear = nn.Linear(fields, 1)
        self.factors = nn.Linear(fields, width, bias=False)
        nn.init.normal_(self.factors.weight, std=0.05)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the ratings: the linear part, and all products of two fields."""
        joint = self.factors(x).square().sum(-1)
        own = F.linear(x.square(), self.factors.weight.square()).sum(-1)
        return self.linear(x)[:, 0] + 0.5 * (joint - own)


def ratings(scaled: bool, number: int = 32) -> Sample:
    """Return a user, an item, the user's age and zip code, with the rating between one and five."""
    g0 = seeded(53)
    taste, kind = normal(g0, USERS, 3), normal(g0, ITEMS, 3)
    age = 18 + 50 * uniform(g0, USERS)
    place = 1000 + 98000 * uniform(g0, USERS)
    numbers = torch.stack([age, place], -1)
    if scaled:
        numbers = (numbers - numbers.mean(0)) / numbers.std(0)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        user, item = choice(g, USERS, number), choice(g, ITEMS, number)
        x = torch.cat([F.one_hot(user, USERS), F.one_hot(item, ITEMS), numbers[user]], -1).float()
        return x, (3.5 + 0.6 * (taste[user] * kind[item]).sum(-1)).clamp(1, 5)

    return sample


@sick(
    "contact18b-recsys-zipcode",
    [("EXPLODING", "*")],
    strong("factors", 1e4),
    allow=("NUMERICAL", "UNSTABLE"),
    source="https://github.com/online-ml/river/issues/669",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def recsys_zipcode(sick: bool, width: int) -> Setup:
    """Age and zip code go into the factorisation machine as they are, beside fields of zeros and ones: their
    products drown all others, the gradients explode, and the ratings end as NaN. Scaling them repairs it."""
    return setup(Machine(width), ratings(not sick), F.mse_loss, sgd(0.01))
