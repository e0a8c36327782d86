"""Healthy cases after reports where what looked wrong was as it should be."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .claims import Claim, huge, no_gradient, training, zero_at_first
from .contact17b_1 import Decoder, Lora
from .data import adam, choice, frozen, grammar, normal, seeded, setup, token_loss, uniform
from .registry import FLOAT32, Setup, healthy

functional = nn.functional


def negative(*, steps: int = 120) -> Claim:
    """After some steps of training the loss is below zero."""

    def claim(ready: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(ready, steps)]
        return losses[-1] < 0, f"loss {losses[0]:.3g} at first, {losses[-1]:.3g} after {steps} steps"

    return claim


def hesitant(*, steps: int = 5) -> Claim:
    """In the first steps the loss hardly changes."""

    def claim(ready: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(ready, steps)]
        return losses[-1] > 0.97 * losses[0], f"loss {losses[0]:.4g} at first, {losses[-1]:.4g} at {steps}"

    return claim


def mostly_zero(module: str, share: float, *, steps: int = 20) -> Claim:
    """More than a share of a module's outputs is exactly zero."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        seen = float((last.outputs[module] == 0).float().mean())
        return seen > share, f"{seen:.0%} of {module} is exactly zero"

    return claim


class Adapted(nn.Module):
    """A frozen body with adapters in it, and a head."""

    def __init__(self, width: int, words: int = 16) -> None:
        super().__init__()
        self.embed = frozen(nn.Embedding(words, width))
        self.one, self.two = Lora(width), Lora(width)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + functional.gelu(self.one(x))
        return self.head(x + functional.gelu(self.two(x)))


