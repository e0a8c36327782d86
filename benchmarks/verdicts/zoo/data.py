"""Small synthetic tasks from seeded generators, and the `Setup` that joins one to a model and a loss."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from .registry import Setup, call

Sample = Callable[[Generator], tuple[Any, Any]]


def seeded(seed: int) -> Generator:
    """Return a generator of its own."""
    return torch.Generator().manual_seed(seed)


def normal(g: Generator, *shape: int) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, generator=g)


def uniform(g: Generator, *shape: int) -> Tensor:
    """Return numbers between 0 and 1."""
    return torch.rand(*shape, generator=g)


def choice(g: Generator, number: int, *shape: int) -> Tensor:
    """Return integers below a number."""
    return torch.randint(0, number, shape, generator=g)


def adam(rate: float) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return a maker of Adam."""
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def sgd(rate: float, momentum: float = 0.0) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return a maker of gradient descent."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=momentum)


def setup(
    model: nn.Module,
    sample: Sample,
    loss: Callable[[Any, Any], Tensor],
    optimizer: Callable[[Iterable[Tensor]], Optimizer] | float = 3e-3,
    *,
    trains: Callable[[], Iterable[Tensor]] | None = None,
    seed: int = 0,
) -> Setup:
    """Return the setup of a model, of `sample` for (inputs, target), and of `loss` for (output, target).

    `optimizer` is a rate for Adam, or a maker; `trains` returns the parameters that it gets, which are those
    that require a gradient unless told.
    """
    g = seeded(seed)
    latest: dict[str, Any] = {}
    make = adam(optimizer) if isinstance(optimizer, float) else optimizer

    def make_batch() -> Any:
        inputs, latest["target"] = sample(g)
        return inputs

    def loss_fn(output: Any) -> Tensor:
        return loss(output, latest["target"])

    def make_optimizer() -> Optimizer:
        return make([p for p in (trains or model.parameters)() if p.requires_grad])

    return Setup(model, make_batch, loss_fn, make_optimizer)


def trained(ready: Setup, steps: int, optimizer: Optimizer | None = None) -> Setup:
    """Return the setup after some steps of training, by default with its own optimizer."""
    optimizer = optimizer or ready.optimizer()
    for _ in range(steps):
        optimizer.zero_grad()
        ready.loss_fn(call(ready.model, ready.make_batch())).backward()
        optimizer.step()
    optimizer.zero_grad()
    return ready


def stack(**layers: nn.Module) -> nn.Sequential:
    """Return the layers one after the other, by name."""
    return nn.Sequential(OrderedDict(layers))


def frozen(module: nn.Module) -> nn.Module:
    """Return the module with nothing in it to train."""
    return module.requires_grad_(False)


# ---------------------------------------------------------------------------------------- the tasks


def clusters(size: int, kinds: int, number: int = 32, spread: float = 0.7) -> Sample:
    """Points round as many centres as there are classes; the target is the class."""
    centres = normal(seeded(11), kinds, size)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, kinds, number)
        return centres[kind] + spread * normal(g, number, size), kind

    return sample


def two_sides(size: int, number: int = 32) -> Sample:
    """Points on either side of a plane; the target is 0 or 1, of shape (number, 1)."""
    plane = normal(seeded(12), size)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, number, size)
        return x, (x @ plane > 0).float()[:, None]

    return sample


def surface(
    size: int, number: int = 32, outputs: int = 1, *, scale: float = 1.0, shift: float = 0.0
) -> Sample:
    """Regression on a smooth function of the features, of unit size before scale and shift."""
    w = normal(seeded(13), size, outputs) / math.sqrt(size)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, number, size)
        return x, scale * (torch.sin(2 * (x @ w)) + 0.5 * (x @ w)) + shift

    return sample


def factors(size: int, rank: int, number: int = 64, noise: float = 0.05) -> Sample:
    """Data of a given rank to be reconstructed: the target is the input."""
    mix = normal(seeded(14), rank, size) / math.sqrt(rank)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, number, rank) @ mix + noise * normal(g, number, size)
        return x, x

    return sample


def textures(kinds: int = 4, number: int = 16, size: int = 8, channels: int = 3) -> Sample:
    """Pictures of stripes whose direction and colour tell the class."""
    g0 = seeded(15)
    waves, colours = normal(g0, kinds, 2), normal(g0, kinds, channels)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, kinds, number)
        phase = waves[kind, 0, None, None] * rows + waves[kind, 1, None, None] * columns
        phase = phase + 6.3 * uniform(g, number, 1, 1)
        picture = torch.sin(phase)[:, None] + colours[kind][..., None, None]
        return picture + 0.3 * normal(g, number, channels, size, size), kind

    return sample


def discs(number: int = 8, size: int = 12) -> Sample:
    """Noisy pictures of one bright disc; the target is its mask, of shape (number, 1, size, size)."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        centre = 2 + (size - 4) * uniform(g, number, 2, 1, 1)
        mask = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < 9).float()[:, None]
        return mask + 0.5 * normal(g, number, 1, size, size), mask

    return sample


def grammar(words: int = 16, length: int = 12, number: int = 16, certain: float = 0.9) -> Sample:
    """Sequences of tokens where the next one mostly follows from the last by a fixed permutation."""
    follow = torch.randperm(words, generator=seeded(16))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, words, number, length + 1)
        for t in range(length):
            sure = uniform(g, number) < certain
            tokens[:, t + 1] = torch.where(sure, follow[tokens[:, t]], tokens[:, t + 1])
        return tokens[:, :-1], tokens[:, 1:]

    return sample


def series(length: int = 24, number: int = 16, features: int = 4) -> Sample:
    """Sequences whose class is told by a pattern in the first quarter; the rest is noise."""
    patterns = 1.5 * normal(seeded(17), 3, max(length // 4, 1), features)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 3, number)
        x = 0.5 * normal(g, number, length, features)
        x[:, : patterns.shape[1]] += patterns[kind]
        return x, kind

    return sample


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy over all tokens."""
    return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())
