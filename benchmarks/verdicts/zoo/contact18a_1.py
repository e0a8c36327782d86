"""Segmentation, detection and medical pictures: re-created from public reports."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import every, fading, no_gradient, not_finite, stuck, training
from .data import discs, normal, setup, sgd, stack, textures, uniform
from .registry import FLOAT32, Setup, healthy, sick


def _bce(output: Tensor, mask: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, mask)


# ------------------------------------------------------------------------------- contrast of pixels


class _PixelContrast(nn.Module):
    def __init__(self, width: int, unit: bool) -> None:
        super().__init__()
        self.body = stack(
            conv1=nn.Conv2d(1, width, 3, padding=1),
            norm1=nn.BatchNorm2d(width),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(width, width, 3, padding=1),
            norm2=nn.BatchNorm2d(width),
            act2=nn.ReLU(),
        )
        self.seg = nn.Conv2d(width, 2, 1)
        self.proj = stack(mix=nn.Conv2d(width, width, 1), norm=nn.BatchNorm2d(width))
        self.unit = unit

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        embedding = self.proj(features)
        return self.seg(features), F.normalize(embedding, dim=1) if self.unit else embedding


def _pixel_loss(eps: float):
    def loss(output: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        seg, embedding = output
        label = mask[:, 0].long()
        anchors = embedding.permute(0, 2, 3, 1).flatten(0, 2)[::29]
        kinds = label.flatten()[::29]
        logits = anchors @ anchors.T / 0.1
        logits = logits - logits.max(1, keepdim=True).values.detach()
        same = (kinds[:, None] == kinds[None]).float()
        positive = same * (1 - torch.eye(len(kinds)))
        others = (logits.exp() * (1 - same)).sum(1, keepdim=True)
        log_prob = logits - torch.log(logits.exp() + others + eps)
        pulled = (positive * log_prob).sum(1) / positive.sum(1).clamp_min(1)
        return F.cross_entropy(seg, label) - 0.1 * pulled.mean()

    return loss


@sick(
    "contact18a-segcontrast-log",
    [("NUMERICAL", "*")],
    not_finite(12),
    source="https://github.com/tfzhou/ContrastiveSeg/issues/68",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def segcontrast_log(sick: bool, width: int) -> Setup:
    """The pixel contrast takes log(exp(logit) + negatives) after the largest logit is subtracted. With a new
    network, whose embeddings are not of unit length, every exponential but the pixel's own underflows: log
    of zero. Unit embeddings and a small number inside the logarithm repair it."""
    return setup(_PixelContrast(width, not sick), discs(), _pixel_loss(0.0 if sick else 1e-10), 3e-3)


# ---------------------------------------------------------------------------- attention in float16


class _HalfAttention(nn.Module):
    def __init__(self, width: int, unit: bool) -> None:
        super().__init__()
        self.query = nn.Conv2d(width, width, 1)
        self.key = nn.Conv2d(width, width, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).flatten(2) for part in (self.query, self.key, self.value))
        if self.unit:
            query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        scores = torch.bmm(query.transpose(1, 2).half(), key.half())
        mixed = torch.bmm(value, scores.softmax(-1).float().transpose(1, 2))
        return x + mixed.view_as(x)


def _pixels_of(sample):
    def scaled(g):
        x, mask = sample(g)
        return (60 * x + 90).clamp(0, 255), mask

    return scaled


@sick(
    "contact18a-saliency-half",
    [("NUMERICAL", "attention")],
    not_finite(12),
    source="https://github.com/plemeri/InSPyReNet/issues/36",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def saliency_half(sick: bool, width: int) -> Setup:
    """A saliency network attends over pixels in float16, and queries and keys have the size of the features,
    which come from pixels up to 255, so that their products pass 65504: infinite scores, a softmax of NaN.
    Queries and keys of unit length
    repair it."""
    model = stack(
        conv1=nn.Conv2d(1, width, 3, padding=1),
        act1=nn.ReLU(),
        conv2=nn.Conv2d(width, width, 3, padding=1),
        act2=nn.ReLU(),
        attention=_HalfAttention(width, not sick),
        norm3=nn.BatchNorm2d(width),
        head=nn.Conv2d(width, 1, 1),
    )
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    return setup(model, _pixels_of(discs(number=4, size=10)), _bce, 3e-3)


# -------------------------------------------------------------------------- normalised flat volumes


def _scans(eps: float):
    pictures = discs()

    def sample(g) -> tuple[Tensor, Tensor]:
        x, mask = pictures(g)
        second = 2 * mask + normal(g, *mask.shape)
        second = second * (uniform(g, len(x), 1, 1, 1) > 0.2)  # the modality was not taken of every patient
        both = torch.cat([x, second], 1)
        mean, spread = both.mean((2, 3), keepdim=True), both.std((2, 3), keepdim=True)
        return (both - mean) / (spread + eps), mask

    return sample


def _unet(channels: int, width: int) -> nn.Sequential:
    return stack(
        conv1=nn.Conv2d(channels, width, 3, padding=1),
        norm1=nn.InstanceNorm2d(width, affine=True),
        act1=nn.LeakyReLU(0.01),
        conv2=nn.Conv2d(width, width, 3, padding=1),
        norm2=nn.InstanceNorm2d(width, affine=True),
        act2=nn.LeakyReLU(0.01),
        head=nn.Conv2d(width, 1, 1),
    )


@sick(
    "contact18a-medical-flat",
    [("NUMERICAL", "*")],
    not_finite(12),
    source="https://github.com/MIC-DKFZ/nnUNet/issues/2357",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def medical_flat(sick: bool, width: int) -> Setup:
    """Every channel of a scan is brought to mean 0 and deviation 1, but some scans have an empty channel, all
    of one value: 0 / 0, and the loss is NaN from the start. A small number in the denominator repairs it."""
    return setup(_unet(2, width), _scans(0.0 if sick else 1e-6), _bce, 3e-3)


# --------------------------------------------------------------------------- a skip that goes nowhere


class _SkipNet(nn.Module):
    def __init__(self, width: int, joined: bool) -> None:
        super().__init__()
        self.conv1a = stack(conv=nn.Conv2d(1, width, 3, 2, 1), norm=nn.BatchNorm2d(width), act=nn.ReLU())
        self.conv1b = stack(conv=nn.Conv2d(1, width, 1), norm=nn.BatchNorm2d(width))
        self.fire = stack(
            conv=nn.Conv2d(width, width, 3, padding=1), norm=nn.BatchNorm2d(width), act=nn.ReLU()
        )
        self.up = nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.head = nn.Conv2d(width, 1, 3, padding=1)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1a(x)
        skips = {1: self.conv1b(x) if self.joined else self.conv1b(x).detach(), 2: first.detach()}
        deep = self.up(self.fire(first) + skips[2])
        return self.head((deep + skips[1]).relu() if self.joined else deep.relu())


@sick(
    "contact18a-lidar-skip",
    [("DEAD", "conv1b")],
    no_gradient("conv1b"),
    source="https://github.com/PRBonn/lidar-bonnetal/issues/99",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lidar_skip(sick: bool, width: int) -> Setup:
    """The branch at full resolution is put among the skips after a detach, and the decoder never takes it:
    its convolution gets no gradient and does nothing. Adding it, attached, in the decoder repairs it."""
    return setup(_SkipNet(width, not sick), discs(), _bce, 3e-3)


# ------------------------------------------------------------------------- dice over empty masks only


def _patients(ill: bool):
    pictures = discs()

    def sample(g) -> tuple[Tensor, Tensor]:
        x, mask = pictures(g)
        return (x, mask) if ill else (x - mask, torch.zeros_like(mask))

    return sample


def _dice(output: Tensor, mask: Tensor) -> Tensor:
    chance = output.sigmoid()
    return 1 - 2 * (chance * mask).sum() / (chance.sum() + mask.sum() + 1e-5)


@sick(
    "contact18a-anomaly-normal",
    [("DEAD", "*")],
    no_gradient("encoder", "head"),
    source="https://github.com/MediaBrain-SJTU/MVFA-AD/issues/16",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def anomaly_normal(sick: bool, width: int) -> Setup:
    """Only normal pictures are trained on, so every mask is empty, the overlap in the Dice loss is zero
    whatever the network says, and so are all gradients. Abnormal pictures with their masks repair it."""
    model = stack(
        encoder=stack(
            conv1=nn.Conv2d(1, width, 3, padding=1),
            act1=nn.GELU(),
            conv2=nn.Conv2d(width, width, 3, padding=1),
            act2=nn.GELU(),
        ),
        head=nn.Conv2d(width, 1, 1),
    )
    return setup(model, _patients(not sick), _dice, 3e-3)


# ------------------------------------------------------------------------ normalisation commented out


class _Plain(nn.Module):
    def __init__(self, width: int, normed: bool, depth: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            stack(
                conv=nn.Conv2d(1 if i == 0 else width, width, 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(width) if normed else nn.Identity(),
                act=nn.ReLU(),
            )
            for i in range(depth)
        )
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@sick(
    "contact18a-anatomy-norm",
    [("VANISHING", "blocks")],
    every(fading("blocks.0", "blocks.7", 0.01), stuck(0.45)),
    allow=("BOTTLENECK",),
    source="https://github.com/wentaozhu/AnatomyNet-for-anatomical-segmentation/issues/6",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def anatomy_norm(sick: bool, width: int) -> Setup:
    """The batch normalisations are commented out of a deep stack of convolutions without biases: signal and
    gradient shrink at every layer, and the Dice of every organ stays at zero. Normalising repairs it."""
    return setup(_Plain(width, not sick), discs(size=8), _bce, sgd(0.05, 0.9))


# -------------------------------------------------------------------------------- clamped confidences


def _clamped(head: str, floor: float):
    """Nearly all confidences are below a floor, still after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, 10, (head,))
        share = float((last.outputs[head].sigmoid() < floor).float().mean())
        return share > 0.95, f"{share:.0%} of the confidences are below {floor:g}"

    return claim


