"""Cases from public reports: vocoder, image critic, depth, pose, face and segmentation models."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import every, fading, flat, no_gradient, not_finite, stuck
from .data import Sample, discs, normal, seeded, setup, stack, textures, trained, uniform
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


# ------------------------------------------------------------------------------------------ vocoder


class ResBlock1d(nn.Module):
    """Two dilated convolutions with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=d, dilation=d) for d in (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(F.leaky_relu(x, 0.1))
        return x


class WaveGenerator(nn.Module):
    """Frames of features to a waveform, eight samples for each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_pre = nn.Conv1d(width, width, 3, padding=1)
        self.ups = nn.ModuleList(
            [nn.ConvTranspose1d(width, width // 2, 4, 4), nn.ConvTranspose1d(width // 2, width // 2, 2, 2)]
        )
        self.resblocks = nn.ModuleList(ResBlock1d(width // 2) for _ in range(2))
        self.conv_post = nn.Conv1d(width // 2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        for up, block in zip(self.ups, self.resblocks, strict=True):
            x = block(up(F.leaky_relu(x, 0.1)))
        return torch.tanh(self.conv_post(F.leaky_relu(x, 0.1)))[:, 0]


class PitchVocoder(nn.Module):
    """An encoder of frames, a head for the pitch, and a generator of the waveform."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = stack(inp=nn.Conv1d(8, width, 3, padding=1), act=nn.LeakyReLU(0.1))
        self.f0_head = nn.Conv1d(width, 1, 1)
        self.generator = WaveGenerator(width)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(frames)
        return self.generator(hidden), self.f0_head(hidden)[:, 0]


def log_mel(wave: Tensor, bank: Tensor, *, detached: bool) -> Tensor:
    """Return the log mel spectrogram of a batch of waveforms."""
    spec = torch.stft(wave, 32, 8, window=torch.hann_window(32), return_complex=True)
    magnitudes = torch.sqrt(spec.real.square() + spec.imag.square() + 1e-6)
    if detached:
        magnitudes = magnitudes.data
    return torch.log(torch.einsum("mf,bft->bmt", bank, magnitudes) + 1e-1)


@sick(
    "contact7a-vocoder-mel",
    [("DEAD", "generator")],
    no_gradient("generator"),
    source="https://github.com/rishikksh20/HiFi-GAN/issues/8",
    **ONE,
)
def vocoder_mel(sick: bool, width: int) -> Setup:
    """The spectrogram function takes `magnitudes.data`, so the mel loss of the generated waveform has no
    gradient function and the generator learns nothing in its pretraining; only the pitch head and the encoder
    move. Keeping the graph through the magnitudes repairs it."""
    time = torch.arange(96) / 96
    bank = F.relu(1 - (torch.arange(17)[None] - torch.linspace(0, 16, 8)[:, None]).abs() / 3)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        pitch, loud = 4 + 20 * uniform(g, 8, 1), 0.3 + 0.6 * uniform(g, 8, 1)
        wave = loud * torch.sin(2 * math.pi * (pitch * time + uniform(g, 8, 1)))
        frames = log_mel(wave, bank, detached=False)[..., :12] + 0.05 * normal(g, 8, 8, 12)
        return frames, (wave, torch.log(pitch / 12).expand(8, 12))

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        heard, wanted = log_mel(output[0], bank, detached=sick), log_mel(target[0], bank, detached=True)
        return F.l1_loss(heard, wanted) + F.mse_loss(output[1], target[1])

    return setup(PitchVocoder(width), sample, loss, 2e-3)


# --------------------------------------------------------------------------------------- GAN critic


class MinibatchStd(nn.Module):
    """Appends the mean over everything of the standard deviation over the batch, as one more channel."""

    def forward(self, x: Tensor) -> Tensor:
        spread = torch.std(x, dim=0).mean()
        return torch.cat([x, spread.expand(len(x), 1, *x.shape[2:])], 1)


class Critic(nn.Module):
    """A progressive GAN's discriminator of 8 by 8 pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.from_rgb = nn.Conv2d(3, width, 1)
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, 3, padding=1)
        self.minibatch_std = MinibatchStd()
        self.final = nn.Conv2d(width + 1, width, 4)
        self.score = nn.Linear(width, 1)

    def rate(self, x: Tensor) -> Tensor:
        """Return how real each picture looks."""
        x = F.leaky_relu(self.from_rgb(x), 0.2)
        x = F.leaky_relu(self.block1(x), 0.2)
        x = F.avg_pool2d(F.leaky_relu(self.block2(x), 0.2), 2)
        x = F.leaky_relu(self.final(self.minibatch_std(x)), 0.2)
        return self.score(x.flatten(1))

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.rate(real), self.rate(fake)


@sick(
    "contact7a-gan-batchstd",
    [("NUMERICAL", "minibatch_std")],
    not_finite(12),
    source="https://github.com/ziwei-jiang/PGGAN-PyTorch/issues/1",
    **ONE,
)
def gan_batchstd(sick: bool, width: int) -> Setup:
    """The data has 65 pictures and a batch 8, so the ninth batch has a single one, whose standard deviation
    over the batch is 0/0 in the discriminator's minibatch layer: everything is NaN from there on. Skipping
    the batch of one repairs it."""
    pictures = textures(4, 65)(seeded(31))[0]
    place = 0

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
        nonlocal place
        real = pictures[place : place + 8]
        place += 8
        if place >= len(pictures) or (not sick and place + 8 > len(pictures)):
            place = 0
        fake = F.avg_pool2d(1.6 * normal(g, len(real), 3, 10, 10), 3, 1)
        return (real, fake), None

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        return F.softplus(-output[0]).mean() + F.softplus(output[1]).mean()

    return setup(Critic(width), sample, loss, 1e-3)


# -------------------------------------------------------------------------------------------- depth


class DepthHead(nn.Module):
    """One convolution to the depth, kept above the least depth by ReLU, or between both ends by a sigmoid."""

    def __init__(self, width: int, *, scale_up: bool) -> None:
        super().__init__()
        self.scale_up = scale_up
        self.conv_depth = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_depth(x)
        return 10 * torch.sigmoid(x) if self.scale_up else F.relu(x) + 1e-3


class DepthNet(nn.Module):
    """A small encoder and decoder of pictures, and the depth head."""

    def __init__(self, width: int, *, scale_up: bool) -> None:
        super().__init__()
        self.backbone = stack(
            stem=nn.Conv2d(3, width, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(width), act1=nn.GELU(),
            conv=nn.Conv2d(width, width, 3, padding=1, bias=False), bn2=nn.BatchNorm2d(width), act2=nn.GELU(),
        )  # fmt: skip
        self.decode_head = DepthHead(width, scale_up=scale_up)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))


def scenes(number: int = 8, size: int = 12) -> Sample:
    """Pictures of a table that recedes and a box on it; the target is the depth in metres."""
    rows = torch.linspace(1, 0, size)[:, None].expand(size, size)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        mask = discs(number, size)(g)[1]
        near, far = 0.06 + 0.06 * uniform(g, number, 1, 1, 1), 0.2 + 0.4 * uniform(g, number, 1, 1, 1)
        depth = near + (far - near) * rows
        depth = torch.where(mask > 0, 0.6 * depth, depth)
        picture = torch.cat([0.2 / depth, mask, rows.expand(number, 1, -1, -1)], 1)
        return picture + 0.1 * normal(g, number, 3, size, size), depth

    return sample


def sig_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the scale-invariant logarithmic loss."""
    g = torch.log(output + 1e-3) - torch.log(target + 1e-3)
    return torch.sqrt(g.var() + 0.15 * g.mean().square() + 1e-6)


@sick(
    "contact7a-depth-head",
    [("DEAD", "decode_head")],
    no_gradient("decode_head", "backbone"),
    source="https://github.com/zhyever/Monocular-Depth-Estimation-Toolbox/issues/54",
    **ONE,
)
def depth_head(sick: bool, width: int) -> Setup:
    """The scale-invariant loss never goes down on a custom data set: the depth head ends in a ReLU plus the
    least depth, and the first large steps push it below zero on every pixel, from where no gradient comes
    back. The answer is the version of the head with a sigmoid (`scale_up`)."""
    ready = setup(DepthNet(width, scale_up=not sick), scenes(), sig_loss, 2e-2)
    return trained(ready, 40) if sick else ready


# --------------------------------------------------------------------------------------------- pose


class PoseMachine(nn.Module):
    """A convolutional pose machine: each stage refines the belief maps of the one before."""

    def __init__(self, width: int, joints: int = 3, stages: int = 5) -> None:
        super().__init__()
        self.features = stack(conv1=nn.Conv2d(1, width, 5, padding=2), act1=nn.ReLU())
        sizes = [width] + [width + joints] * (stages - 1)
        self.stages = nn.ModuleList(
            stack(
                conv1=nn.Conv2d(size, width, 5, padding=2), act1=nn.ReLU(),
                conv2=nn.Conv2d(width, width, 1), act2=nn.ReLU(),
                belief=nn.Conv2d(width, joints, 1),
            )
            for size in sizes
        )  # fmt: skip

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.features(x)
        beliefs = [self.stages[0](features)]
        for stage in self.stages[1:]:
            beliefs.append(stage(torch.cat([features, beliefs[-1]], 1)))
        return beliefs


def joints(number: int = 8, size: int = 10) -> Sample:
    """Pictures of three blobs of different size; the target is a heat map for each."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    sizes = torch.tensor([0.5, 1.5, 4.0])[:, None, None]

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        at = 1 + (size - 2) * uniform(g, number, 3, 2, 1, 1)
        away = (rows - at[:, :, 0]) ** 2 + (columns - at[:, :, 1]) ** 2
        picture = torch.exp(-away / sizes).sum(1, keepdim=True) + 0.05 * normal(g, number, 1, size, size)
        return picture, 2 * torch.exp(-away / 3)

    return sample


@sick(
    "contact7a-pose-stages",
    [("VANISHING", "stages")],
    fading("stages.0.belief", "stages.4.belief", 1e-2),
    source="https://arxiv.org/abs/1602.00134",
    **ONE,
)
def pose_stages(sick: bool, width: int) -> Setup:
    """The paper on why it supervises every stage: with a loss at the last one alone, the gradient fades on
    its way through the stages, and the early ones hardly learn. A loss on the belief maps of every stage
    repairs it."""

    def loss(output: list[Tensor], target: Tensor) -> Tensor:
        return sum(F.mse_loss(belief, target) for belief in (output[-1:] if sick else output))

    return setup(PoseMachine(width), joints(), loss, 2e-3)


# --------------------------------------------------------------------------------------------- face


class ArcMargin(nn.Module):
    """Cosines to the identities' centres, with an angular margin for the true one."""

    def __init__(self, size: int, kinds: int, *, margin: float, least: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(kinds, size))
        self.margin, self.least = margin, least

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))
        if not self.margin:
            return 16 * cosine
        sine = torch.sqrt((1 - cosine.square()).clamp_min(self.least) if self.least else 1 - cosine.square())
        phi = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        safe = math.cos(math.pi - self.margin)
        phi = torch.where(cosine > safe, phi, cosine - self.margin * math.sin(self.margin))
        true = F.one_hot(label, cosine.shape[1])
        return 16 * (true * phi + (1 - true) * cosine)


