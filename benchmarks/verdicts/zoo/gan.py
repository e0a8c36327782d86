"""Generators and discriminators, each in the step of one of the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .claims import every, fading, flat, no_gradient, not_finite, tiny
from .data import Setup, adam, frozen, normal, seeded, setup, sgd, stack, trained
from .registry import FLOAT32, healthy, sick

NOISE, SIZE = 4, 8


def generator(width: int, bounded: bool = False) -> nn.Sequential:
    """Return a generator of points of eight features from noise of four."""
    last = nn.Tanh() if bounded else nn.Identity()
    return stack(
        fc0=nn.Linear(NOISE, width),
        act0=nn.ReLU(),
        fc1=nn.Linear(width, width),
        act1=nn.ReLU(),
        out=nn.Linear(width, SIZE),
        last=last,
    )


def judge(width: int) -> nn.Sequential:
    """Return a discriminator of points of eight features, which returns a logit."""
    return stack(
        fc0=nn.Linear(SIZE, width),
        act0=nn.LeakyReLU(0.2),
        fc1=nn.Linear(width, width),
        act1=nn.LeakyReLU(0.2),
        out=nn.Linear(width, 1),
    )


def rms(rate: float) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return a maker of RMSprop, which critics with clipped weights are trained with."""
    return lambda parameters: torch.optim.RMSprop(parameters, lr=rate)


def real_points(g: torch.Generator, number: int = 32) -> Tensor:
    """Return samples of what is to be imitated."""
    mix = normal(seeded(21), NOISE, SIZE) / 2
    return 2 + normal(g, number, NOISE) @ mix


def noise_and_real(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], None]:
    """Return a batch of noise and of real points."""
    return (normal(g, 32, NOISE), real_points(g)), None


