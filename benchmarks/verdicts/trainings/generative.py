"""Trainings of nets that make things: autoencoders, adversaries, flows, diffusion, and codes."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .data import (
    choice,
    mean_loss,
    moons,
    normal,
    pictures,
    seeded,
    table,
    training,
    uniform,
)
from .registry import Training, healthy
from .tables import mlp


def digits(g: Generator, number: int = 32) -> Tensor:
    """Return digits between 0 and 1, shape (number, 64)."""
    x = table("digits")[0]
    return x[choice(g, len(x), number)] + 0.3


class Vae(nn.Module):
    """An encoder to a normal distribution, a sample of it, and a decoder."""

    def __init__(self, size: int, latent: int) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, size, 2 * latent), mlp(latent, size, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decoder's logits, and the mean and log variance."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decoder(z), mean, log_variance


def negative_bound(output: tuple[Tensor, Tensor, Tensor], target: Tensor, weight: float = 1.0) -> Tensor:
    """Return the negative evidence bound per sample."""
    logits, mean, log_variance = output
    told = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
    apart = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return (told + weight * apart).mean()


@healthy("made-vae-digits", 700, at_most=30.0)
def vae() -> Training:
    """A variational autoencoder of digits."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = digits(g).clamp(0, 1)
        return x, x

    return training(Vae(96, 8), sample, negative_bound, 2e-3, mean_loss(sample, negative_bound))


@healthy("made-denoising-convolutional-autoencoder", 400, at_most=0.04)
def denoising() -> Training:
    """A convolutional autoencoder that takes noise away, with transposed convolutions."""
    x = pictures()[0]

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        clean = x[choice(g, len(x), 32)] + 0.3
        return clean + 0.2 * normal(g, *clean.shape), clean

    down = [nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU()]
    up = [nn.ConvTranspose2d(16, 12, 2, 2), nn.ReLU(), nn.ConvTranspose2d(12, 1, 2, 2), nn.Sigmoid()]
    model = nn.Sequential(*down, *up)
    return training(model, sample, F.mse_loss, 3e-3, mean_loss(sample, F.mse_loss))