class FaceNet(nn.Module):
    """A small backbone to a plane, as in drawings of what margins do, and the margin head."""

    def __init__(self, width: int, least: float) -> None:
        super().__init__()
        self.backbone = stack(
            conv1=nn.Conv2d(3, width, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(width), act1=nn.PReLU(),
            pool=nn.AvgPool2d(2), conv2=nn.Conv2d(width, width, 3, padding=1), act2=nn.PReLU(),
            flatten=nn.Flatten(), embed=nn.Linear(16 * width, 2),
        )  # fmt: skip
        self.margin = ArcMargin(2, 4, margin=0.0, least=least)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.margin(self.backbone(x), label)


@sick(
    "contact7a-face-margin",
    [("NUMERICAL", "margin")],
    not_finite(20),
    source="https://github.com/MccreeZhao/FR-Loss-on-Mnist/issues/2",
    **ONE,
)
def face_margin(sick: bool, width: int) -> Setup:
    """On easy data the two-dimensional embedding comes to point exactly along a class's centre; the sine in
    the arc margin is the root of one minus the squared cosine, whose gradient at zero (or below it, by
    rounding) is not a number. Keeping the argument of the root above a small number repairs it."""
    model = FaceNet(width // 2, 0.0 if sick else 1e-6)
    easy = textures(4, 256)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, label = easy(g)
        return (x, label), label

    ready = trained(setup(model, sample, F.cross_entropy, 3e-3), 60)
    model.margin.margin = 0.3
    return ready


# ------------------------------------------------------------------------------------- segmentation


class MaskNet(nn.Module):
    """Two levels with a skip, and the mask's activation as a module."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.enc1, self.enc2 = self.level(1, width), self.level(width, width)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.head = nn.Conv2d(2 * width, 1, 1)
        self.act = act

    def level(self, inp: int, out: int) -> nn.Sequential:
        """Return a convolution with normalisation and activation."""
        conv = nn.Conv2d(inp, out, 3, padding=1, bias=False)
        return stack(conv=conv, bn=nn.BatchNorm2d(out), act=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc1(x)
        deep = self.up(self.enc2(F.max_pool2d(skip, 2)))
        return self.act(self.head(torch.cat([skip, deep], 1)))


@sick(
    "contact7a-segmentation-sigmoids",
    [("SATURATION", "act")],
    every(stuck(0.5, steps=60), flat("act", "sigmoid", 0.7)),
    allow=("VANISHING", "BOTTLENECK"),
    source="https://github.com/itakurah/focal-loss-pytorch/pull/5",
    **ONE,
)
def segmentation_sigmoids(sick: bool, width: int) -> Setup:
    """A sigmoid is applied before a loss that applies one itself, so the second only gets numbers from 0 to 1
    and no score is below a half: the first is driven to its flat ends and the loss stays high. Handing the
    bare logits to the loss repairs it."""
    model = MaskNet(width // 2, nn.Sigmoid() if sick else nn.Identity())
    ready = setup(model, discs(), F.binary_cross_entropy_with_logits, 1e-2 if sick else 3e-3)
    return trained(ready, 120) if sick else ready
