"""Data for whole trainings, real and synthetic, and the `Training` that joins them to a model and a loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from sklearn import datasets
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from zoo import call
from zoo.data import Sample, choice, normal, seeded, uniform
from zoo.data import frozen as frozen
from zoo.data import token_loss as token_loss

from .registry import Hook, Training

Figure = Callable[[nn.Module], float]
Loss = Callable[[Any, Any], Tensor]


def training(
    model: nn.Module,
    sample: Sample,
    loss: Loss,
    optimizer: Optimizer | float,
    figure: Figure,
    *,
    clip: float | None = None,
    before: Hook | None = None,
    after: Hook | None = None,
) -> Training:
    """Return the training of a model on `sample` for (inputs, target) with `loss` for (output, target).

    `optimizer` may be a rate for Adam; `figure` is a function of the model; the others are as
    `Training` has them.
    """
    g = seeded(0)
    latest: dict[str, Any] = {}
    if not isinstance(optimizer, Optimizer):
        optimizer = torch.optim.Adam(parameters(model), lr=optimizer)

    def make_batch() -> Any:
        inputs, latest["target"] = sample(g)
        return inputs

    def loss_fn(output: Any) -> Tensor:
        return loss(output, latest["target"])

    return Training(model, make_batch, loss_fn, optimizer, lambda: figure(model), clip, before, after)


def scheduled(optimizer: Optimizer, factor: Callable[[int], float]) -> Hook:
    """Return a hook that sets the rates to the initial ones times a factor of the number of steps done."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]

    def after(step: int) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step + 1)

    after(-1)
    return after


def cosine(steps: int, *, warm: int = 0, floor: float = 0.01) -> Callable[[int], float]:
    """Return a factor that rises over `warm` steps and then falls as half a cosine to `floor` at `steps`."""

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        part = min((step - warm) / (steps - warm), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))

    return factor


def moving_average(target: nn.Module, source: nn.Module, keep: float) -> Hook:
    """Return a hook that moves the parameters of `target` towards those of `source`."""

    def after(step: int) -> None:
        with torch.no_grad():
            for old, new in zip(target.parameters(), source.parameters(), strict=True):
                old.lerp_(new, 1 - keep)

    return after


def rows(*columns: Tensor, size: int = 32) -> Sample:
    """Return random rows of a table: all columns but the last are inputs, the last the target."""

    def sample(g: Generator) -> tuple[Any, Tensor]:
        chosen = choice(g, len(columns[0]), size)
        *inputs, target = (column[chosen] for column in columns)
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), target

    return sample


def accuracy(inputs: Any, target: Tensor) -> Figure:
    """Return the figure: the share of right answers."""
    return lambda model: float((call(model, inputs).argmax(-1) == target).float().mean())


def mean_loss(sample: Sample, loss: Loss, number: int = 8) -> Figure:
    """Return the figure: the mean loss over batches from a generator of their own."""

    def figure(model: nn.Module) -> float:
        g, total = seeded(99), 0.0
        for _ in range(number):
            inputs, target = sample(g)
            total += float(loss(call(model, inputs), target))
        return total / number

    return figure


def explained(inputs: Any, target: Tensor) -> Figure:
    """Return the figure: the explained part of the target's variance."""
    return lambda model: float(1 - F.mse_loss(call(model, inputs), target) / target.var())


def parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """Return all parameters of some modules that require a gradient."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def fitted(model: nn.Module, sample: Sample, loss: Loss, steps: int, rate: float = 3e-3) -> nn.Module:
    """Return the model after a training of its own with Adam: what fine-tuning starts from."""
    training(model, sample, loss, rate, lambda _: 0.0).carry_on(steps)
    return model


# --------------------------------------------------------------------------------------- real data


@functools.lru_cache
def table(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (training inputs, training targets, test inputs, test targets) of one of scikit-learn's tables:
    digits, iris, wine, breast_cancer, diabetes. Inputs are standardised; targets are classes, or standardised
    numbers for diabetes; a quarter of the rows are for testing."""
    x, y = cast(tuple[np.ndarray, np.ndarray], getattr(datasets, f"load_{name}")(return_X_y=True))
    inputs = torch.tensor(x, dtype=torch.float32)
    target = torch.tensor(y, dtype=torch.float32 if name == "diabetes" else torch.long)
    order = torch.randperm(len(inputs), generator=seeded(5))
    inputs, target = inputs[order], target[order]
    inputs = inputs / 16 - 0.3 if name == "digits" else (inputs - inputs.mean(0)) / inputs.std(0)
    if name == "diabetes":
        target = ((target - target.mean()) / target.std())[:, None]
    cut = 3 * len(inputs) // 4
    return inputs[:cut], target[:cut], inputs[cut:], target[cut:]


@functools.lru_cache
def pictures() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the digits as pictures of shape (number, 1, 8, 8)."""
    x, y, xt, yt = table("digits")
    return x.reshape(-1, 1, 8, 8), y, xt.reshape(-1, 1, 8, 8), yt


@functools.lru_cache
def text() -> tuple[Tensor, int]:
    """Return Python's own help topics as tokens, one for each letter, and how many letters there are."""
    from pydoc_data.topics import topics

    told = "\n".join(topics[key] for key in sorted(topics))[:100_000].lower()
    letters = sorted(set(told))
    places = {letter: place for place, letter in enumerate(letters)}
    return torch.tensor([places[letter] for letter in told]), len(letters)


def passages(length: int = 32, size: int = 16) -> Sample:
    """Return passages of the text; the target is the next letter at every place."""
    tokens, _ = text()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        starts = choice(g, len(tokens) - length - 1, size)
        window = tokens[starts[:, None] + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:]

    return sample


# ----------------------------------------------------------------------------------- synthetic data


def moons(g: Generator, number: int) -> tuple[Tensor, Tensor]:
    """Return points on two half circles, shape (number, 2), and which one they are on."""
    side, angle = choice(g, 2, number), math.pi * uniform(g, number)
    x = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    x = torch.where(side[:, None] == 0, x, torch.tensor([1.0, 0.5]) - x)
    return x + 0.08 * normal(g, number, 2), side