class SparseCodes(nn.Module):
    """Many rectified codes, few of which are meant to fire."""

    def __init__(self, size: int, codes: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(size, codes), nn.Linear(codes, size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is made of the codes, and the codes."""
        codes = F.relu(self.encoder(x - self.decoder.bias))
        return self.decoder(codes), codes


@healthy("made-sparse-autoencoder", 800, at_most=0.03)
def sparse() -> Training:
    """A sparse autoencoder with more codes than pixels, as used to read what nets have learned."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = digits(g, 64)
        return x, x

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        made, codes = output
        return (made - target).square().mean() + 1e-3 * codes.sum(1).mean()

    def error(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return (output[0] - target).square().mean()

    return training(SparseCodes(64, 128), sample, loss, 1e-3, mean_loss(sample, error))


def mixture(g: Generator, number: int) -> Tensor:
    """Return points round eight places on a circle."""
    angle = choice(g, 8, number) * math.pi / 4
    return 2 * torch.stack([torch.cos(angle), torch.sin(angle)], 1) + 0.2 * normal(g, number, 2)


def reached(points: Tensor) -> float:
    """Return the share of points near any of the eight places, times the share of places with points near."""
    angle = torch.arange(8) * math.pi / 4
    near = torch.cdist(points, 2 * torch.stack([torch.cos(angle), torch.sin(angle)], 1)) < 0.6
    return float(near.any(1).float().mean() * (near.float().sum(0) > 5).float().mean())


class Adversaries(nn.Module):
    """A generator, judged by its critic."""

    def __init__(self, generator: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.generator, self.critic = generator, critic

    def forward(self, z: Tensor) -> Tensor:
        """Return the critic's logits of what is generated."""
        return self.critic(self.generator(z))


@healthy("made-gan-generator", 2500, at_least=0.5)
def gan_generator() -> Training:
    """The generator's turns of an adversarial pair on eight modes; the discriminator has its own optimizer,
    and its turn comes before."""
    model = Adversaries(mlp(8, 64, 64, 2), mlp(2, 64, 64, 1, act=nn.LeakyReLU))
    made = torch.optim.Adam(model.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    judged = torch.optim.Adam(model.critic.parameters(), lr=1e-3, betas=(0.5, 0.999))
    own = seeded(41)

    def before(step: int) -> None:
        with torch.no_grad():
            fake = model.generator(normal(own, 64, 8))
        judged.zero_grad()
        real = mixture(own, 64) + 0.2 * normal(own, 64, 2)
        fake = fake + 0.2 * normal(own, 64, 2)
        (F.softplus(-model.critic(real)) + F.softplus(model.critic(fake))).mean().backward()
        judged.step()

    def sample(g: Generator) -> tuple[Tensor, None]:
        return normal(g, 64, 8), None

    def loss(output: Tensor, target: None) -> Tensor:
        return F.softplus(-output).mean()

    def figure(net: nn.Module) -> float:
        return reached(model.generator(normal(seeded(98), 512, 8)))

    return training(model, sample, loss, made, figure, before=before)


@healthy("made-gan-discriminator-spectral-norm", 800, at_least=0.5)
def gan_discriminator() -> Training:
    """The discriminator's turns, with spectral norm and the hinge loss; the generator moves in between."""
    norm = nn.utils.parametrizations.spectral_norm
    generator = mlp(8, 64, 64, 2)
    layers = [norm(nn.Linear(2, 64)), nn.LeakyReLU(0.1), norm(nn.Linear(64, 64)), nn.LeakyReLU(0.1)]
    critic = nn.Sequential(*layers, norm(nn.Linear(64, 1)))
    made = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    judged = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.0, 0.9))
    own = seeded(42)

    def before(step: int) -> None:
        made.zero_grad()
        (-3 * critic(2 * generator(normal(own, 64, 8)))).mean().backward()
        made.step()

    def sample(g: Generator) -> tuple[Tensor, None]:
        with torch.no_grad():
            fake = generator(normal(g, 64, 8))
        return 2 * torch.cat([mixture(g, 64), fake]), None

    def loss(output: Tensor, target: None) -> Tensor:
        real, fake = (3 * output).chunk(2)
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

    def figure(net: nn.Module) -> float:
        return reached(generator(normal(seeded(98), 512, 8)))

    return training(critic, sample, loss, judged, figure, before=before)


@healthy("made-wgan-gradient-penalty-critic", 4000, at_least=0.4)
def wgan() -> Training:
    """The critic's turns of a Wasserstein pair, whose penalty is taken of a gradient inside the loss; the
    generator moves at every third."""
    generator, critic = mlp(8, 64, 64, 2), mlp(2, 64, 64, 1, act=nn.Softplus)
    made = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    judged = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))
    own, latest = seeded(43), {}

    def before(step: int) -> None:
        if step % 3 == 0:
            made.zero_grad()
            (-critic(generator(normal(own, 64, 8)))).mean().backward()
            made.step()

    def sample(g: Generator) -> tuple[Tensor, None]:
        with torch.no_grad():
            fake = generator(normal(g, 64, 8))
        real, part = mixture(g, 64), uniform(g, 64, 1)
        latest["between"] = (part * real + (1 - part) * fake).requires_grad_()
        return torch.cat([real, fake, latest["between"]]), None

    def loss(output: Tensor, target: None) -> Tensor:
        real, fake, between = output.chunk(3)
        (slope,) = torch.autograd.grad(between.sum(), latest["between"], create_graph=True)
        return fake.mean() - real.mean() + 1.0 * (slope.norm(dim=1) - 1).square().mean()

    def figure(net: nn.Module) -> float:
        return reached(generator(normal(seeded(98), 512, 8)))

    return training(critic, sample, loss, judged, figure, before=before)


class Denoiser(nn.Module):
    """Tells the noise in points from how far the noising has gone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = mlp(2 + 8, size, size, size, 2, act=nn.SiLU)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the noise of points (batch, 2) at times between 0 and 1."""
        waves = time[:, None] * torch.tensor([1.0, 3.0, 10.0, 30.0])
        return self.net(torch.cat([x, torch.sin(waves), torch.cos(waves)], 1))


@healthy("made-diffusion-points", 1000, at_most=0.45)
def diffusion() -> Training:
    """Diffusion on two moons: the noise is told at random times; a moving average is not needed."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, time, noise = moons(g, 128)[0], uniform(g, 128), normal(g, 128, 2)
        keep = torch.cos(0.5 * math.pi * time)[:, None]
        return (keep * x + (1 - keep**2).sqrt() * noise, time), noise

    return training(Denoiser(64), sample, F.mse_loss, 2e-3, mean_loss(sample, F.mse_loss, 16))


@healthy("made-flow-matching-digits", 600, at_most=0.7)
def flow_matching() -> Training:
    """Flow matching on digits: the velocity from noise to picture, with a class to go by."""
    x, y, *_ = table("digits")

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        chosen, noise, time = choice(g, len(x), 64), normal(g, 64, 64), uniform(g, 64, 1)
        to = 2 * x[chosen]
        return (time * to + (1 - time) * noise, time, y[chosen]), to - noise

    return training(Velocity(128), sample, F.mse_loss, 2e-3, mean_loss(sample, F.mse_loss))


class Velocity(nn.Module):
    """The velocity at a place, a time and for a class."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.kind, self.net = nn.Embedding(10, 16), mlp(64 + 1 + 16, size, size, 64, act=nn.GELU)

    def forward(self, x: Tensor, time: Tensor, kind: Tensor) -> Tensor:
        """Return the velocity (batch, 64)."""
        return self.net(torch.cat([x, time, self.kind(kind)], 1))


class Coupling(nn.Module):
    """Scales and shifts one half of the features by what the other half says."""

    def __init__(self, size: int, flip: bool) -> None:
        super().__init__()
        self.net, self.flip = mlp(1, size, 2, act=nn.Tanh), flip
        last = self.net[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the moved points and the log of the volume's change."""
        x = x.flip(1) if self.flip else x
        still, moved = x.chunk(2, 1)
        scale, shift = self.net(still).chunk(2, 1)
        scale = 2 * torch.tanh(scale / 2)
        return torch.cat([still, moved * scale.exp() + shift], 1), scale.sum(1)


class RealNvp(nn.Module):
    """Couplings that start as the identity."""

    def __init__(self, size: int, depth: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Coupling(size, bool(i % 2)) for i in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points in the latent space and the log of the volume's change."""
        volume = torch.zeros(len(x))
        for step in self.steps:
            x, more = step(x)
            volume = volume + more
        return x, volume


@healthy("made-normalising-flow-moons", 800, at_most=1.6, source="https://arxiv.org/abs/1605.08803")
def flow() -> Training:
    """A flow of couplings, whose nets start at zero, on two moons."""

    def sample(g: Generator) -> tuple[Tensor, None]:
        return moons(g, 128)[0], None

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        z, volume = output
        return (0.5 * z.square().sum(1) + math.log(2 * math.pi) - volume).mean()

    return training(RealNvp(32, 6), sample, loss, 3e-3, mean_loss(sample, loss), clip=5.0)


class Codes(nn.Module):
    """A vector-quantised autoencoder: each of several parts is one of a book of codes."""

    def __init__(self, parts: int, codes: int, size: int) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 96, parts * size), mlp(parts * size, 96, 64)
        self.book, self.parts = nn.Embedding(codes, size), parts
        nn.init.uniform_(self.book.weight, -0.5, 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is made of the codes, and what the codes cost."""
        z = self.encoder(x).unflatten(1, (self.parts, -1))
        chosen = self.book(torch.cdist(z, self.book.weight).argmin(-1))
        cost = F.mse_loss(chosen, z.detach()) + 0.25 * F.mse_loss(z, chosen.detach())
        return self.decoder((z + (chosen - z).detach()).flatten(1)), cost


@healthy("made-vq-vae-digits", 800, at_most=0.04, source="https://arxiv.org/abs/1711.00937")
def quantised() -> Training:
    """Digits made of eight codes out of thirty-two, with gradients passed straight through."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = digits(g, 64)
        return x, x

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(output[0], target) * 10 + output[1]

    def error(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(output[0], target)

    return training(Codes(8, 32, 8), sample, loss, 2e-3, mean_loss(sample, error))
