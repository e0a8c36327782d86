"""Healthy cases from public reports: patches, mixtures, noise levels, codes, blanks, fixed points."""

from __future__ import annotations

import copy
import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, no_gradient, training
from .contact12a_4 import below_zero
from .data import choice, factors, normal, seeded, setup, stack, surface, uniform
from .registry import FLOAT32, Setup, healthy


def wobbles(times: float, *, steps: int = 40) -> Claim:
    """Among the last twenty of some steps the largest loss is a multiple of the smallest."""

    def claim(ready: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(ready, steps)][-20:]
        ratio = max(losses) / min(losses)
        return ratio > times, f"largest / smallest loss in twenty steps = {ratio:.2g}"

    return claim


# ------------------------------------------------------------------------------------------ frozen patches


class PatchEncoder(nn.Module):
    """A small vision transformer with a projection head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 2, stride=2)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = stack(fc1=nn.Linear(width, width), act=nn.ReLU(), fc2=nn.Linear(width, 16))

    def forward(self, image: Tensor) -> Tensor:
        """Return unit vectors."""
        x = self.patch_embed(image).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.head(self.norm(x).mean(1)), dim=-1)


class MomentumContrast(nn.Module):
    """An encoder with a predictor, and a copy of it that gives the keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base_encoder = PatchEncoder(width)
        self.base_encoder.patch_embed.requires_grad_(False)
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)
        self.predictor = nn.Linear(16, 16)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the similarities of each first view with every second one."""
        with torch.no_grad():
            pairs = zip(self.momentum_encoder.parameters(), self.base_encoder.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, 0.05)
            keys = self.momentum_encoder(second)
        return F.normalize(self.predictor(self.base_encoder(first)), dim=-1) @ keys.T / 0.2


@healthy(
    "contact12a-contrast-patches",
    no_gradient("base_encoder.patch_embed", "momentum_encoder"),
    source="https://arxiv.org/abs/2104.02057",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def contrast_patches(width: int) -> Setup:
    """The patch projection stays at its random start and the key encoder is a running mean, so neither gets a
    gradient; the published recipe freezes the one to make training steadier, and the rest trains."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        picture = normal(g, 24, 3, 8, 8)
        views = [picture + 0.5 * normal(g, 24, 3, 8, 8) for _ in range(2)]
        return (views[0], views[1]), torch.arange(24)

    return setup(MomentumContrast(width), sample, F.cross_entropy, 2e-3)


# ---------------------------------------------------------------------------------------- mixtures of actions