def _focal(floor: float):
    def loss(output: Tensor, kind: Tensor) -> Tensor:
        chance = output.sigmoid().clamp(floor, 1 - 1e-4)
        hit = F.one_hot(kind, output.shape[1]).float()
        positive = 0.25 * hit * (1 - chance).square() * -chance.log()
        negative = 0.75 * (1 - hit) * chance.square() * -(1 - chance).log()
        return (positive + negative).sum() / len(kind)

    return loss


@sick(
    "contact18a-detect-clamp",
    [("SATURATION", "*")],
    every(_clamped("head", 1e-4), no_gradient("head"), stuck(1.5)),
    allow=("DEAD", "VANISHING"),
    source="https://github.com/toandaominh1997/EfficientDet.Pytorch/issues/131",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def detect_clamp(sick: bool, width: int) -> Setup:
    """The focal loss clamps confidences at 1e-4, but with very many classes the prior of each is lower: all
    confidences sit on the clamp, where nothing has a gradient, and the class loss stays. A clamp at 1e-8
    repairs it."""
    model = stack(
        conv1=nn.Conv2d(3, width, 3, padding=1),
        act1=nn.SiLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        mix=nn.Linear(width, width),
        act2=nn.SiLU(),
        head=nn.Linear(width, 40),
    )
    nn.init.normal_(model.head.weight, std=0.01)
    nn.init.constant_(model.head.bias, -math.log(1600 / 0.1))
    return setup(model, textures(), _focal(1e-4 if sick else 1e-8), 1e-2)


# ------------------------------------------------------------------------------------------ healthy


class _Adapted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Conv2d(1 if i == 0 else width, width, 3, padding=1) for i in range(3))
        self.down = nn.ModuleList(nn.Conv2d(width, width // 2, 1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(width // 2, width, 1) for _ in range(3))
        self.head = nn.Conv2d(width, 1, 1)
        for layer in self.encoder:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.encoder.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer, down, up in zip(self.encoder, self.down, self.up, strict=True):
            x = layer(x).relu()
            x = x + up(F.gelu(down(x)))
        return self.head(x)


@healthy(
    "contact18a-healthy-adapter",
    no_gradient("encoder"),
    source="https://github.com/tianrun-chen/SAM-Adapter-PyTorch/issues/72",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_adapter(width: int) -> Setup:
    """The image encoder of a segmentation network is frozen on purpose; adapters between its layers and the
    decoder train."""
    return setup(_Adapted(width), discs(), _bce, 3e-3)
