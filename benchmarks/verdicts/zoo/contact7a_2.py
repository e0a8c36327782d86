"""Cases from public reports: flows, flow matching, diffusion, a VAE, and unrolled MRI reconstruction."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import every, growing, not_finite, rank_below, rises, stuck
from .data import choice, normal, seeded, setup, stack, textures, uniform
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


# --------------------------------------------------------------------------------- normalising flow


class RNVPBlock(nn.Module):
    """Two affine couplings, each of one half of the features by what the other half says."""

    def __init__(self, size: int, width: int, clamp: float | None) -> None:
        super().__init__()
        self.half, self.clamp = size // 2, clamp
        self.subnet1, self.subnet2 = self.subnet(width), self.subnet(width)

    def subnet(self, width: int) -> nn.Sequential:
        """Return a network of four layers; a clamped block begins as the identity."""
        sizes = [self.half, width, width, width, 2 * self.half]
        layers: list[nn.Module] = []
        for inp, out in pairwise(sizes):
            layers += [nn.Linear(inp, out), nn.LeakyReLU(0.1)]
            nn.init.xavier_normal_(layers[-2].weight)
        if self.clamp:
            nn.init.normal_(layers[-2].weight, std=1e-3)
        return nn.Sequential(*layers[:-1])

    def couple(self, x: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Return the half scaled and shifted, and the logarithm of the determinant."""
        scale, shift = told.chunk(2, 1)
        if self.clamp:
            scale = self.clamp * torch.tanh(scale / self.clamp)
        return x * torch.exp(scale) + shift, scale.sum(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, 1)
        y2, jac2 = self.couple(x2, self.subnet1(x1))
        y1, jac1 = self.couple(x1, self.subnet2(y2))
        return torch.cat([y1, y2], 1), jac1 + jac2


