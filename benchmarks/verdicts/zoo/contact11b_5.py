"""Healthy generative and restoring models with loud losses, faint branches or a single sample."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, training, weak
from .data import Sample, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, healthy


def starts_above(limit: float) -> Claim:
    """The loss is above a number at first."""

    def claim(setup: Setup) -> tuple[bool, str]:
        first = next(training(setup, 1)).loss
        return first > limit, f"loss at first = {first:.4g}"

    return claim


def one_sample(steps: int = 3) -> Claim:
    """Every batch is one and the same sample."""

    def claim(setup: Setup) -> tuple[bool, str]:
        batches = [setup.make_batch() for _ in range(steps)]
        same = all(len(b) == 1 and torch.equal(b, batches[0]) for b in batches)
        return same, f"{steps} batches of {len(batches[0])}, all the same: {same}"

    return claim


# ------------------------------------------------------------------------------------------ RealNVP


class Coupling(nn.Module):
    """Scales and shifts pixels of one colour of a chess board by what the others hold."""

    def __init__(self, width: int, side: int, parity: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, 2, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        self.rescale = nn.Parameter(torch.ones(1))
        board = (torch.arange(side)[:, None] + torch.arange(side) + parity) % 2
        self.register_buffer("board", board.float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new pixels and the logarithm of the determinant."""
        board = torch.as_tensor(self.board)
        h = F.relu(self.conv2(F.relu(self.conv1(x * board))))
        s, t = self.out(h).chunk(2, 1)
        s = self.rescale * torch.tanh(s) * (1 - board)
        return (x + t * (1 - board)) * torch.exp(s), s.flatten(1).sum(1)


class RealNVP(nn.Module):
    """A chain of couplings of a picture."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(width, side, i % 2) for i in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent picture and the logarithm of the determinant."""
        total = torch.zeros(len(x))
        for coupling in self.couplings:
            x, sldj = coupling(x)
            total = total + sldj
        return x, total


def levels(number: int = 16, side: int = 16) -> Sample:
    """Smooth pictures of 256 grey levels with uniform noise, scaled to -1..1."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        smooth = F.interpolate(normal(g, number, 1, 4, 4), size=(side, side), mode="bicubic")
        grey = (127.5 + 40 * smooth).clamp(0, 255).floor()
        x = (grey + uniform(g, *grey.shape)) / 128 - 1
        return x, x

    return sample


@healthy(
    "contact11b-realnvp-nats",
    starts_above(1000),
    source="https://github.com/chrischute/real-nvp/issues/6",
    steps=150,
    falls_to=0.85,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def realnvp_nats(width: int) -> Setup:
    """The loss is the negative log-likelihood of a whole picture, summed over pixels with the price of 256
    levels, so it is in the thousands; as bits per pixel it is usual."""

    def loss(output: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        z, sldj = output
        prior = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
        return -(prior + sldj - math.log(128) * z[0].numel()).mean()

    return setup(RealNVP(width // 2, 16), levels(), loss, 2e-3)


# --------------------------------------------------------------------------------------------- RRDB


class DenseBlock(nn.Module):
    """Three convolutions that read all before them, added to the input at a fifth."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, growth, 3, padding=1)
        self.conv2 = nn.Conv2d(width + growth, growth, 3, padding=1)
        self.conv3 = nn.Conv2d(width + 2 * growth, width, 3, padding=1)
        for conv in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        a = F.leaky_relu(self.conv1(x), 0.2)
        b = F.leaky_relu(self.conv2(torch.cat([x, a], 1)), 0.2)
        return x + 0.2 * self.conv3(torch.cat([x, a, b], 1))


class RRDB(nn.Module):
    """Two dense blocks, added to the input at a fifth again."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2 = DenseBlock(width, growth), DenseBlock(width, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        return x + 0.2 * self.rdb2(self.rdb1(x))


class RRDBNet(nn.Module):
    """A super-resolution network of residual dense blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(width, width // 2) for _ in range(3)))
        self.conv_body = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return pictures of twice the size."""
        h = self.conv_first(x)
        return F.pixel_shuffle(self.conv_last(h + self.conv_body(self.body(h))), 2)


def halved(number: int = 8, size: int = 12) -> Sample:
    """Halved pictures of smooth spots with edges; the target is the picture."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        coarse = F.interpolate(normal(g, number, 1, size // 3, size // 3), scale_factor=3.0, mode="bicubic")
        large = torch.tanh(3 * coarse)
        return F.avg_pool2d(large, 2), large

    return sample


@healthy(
    "contact11b-rrdb-faint",
    weak("body.0", "conv_last", 0.02, steps=1),
    source="https://github.com/XPixelGroup/BasicSR/issues/85",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rrdb_faint(width: int) -> Setup:
    """Residuals are multiplied by 0.2 twice and weights start at a tenth, so the blocks get a hundredth of
    the gradient of the last layer; the skips carry the signal, and it keeps deep bodies stable."""
    return setup(RRDBNet(width // 2), halved(), F.l1_loss, 1e-3)


# ------------------------------------------------------------------------------- deep image prior


class ImagePrior(nn.Module):
    """An hourglass with batch norms that turns fixed noise into one picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = stack(
            conv1=nn.Conv2d(4, width, 3, stride=2, padding=1),
            bn1=nn.BatchNorm2d(width),
            act1=nn.LeakyReLU(0.2),
            conv2=nn.Conv2d(width, width, 3, padding=1),
            bn2=nn.BatchNorm2d(width),
            act2=nn.LeakyReLU(0.2),
        )
        self.skip = stack(conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), act=nn.LeakyReLU(0.2))
        self.up = stack(
            bn0=nn.BatchNorm2d(width + 4),
            conv1=nn.Conv2d(width + 4, width, 3, padding=1),
            bn1=nn.BatchNorm2d(width),
            act1=nn.LeakyReLU(0.2),
            out=nn.Conv2d(width, 1, 1),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Return the picture."""
        h = F.interpolate(self.down(z), scale_factor=2.0, mode="bilinear")
        return torch.sigmoid(self.up(torch.cat([h, self.skip(z)], 1)))


def one_picture(size: int = 16) -> Sample:
    """Fixed noise; the target is one noisy picture."""
    z = 0.1 * uniform(seeded(51), 1, 4, size, size)
    smooth = F.interpolate(normal(seeded(52), 1, 1, 5, 5), size=(size, size), mode="bicubic")
    picture = (0.5 + 0.25 * smooth + 0.05 * normal(seeded(53), 1, 1, size, size)).clamp(0, 1)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return z.clone(), picture

    return sample


@healthy(
    "contact11b-dip-batchnorm",
    one_sample(),
    source="https://github.com/DmitryUlyanov/deep-image-prior/issues/27",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def dip_batchnorm(width: int) -> Setup:
    """Batch norms see a batch of one fixed noise picture; they work as instance norms over its pixels, and
    fitting the one picture is the aim."""
    return setup(ImagePrior(width), one_picture(), F.mse_loss, 1e-2)