@healthy(
    "contact17b-healthy-zeroup",
    zero_at_first("one.down", "two.down"),
    source="https://github.com/Yuanshi9815/OminiControl/issues/54",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def zeroup(width: int) -> Setup:
    """Adapters whose second matrix starts at zero, so that the tuned model starts as the given one: in
    the first step the first matrix gets a gradient of exactly zero, later it learns."""
    return setup(Adapted(width), grammar(), token_loss, 1e-2)


@healthy(
    "contact17b-healthy-sumloss",
    huge("*", 200),
    source="https://github.com/alibaba/Pai-Megatron-Patch/issues/579",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def sumloss(width: int) -> Setup:
    """A language model whose loss is summed over the tokens, not averaged: the gradient's norm is in the
    hundreds, which Adam does not care about, and the loss falls as it should."""
    model = Decoder(width, length=24)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")

    return setup(model, grammar(length=24, number=48), loss, 5e-3)


@healthy(
    "contact17b-healthy-warmup",
    hesitant(),
    source="https://github.com/NVIDIA/Megatron-LM/issues/86",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def warmup(width: int) -> Setup:
    """Pretraining with a linear warm-up over a hundred steps: the loss hardly moves at first, where others
    fall fastest, and then falls."""

    def make(parameters: object) -> Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=4e-3)
        scheduler = LambdaLR(optimizer, lambda count: min(1.0, (count + 1) / 100))
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    return setup(Decoder(width), grammar(number=64), token_loss, make)


def si_snr(guess: Tensor, clean: Tensor) -> Tensor:
    """Return minus the scale-invariant ratio of signal and noise, in decibels."""
    share = (guess * clean).sum(-1, keepdim=True) / clean.square().sum(-1, keepdim=True)
    signal = share * clean
    noise = (guess - signal).square().sum(-1) + 1e-8
    return -10 * torch.log10(signal.square().sum(-1) / noise + 1e-8).mean()


class Separator(nn.Module):
    """Takes what it holds for the other source off the mixture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 9, padding=4)
        self.second = nn.Conv1d(width, width, 9, padding=4)
        self.last = nn.Conv1d(width, 1, 9, padding=4)

    def forward(self, mixture: Tensor) -> Tensor:
        x = functional.leaky_relu(self.first(mixture), 0.2)
        x = functional.leaky_relu(self.second(x), 0.2)
        return (mixture - self.last(x)).flatten(1)


@healthy(
    "contact17b-healthy-decibels",
    negative(),
    source="https://github.com/speechbrain/speechbrain/issues/1170",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def decibels(width: int) -> Setup:
    """Source separation whose loss is minus a ratio in decibels: it passes zero and becomes negative, which
    is what a good separation means."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        time = torch.arange(96)
        low = torch.sin((0.1 + 0.2 * uniform(g, 16, 1)) * time + 6.3 * uniform(g, 16, 1))
        high = torch.sin((1.2 + 0.8 * uniform(g, 16, 1)) * time + 6.3 * uniform(g, 16, 1))
        return (low + high)[:, None], low

    return setup(Separator(width), sample, si_snr, 2e-3)


class Bootstrap(nn.Module):
    """A value network, and the older copy of it that gives the targets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))
        self.target = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))
        self.target.load_state_dict(self.online.state_dict())

    def forward(self, state: Tensor, after: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
        return self.online(state), reward + 0.9 * self.target(after).detach()


@healthy(
    "contact17b-healthy-bootstrap",
    no_gradient("target"),
    source="https://github.com/google-deepmind/rlax/pull/162",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def bootstrap(width: int) -> Setup:
    """Learning of values by temporal differences: no gradient flows through the bootstrap target, on purpose,
    and so none reaches the target network, which follows the other slowly."""
    w = normal(seeded(41), 6) / math.sqrt(6)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        state = normal(g, 64, 6)
        reward = torch.tanh(2 * state @ w)[:, None]
        return (state, 0.5 * state + 0.3 * normal(g, 64, 6), reward), reward

    model = Bootstrap(width)

    def make(parameters: object) -> Optimizer:
        optimizer = torch.optim.Adam(parameters, lr=5e-3)

        def follow(*_: object) -> None:
            with torch.no_grad():
                for old, new in zip(model.target.parameters(), model.online.parameters(), strict=True):
                    old.lerp_(new, 0.05)

        optimizer.register_step_post_hook(follow)
        return optimizer

    def loss(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        return functional.mse_loss(*output)

    return setup(model, sample, loss, make, trains=model.online.parameters)


class Guided(nn.Module):
    """A generator, and a frozen network that reads physical quantities off what it makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 16))
        self.physics = frozen(nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 4)))

    def forward(self, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = self.maker(x)
        return made, self.physics(made), self.physics(wanted)


@healthy(
    "contact17b-healthy-physics",
    no_gradient("physics"),
    source="https://github.com/fangyuanmao/PID/issues/46",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def physics(width: int) -> Setup:
    """A loss by a frozen network that decomposes pictures into physical quantities: its parameters get no
    gradient, as meant, and what it reads off the generator's output passes one on."""
    w = normal(seeded(42), 8, 16) / math.sqrt(8)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = normal(g, 64, 8)
        wanted = torch.sin(x @ w)
        return (x, wanted), wanted

    def loss(output: tuple[Tensor, Tensor, Tensor], wanted: Tensor) -> Tensor:
        made, read, meant = output
        return functional.mse_loss(made, wanted) + functional.mse_loss(read, meant)

    return setup(Guided(width), sample, loss, 1e-2)


class Sparsemax(nn.Module):
    """The projection on the simplex, which makes most of many entries exactly zero."""

    def forward(self, x: Tensor) -> Tensor:
        ordered = x.sort(-1, descending=True).values
        count = torch.arange(1, x.shape[-1] + 1)
        excess = ordered.cumsum(-1) - 1
        size = (count * ordered > excess).sum(-1, keepdim=True)
        return (x - excess.gather(-1, size - 1) / size).clamp_min(0)


class Masked(nn.Module):
    """Measurements of a row, weighted by a sparse mask that the row's kind chooses, and a regression."""

    def __init__(self, width: int, features: int = 8) -> None:
        super().__init__()
        self.choose = nn.Linear(2 * features, features)
        self.level = nn.BatchNorm1d(features)
        self.mask = Sparsemax()
        self.body = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, values: Tensor, kind: Tensor) -> Tensor:
        logits = self.level(self.choose(torch.cat([values, kind], 1)))
        return self.body(values * self.mask(logits))


@healthy(
    "contact17b-healthy-mask",
    mostly_zero("mask", 0.6),
    source="https://github.com/dreamquark-ai/tabnet/issues/516",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def mask(width: int) -> Setup:
    """A network for tables that selects features for each row by a sparse projection: most of the mask's
    entries are exactly zero, but others in other rows, so that every feature is used and learns."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        kind, values = choice(g, 8, 128), normal(g, 128, 8)
        marks = functional.one_hot(kind, 8).float() + 0.35 * normal(g, 128, 8)
        return (values, marks), values.gather(1, kind[:, None])

    return setup(Masked(width), sample, functional.mse_loss, 1e-2)


class Rescaled(nn.Module):
    """A recurrent forecaster that works on standardized values and gives its answer in the raw unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, 4)

    def forward(self, past: Tensor) -> Tensor:
        states, _ = self.gru((past - 5000) / 800)
        return 5000 + 800 * self.head(states[:, -1])


@healthy(
    "contact17b-healthy-rawunit",
    huge("*", 1e4),
    source="https://github.com/sktime/pytorch-forecasting/issues/410",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rawunit(width: int) -> Setup:
    """Forecasting where inputs are standardized and predictions are scaled back before the loss: the targets
    stay in thousands, loss and gradients are huge, and Adam, which does not care, trains."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        time = torch.arange(20)
        x = 5000 + 1000 * torch.sin(0.4 * time + 6.3 * uniform(g, 32, 1)) + 80 * normal(g, 32, 20)
        return x[:, :16, None], x[:, 16:]

    return setup(Rescaled(width), sample, functional.mse_loss, adam(5e-3))
