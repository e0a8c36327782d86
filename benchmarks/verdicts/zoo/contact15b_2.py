"""Cases after public reports: flows, physics-informed nets, GANs, optimisers, contrastive learning."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .claims import Claim, flat, loss_of, rises, stuck
from .data import clusters, grammar, normal, seeded, setup, sgd, token_loss, uniform
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}

# --------------------------------------------------------------------- flow: the exponential of any number


class Coupling(nn.Module):
    """Shift and scale one half by what the other half says; return the log of the volume too."""

    def __init__(self, one: int, two: int, width: int, bounded: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(one, width), nn.LeakyReLU(0.01), nn.Linear(width, 2 * two))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)
        self.one, self.bounded = one, bounded

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, other = x[:, : self.one], x[:, self.one :]
        shift, scale = self.net(kept).chunk(2, -1)
        if self.bounded:
            scale = 0.3 * torch.tanh(scale)
        return torch.cat([other * scale.exp() + shift, kept], -1), scale.sum(-1)


class Flow(nn.Module):
    """Couplings that take turns, to a normal distribution."""

    def __init__(self, width: int, bounded: bool) -> None:
        super().__init__()
        halves = [(4, 3) if i % 2 == 0 else (3, 4) for i in range(24)]
        self.couplings = nn.ModuleList(Coupling(a, b, width, bounded) for a, b in halves)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = torch.zeros(len(x))
        for coupling in self.couplings:
            x, more = coupling(x)
            volume = volume + more
        return x, volume


def spread_out(g: Generator) -> tuple[Tensor, None]:
    """Give seven numbers that hang together, and are now and then far from zero."""
    mix = normal(seeded(154), 7, 7)
    return normal(g, 64, 7) @ mix * (1.2 * normal(g, 64, 1)).exp(), None


def likelihood(output: tuple[Tensor, Tensor], _: None) -> Tensor:
    """Return the mean negative log likelihood."""
    z, volume = output
    return (0.5 * z.square().sum(-1) + 0.5 * 7 * math.log(2 * math.pi) - volume).mean()


@sick(
    "contact15b-flow-exponential",
    [("EXPLODING", "couplings")],
    rises(10.0),
    allow=("NUMERICAL", "UNSTABLE"),
    source="https://github.com/VincentStimper/normalizing-flows/issues/73",
    **ONE,
)
def flow_exponential(sick: bool, width: int) -> Setup:
    """Twenty-four affine couplings, each with the exponential of an unbounded network as its scale: what one
    makes large the next ones make larger, and the likelihood leaves the range of numbers. Repair: bound the
    logarithm of the scale."""
    return setup(Flow(width, not sick), spread_out, likelihood, 1e-2)


# --------------------------------------------------------------- physics: coordinates that are not rescaled


class Field(nn.Module):
    """A tanh network of place and time; return its value and what is left of u_t + u_x = 0."""

    def __init__(self, width: int, raw: bool) -> None:
        super().__init__()
        self.hidden1 = nn.Sequential(nn.Linear(2, width), nn.Tanh())
        self.hidden2 = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.out = nn.Linear(width, 1)
        self.raw = raw

    def forward(self, place: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            place = place.detach().requires_grad_()
            x = place if self.raw else place / 50 - 1
            u = self.out(self.hidden2(self.hidden1(x)))
            slope = torch.autograd.grad(u.sum(), place, create_graph=True)[0]
        return u, slope.sum(-1, keepdim=True) * 50


def wave(g: Generator) -> tuple[Tensor, Tensor]:
    """Give places and times from 0 to 100, and the height of a wave that travels."""
    place = 100 * uniform(g, 64, 2)
    return place, torch.sin((place[:, :1] - place[:, 1:]) / 20)


def physics(output: tuple[Tensor, Tensor], height: Tensor) -> Tensor:
    """Return the error of the data and a part of the residual."""
    return F.mse_loss(output[0], height) + 0.1 * output[1].square().mean()


@sick(
    "contact15b-pinn-raw",
    [("SATURATION", "hidden1")],
    flat("hidden1", "tanh", 0.7),
    allow=("BOTTLENECK", "VANISHING"),
    source="https://github.com/pierremtb/PINNs-TF2.0/issues/1",
    **ONE,
)
def pinn_raw(sick: bool, width: int) -> Setup:
    """The coordinates of a physics-informed net run to 100 and reach the first tanh as they are, at its flat
    ends. Repair: bring them to -1 … 1 first."""
    return setup(Field(width, sick), wave, physics, 5e-3)


# ------------------------------------------------------------- GAN: a tanh on a sum of unnormalised pictures


def shut(module: str, share: float) -> Claim:
    """More than a share of a module's numbers lets less than a tenth of the gradient pass."""

    def claim(ready: Setup) -> tuple[bool, str]:
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            copy = output.clone()
            for tensor in (inputs[0], copy):
                tensor.retain_grad()
                seen.append(tensor)
            return copy

        handle = ready.model.get_submodule(module).register_forward_hook(keep)
        loss_of(ready).backward()
        handle.remove()
        passed = float((seen[0].grad.abs() < 0.1 * seen[1].grad.abs()).float().mean())
        return passed > share, f"{passed:.0%} of {module} lets less than a tenth of the gradient pass"

    return claim


