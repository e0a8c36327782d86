"""Reports from vision and rendering: warping, masks, boxes and heat maps that do not learn."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import fading, no_gradient, not_finite
from .data import Sample, choice, discs, normal, seeded, setup, sgd, stack, uniform
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------------------------ spatial transformer


def scattered(kinds: int = 4, number: int = 32, size: int = 12) -> Sample:
    """Pictures with one small glyph at a random place; the target is the glyph's number."""
    glyphs = (normal(seeded(31), kinds, 5, 5) > 0).float() * 2 - 1

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind, place = choice(g, kinds, number), choice(g, 2, number, 2)
        picture = torch.zeros(number, 1, size, size)
        for i in range(number):
            r, c = (place[i] * (size - 5)).tolist()
            picture[i, 0, r : r + 5, c : c + 5] = glyphs[kind[i]]
        return picture + 0.2 * normal(g, number, 1, size, size), kind

    return sample


class SpatialTransformerNet(nn.Module):
    """A localisation network, a sampler, and a convolutional classifier with a dense end."""

    def __init__(self, width: int, kinds: int, size: int, chained: bool) -> None:
        super().__init__()
        self.loc_net = stack(
            conv=nn.Conv2d(1, width // 2, 5, stride=2, padding=2),
            relu=nn.ReLU(),
            flat=nn.Flatten(),
            fc1=nn.Linear(width // 2 * (size // 2) ** 2, width),
            tanh=nn.Tanh(),
            fc2=nn.Linear(width, 6),
        )
        last = self.loc_net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([1.0, 0, 0, 0, 1, 0])
        self.conv1 = nn.Conv2d(1, 1, 3, stride=2, padding=1)
        self.fc = nn.Linear((size // 2) ** 2, kinds)
        self.chained = chained

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of pictures."""
        theta = self.loc_net(x).view(-1, 2, 3)
        h_trans = F.grid_sample(x, F.affine_grid(theta, list(x.shape), False), align_corners=False)
        h = F.relu(self.conv1(h_trans if self.chained else x))
        return self.fc(h.flatten(1))


@sick(
    "contact11b-stn-picture",
    [("DEAD", "loc_net")],
    no_gradient("loc_net"),
    source="https://github.com/kevinzakka/spatial-transformer-network/issues/3",
    steps=180,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def stn_picture(sick: bool, width: int) -> Setup:
    """The classifier is given the original picture and not the warped one, so the localisation network
    gets no gradient; the repair hands on the warped picture."""
    model = SpatialTransformerNet(width, 4, 12, not sick)
    return setup(model, scattered(), F.cross_entropy, 5e-3)


# ------------------------------------------------------------------------- silhouettes of a polygon


class SilhouetteFitter(nn.Module):
    """An encoder that places a convex polygon, and a renderer of its silhouette with antialiasing."""

    def __init__(self, width: int, size: int, mask_first: bool) -> None:
        super().__init__()
        self.encoder = stack(
            conv1=nn.Conv2d(1, width // 2, 3, stride=2, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
        )
        self.vertex_head = nn.Linear(width * (size // 4) ** 2, 3)
        self.mask_first = mask_first
        angle = torch.arange(8) * (2 * math.pi / 8)
        self.register_buffer("normals", torch.stack([angle.cos(), angle.sin()], -1))
        rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        self.register_buffer("pixels", torch.stack([rows, columns], -1).float())
        self.size = size

    def antialias(self, colour: Tensor, edge: Tensor) -> Tensor:
        """Blend a pixel with its neighbours where their colours differ, by how much the edge covers it."""
        low, high = -F.max_pool2d(-colour, 3, 1, 1), F.max_pool2d(colour, 3, 1, 1)
        return low + torch.sigmoid(2 * edge) * (high - low)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rendered silhouettes."""
        place = self.vertex_head(self.encoder(x))
        centre = self.size / 2 + 3 * place[:, :2]
        radius = 3 * torch.exp(0.3 * place[:, 2])
        away = torch.as_tensor(self.pixels) - centre[:, None, None]
        edge = radius[:, None, None] - (away @ torch.as_tensor(self.normals).T).amax(-1)
        edge, covered = edge[:, None], (edge > 0).float()[:, None]
        colour = torch.ones_like(covered)
        if self.mask_first:
            return self.antialias(colour * covered, edge)
        return self.antialias(colour, edge) * covered


@sick(
    "contact11b-silhouette-order",
    [("DEAD", "*")],
    no_gradient("encoder", "vertex_head"),
    source="https://github.com/NVlabs/nvdiffrast/issues/14",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def silhouette_order(sick: bool, width: int) -> Setup:
    """The coverage mask, a step function, is multiplied on after the antialiasing of a picture that is one
    everywhere, so no gradient reaches the vertices; the repair masks first and antialiases then."""
    return setup(SilhouetteFitter(width, 12, not sick), discs(16), F.mse_loss, 3e-3)


# ------------------------------------------------------------------------------------------- SegNet


class SegNet(nn.Module):
    """Three levels of encoders that pool, and decoders that unpool at the remembered places."""

    def __init__(self, width: int, through: bool) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = (
            self.block(1, width),
            self.block(width, width),
            self.block(width, width),
        )
        self.dec3, self.dec2, self.dec1 = (self.block(width, width) for _ in range(3))
        self.final = nn.Conv2d(width, 1, 3, padding=1)
        self.through = through

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        """Return a convolution with its norm and rectifier."""
        return stack(
            conv=nn.Conv2d(inputs, outputs, 3, padding=1), bn=nn.BatchNorm2d(outputs), relu=nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every pixel."""
        e1, m1 = F.max_pool2d(self.enc1(x), 2, return_indices=True)
        e2, m2 = F.max_pool2d(self.enc2(e1), 2, return_indices=True)
        e3, m3 = F.max_pool2d(self.enc3(e2), 2, return_indices=True)
        dec3 = self.dec3(F.max_unpool2d(e3, m3, 2))
        dec2 = self.dec2(F.max_unpool2d(dec3, m2, 2))
        dec1 = self.dec1(F.max_unpool2d(dec2, m1, 2))
        return self.final(dec1 if self.through else F.interpolate(e3, size=x.shape[-2:], mode="bilinear"))


@sick(
    "contact11b-segnet-decoders",
    [("DEAD", "dec1"), ("DEAD", "dec2"), ("DEAD", "dec3")],
    no_gradient("dec1", "dec2", "dec3"),
    allow=("BOTTLENECK",),
    source="https://github.com/mehtanihar/pspnet/issues/6",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def segnet_decoders(sick: bool, width: int) -> Setup:
    """The decoders run but the output is made from the enlarged last encoder, so they get no gradient and
    the masks stay coarse; the repair makes the output from the last decoder."""
    loss = F.binary_cross_entropy_with_logits
    return setup(SegNet(width // 2, not sick), discs(16, 16), loss, 3e-3)


# --------------------------------------------------------------------------------- super-resolution


class ResBlock(nn.Module):
    """Two convolutions round a rectifier, beside a skip."""

    def __init__(self, width: int, scale: float, inner: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.scale, self.inner = scale, inner

    def forward(self, x: Tensor) -> Tensor:
        """Return the features with the residual."""
        residual = self.conv2(F.relu(self.conv1(x)))
        return x + self.scale * residual if self.inner else (x + residual) * self.scale


class EDSR(nn.Module):
    """Head, residual body with a long skip, and an upsampler by pixel shuffle."""

    def __init__(self, width: int, blocks: int, inner: bool) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Sequential(*(ResBlock(width, 0.1, inner) for _ in range(blocks)))
        self.tail_conv = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return pictures of twice the size."""
        h = self.head(x)
        return F.pixel_shuffle(self.tail_conv(self.body(h)), 2)


def small_and_large(number: int = 16, size: int = 12) -> Sample:
    """Blurred and halved pictures of noise with sharp edges; the target is the picture."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        coarse = F.interpolate(normal(g, number, 1, size // 3, size // 3), scale_factor=3.0, mode="bicubic")
        large = torch.tanh(3 * coarse)
        return F.avg_pool2d(large, 2), large

    return sample


@sick(
    "contact11b-edsr-scaling",
    [("VANISHING", "*")],
    fading("body.0", "body.5", 1e-3),
    allow=("BOTTLENECK",),
    source="https://github.com/krasserm/super-resolution/issues/25",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def edsr_scaling(sick: bool, width: int) -> Setup:
    """Each block multiplies the sum of skip and residual by 0.1, so that six blocks shrink signal and
    gradient by a million; the repair multiplies only the residual before the sum."""
    return setup(EDSR(width, 6, not sick), small_and_large(), F.l1_loss, sgd(0.1, 0.9))


# ------------------------------------------------------------------------------------------- depths


class Hourglass(nn.Module):
    """A small encoder and decoder with a skip that returns the logarithm of depth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = stack(
            conv=nn.Conv2d(3, width, 3, stride=2, padding=1), bn=nn.BatchNorm2d(width), act=nn.ReLU()
        )
        self.inner = stack(
            conv=nn.Conv2d(width, width, 3, padding=1), bn=nn.BatchNorm2d(width), act=nn.ReLU()
        )
        self.skip = nn.Conv2d(3, width, 1)
        self.pred = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithm of depth."""
        h = self.inner(self.down(x))
        return self.pred(F.relu(F.interpolate(h, scale_factor=2.0) + self.skip(x)))


def holed_depth(number: int = 8, size: int = 12) -> Sample:
    """Pictures whose brightness tells depth; a tenth of the depths is missing and stored as zero."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        smooth = F.interpolate(normal(g, number, 1, 3, 3), size=(size, size), mode="bicubic")
        depth = torch.exp(0.7 * smooth) * 3
        picture = torch.cat([smooth, -smooth, smooth**2], 1) + 0.1 * normal(g, number, 3, size, size)
        return picture, depth * (uniform(g, number, 1, size, size) > 0.1)

    return sample


@sick(
    "contact11b-megadepth-holes",
    [("NUMERICAL", "*")],
    not_finite(3, loss=True),
    source="https://github.com/zhengqili/MegaDepth/issues/38",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def megadepth_holes(sick: bool, width: int) -> Setup:
    """The logarithm of the ground truth is taken before the mask is multiplied on, and missing depths are
    zero, so that minus infinity times zero is NaN; the repair keeps missing depths out of the logarithm."""

    def loss(log_pred: Tensor, depth: Tensor) -> Tensor:
        mask = (depth > 0).float()
        log_gt = torch.log(depth if sick else torch.where(depth > 0, depth, torch.ones_like(depth)))
        diff = (log_pred - log_gt) * mask
        count = mask.sum()
        data = diff.square().sum() / count - 0.5 * (diff.sum() / count).square()
        across = (diff[..., 2:] - diff[..., :-2]).abs() * mask[..., 2:] * mask[..., :-2]
        return data + 0.1 * across.sum() / count

    return setup(Hourglass(width // 2), holed_depth(), loss, 3e-3)


# ---------------------------------------------------------------------------------------- heat maps


class CenterHead(nn.Module):
    """A backbone and a head that returns a heat map of object centres per class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = stack(
            conv1=nn.Conv2d(3, width, 3, padding=1),
            bn1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(width, width, 3, padding=1),
            bn2=nn.BatchNorm2d(width),
            relu2=nn.ReLU(),
        )
        self.hm = nn.Conv2d(width, 2, 1)
        nn.init.constant_(self.hm.bias if self.hm.bias is not None else torch.zeros(2), -2.19)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the heat map."""
        return self.hm(self.backbone(x))


def centres(number: int = 8, size: int = 16) -> Sample:
    """Pictures with two coloured blobs; the target is a heat map with Gaussian peaks per class."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        place = choice(g, size, number, 2, 2, 1, 1)
        away = (rows - place[:, :, 0]) ** 2 + (columns - place[:, :, 1]) ** 2
        heat = torch.exp(-away / 2.0)
        picture = torch.cat([heat, heat.sum(1, keepdim=True)], 1) + 0.2 * normal(g, number, 3, size, size)
        return picture, heat

    return sample


def centre_focal(logits: Tensor, heat: Tensor) -> Tensor:
    """Return the focal loss of a heat map, summed over pixels and divided by the number of objects."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = heat.eq(1).float()
    positive = torch.log(p) * (1 - p) ** 2 * peak
    negative = torch.log(1 - p) * p**2 * (1 - heat) ** 4 * (1 - peak)
    return -(positive.sum() + negative.sum()) / peak.sum()


@sick(
    "contact11b-centernet-rate",
    [("SATURATION", "*")],
    no_gradient("backbone", "hm", after=17),
    allow=("DEAD", "UNSTABLE", "EXPLODING"),
    source="https://github.com/xingyizhou/CenterNet/issues/670",
    steps=150,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def centernet_rate(sick: bool, width: int) -> Setup:
    """With plain descent at too high a rate the logits drop so far in the first steps that the clamp of the
    sigmoid at 1e-4 holds all of them and no gradient is left; the repair is Adam at a low rate."""
    return setup(CenterHead(width // 2), centres(), centre_focal, sgd(0.5, 0.9) if sick else 5e-3)
