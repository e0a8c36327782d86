"""Healthy models after public reports in which what looked wrong was meant to be so, or is a known design."""

from __future__ import annotations

import copy
import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, alike, loss_of, training, zero_at_first
from .data import choice, frozen, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}

# ------------------------------------------------------------------- diffusion: a last layer that is zero


class Patches(nn.Module):
    """Tell the noise of a signal at a level of noise; the last layer begins as zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_in = nn.Linear(17, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.patch_out = nn.Linear(width, 16, bias=False)
        nn.init.zeros_(self.patch_out.weight)

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        x = self.patch_in(torch.cat([noisy, level], -1))
        return self.patch_out(x + self.body(x))


def signals(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Give noisy tones with their level of noise, and the noise."""
    clean = torch.sin(torch.arange(16) / 2 + 6.3 * uniform(g, 64, 1))
    level, noise = uniform(g, 64, 1), normal(g, 64, 16)
    return (clean * (1 - level) + noise * level, level), noise


@healthy(
    "contact15b-healthy-patch",
    zero_at_first("patch_in", "body"),
    source="https://github.com/crowsonkb/k-diffusion/issues/113",
    **ONE,
)
def patch(width: int) -> Setup:
    """The last layer of a denoiser begins as zero, so that its output is the mean of the noise and all before
    it gets no gradient in the first step. A known design."""
    return setup(Patches(width), signals, F.mse_loss, 1e-2)


# ------------------------------------------------------------- diffusion: preferences against a reference


class Preferred(nn.Module):
    """A denoiser and its frozen copy; return by how much better each tells the noise of better and worse."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(17, width), nn.SiLU(), nn.Linear(width, 16))
        self.reference = frozen(copy.deepcopy(self.policy))

    def forward(self, better: Tensor, worse: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        gains = []
        for x in (better, worse):
            seen = torch.cat([x * (1 - level) + noise * level, level], -1)
            errors = [(net(seen) - noise).square().mean(-1) for net in (self.policy, self.reference)]
            gains.append(errors[0] - errors[1])
        return gains[0] - gains[1]


def pairs(g: Generator) -> tuple[tuple[Tensor, ...], None]:
    """Give clean tones and harsh ones, with the same level of noise and the same noise."""
    better = torch.sin(torch.arange(16) / 2 + 6.3 * uniform(g, 64, 1))
    worse = 1.5 * torch.sin(torch.arange(16) * 1.4 + 6.3 * uniform(g, 64, 1)).sign()
    return (better, worse, 0.2 + 0.6 * uniform(g, 64, 1), normal(g, 64, 16)), None


def begins_at(value: float) -> Claim:
    """The first loss is exactly a value."""

    def claim(ready: Setup) -> tuple[bool, str]:
        first = loss_of(ready).item()
        return abs(first - value) < 1e-6, f"first loss = {first:.7f}"

    return claim


@healthy(
    "contact15b-healthy-preference",
    begins_at(math.log(2)),
    source="https://github.com/SalesforceAIResearch/DiffusionDPO/issues/7",
    **ONE,
)
def preference(width: int) -> Setup:
    """A denoiser learns preferences and begins as its own frozen reference: every margin is zero and the loss
    the logarithm of two at first, but its gradient is not zero."""
    return setup(Preferred(width), pairs, lambda margin, _: F.softplus(10 * margin).mean(), 3e-3)


# --------------------------------------------------------------------- regression: targets as they are


def begins_above(value: float) -> Claim:
    """The loss is above a value in each of the first steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        least = min(step.loss for step in training(ready, 10))
        return least > value, f"smallest loss of ten steps = {least:.3g}"

    return claim


def sunshine(g: Generator) -> tuple[Tensor, Tensor]:
    """Give normalised weather, and the sun's power in watts per square metre."""
    x = normal(g, 64, 8)
    return x, 250 + 150 * torch.tanh(x @ normal(seeded(157), 8, 1) / 2)


@healthy(
    "contact15b-healthy-watts",
    begins_above(50.0),
    source="https://github.com/gitbooo/CrossViVit/issues/5",
    **ONE,
)
def watts(width: int) -> Setup:
    """Inputs are normalised and targets are not, so that the loss is counted in watts: large, and falling as
    it should."""
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    model.append(nn.Linear(width, 1))
    return setup(model, sunshine, F.l1_loss, 1e-2)


# ------------------------------------------------------------------------ speech: durations on the side