class Skips(nn.Module):
    """A generator that sums the pictures of its stages; one number per picture and critic tells real."""

    def __init__(self, width: int, squash: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(8 if i == 0 else width, width) for i in range(3))
        self.pictures = nn.ModuleList(nn.Linear(width, 32) for _ in range(3))
        for layer in (*self.stages, *self.pictures):
            nn.init.normal_(layer.weight)
        self.squash = nn.Tanh() if squash else nn.Identity()

    def forward(self, code: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for stage, picture in zip(self.stages, self.pictures, strict=True):
            code = F.leaky_relu(stage(code), 0.2) * math.sqrt(2 / code.shape[-1])
            total = total + picture(code)
        return self.squash(total)


def pictures(g: Generator) -> tuple[Tensor, Tensor]:
    """Give codes, and the picture between -1 and 1 that each one stands for."""
    code = normal(g, 32, 8)
    return code, torch.tanh(0.5 * code @ normal(seeded(155), 8, 32) / math.sqrt(8))


@sick(
    "contact15b-gan-tanh",
    [("SATURATION", "squash")],
    shut("squash", 0.5),
    allow=("VANISHING",),
    source="https://github.com/taesungp/swapping-autoencoder-pytorch/issues/22",
    **ONE,
)
def gan_tanh(sick: bool, width: int) -> Setup:
    """A tanh was put behind a generator that sums the unscaled pictures of its stages, with weights of size
    one: nearly every pixel begins at a flat end, and little gradient passes. Repair: no function there."""
    return setup(Skips(width, sick), pictures, F.mse_loss, 1e-2)


# --------------------------------------------------------------------- speech: the rate at a warm-up's end


def warmed(peak: float, steps: int) -> object:
    """Return a maker of AdamW whose rate rises in a line to its peak and stays there."""

    def make(parameters: Iterable[Tensor]) -> Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=peak)
        rule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))
        optimizer.register_step_post_hook(lambda *_: rule.step())
        return optimizer

    return make


class Cleaner(nn.Module):
    """Say for every band and frame of a noisy spectrum which part of it is speech."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(12, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv1d(width, width, 3, padding=2**i, dilation=2**i) for i in range(4))
        self.last = nn.Conv1d(width, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + F.relu(block(h))
        return self.last(h)


def noisy_speech(g: Generator) -> tuple[Tensor, Tensor]:
    """Give noisy spectra of slow tones in bands, and the clean ones."""
    beat = torch.sin(torch.arange(24) * (0.2 + 0.6 * uniform(g, 8, 1, 1)) + 6.3 * uniform(g, 8, 1, 1))
    clean = (1 + beat) * (uniform(g, 8, 12, 1) < 0.3).float()
    return clean + 0.4 * normal(g, 8, 12, 24), clean


@sick(
    "contact15b-speech-warmup",
    [("UNSTABLE", "*")],
    rises(3.0),
    allow=("EXPLODING",),
    source="https://github.com/SofieneKammoun/SE-NAC-CODE/issues/3",
    **ONE,
)
def speech_warmup(sick: bool, width: int) -> Setup:
    """A speech enhancer learns in the warm-up of its rate and breaks when the rate nears its peak, which is
    too high for it. Repair: a peak of a tenth or less."""
    return setup(Cleaner(width), noisy_speech, F.mse_loss, warmed(0.1 if sick else 5e-3, 10))


# ------------------------------------------------------------------- contrastive: the rate of a larger batch


class Projector(nn.Module):
    """Two views of each sample as directions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, views: Tensor) -> Tensor:
        return F.normalize(self.head(self.encoder(views)), dim=-1)


