"""Trainings of convolutional nets: on digits as pictures, on shapes, and on series."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .data import (
    accuracy,
    choice,
    cosine,
    explained,
    mean_loss,
    normal,
    pictures,
    rows,
    scheduled,
    seeded,
    training,
    uniform,
)
from .registry import Training, healthy


@healthy("conv-digits-pooled", 500, at_least=0.95)
def pooled() -> Training:
    """Two convolutions, pooling and a linear head, as in the oldest of tutorials."""
    x, y, xt, yt = pictures()
    conv = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1)]
    model = nn.Sequential(*conv, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    return training(model, rows(x, y), F.cross_entropy, 3e-3, accuracy(xt, yt))


class Block(nn.Module):
    """Two convolutions with batch norm, added to what they read."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.short(x) + self.bn2(self.conv2(inner)))


@healthy("conv-digits-resnet", 300, at_least=0.95)
def resnet() -> Training:
    """A small residual net with batch norm, momentum and weight decay."""
    x, y, xt, yt = pictures()
    stem = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    blocks = [Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1), Block(16, 32, 2)]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    after = scheduled(optimizer, cosine(300))
    return training(model, rows(x, y), F.cross_entropy, optimizer, accuracy(xt, yt), after=after)


def depthwise_block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return an expansion, a depthwise convolution and a projection."""
    wide = 4 * inputs
    return nn.Sequential(
        *[nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()],
        *[nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()],
        *[nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)],
    )


@healthy("conv-digits-depthwise", 400, at_least=0.93)
def depthwise() -> Training:
    """Inverted bottlenecks with depthwise convolutions and ReLU6, with RMSprop."""
    x, y, xt, yt = pictures()
    stem = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()]
    blocks = [depthwise_block(8, 12, 2), depthwise_block(12, 16, 2)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 10)]
    model = nn.Sequential(*stem, *blocks, *tail)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3, momentum=0.5)
    return training(model, rows(x, y), F.cross_entropy, optimizer, accuracy(xt, yt))


class UNet(nn.Module):
    """Two scales down, two up, with skips."""

    def __init__(self, inputs: int = 1, outputs: int = 1, size: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = self.two(inputs, size), self.two(size, 2 * size)
        self.middle = self.two(2 * size, 2 * size)
        self.up2, self.up1 = self.two(4 * size, size), self.two(2 * size, size)
        self.head = nn.Conv2d(size, outputs, 1)

    @staticmethod
    def two(inputs: int, outputs: int) -> nn.Sequential:
        """Return two convolutions with group norm."""
        layers: list[nn.Module] = []
        for size in (inputs, outputs):
            layers += [nn.Conv2d(size, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return one map of logits for each output."""
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        low = self.middle(F.max_pool2d(two, 2))
        up = self.up2(torch.cat([F.interpolate(low, scale_factor=2.0), two], 1))
        return self.head(self.up1(torch.cat([F.interpolate(up, scale_factor=2.0), one], 1)))