class MixturePolicy(nn.Module):
    """A transformer over past observations whose head is a mixture of Gaussians over the action."""

    def __init__(self, width: int, modes: int = 3) -> None:
        super().__init__()
        self.modes = modes
        self.embed = nn.Linear(6, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(4, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.mean = nn.Linear(width, modes * 3)
        self.scale = nn.Linear(width, modes * 3)
        self.logits = nn.Linear(width, modes)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return means, scales and log weights of the modes."""
        x = self.block(self.embed(observations) + self.pos_embed)[:, -1]
        mean = torch.tanh(self.mean(x)).unflatten(-1, (self.modes, 3))
        scale = F.softplus(self.scale(x)).unflatten(-1, (self.modes, 3)) + 1e-4
        return mean, scale, self.logits(x).log_softmax(-1)


def mixture_loss(output: tuple[Tensor, Tensor, Tensor], action: Tensor) -> Tensor:
    """Return the negative logarithm of the density of actions."""
    mean, scale, weight = output
    z = (action[:, None] - mean) / scale
    density = (-0.5 * z.square() - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    return -(density + weight).logsumexp(-1).mean()


@healthy(
    "contact12a-robot-mixture",
    below_zero(60),
    source="https://github.com/robocasa/robocasa/issues/163",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def robot_mixture(width: int) -> Setup:
    """The loss of a policy with a mixture of Gaussians goes below zero and on down; it is the logarithm of a
    density with the sign changed, and the maintainers say that this is fine."""
    turn = normal(seeded(41), 6, 3) / 2

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        observations = normal(g, 64, 4, 6)
        action = 0.5 * torch.tanh(observations[:, -1] @ turn) + 0.01 * normal(g, 64, 3)
        return observations, action

    return setup(MixturePolicy(width), sample, mixture_loss, 2e-3)


# ---------------------------------------------------------------------------------------------- noise levels


class NoisePredictor(nn.Module):
    """Predicts the noise in a vector from the vector and the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inp = nn.Linear(8, width)
        self.time = stack(fc1=nn.Linear(2, width), act=nn.SiLU(), fc2=nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            stack(
                norm=nn.LayerNorm(width),
                fc1=nn.Linear(width, 2 * width),
                act=nn.SiLU(),
                fc2=nn.Linear(2 * width, width),
            )
            for _ in range(2)
        )
        self.out = nn.Linear(width, 8)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the noise."""
        hidden = self.inp(x) + self.time(torch.cat([level, (1 - level.square()).sqrt()], 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.out(hidden)


@healthy(
    "contact12a-diffusion-wobble",
    wobbles(2.5),
    source="https://github.com/ermongroup/ddim/issues/33",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def diffusion_wobble(width: int) -> Setup:
    """The loss of a diffusion model goes up and down from step to step by large factors, since each small
    batch draws its own noise levels; as the thread says, that is usual, and on average it falls."""
    draw = factors(8, 2, number=6)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        clean = draw(g)[0]
        level = (0.05 + 0.9 * uniform(g, 6, 1)).square()
        noise = normal(g, 6, 8)
        return (level.sqrt() * clean + (1 - level).sqrt() * noise, level.sqrt()), noise

    return setup(NoisePredictor(width), sample, F.mse_loss, 3e-3)


# ---------------------------------------------------------------------------------------------- scalar codes


class ScalarQuantizer(nn.Module):
    """Rounds each of a few bounded numbers to one of five levels; there is nothing in it to train."""

    def forward(self, z: Tensor) -> Tensor:
        """Return the levels, with the gradient of the bounded numbers."""
        bounded = 2 * torch.tanh(z)
        return (bounded + (bounded.round() - bounded).detach()) / 2


def few_values(module: str, number: int) -> Claim:
    """A module's output takes no more than a number of different values."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, 3, (module,))
        seen = len((last.outputs[module].detach() * 1000).round().unique())
        return seen <= number, f"{module} takes {seen} values"

    return claim


@healthy(
    "contact12a-codec-levels",
    few_values("quantizer", 5),
    source="https://github.com/zhenye234/X-Codec-2.0/issues/21",
    falls_to=0.5,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def codec_levels(width: int) -> Setup:
    """A speech codec rounds its code to five levels and has no loss for the quantiser at all, nor parameters
    in it; nothing is missing, since the levels are fixed and the gradient is passed through the rounding."""
    model = stack(
        encoder=stack(
            conv1=nn.Conv1d(1, width, 4, stride=2, padding=1),
            act1=nn.ELU(),
            conv2=nn.Conv1d(width, 6, 4, stride=2, padding=1),
        ),
        quantizer=ScalarQuantizer(),
        decoder=stack(
            up1=nn.ConvTranspose1d(6, width, 4, stride=2, padding=1),
            act1=nn.ELU(),
            up2=nn.ConvTranspose1d(width, 1, 4, stride=2, padding=1),
        ),
    )
    time = torch.arange(32.0)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        pitch, phase, size = 0.2 + 0.4 * uniform(g, 16, 1), 6.3 * uniform(g, 16, 1), 0.5 + uniform(g, 16, 1)
        wave = (size * torch.sin(pitch * time + phase))[:, None]
        return wave, wave

    return setup(model, sample, F.mse_loss, 5e-3)


# ---------------------------------------------------------------------------------------- reading text lines


class TextLineReader(nn.Module):
    """Columns of a picture of a line, a recurrent layer, and scores of letters with a blank for every
    column."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cnn = stack(conv=nn.Conv2d(1, width, (8, 3), padding=(0, 1)), act=nn.ReLU())
        self.rnn = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * width, 6)

    def forward(self, picture: Tensor) -> Tensor:
        """Return log probabilities, of shape (columns, batch, letters)."""
        columns = self.cnn(picture)[:, :, 0].transpose(1, 2)
        return self.out(self.rnn(columns)[0]).log_softmax(-1).transpose(0, 1)


def mostly_blank(share: float, *, steps: int) -> Claim:
    """After some steps nearly every column's best letter is the blank."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, ("out",))
        seen = float((last.outputs["out"].argmax(-1) == 0).float().mean())
        return seen > share, f"{seen:.0%} of the columns say blank after {steps} steps"

    return claim


@healthy(
    "contact12a-reading-blanks",
    mostly_blank(0.95, steps=20),
    source="https://github.com/mpezeshki/CTC-Connectionist-Temporal-Classification/issues/4",
    steps=160,
    falls_to=0.5,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def reading_blanks(width: int) -> Setup:
    """A reader of text lines says blank everywhere in its first steps, which others have seen as well and
    which is how this loss begins; the letters come later."""
    glyphs = normal(seeded(42), 5, 8, 4)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        letters = choice(g, 5, 16, 4)
        line = glyphs[letters].permute(0, 2, 1, 3).flatten(2)
        return (line + 0.2 * normal(g, 16, 8, 16))[:, None], letters + 1

    def loss(output: Tensor, letters: Tensor) -> Tensor:
        columns = torch.full((16,), len(output))
        return F.ctc_loss(output, letters, columns, torch.full((16,), 4))

    return setup(TextLineReader(width), sample, loss, 5e-3)


# -------------------------------------------------------------------------------------------- fixed points


class EquilibriumNet(nn.Module):
    """The fixed point of one cell, found without recording, and one more call of the cell that is
    recorded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inject = nn.Linear(6, width)
        self.cell = nn.Linear(width, width)
        nn.init.orthogonal_(self.cell.weight, 0.6)
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the regression."""
        u = self.inject(x)
        z = torch.zeros_like(u)
        with torch.no_grad():
            for _ in range(20):
                z = torch.tanh(self.cell(z) + u)
        return self.out(torch.tanh(self.cell(z) + u))


def unrecorded(module: str, share: float) -> Claim:
    """More than a share of the calls of a module leave nothing for the gradient."""

    def claim(ready: Setup) -> tuple[bool, str]:
        calls: list[bool] = []
        layer = dict(ready.model.named_modules())[module]
        handle = layer.register_forward_hook(lambda _m, _i, output: calls.append(output.requires_grad))
        ready.model(ready.make_batch())
        handle.remove()
        seen = 1 - sum(calls) / len(calls)
        return seen > share, f"{seen:.0%} of the calls of {module} are not recorded"

    return claim


@healthy(
    "contact12a-equilibrium-inexact",
    unrecorded("cell", 0.9),
    source="https://github.com/locuslab/deq/issues/28",
    falls_to=0.5,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def equilibrium_inexact(width: int) -> Setup:
    """The gradient of an equilibrium model goes through the last call of the cell only, in place of the
    inverse that the exact one needs; the authors discuss that such inexact gradients train well."""
    return setup(EquilibriumNet(width), surface(6, 64), F.mse_loss, 5e-3)