def two_views(g: Generator) -> tuple[Tensor, Tensor]:
    """Give sixteen samples of five classes twice, each time with other noise, and their classes."""
    x, kind = clusters(16, 5, number=16)(g)
    return torch.cat([x + 0.3 * normal(g, 16, 16), x + 0.3 * normal(g, 16, 16)]), kind.repeat(2)


def supervised_contrast(z: Tensor, kind: Tensor) -> Tensor:
    """Return the supervised contrastive loss at a temperature of 0.1."""
    other = ~torch.eye(len(z), dtype=torch.bool)
    scores = (z @ z.T / 0.1).masked_fill(~other, -1e9).log_softmax(-1)
    same = (kind[:, None] == kind) & other
    return -((scores * same).sum(-1) / same.sum(-1)).mean()


@sick(
    "contact15b-contrastive-rate",
    [("UNSTABLE", "*")],
    stuck(3.3, steps=20),
    allow=("BOTTLENECK", "DEAD", "SATURATION", "EXPLODING"),
    source="https://github.com/HobbitLong/SupContrast/issues/127",
    **ONE,
)
def contrastive_rate(sick: bool, width: int) -> Setup:
    """The rate meant for a batch of a thousand is kept for one of sixteen: the first steps throw all
    directions together, and the loss stays at the logarithm of the batch. Repair: a rate in proportion."""
    return setup(Projector(width), two_views, supervised_contrast, sgd(1.0 if sick else 0.02, 0.9))


# ---------------------------------------------------------------------- optimiser: bfloat16 weights, no copy


def swallowed(share: float, steps: int = 10) -> Claim:
    """More than a share of the weights with a gradient keep their value in a step, by rounding."""

    def claim(ready: Setup) -> tuple[bool, str]:
        optimizer = ready.optimizer()
        stay, all_of = 0, 0
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(ready).backward()
            before = [p.detach().clone() for p in ready.model.parameters()]
            optimizer.step()
            for old, p in zip(before, ready.model.parameters(), strict=True):
                pushed = p.grad != 0
                stay += int((pushed & (old == p.detach())).sum())
                all_of += int(pushed.sum())
        return stay > share * all_of, f"{stay / all_of:.0%} of the pushed weights keep their value"

    return claim


class Short(nn.Module):
    """A model of tokens; the values between its layers are bfloat16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        kind = torch.bfloat16
        x = self.norm(self.embed(tokens)).to(kind)
        h = F.relu(F.linear(x, self.up.weight.to(kind), self.up.bias.to(kind)))
        return F.linear(h, self.out.weight.to(kind), self.out.bias.to(kind)).float()


@sick(
    "contact15b-optimiser-rounding",
    [("NUMERICAL", "*")],
    swallowed(0.4),
    allow=("UNSTABLE", "DEAD"),
    source="https://github.com/pytorch/pytorch/issues/120376",
    **ONE,
)
def optimiser_rounding(sick: bool, width: int) -> Setup:
    """The weights themselves are bfloat16 and rounded to the nearest: AdamW's steps are less than half the
    distance to the next number for many of them, and vanish. Repair: float32 weights, bfloat16 products."""
    model = Short(width)
    if sick:
        model = model.to(torch.bfloat16)
    return setup(
        model, grammar(length=12), token_loss, lambda p: torch.optim.AdamW(p, lr=2.5e-4, weight_decay=0.0)
    )
