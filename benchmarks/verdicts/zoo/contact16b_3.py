"""Healthy trainings that look sick, after public reports: points, spikes, bits, experts, flows, codes."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, flat, training, zero_at_first
from .contact16b_1 import ONE, starts_above
from .contact16b_2 import BinaryLinear, Sign
from .data import (
    adam,
    choice,
    clusters,
    factors,
    frozen,
    grammar,
    normal,
    seeded,
    series,
    setup,
    sgd,
    stack,
    surface,
    token_loss,
    uniform,
)
from .registry import Setup, healthy


def zero_steps(least: int, *, steps: int = 60) -> Claim:
    """In at least so many of the first steps every gradient is exactly zero."""

    def claim(ready: Setup) -> tuple[bool, str]:
        seen = sum(step.norm("*") == 0 for step in training(ready, steps))
        return seen >= least, f"no gradient at all in {seen} of {steps} steps"

    return claim


def zero_share(module: str, above: float, *, steps: int = 5) -> Claim:
    """More than a share of the gradient with respect to a module's output is exactly zero."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        seen = float((last.outputs[module].grad == 0).float().mean())
        return seen > above, f"{seen:.0%} of the gradient at {module} is zero"

    return claim


def quiet(module: str, below: float, *, steps: int = 5) -> Claim:
    """Only a small share of a module's outputs, at its last call, is not zero."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        seen = float((last.outputs[module] != 0).float().mean())
        return seen < below, f"{seen:.0%} of {module} is not zero"

    return claim


def zero_rows(parameter: str, share: float, *, steps: int = 5) -> Claim:
    """More than a share of a parameter's rows has no gradient."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps)
        seen = float((last.grads[parameter] == 0).all(1).float().mean())
        return seen > share, f"{seen:.0%} of the rows of {parameter} have no gradient"

    return claim


# ------------------------------------------------------------------------------------ point clouds


class PointEmbedding(nn.Module):
    """A layer for each point, the largest over points, a unit vector for the cloud."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.cloud = nn.Linear(width, 16)

    def forward(self, clouds: Tensor) -> Tensor:
        """Return a vector for each cloud, (clouds, points, 3) to (clouds, 16)."""
        return F.normalize(self.cloud(self.points(clouds).amax(1)), dim=-1)


@healthy(
    "contact16b-healthy-easytuples",
    zero_steps(5),
    source="https://github.com/mikacuy/pointnetvlad/issues/15",
    **ONE,
)
def easytuples(width: int) -> Setup:
    """A triplet loss on clouds of points goes up and down and is exactly zero in many steps, without any
    gradient. That is the hinge: in these tuples the negative is already far enough away."""
    places = normal(seeded(41), 24, 3) * (0.7 + 0.6 * uniform(seeded(42), 8, 1, 3))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        first = choice(g, 8, 3)
        other = (first + 1 + choice(g, 7, 3)) % 8
        clouds = places[torch.stack([first, first, other], 1)].flatten(0, 1)
        return clouds + 0.15 * normal(g, 9, 24, 3), first

    def loss(output: Tensor, _: Tensor) -> Tensor:
        anchor, same, other = output.reshape(3, 3, -1).unbind(1)
        near, far = (anchor - same).square().sum(-1), (anchor - other).square().sum(-1)
        return (near - far + 0.5).relu().mean()

    return setup(PointEmbedding(width), sample, loss, 2e-3)


# ------------------------------------------------------------------------------------------ spikes


class Spike(nn.Module):
    """One above zero, else nought, with the gradient of a fast sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the spikes."""
        soft = x / (1 + 5 * x.abs())
        return (x > 0).float() + soft - soft.detach()


class SpikingNet(nn.Module):
    """Leaky neurons that fire and reset, and readers that sum up what they get."""

    def __init__(self, inputs: int, width: int, kinds: int) -> None:
        super().__init__()
        self.current, self.spike = nn.Linear(inputs, width), Spike()
        self.read = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums, from inputs of (batch, time, features)."""
        current = self.current(x)
        potential, total = torch.zeros_like(current[:, 0]), 0.0
        for t in range(x.shape[1]):
            potential = 0.9 * potential + 0.6 * current[:, t]
            spikes = self.spike(potential - 1)
            potential = potential - spikes.detach()  # no gradient through the reset
            total = total + self.read(spikes)
        return total


@healthy(
    "contact16b-healthy-spikes",
    quiet("spike", 0.25),
    source="https://github.com/fzenke/spytorch/issues/2",
    **ONE,
)
def spikes(width: int) -> Setup:
    """Hardly any neuron of a spiking net fires at a time, the forward step has no slope, and the reset is cut
    out of the gradient. That is how such nets are trained: with a surrogate slope and a detached reset."""
    plain = series(24, 24, 6)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, kind = plain(g)
        return 2 * x, kind

    return setup(SpikingNet(6, width, 3), sample, F.cross_entropy, 5e-3)


# -------------------------------------------------------------------------------------------- bits


@healthy(
    "contact16b-healthy-latentbits",
    flat("sign", "one", 0.99),
    source="https://github.com/MatthieuCourbariaux/BinaryNet/issues/38",
    **ONE,
)
def latentbits(width: int) -> Setup:
    """All activations of a binary net lie at plus or minus one, and its weights are still floats in training.
    Both are meant: real weights collect the gradients, and only their signs are used."""
    model = stack(
        lift=nn.Linear(12, 2 * width),
        norm=nn.BatchNorm1d(2 * width),
        sign=Sign(),
        hidden=BinaryLinear(2 * width, 2 * width),
        norm2=nn.BatchNorm1d(2 * width),
        sign2=Sign(),
        head=BinaryLinear(2 * width, 6),
    )
    return setup(model, clusters(12, 6), F.cross_entropy, 1e-2)


