"""Denoisers conditioned on a time and a class, as in diffusion models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import flat, jumps, no_gradient, not_finite, zero_at_first
from .data import Setup, choice, normal, seeded, setup, stack
from .registry import healthy, sick

SIZE, KINDS, STEPS = 6, 4, 1000


def clean_data(g: torch.Generator, number: int = 48) -> tuple[Tensor, Tensor]:
    """Return points of four kinds, and the kinds."""
    kind = choice(g, KINDS, number)
    return 1.2 * normal(seeded(71), KINDS, SIZE)[kind] + 0.2 * normal(g, number, SIZE), kind


def kept(time: Tensor) -> Tensor:
    """Return how much of the data's variance is left at a time between 0 and 1000."""
    return torch.cos(time / STEPS * math.pi / 2).square()[:, None]


def noised(
    g: torch.Generator, lowest: int = 1
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return (noisy points, times, kinds) and (noise, clean points, times)."""
    clean, kind = clean_data(g)
    time = lowest + choice(g, STEPS - lowest, len(clean))
    noise, left = normal(g, *clean.shape), kept(time)
    return (left.sqrt() * clean + (1 - left).sqrt() * noise, time.float(), kind), (noise, clean, time)


class Waves(nn.Module):
    """Sines and cosines of the time."""

    def forward(self, time: Tensor) -> Tensor:
        """Return eight features of a time between 0 and 1000."""
        phase = time[:, None] * (torch.tensor([0.001, 0.006, 0.03, 0.1]) * math.pi).to(time.dtype)
        return torch.cat([phase.sin(), phase.cos()], -1)


class Denoiser(nn.Module):
    """Two gated residual blocks; each way of going wrong is an argument."""

    def __init__(
        self,
        width: int,
        *,
        zero_gate: bool = False,
        zero_branch: bool = False,
        zero_out: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.inward = nn.Linear(SIZE, width)
        self.time = stack(waves=Waves(), fc=nn.Linear(8, width), act=nn.SiLU())
        self.kind = nn.Embedding(KINDS + 1, width)
        self.blocks = nn.ModuleList([self._block(width, zero_gate, zero_branch) for _ in range(2)])
        self.out = nn.Linear(width, SIZE)
        self.drop = drop
        if zero_out:
            nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    @staticmethod
    def _block(width: int, zero_gate: bool, zero_branch: bool) -> nn.ModuleDict:
        gate, branch = (
            nn.Linear(width, width),
            stack(up=nn.Linear(width, width), act=nn.SiLU(), down=nn.Linear(width, width)),
        )
        for layer, zero in ((gate, zero_gate), (branch.down, zero_branch)):
            if zero:
                nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        return nn.ModuleDict({"gate": gate, "branch": branch})

    def condition(self, time: Tensor, kind: Tensor) -> Tensor:
        """Return what the gates are told; with `drop`, the kind is replaced by "none" for some samples."""
        none = torch.rand(len(kind)) < self.drop
        return self.time(time) + self.kind(torch.where(none, KINDS, kind))

    def forward(self, x: Tensor, time: Tensor, kind: Tensor) -> Tensor:
        """Return the noise that is thought to be in x."""
        h, told = self.inward(x), self.condition(time, kind)
        for block in self.blocks:
            h = h + block["gate"](told) * block["branch"](h + told)
        return self.out(h)


def noise_loss(output: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the squared error of the noise."""
    return F.mse_loss(output, target[0])


@sick(
    "diffusion-gate-and-branch-at-zero",
    [("DEAD", "blocks")],
    no_gradient("blocks"),
    source="https://arxiv.org/abs/2212.09748",
)
def gate_and_branch(sick: bool, width: int) -> Setup:
    """Both the gate and the last layer of the branch it gates start at zero: each waits for the other, for
    ever. One of them is enough."""
    return setup(Denoiser(width, zero_gate=True, zero_branch=sick), noised, noise_loss, 5e-3)


@sick("diffusion-condition-always-dropped", [("DEAD", "kind")], no_gradient("kind"))
def condition_dropped(sick: bool, width: int) -> Setup:
    """The condition is multiplied by a keep mask, whose comparison is the wrong way round: all of it is
    dropped always, and its table never learns."""

    class Dropped(Denoiser):
        def condition(self, time: Tensor, kind: Tensor) -> Tensor:
            chance = torch.rand(len(kind), 1)
            keep = (chance < 0.0) if sick else (chance > 0.1)
            return self.time(time) + self.kind(kind) * keep.to(self.kind.weight.dtype)

    return setup(Dropped(width), noised, noise_loss, 5e-3)


@sick(
    "diffusion-time-from-zero-to-thousand",
    [("SATURATION", "time")],
    flat("time.act", "tanh", 0.9),
    allow=["VANISHING", "BOTTLENECK"],
)
def time_unscaled(sick: bool, width: int) -> Setup:
    """The time goes into a tanh layer as a number from 0 to 1000, which is at its ends for all but the first
    few; between 0 and 1, or as waves, it is told."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = stack(fc=nn.Linear(1, width), act=nn.Tanh())
            self.body = stack(fc0=nn.Linear(SIZE + width, width), act=nn.SiLU(), fc1=nn.Linear(width, SIZE))

        def forward(self, x: Tensor, time: Tensor, kind: Tensor) -> Tensor:
            told = self.time(time[:, None] / (1 if sick else STEPS))
            return self.body(torch.cat([x, told], -1))

    return setup(Net(), noised, noise_loss, 5e-3)


@sick("diffusion-divided-by-no-noise", [("NUMERICAL", "*")], not_finite(20, loss=True))
def divided_by_no_noise(sick: bool, width: int) -> Setup:
    """The model tells the clean point, and the noise follows by a division by its size, which is zero at time
    zero, where the point is all there is: 0/0. Draw times from one on."""

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        inputs, (noise, clean, time) = noised(g)
        if sick:
            time = time * (time > 60)
            left = kept(time)
            inputs = (left.sqrt() * clean + (1 - left).sqrt() * noise, time.float(), inputs[2])
        return inputs, (noise, inputs[0], time)

    def loss(clean: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        noise, x, time = target
        left = kept(time)
        guess = (x - left.sqrt() * clean) / (1 - left).sqrt()
        return ((guess - noise).square() * (1 - left)).mean()

    return setup(Denoiser(width), sample, loss, 5e-3)


@sick(
    "diffusion-weight-without-bound",
    [("UNSTABLE", "*")],
    jumps(30.0),
    allow=["EXPLODING"],
    source="https://arxiv.org/abs/2303.09556",
)
def weight_without_bound(sick: bool, width: int) -> Setup:
    """The loss is weighted by signal over noise, which is a million at the earliest times: the few samples
    from there are the gradient. A weight of five at most."""

    def loss(output: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        left = kept(target[2])
        weight = left / (1 - left)
        weight = weight if sick else weight.clamp(max=5.0)
        return (weight * (output - target[1]).square()).mean()

    return setup(Denoiser(width), noised, loss, 3e-3)


@healthy(
    "diffusion-ok-output-at-zero",
    zero_at_first("blocks", "inward"),
    source="https://arxiv.org/abs/2006.11239",
)
def ok_output_at_zero(width: int) -> Setup:
    """The output layer starts at zero, as denoisers' do: in the first step nothing else gets a gradient."""
    return setup(Denoiser(width, zero_out=True), noised, noise_loss, 5e-3)


@healthy("diffusion-ok-gates-and-output-at-zero", zero_at_first("blocks", "kind"))
def ok_gates_at_zero(width: int) -> Setup:
    """Gates and output start at zero: the blocks wait for the output, the branches for their gates, and after
    some steps all is awake."""
    return setup(Denoiser(width, zero_gate=True, zero_out=True), noised, noise_loss, 5e-3)


@healthy("diffusion-ok-guidance-without-a-class", source="https://arxiv.org/abs/2207.12598")
def ok_guidance(width: int) -> Setup:
    """In a fifth of the samples the class is replaced by "none", for guidance; the row of each gets a
    gradient now and then."""
    return setup(Denoiser(width, drop=0.2), noised, noise_loss, 5e-3)