def grid(size: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of a picture."""
    rows_, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return rows_, columns


def discs(g: Generator, number: int, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy pictures of a disc, its mask, and (row, column, radius) between 0 and 1."""
    r, c = grid(size)
    place = 3 + (size - 6) * uniform(g, number, 2)
    radius = 2 + 2.5 * uniform(g, number)
    distance = (r - place[:, 0, None, None]) ** 2 + (c - place[:, 1, None, None]) ** 2
    mask = (distance < radius[:, None, None] ** 2).float()[:, None]
    box = torch.cat([place / size, radius[:, None] / size], 1)
    return mask + 0.4 * normal(g, number, 1, size, size), mask, box


@healthy("conv-unet-segmentation", 250, at_least=0.85)
def unet() -> Training:
    """A U-Net that marks discs, with cross entropy and the soft overlap."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return discs(g, 8)[:2]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        p = output.sigmoid()
        overlap = (2 * (p * target).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1)
        return F.binary_cross_entropy_with_logits(output, target) + 1 - overlap.mean()

    x, mask = discs(seeded(98), 64)[:2]

    def overlap(net: nn.Module) -> float:
        told = net(x) > 0
        return float((told & (mask > 0)).sum() / (told | (mask > 0)).sum())

    return training(UNet(), sample, loss, 3e-3, overlap)


class ConvNext(nn.Module):
    """A wide depthwise convolution, layer norm over channels, and a scaled residual."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(size, size, 5, padding=2, groups=size), nn.LayerNorm(size)
        self.wide, self.narrow = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.scale = nn.Parameter(1e-2 * torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        inner = self.scale * self.narrow(F.gelu(self.wide(inner)))
        return x + inner.permute(0, 3, 1, 2)


@healthy("conv-digits-convnext-layer-scale", 400, at_least=0.93, source="https://arxiv.org/abs/2201.03545")
def convnext() -> Training:
    """Blocks that start as almost nothing: layer scale of a hundredth, AdamW, warm-up."""
    x, y, xt, yt = pictures()
    parts = [nn.Conv2d(1, 16, 2, 2), ConvNext(16), ConvNext(16), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*parts, nn.LayerNorm(16), nn.Linear(16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    after = scheduled(optimizer, cosine(400, warm=30))
    return training(model, rows(x, y), F.cross_entropy, optimizer, accuracy(xt, yt), after=after)


class Squeezed(nn.Module):
    """A convolution whose channels are weighed by what the whole picture says."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.down, self.up = nn.Linear(outputs, outputs // 4), nn.Linear(outputs // 4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        x = F.silu(self.norm(self.conv(x)))
        gate = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return x * gate[..., None, None]


@healthy("conv-digits-squeeze-excitation", 300, at_least=0.95)
def squeezed() -> Training:
    """Squeeze and excitation, with Adamax."""
    x, y, xt, yt = pictures()
    parts = [Squeezed(1, 16), nn.MaxPool2d(2), Squeezed(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*parts, nn.Linear(32, 10))
    optimizer = torch.optim.Adamax(model.parameters(), lr=5e-3)
    return training(model, rows(x, y), F.cross_entropy, optimizer, accuracy(xt, yt))


@healthy("conv-boxes-smooth-l1", 400, at_least=0.75)
def boxes() -> Training:
    """A detector's head: the place and the size of a disc from its picture."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, _, box = discs(g, 16)
        return x, box

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(output.sigmoid(), target, beta=0.05)

    conv = [nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*conv, nn.Linear(24 * 16, 48), nn.ReLU(), nn.Linear(48, 3))
    x, _, box = discs(seeded(98), 256)
    figure = explained(x, box)

    def part(net: nn.Module) -> float:
        return figure(nn.Sequential(net, nn.Sigmoid()))

    return training(model, sample, loss, 2e-3, part)


@healthy("conv-super-resolution", 300, at_most=0.03)
def super_resolution() -> Training:
    """Digits of half the size made whole by shuffled pixels, with the mean absolute error."""
    x, _, xt, _ = pictures()

    def halved(whole: Tensor) -> Tensor:
        return F.avg_pool2d(whole, 2)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        whole = x[choice(g, len(x), 16)]
        return halved(whole), whole

    conv = [nn.Conv2d(1, 24, 3, padding=1), nn.PReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.PReLU()]
    model = nn.Sequential(*conv, nn.Conv2d(24, 4, 3, padding=1), nn.PixelShuffle(2))
    return training(model, sample, F.l1_loss, 3e-3, lambda net: float(F.mse_loss(net(halved(xt)), xt)))


class Half(nn.Module):
    """A net that runs in bfloat16 where autocast says so."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the net's output in float32."""
        with torch.autocast("cpu", torch.bfloat16):
            x = self.net(x)
        return x.float()


@healthy("conv-digits-bfloat16", 300, at_least=0.93)
def bfloat16() -> Training:
    """A convolutional net under bfloat16's autocast."""
    x, y, xt, yt = pictures()
    conv = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1)]
    model = Half(nn.Sequential(*conv, nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return training(model, rows(x, y), F.cross_entropy, optimizer, accuracy(xt, yt))


class Dilated(nn.Module):
    """A causal convolution with weight norm, added to what it reads."""

    def __init__(self, size: int, dilation: int) -> None:
        super().__init__()
        conv = nn.Conv1d(size, size, 3, dilation=dilation)
        self.conv, self.reach = nn.utils.parametrizations.weight_norm(conv), 2 * dilation

    def forward(self, x: Tensor) -> Tensor:
        """Return features, of the same length."""
        return x + F.relu(self.conv(F.pad(x, (self.reach, 0))))


@healthy("conv-series-dilated-causal", 400, at_least=0.85)
def causal() -> Training:
    """Dilated causal convolutions with weight norm forecast a wave of changing pitch."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        pitch, start = 0.2 + 0.5 * uniform(g, 16, 1), 6.3 * uniform(g, 16, 1)
        t = torch.arange(41.0)
        wave = torch.sin(pitch * t + start) + 0.3 * torch.sin(2.3 * pitch * t)
        wave = wave + 0.05 * normal(g, 16, 41)
        return wave[:, None, :-1], wave[:, None, 1:]

    blocks = [Dilated(16, 2**i) for i in range(4)]
    model = nn.Sequential(nn.Conv1d(1, 16, 1), *blocks, nn.Conv1d(16, 1, 1))
    return training(model, sample, F.mse_loss, 3e-3, explained(*sample(seeded(98))))


@healthy("conv-stripes-group-norm-contrast", 300, at_most=0.2)
def stripes() -> Training:
    """The angle of stripes as a point on the circle, by a fully convolutional net with group norm."""
    r, c = grid(10)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        angle = math.pi * uniform(g, 16)
        phase = torch.cos(angle)[:, None, None] * r + torch.sin(angle)[:, None, None] * c
        x = torch.sin(1.3 * phase + 6.3 * uniform(g, 16, 1, 1))[:, None] + 0.2 * normal(g, 16, 1, 10, 10)
        return x, torch.stack([torch.cos(2 * angle), torch.sin(2 * angle)], 1)

    layers: list[nn.Module] = []
    for a, b in ((1, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(a, b, 3), nn.GroupNorm(4, b), nn.Mish()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(output, target).mean()

    optimizer = torch.optim.RAdam(model.parameters(), lr=3e-3)
    return training(model, sample, loss, optimizer, mean_loss(sample, loss))