# --------------------------------------------------------------------------------- experts and depth


class HalfDepth(nn.Module):
    """A block that only the half of the tokens with the highest scores pass; the rest go by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 1)
        self.norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, the chosen ones with what the block adds, weighted by their score."""
        scores = self.router(x)
        chosen = scores[..., 0].topk(x.shape[1] // 2, dim=1).indices[..., None].expand(-1, -1, x.shape[-1])
        weight = scores.gather(1, chosen[..., :1]).sigmoid()
        return x.scatter_add(1, chosen, weight * self.feed(self.norm(x.gather(1, chosen))))


@healthy(
    "contact16b-healthy-halfdepth",
    zero_share("first.router", 0.45),
    source="https://github.com/astramind-ai/Mixture-of-depths/issues/10",
    **ONE,
)
def halfdepth(width: int) -> Setup:
    """The router of a mixture of depths chooses by a top-k, which has no gradient, and half of its scores get
    exactly none. It learns all the same, since the chosen tokens' scores weigh what the block adds."""
    model = stack(
        embed=nn.Embedding(16, width),
        first=HalfDepth(width),
        second=HalfDepth(width),
        norm=nn.LayerNorm(width),
        head=nn.Linear(width, 16),
    )
    return setup(model, grammar(16, 12, 16), token_loss, 5e-3)


# ------------------------------------------------------------------------------------------- flows


class ControlledFlow(nn.Module):
    """Euler steps along a field whose last layer starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(width, width, bias=False)
        nn.init.zeros_(last.weight)
        self.field = stack(first=nn.Linear(width, width), act=nn.Tanh(), last=last, bound=nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """Return where the flow ends."""
        for _ in range(8):
            x = x + 0.25 * self.field(x)
        return x


@healthy(
    "contact16b-healthy-zerofield",
    zero_at_first("flow.field.first"),
    source="https://github.com/rtqichen/torchdiffeq/issues/209",
    **ONE,
)
def zerofield(width: int) -> Setup:
    """The last layer of a flow's field starts at zero, so the flow does nothing at first and the field's
    first layer gets no gradient in the first step. The last layer moves at once, and the rest follows."""
    model = stack(lift=nn.Linear(8, width), flow=ControlledFlow(width), lower=nn.Linear(width, 1))
    return setup(model, surface(8, number=64), F.mse_loss, 5e-3)


# ------------------------------------------------------------------------------- codes and students


class TopCode(nn.Module):
    """A code of which only the largest values are kept."""

    def __init__(self, size: int, code: int, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.shift = nn.Parameter(torch.zeros(size))
        self.encoder, self.decoder = nn.Linear(size, code), nn.Linear(code, size, bias=False)
        with torch.no_grad():
            self.encoder.weight.copy_(self.decoder.weight.T)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction."""
        code = self.encoder(x - self.shift).relu()
        values, places = code.topk(self.kept, dim=-1)
        sparse = torch.zeros_like(code).scatter(-1, places, values)
        return self.decoder(sparse) + self.shift


@healthy(
    "contact16b-healthy-topcode",
    zero_share("encoder", 0.85),
    source="https://github.com/braindecode/braindecode/pull/1152",
    **ONE,
)
def topcode(width: int) -> Setup:
    """More than four in five of a sparse autoencoder's features get no gradient from a sample. That is a
    top-k code: only the few features that are kept for a sample learn from it, and others from others."""
    return setup(TopCode(width, 2 * width, 8), factors(width, 12), F.mse_loss, 3e-3)


@healthy(
    "contact16b-healthy-bigsum",
    starts_above(100.0),
    source="https://github.com/denguir/student-teacher-anomaly-detection/issues/13",
    **ONE,
)
def bigsum(width: int) -> Setup:
    """A student that copies a frozen teacher for anomaly detection has a loss of hundreds. It is the squared
    error summed over the teacher's 512 features, not their mean, and it falls as it should."""

    def branch(hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, 512))

    teacher, student = frozen(branch(4 * width)), branch(2 * width)
    nn.init.normal_(teacher[2].weight, std=1 / math.sqrt(2 * width))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 1.5 * normal(g, 32, 12)
        return x, teacher(x)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(-1).mean()

    return setup(student, sample, loss, adam(5e-3))


# ------------------------------------------------------------------------------ continual learning


@healthy(
    "contact16b-healthy-oldrows",
    zero_rows("head.weight", 0.5),
    source="https://github.com/LAMDA-CL/LAMDA-PILOT/issues/21",
    **ONE,
)
def oldrows(width: int) -> Setup:
    """More than half of the rows of a head get no gradient. They belong to the classes of earlier tasks, and
    in this task the loss is meant to look at the new ones alone."""
    known, centres = 6, clusters(12, 5)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, kind = centres(g)
        return x, known + kind

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output[:, known:], target - known)

    model = stack(trunk=nn.Sequential(nn.Linear(12, width), nn.ReLU()), head=nn.Linear(width, known + 5))
    return setup(model, sample, loss, sgd(0.05, 0.9))