class CouplingFlow(nn.Module):
    """A chain of blocks to a standard normal; the output is the negative log likelihood of each sample."""

    def __init__(self, size: int, width: int, depth: int, clamp: float | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RNVPBlock(size, width, clamp) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for block in self.blocks:
            x, jac = block(x)
            total = total + jac
        return 0.5 * (x.square() + math.log(2 * math.pi)).sum(1) - total


@sick(
    "contact7a-flow-chain",
    [("NUMERICAL", "blocks")],
    not_finite(3),
    allow=("EXPLODING", "UNSTABLE"),
    source="https://github.com/vislearn/FrEIA/issues/38",
    **ONE,
)
def flow_chain(sick: bool, width: int) -> Setup:
    """From some number of real-NVP blocks in a chain on, the values leave the range of numbers: each block
    multiplies by the exponential of what a network says of the growing values before. Clamping the exponent
    softly and beginning near the identity repairs it."""
    mix, apart = torch.eye(8) + 0.4 * normal(seeded(41), 8, 8), torch.linspace(0.2, 1.2, 8)

    def sample(g: Generator) -> tuple[Tensor, None]:
        side = torch.sign(normal(g, 64, 1))
        return (0.5 * normal(g, 64, 8) + side * apart) @ mix / 1.3, None

    model = CouplingFlow(8, width, 10, None if sick else 1.0)
    return setup(model, sample, lambda nll, _: nll.mean(), 2e-3)


# ------------------------------------------------------------------------------------ flow matching


class Sinusoid(nn.Module):
    """The sinusoidal embedding of a time, with periods up to the greatest."""

    def __init__(self, size: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        half = size // 2
        self.register_buffer("freqs", torch.exp(-math.log(max_period) * torch.arange(half) / half))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.freqs
        return torch.cat([torch.cos(angles), torch.sin(angles)], -1)


class TimestepEmbedder(nn.Module):
    """The sinusoids of a time, scaled first, and two layers on them."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.sinusoid = Sinusoid(64)
        self.mlp = stack(lin1=nn.Linear(64, width), act=nn.SiLU(), lin2=nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.sinusoid(self.scale * t))


class Block(nn.Module):
    """A block of a diffusion transformer: attention and feed-forward, both modulated by the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = stack(lin1=nn.Linear(width, 2 * width), act=nn.GELU(), lin2=nn.Linear(2 * width, width))
        self.modulation = stack(act=nn.SiLU(), lin=nn.Linear(width, 4 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(c)[:, None].chunk(4, -1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FlowDiT(nn.Module):
    """The velocity of 8 by 8 latents, in patches of 2 by 2, at a time between 0 and 1."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        self.t_embedder = TimestepEmbedder(width, scale)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.final = nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        c = self.t_embedder(t)
        for block in self.blocks:
            h = block(h, c)
        return F.pixel_shuffle(self.final(h).transpose(1, 2).unflatten(2, (4, 4)), 2)


@sick(
    "contact7a-matching-timestep",
    [("BOTTLENECK", "t_embedder")],
    every(rank_below("t_embedder.sinusoid", 2.0), stuck(1.9, steps=60)),
    source="https://github.com/ArchiMickey/Just-a-DiT/pull/9",
    **ONE,
)
def matching_timestep(sick: bool, width: int) -> Setup:
    """Flow matching draws times from 0 to 1, but the sinusoidal embedding has periods for a thousand whole
    steps, so nearly all its features stay as they are and the time hardly gets through. Multiplying the
    time by a thousand before the embedding repairs it."""
    basis = normal(seeded(3), 6, 64) / math.sqrt(6)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        clean = (0.5 * normal(g, 24, 6) @ basis + 0.87 * normal(g, 24, 64)).view(24, 1, 8, 8)
        noise, t = normal(g, *clean.shape), uniform(g, len(clean))
        at = t[:, None, None, None]
        return ((1 - at) * noise + at * clean, t), clean - noise

    return setup(FlowDiT(width, 1.0 if sick else 1000.0), sample, F.mse_loss, 2e-3)


# ---------------------------------------------------------------------------------------- diffusion


class NoiseUNet(nn.Module):
    """A small U-Net that tells the noise in a latent of four channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_embed = stack(sin=Sinusoid(32), lin1=nn.Linear(32, width), act=nn.SiLU())
        self.input = nn.Conv2d(4, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.time1, self.time2 = nn.Linear(width, width), nn.Linear(width, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.out = nn.Conv2d(2 * width, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time_embed(t)
        skip = F.silu(self.norm1(self.input(x)) + self.time1(c)[..., None, None])
        deep = self.middle(F.silu(self.norm2(self.down(skip)) + self.time2(c)[..., None, None]))
        return self.out(torch.cat([skip, F.silu(self.up(deep))], 1))


@sick(
    "contact7a-diffusion-scalelr",
    [("UNSTABLE", "*")],
    every(rises(3), stuck(1.0)),
    source="https://github.com/CompVis/latent-diffusion/issues/259",
    **ONE,
)
def diffusion_scalelr(sick: bool, width: int) -> Setup:
    """The trainer's default multiplies the base rate by the batch size and the number of devices, here 2 of
    48 each, so that AdamW takes steps a hundred times those of the paper and the latent diffusion model does
    not converge. Training with the base rate itself (`--scale_lr False`) repairs it."""
    pictures = textures(4, 12, channels=4)
    alphas = torch.cumprod(1 - torch.linspace(0.0015, 0.0195, 1000), 0)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        latent = pictures(g)[0]
        noise, t = torch.randn(latent.shape, generator=g), choice(g, 1000, len(latent))
        a = alphas[t][:, None, None, None]
        return (a.sqrt() * latent + (1 - a).sqrt() * noise, t.float()), noise

    base = 2e-3
    rate = 2 * 48 * base if sick else base
    return setup(NoiseUNet(width), sample, F.mse_loss, lambda p: torch.optim.AdamW(p, lr=rate))


# ------------------------------------------------------------------------------------------ MRI scans


class Refiner(nn.Module):
    """The small U-shaped network of a cascade, with or without instance normalisation."""

    def __init__(self, width: int, *, normed: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, padding=1, bias=not normed)
        self.norm1 = nn.InstanceNorm2d(width) if normed else nn.Identity()
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=not normed)
        self.norm2 = nn.InstanceNorm2d(width) if normed else nn.Identity()
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.conv2 = nn.Conv2d(2 * width, 2, 1)
        for conv in (self.conv1, self.down, self.up, self.conv2):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        deep = self.up(F.leaky_relu(self.norm2(self.down(skip)), 0.2))
        return self.conv2(torch.cat([skip, deep], 1))


class Cascade(nn.Module):
    """One step of an unrolled reconstruction: towards the measured samples, and what the network adds."""

    def __init__(self, width: int, *, normed: bool) -> None:
        super().__init__()
        self.model = Refiner(width, normed=normed)

    def forward(self, image: Tensor, measured: Tensor, mask: Tensor) -> Tensor:
        space = torch.fft.fft2(torch.view_as_complex(image.permute(0, 2, 3, 1).contiguous()), norm="ortho")
        back = torch.fft.ifft2(mask * (space - measured), norm="ortho")
        return image - torch.view_as_real(back).permute(0, 3, 1, 2) - self.model(image)


class VarNet(nn.Module):
    """A chain of cascades from the zero-filled image to the reconstruction."""

    def __init__(self, width: int, cascades: int, *, normed: bool) -> None:
        super().__init__()
        self.cascades = nn.ModuleList(Cascade(width, normed=normed) for _ in range(cascades))

    def forward(self, image: Tensor, measured: Tensor, mask: Tensor) -> Tensor:
        for cascade in self.cascades:
            image = cascade(image, measured, mask)
        return image


def dissimilarity(output: Tensor, target: Tensor) -> Tensor:
    """Return one minus the mean structural similarity of the magnitudes of two images."""
    y, t = ((z.square().sum(1, keepdim=True) + 1e-6).sqrt() for z in (output, target))
    mean_y, mean_t = F.avg_pool2d(y, 5, 1), F.avg_pool2d(t, 5, 1)
    var_y, var_t = (F.avg_pool2d(z * z, 5, 1) - m * m for z, m in ((y, mean_y), (t, mean_t)))
    both = F.avg_pool2d(y * t, 5, 1) - mean_y * mean_t
    light = (2 * mean_y * mean_t + 0.01) / (mean_y.square() + mean_t.square() + 0.01)
    return 1 - (light * (2 * both + 0.09) / (var_y + var_t + 0.09)).mean()


@sick(
    "contact7a-mri-cascades",
    [("EXPLODING", "cascades")],
    every(growing("cascades.0", "cascades.15", 100), stuck(0.95, steps=10)),
    allow=("UNSTABLE", "VANISHING"),
    source="https://github.com/hellopipu/PromptMR-plus/issues/7",
    **ONE,
)
def mri_cascades(sick: bool, width: int) -> Setup:
    """An unrolled MRI reconstruction suffers gradient explosion and its loss, one minus the similarity, sits
    at one: the networks of its many cascades have no normalisation at all, so values and gradients grow from
    one to the next. Instance normalisation inside them, as fastMRI's VarNet has, repairs it."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")

    def channels(image: Tensor) -> Tensor:
        return torch.view_as_real(image).permute(0, 3, 1, 2)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        at, size = 2 + 8 * uniform(g, 6, 3, 2, 1, 1), 1 + 3 * uniform(g, 6, 3, 1, 1)
        away = (rows - at[:, :, 0]) ** 2 + (columns - at[:, :, 1]) ** 2
        image = 3 * torch.exp(-away / size).sum(1) * (1 + 0.3j)
        mask = (uniform(g, 6, 1, 12) < 0.35).float()
        mask[..., [0, 1, 11]] = 1
        measured = mask * torch.fft.fft2(image, norm="ortho")
        return (channels(torch.fft.ifft2(measured, norm="ortho")), measured, mask), channels(image)

    return setup(VarNet(width // 2, 16, normed=not sick), sample, dissimilarity, 1e-3)