class Pair(nn.Module):
    """A generator and its judge; the output is the judge's word on (fakes, real)."""

    def __init__(self, gen: nn.Module, disc: nn.Module, detach: bool = False) -> None:
        super().__init__()
        self.gen, self.disc, self.detach = gen, disc, detach

    def forward(self, noise: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the judge's output for generated and for real points."""
        fake = self.gen(noise)
        return self.disc(fake.detach() if self.detach else fake), self.disc(real)


def fooled(output: tuple[Tensor, Tensor], target: None) -> Tensor:
    """Return the generator's loss that does not saturate."""
    return F.softplus(-output[0]).mean()


@sick("gan-fakes-detached-in-generator-step", [("DEAD", "gen")], no_gradient("gen"))
def fakes_detached(sick: bool, width: int) -> Setup:
    """The `detach` of the discriminator's step is left in the generator's, which also calibrates the judge's
    word: only that learns, and the generator never moves."""

    class Calibrated(Pair):
        def __init__(self) -> None:
            super().__init__(generator(width), frozen(judge(width)), detach=sick)
            self.calibration = nn.Linear(1, 1)

        def forward(self, noise: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            fake, true = super().forward(noise, real)
            return fake, true, self.calibration(torch.cat([fake, true]).detach())

    def loss(output: tuple[Tensor, Tensor, Tensor], target: None) -> Tensor:
        fake, true, word = output
        truth = torch.cat([torch.zeros_like(fake), torch.ones_like(true)])
        return fooled((fake, true), None) + 0.1 * F.binary_cross_entropy_with_logits(word, truth)

    return setup(Calibrated(), noise_and_real, loss, 5e-3)


@sick(
    "gan-discriminator-has-won",
    [("SATURATION", "disc")],
    every(flat("disc", "sigmoid of", 0.8), tiny("gen", 1e-3)),
    allow=["VANISHING", "DEAD"],
    source="https://arxiv.org/abs/1701.04862",
    dtypes=(FLOAT32,),
    steps=200,
)
def discriminator_has_won(sick: bool, width: int) -> Setup:
    """The generator minimises log(1 - D) against a discriminator that is sure of every fake: nothing comes
    back through its sigmoid. The loss -log D of a judge that is not ahead does."""
    gen, disc = generator(width), judge(width)
    if sick:
        both = setup(
            Pair(gen, disc, detach=True),
            noise_and_real,
            lambda o, _: F.softplus(o[0]).mean() + F.softplus(-o[1]).mean(),
            1e-2,
            trains=disc.parameters,
        )
        trained(both, 600)

    def losing(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        return torch.log(1 - torch.sigmoid(output[0]) + 1e-8).mean()

    return setup(Pair(gen, frozen(disc)), noise_and_real, losing if sick else fooled, sgd(0.1, 0.9))


@sick(
    "gan-tanh-output-at-its-ends", [("SATURATION", "gen")], flat("gen.last", "tanh", 0.6), allow=["VANISHING"]
)
def tanh_output(sick: bool, width: int) -> Setup:
    """The generator's last layer is drawn a hundred times too large before a tanh: every output is -1 or 1,
    and the matching of features cannot move it."""
    net = Pair(generator(width, bounded=True), frozen(nn.Linear(SIZE, 16)))
    with torch.no_grad():
        net.gen.out.weight.mul_(100.0 if sick else 1.0)

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], None]:
        return (normal(g, 64, NOISE), torch.tanh(real_points(g, 64)) / 2), None

    def matched(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        fake, real = output
        return (fake.mean(0) - real.mean(0)).square().mean() + (fake.std(0) - real.std(0)).square().mean()

    return setup(net, sample, matched, 3e-3)


@sick(
    "gan-critic-clipped-to-a-hundredth",
    [("VANISHING", "critic")],
    fading("critic.c0", "critic.c5", 1e-5),
    allow=["BOTTLENECK", "DEAD"],
    widths=(8, 16),
    dtypes=(FLOAT32,),
    source="https://arxiv.org/abs/1701.07875",
)
def critic_clipped(sick: bool, width: int) -> Setup:
    """A convolutional critic of six layers with weights clipped to a hundredth: each layer keeps a small part
    of the gradient. Without the clipping, and with a penalty, it is whole."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: dict[str, nn.Module] = {}
            for i in range(6):
                layers[f"c{i}"] = nn.Conv2d(1 if i == 0 else width, width, 3, padding=1)
                nn.init.kaiming_normal_(layers[f"c{i}"].weight, a=0.2)
                layers[f"a{i}"] = nn.LeakyReLU(0.2)
            self.critic = stack(
                **layers, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), out=nn.Linear(width, 1)
            )
            if sick:
                with torch.no_grad():
                    for parameter in self.parameters():
                        parameter.clamp_(-0.01, 0.01)

        def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
            return self.critic(real), self.critic(fake)

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], None]:
        return (0.5 + normal(g, 16, 1, 6, 6), normal(g, 16, 1, 6, 6)), None

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        real, fake = output
        return fake.mean() - real.mean() + 0.01 * (real.square() + fake.square()).mean()

    return setup(Critic(), sample, loss, rms(5e-5) if sick else adam(1e-3))


@sick(
    "gan-log-of-a-sure-judge",
    [("NUMERICAL", "*")],
    not_finite(),
    allow=["SATURATION", "VANISHING", "DEAD", "UNSTABLE", "EXPLODING"],
    dtypes=(FLOAT32,),
)
def log_of_sure_judge(sick: bool, width: int) -> Setup:
    """The losses are logarithms of a sigmoid by hand, and the judge is so sure that it is exactly one: log 0.
    The loss on logits has no such point, and this judge is not so sure."""
    net = Pair(generator(width), judge(width))
    with torch.no_grad():
        net.disc.out.weight.mul_(2000.0 if sick else 1.0)

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        fake, real = output
        if sick:
            return -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    return setup(net, noise_and_real, loss, 3e-3, trains=net.disc.parameters)


@healthy("gan-ok-generator-step", no_gradient("disc", after=1))
def ok_generator_step(width: int) -> Setup:
    """The generator's step: the judge is frozen for it, and its gradients are absent."""
    return setup(Pair(generator(width), frozen(judge(width))), noise_and_real, fooled, 5e-3)


@healthy("gan-ok-discriminator-step")
def ok_discriminator_step(width: int) -> Setup:
    """The discriminator's step, with detached fakes: the generator is another optimizer's, and gets
    nothing."""
    net = Pair(generator(width), judge(width), detach=True)
    return setup(
        net,
        noise_and_real,
        lambda o, _: F.softplus(o[0]).mean() + F.softplus(-o[1]).mean(),
        3e-3,
        trains=net.disc.parameters,
    )


@healthy("gan-ok-least-squares", source="https://arxiv.org/abs/1611.04076")
def ok_least_squares(width: int) -> Setup:
    """A least-squares judge that is half right, with label noise: both of its losses stay alive."""
    net = Pair(frozen(generator(width)), judge(width))

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        fake, real = output
        return (fake + 1).square().mean() + (real - 1 + 0.1 * torch.randn_like(real)).square().mean()

    return setup(net, noise_and_real, loss, 3e-3)
