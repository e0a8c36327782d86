"""Autoencoders, variational and quantised, and density models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from .claims import every, no_gradient, not_finite, rank_below, stuck, zero_at_first
from .data import Setup, factors, normal, setup, stack
from .registry import healthy, sick

SIZE = 16


def encoder(width: int, code: int) -> nn.Sequential:
    """Return an encoder of 16 features."""
    return stack(fc0=nn.Linear(SIZE, width), act0=nn.GELU(), fc1=nn.Linear(width, code))


def decoder(width: int, code: int) -> nn.Sequential:
    """Return a decoder to 16 features."""
    return stack(fc0=nn.Linear(code, width), act0=nn.GELU(), fc1=nn.Linear(width, SIZE))


class Variational(nn.Module):
    """A variational autoencoder; the output is (reconstruction, mean, log variance)."""

    def __init__(self, width: int, code: int = 6, *, cut: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder, self.cut = encoder(width, 2 * code), decoder(width, code), cut

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the decoder makes of a draw, and the code's mean and log variance."""
        mean, logvar = self.encoder(x).chunk(2, -1)
        draws = Normal(mean.float(), (0.5 * logvar.float()).exp())
        z = draws.sample() if self.cut else draws.rsample()
        return self.decoder(z.to(x.dtype)), mean, logvar


def elbo(weight: float, output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """Return the squared error and the weighted divergence from a standard normal."""
    y, mean, logvar = output
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1).mean()
    return (y - x).square().sum(-1).mean() + weight * divergence


@sick(
    "vae-sample-for-rsample",
    [("DEAD", "encoder")],
    no_gradient("encoder"),
    source="https://arxiv.org/abs/1312.6114",
)
def sample_for_rsample(sick: bool, width: int) -> Setup:
    """`sample` of a distribution has no gradient, `rsample` has; the divergence, which would hide it, is not
    switched on yet."""
    net = Variational(width, cut=sick)
    if not sick:
        nn.init.constant_(net.encoder.fc1.bias[6:].data, -4.0)
    return setup(net, factors(SIZE, 4), lambda o, x: elbo(0.0, o, x), 5e-3, seed=1)


