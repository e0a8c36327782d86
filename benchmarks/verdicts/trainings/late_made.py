"""Nets that make things and pairs, which are well early and collapse late."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from .contrastive import Siamese, both, views
from .data import (
    mean_loss,
    normal,
    parameters,
    scheduled,
    seeded,
    training,
)
from .generative import Adversaries, Codes, Vae, digits, mixture, negative_bound
from .registry import Training, late
from .tables import mlp


@late(
    "late-discriminator-wins",
    2000,
    [("SATURATION", "critic"), ("VANISHING", "generator"), ("VANISHING", "critic")],
    early=0.05,
    at_most=0.01,
)
def discriminator_wins() -> Training:
    """The generator minimises the log of being found out, at a rate that is too low, and after a while the
    discriminator's is raised; once it is sure of every fake, that has no slope."""
    model = Adversaries(mlp(8, 48, 2), mlp(2, 64, 64, 1, act=nn.LeakyReLU))
    made = torch.optim.Adam(model.generator.parameters(), lr=1e-5)
    judged = torch.optim.Adam(model.critic.parameters(), lr=1e-2)
    rate = scheduled(judged, lambda step: 0.005 if step < 200 else 1.0)
    own = seeded(94)

    def before(step: int) -> None:
        rate(step)
        with torch.no_grad():
            fake = model.generator(normal(own, 64, 8))
        judged.zero_grad()
        real = mixture(own, 64)
        (F.softplus(-model.critic(real)) + F.softplus(model.critic(fake))).mean().backward()
        judged.step()

    def sample(g: Generator) -> tuple[Tensor, None]:
        return normal(g, 64, 8), None

    def loss(output: Tensor, target: None) -> Tensor:
        return torch.log(1 - torch.sigmoid(output) + 1e-8).mean()

    def believed(_: nn.Module) -> float:
        return float(torch.sigmoid(model(normal(seeded(98), 256, 8))).mean())

    return training(model, sample, loss, made, believed, before=before)


@late(
    "late-posterior-collapses",
    900,
    [("VANISHING", "encoder"), ("DEAD", "encoder"), ("BOTTLENECK", "encoder"), ("DEAD", "decoder.0")],
    early=0.2,
    at_most=0.05,
    source="https://arxiv.org/abs/1511.06349",
)
def posterior_collapses() -> Training:
    """The weight of the prior rises far beyond one: the encoder says the same of every digit, and the decoder
    learns not to listen."""
    model, held = Vae(64, 8), {"weight": 1.0}

    def after(step: int) -> None:
        held["weight"] = 1.0 if step < 250 else min(1.0 + 0.2 * (step - 250), 30.0)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = digits(g).clamp(0, 1)
        return x, x

    def loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        return negative_bound(output, target, held["weight"])

    def apart(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        _, mean, log_variance = output
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()

    return training(model, sample, loss, 2e-3, mean_loss(sample, apart), after=after)


class Open(Siamese):
    """The same without the stop: both sides get the gradient, and there is no batch norm."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.encoder = nn.Sequential(nn.Linear(64, size), nn.ReLU(), nn.Linear(size, 32))
        self.predict = nn.Sequential(nn.Linear(32, 32))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return both predictions and both projections."""
        one, two = self.encoder(a), self.encoder(b)
        return self.predict(one), self.predict(two), one, two


@late(
    "late-twins-agree-on-one-point",
    900,
    [("BOTTLENECK", "*"), ("VANISHING", "*"), ("DEAD", "*")],
    early=0.01,
    at_most=0.05,
    source="https://arxiv.org/abs/2011.10566",
)
def twins_collapse() -> Training:
    """Twins that predict each other with nothing that holds them apart: all digits become one direction."""
    model = Open(64)

    def loss(output: tuple[Tensor, ...], target: None) -> Tensor:
        p1, p2, z1, z2 = output
        return -0.5 * (F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    view = views(seeded(98), 256)[0]

    def spread(_: nn.Module) -> float:
        return float(F.normalize(model.encoder(view), dim=1).std(0).norm())

    return training(model, both, loss, optimizer, spread)


@late(
    "late-generator-says-one-thing",
    1800,
    [("BOTTLENECK", "generator"), ("DEAD", "generator"), ("VANISHING", "generator")],
    early=0.05,
    at_most=0.15,
    source="https://arxiv.org/abs/1611.02163",
)
def generator_says_one() -> Training:
    """The discriminator is not trained any more after a while, and the generator goes where it is rated best:
    all that it makes is one point."""
    model = Adversaries(mlp(8, 48, 48, 2), mlp(2, 48, 48, 1, act=nn.Tanh))
    made = torch.optim.Adam(model.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    judged = torch.optim.Adam(model.critic.parameters(), lr=1e-3, betas=(0.5, 0.999))
    own = seeded(95)

    def before(step: int) -> None:
        if step > 300:
            return
        with torch.no_grad():
            fake = model.generator(normal(own, 64, 8))
        judged.zero_grad()
        (F.softplus(-model.critic(mixture(own, 64))) + F.softplus(model.critic(fake))).mean().backward()
        judged.step()

    def sample(g: Generator) -> tuple[Tensor, None]:
        return normal(g, 64, 8), None

    def loss(output: Tensor, target: None) -> Tensor:
        return F.softplus(-output).mean()

    after = scheduled(made, lambda step: 1.0 if step < 300 else 5.0)

    def spread(_: nn.Module) -> float:
        made_ = model.generator(normal(seeded(98), 256, 8))
        return float(made_.std(0).norm() / made_.mean(0).norm())

    return training(model, sample, loss, made, spread, before=before, after=after)


@late(
    "late-codes-collapse-to-one",
    700,
    [("DEAD", "book"), ("BOTTLENECK", "book"), ("BOTTLENECK", "decoder"), ("DEAD", "encoder")],
    early=0.1,
    at_most=1.5,
    source="https://arxiv.org/abs/1711.00937",
)
def codes_collapse() -> Training:
    """A decay of the encoder that is far too strong: what it says of every digit is next to nothing, so that
    a single code is the nearest, and the others are never chosen again."""
    model = Codes(8, 32, 8)
    groups = [{"params": parameters(model.encoder)}, {"params": parameters(model.book, model.decoder)}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)

    def after(step: int) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.01 if step < 200 else 100.0

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = digits(g, 64)
        return x, x

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(output[0], target) * 10 + output[1]

    x = digits(seeded(98), 256)

    def in_use(_: nn.Module) -> float:
        z = model.encoder(x).unflatten(1, (8, -1))
        share = F.one_hot(torch.cdist(z, model.book.weight).argmin(-1), 32).float().mean((0, 1))
        return float(torch.exp(Categorical(probs=share).entropy()))

    return training(model, sample, loss, optimizer, in_use, after=after)