class Voice(nn.Module):
    """Text to frames; a side branch that tells durations from the text, cut off from the encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Embedding(20, width), nn.Linear(width, width), nn.ReLU())
        self.durations = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.frames = nn.Linear(width, 10)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(text)
        return self.frames(h), self.durations(h.detach())[..., 0]


def spoken(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Give letters, the frame of each and the logarithm of how long it is."""
    text = choice(g, 20, 16, 8)
    sound, length = normal(seeded(158), 20, 10), uniform(seeded(159), 20)
    frames = sound[text]
    return text, (frames + 0.2 * normal(g, *frames.shape), (1 + 9 * length[text]).log())


def speak(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the error of the frames and that of the durations."""
    return F.l1_loss(output[0], target[0]) + F.mse_loss(output[1], target[1])


def cut_off(module: str) -> Claim:
    """What a module gets as its input carries no gradient back."""

    def claim(ready: Setup) -> tuple[bool, str]:
        seen: list[bool] = []
        layer = ready.model.get_submodule(module)
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
        loss_of(ready)
        handle.remove()
        return not any(seen), f"input of {module} wants a gradient: {seen}"

    return claim


@healthy(
    "contact15b-healthy-durations",
    cut_off("durations"),
    source="https://github.com/p0p4k/vits2_pytorch/issues/21",
    **ONE,
)
def durations(width: int) -> Setup:
    """The predictor of durations reads a detached encoding, so that it does not teach the text encoder, which
    learns from the frames. A known design."""
    return setup(Voice(width), spoken, speak, 5e-3)


# -------------------------------------------------------------------- speakers: a margin that grows


class Speakers(nn.Module):
    """The cosine of each recording with each speaker."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width))
        self.centres = nn.Parameter(torch.randn(number, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=-1) @ F.normalize(self.centres, dim=-1).T


def climbs(times: float, first: int, last: int) -> Claim:
    """The mean loss of three steps grows from one step to a later one, after it had fallen."""

    def claim(ready: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(ready, last + 3)]
        low, high = sum(losses[first : first + 3]) / 3, sum(losses[last : last + 3]) / 3
        told = f"loss {losses[0]:.3g}, then {low:.3g}, then {high:.3g}"
        return high > times * low and low < losses[0], told

    return claim


@healthy(
    "contact15b-healthy-margin",
    climbs(1.2, 7, 16),
    source="https://github.com/wenet-e2e/wespeaker/issues/127",
    **ONE,
)
def margin(width: int) -> Setup:
    """The margin of a speaker loss grows from zero to its full size between two steps of the training: the
    loss rises meanwhile since the task is made harder, and goes on to fall. Meant to be so."""
    places = 1.2 * normal(seeded(160), 12, 16)
    count = 0

    def recordings(g: Generator) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        who = choice(g, 12, 64)
        return places[who] + normal(g, 64, 16), who

    def loss(cosine: Tensor, who: Tensor) -> Tensor:
        size = 0.4 * min(max((count - 10) / 8, 0.0), 1.0)
        return F.cross_entropy(12 * (cosine - size * F.one_hot(who, 12)), who)

    return setup(Speakers(width, 12), recordings, loss, 1e-2)


# -------------------------------------------------------------------- embeddings: alike, at a low temperature


class Narrow(nn.Module):
    """Texts as directions in a narrow cone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width))
        nn.init.normal_(self.tower[2].bias, std=0.8)
        self.unit = Unit()

    def forward(self, both: Tensor) -> Tensor:
        asked, told = self.unit(self.tower(both)).chunk(2)
        return asked @ told.T / 0.01


class Unit(nn.Module):
    """Give all rows length one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def questions(g: Generator) -> tuple[Tensor, Tensor]:
    """Give 32 questions and then their answers, near them."""
    asked = normal(g, 32, 12)
    return torch.cat([asked, asked + 0.8 * normal(g, 32, 12)]), torch.arange(32)


@healthy(
    "contact15b-healthy-cone",
    alike("unit", 0.5),
    source="https://github.com/FlagOpen/FlagEmbedding/issues/402",
    **ONE,
)
def cone(width: int) -> Setup:
    """At a temperature of 0.01 the similarities of a text model stay close to one even for texts that have
    nothing in common: the differences are what counts, and it learns well. Known and meant."""
    return setup(Narrow(width), questions, F.cross_entropy, 2e-3)