@sick(
    "vae-scalar-levels-by-round",
    [("DEAD", "encoder")],
    no_gradient("encoder"),
    source="https://arxiv.org/abs/2309.15505",
)
def levels_by_round(sick: bool, width: int) -> Setup:
    """A code of a few levels by `round`, and the step that lets the gradient past it was left out."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = encoder(width, 6), decoder(width, 6)

        def forward(self, x: Tensor) -> Tensor:
            z = 3 * torch.tanh(self.encoder(x))
            return self.decoder(z.round() if sick else z + (z.round() - z).detach())

    return setup(Quantised(), factors(SIZE, 4), F.mse_loss, 1e-2)


@sick("vae-prior-under-no-grad", [("DEAD", "prior")], no_gradient("prior"))
def prior_on_wrong_code(sick: bool, width: int) -> Setup:
    """A learned prior is called under no_grad, as samplers do, and its loss on the code cannot reach it."""

    class WithPrior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.prior = encoder(width, 4), decoder(width, 4), nn.Linear(2, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z = self.encoder(x)
            with torch.set_grad_enabled(not sick):
                guess = self.prior(x[:, :2])
            return self.decoder(z), z, guess

    def loss(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        y, z, guess = output
        mean, logvar = guess.chunk(2, -1)
        fit = 0.5 * ((z.detach() - mean).square() / logvar.exp() + logvar).mean()
        return F.mse_loss(y, x) + 0.1 * fit + 0.01 * z.square().mean()

    return setup(WithPrior(), factors(SIZE, 4), loss, 5e-3)


@sick("vae-log-of-a-negative-scale", [("NUMERICAL", "*")], not_finite(), allow=["UNSTABLE", "EXPLODING"])
def log_of_negative(sick: bool, width: int) -> Setup:
    """The predicted standard deviation is a linear layer's output, which may be negative, and its logarithm
    is taken; softplus keeps it above zero."""

    class Gauss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stack(fc=nn.Linear(SIZE, width), act=nn.GELU())
            self.mean, self.scale = nn.Linear(width, SIZE), nn.Linear(width, SIZE)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.mean(h), self.scale(h) if sick else F.softplus(self.scale(h)) + 1e-2

    def loss(output: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        mean, scale = output
        return 3 + (torch.log(scale) + 0.5 * ((x - mean) / scale).square()).mean()

    return setup(Gauss(), factors(SIZE, 4), loss, 5e-3)


@sick(
    "vae-mixture-density-underflow",
    [("NUMERICAL", "*")],
    not_finite(),
    source="https://arxiv.org/abs/1308.0850",
    allow=["EXPLODING"],
)
def mixture_underflow(sick: bool, width: int) -> Setup:
    """Densities of a mixture are added up and then the logarithm is taken: far from every component all are
    exactly zero. `logsumexp` of log densities is never empty."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stack(fc=nn.Linear(4, width), act=nn.Tanh())
            self.head = nn.Linear(width, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 32, 4)
        return x, 20 * torch.sign(x[:, :1]) + x[:, 1:2]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        weight, mean, logscale = output.chunk(3, -1)
        scale = logscale.clamp(-3, 3).exp()
        logs = -0.5 * ((y - mean) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
        if sick:
            return -torch.log((weight.softmax(-1) * logs.exp()).sum(-1)).mean()
        return -torch.logsumexp(weight.log_softmax(-1) + logs, -1).mean()

    return setup(Mixture(), sample, loss, 3e-2)


@sick(
    "vae-code-of-one-number",
    [("BOTTLENECK", "encoder")],
    every(rank_below("encoder", 1.01), stuck(0.4, steps=150)),
    allow=["VANISHING"],
    steps=150,
)
def code_of_one_number(sick: bool, width: int) -> Setup:
    """Data of eight factors go through a code of one number, and most of it cannot come back; eight do."""
    k = 1 if sick else 8
    net = stack(encoder=encoder(width, k), decoder=decoder(width, k))
    return setup(net, factors(SIZE, 8), F.mse_loss, 1e-2)


@healthy("vae-ok-standard")
def ok_standard(width: int) -> Setup:
    """A variational autoencoder with both of its losses: the code is noise at first, and comes to life."""
    return setup(Variational(width), factors(SIZE, 4), lambda o, x: elbo(0.2, o, x), 5e-3)


@healthy("vae-ok-code-as-wide-as-the-data-are", rank_below("encoder", 4.01), steps=150)
def ok_code_by_design(width: int) -> Setup:
    """An autoencoder squeezes 16 features into four, by design: the data have four factors."""
    return setup(
        stack(encoder=encoder(width, 4), decoder=decoder(width, 4)), factors(SIZE, 4), F.mse_loss, 1e-2
    )


@healthy("vae-ok-zero-divergence-head", zero_at_first("encoder.fc0"))
def ok_zero_head(width: int) -> Setup:
    """The encoder's last layer starts at zero, mean zero and variance one, as some codes of the craft do:
    what is below it gets nothing in the first step."""
    net = Variational(width)
    nn.init.zeros_(net.encoder.fc1.weight), nn.init.zeros_(net.encoder.fc1.bias)
    with torch.no_grad():
        net.encoder.fc1.bias[6:] = -3.0
    return setup(net, factors(SIZE, 4), lambda o, x: elbo(0.05, o, x), 1e-2)


@healthy("vae-ok-denoiser-with-masked-inputs")
def ok_denoiser(width: int) -> Setup:
    """Three quarters of the inputs are hidden at random, and all are to be told: noisy, and it learns."""
    inner = factors(SIZE, 2)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, _ = inner(g)
        return x * (torch.rand(x.shape, generator=g) < 0.25) * 2, x

    return setup(stack(encoder=encoder(width, 8), decoder=decoder(width, 8)), sample, F.mse_loss, 1e-2)
