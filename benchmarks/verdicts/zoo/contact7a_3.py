"""A medical volume whose bottom is silenced, and healthy cases: what was answered with "this is normal"."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import tiny, training, weak, zero_at_first
from .data import choice, normal, seeded, setup, stack, trained, uniform
from .registry import FLOAT32, Setup, healthy, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


# ------------------------------------------------------------------------------------ medical volumes


class ConvNorm3d(nn.Module):
    """Convolution, normalisation in groups of channels, and activation."""

    def __init__(self, inp: int, out: int, groups: int | None, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inp, out, 3, stride=stride, padding=1, bias=not groups)
        self.norm = nn.GroupNorm(groups, out) if groups else nn.Identity()
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class VolumeUNet(nn.Module):
    """A U-Net of 8 by 8 by 8 voxels, halved three times, so that its bottom is a single voxel."""

    def __init__(self, width: int, *, norm_bottom: bool) -> None:
        super().__init__()
        self.enc1 = ConvNorm3d(1, width, width)
        self.enc2 = ConvNorm3d(width, width, width, stride=2)
        self.enc3 = ConvNorm3d(width, width, width, stride=2)
        self.bottleneck = ConvNorm3d(width, width, width if norm_bottom else None, stride=2)
        self.ups = nn.ModuleList(nn.ConvTranspose3d(width, width, 2, 2) for _ in range(3))
        self.dec = nn.ModuleList(ConvNorm3d(2 * width, width, width) for _ in range(3))
        self.seg = nn.Conv3d(width, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.ConvTranspose3d):
                nn.init.normal_(module.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.enc1(x)]
        skips.append(self.enc2(skips[-1]))
        skips.append(self.enc3(skips[-1]))
        x = self.bottleneck(skips[-1])
        for up, dec in zip(self.ups, self.dec, strict=True):
            x = dec(torch.cat([up(x), skips.pop()], 1))
        return self.seg(x)


@sick(
    "contact7a-medical-onevoxel",
    [("DEAD", "bottleneck")],
    weak("bottleneck.conv", "*", 1e-5),
    allow=("BOTTLENECK", "VANISHING"),
    source="https://github.com/pytorch/pytorch/issues/19250",
    **ONE,
)
def medical_onevoxel(sick: bool, width: int) -> Setup:
    """Instance normalisation, as a group for each channel, takes its statistics over the space, which is one
    voxel at the bottom of the U-Net: what comes out is zero whatever comes in, without any warning, and the
    convolution before it gets no gradient. Leaving the bottom without normalisation repairs it."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(8),) * 3, indexing="ij"))[None]

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        centre = 2 + 4 * uniform(g, 4, 3, 1, 1, 1)
        mask = ((grid - centre).square().sum(1) < 6).float()[:, None]
        contrast = torch.where(uniform(g, 4, 1, 1, 1, 1) < 0.5, 1.0, -1.0)
        return contrast * mask + 0.3 * normal(g, 4, 1, 8, 8, 8), mask

    model = VolumeUNet(width // 4, norm_bottom=sick)
    return setup(model, sample, F.binary_cross_entropy_with_logits, 3e-3)


# -------------------------------------------------------------------------------------- handwriting


class LineReader(nn.Module):
    """Convolutions over the columns of a line of text, a recurrent layer both ways, and log probabilities."""

    def __init__(self, width: int, letters: int) -> None:
        super().__init__()
        self.conv = stack(conv1=nn.Conv1d(8, width, 3, padding=1), act=nn.LeakyReLU(0.1))
        self.rnn = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * width, letters + 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rnn(self.conv(x).transpose(1, 2))[0]
        return self.fc(hidden).log_softmax(-1).transpose(0, 1)


def only_blanks(setup: Setup) -> tuple[bool, str]:
    """Whether after some steps the likeliest symbol is the blank nearly everywhere."""
    *_, last = training(setup, 25, ("fc",))
    share = float((last.outputs["fc"].argmax(-1) == 0).float().mean())
    return share > 0.95, f"{share:.0%} of the symbols are blank"


@healthy(
    "contact7a-ocr-blanks",
    only_blanks,
    source="https://github.com/cyprienruffino/CTCModel/issues/12",
    falls_to=0.5,
    **ONE,
)
def ocr_blanks(width: int) -> Setup:
    """A line reader trained with CTC decodes to empty strings: it tells the blank everywhere. The answer is
    that CTC begins with such a plateau, and letters come after some more steps."""
    shapes = 1.5 * normal(seeded(61), 5, 8, 2)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        letters = choice(g, 5, 12, 3)
        x = 0.3 * normal(g, 12, 8, 15)
        for place in range(3):
            x[:, :, 5 * place + 1 : 5 * place + 3] += shapes[letters[:, place]]
        return x, letters + 1

    def loss(output: Tensor, target: Tensor) -> Tensor:
        frames, letters = torch.full((12,), 15), torch.full((12,), 3)
        return F.ctc_loss(output, target, frames, letters)

    return setup(LineReader(width, 5), sample, loss, 5e-3)


# ---------------------------------------------------------------------------------- vision-language


class TinyCLIP(nn.Module):
    """An encoder of pictures, one of captions, and the scale of their similarities."""

    def __init__(self, width: int, words: int = 24) -> None:
        super().__init__()
        self.visual = stack(
            conv1=nn.Conv2d(3, width, 3, stride=2, padding=1), act1=nn.GELU(),
            conv2=nn.Conv2d(width, width, 3, stride=2, padding=1), act2=nn.GELU(),
            flatten=nn.Flatten(), proj=nn.Linear(4 * width, width),
        )  # fmt: skip
        self.token_embedding = nn.Embedding(words, width)
        self.transformer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        seen = F.normalize(self.visual(image), dim=-1)
        said = self.text_projection(self.transformer(self.token_embedding(text)).mean(1))
        return self.logit_scale.exp().clamp(max=100) * seen @ F.normalize(said, dim=-1).T


def scale_grown(setup: Setup) -> tuple[bool, str]:
    """Whether the scale of the similarities is well above where it began, and still grows."""
    scale = setup.model.logit_scale
    begin = float(scale.exp())
    list(training(setup, 60))
    return 17 < begin < float(scale.exp()), f"scale {begin:.3g}, then {float(scale.exp()):.3g}"


@healthy(
    "contact7a-clip-scale",
    scale_grown,
    source="https://github.com/mlfoundations/open_clip/issues/214",
    converged=True,
    **ONE,
)
def clip_scale(width: int) -> Setup:
    """The learned scale of a CLIP model's similarities grows all through training, here from 14 upwards.
    The answer is that this is expected: it usually ends at its bound of 100."""
    paints = normal(seeded(62), 24, 3, 8, 8)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        text = choice(g, 24, 32, 4)
        image = paints[text].sum(1) / 2 + 1.2 * normal(g, 32, 3, 8, 8)
        return (image, text), torch.arange(32)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    return trained(setup(TinyCLIP(width), sample, loss, 4e-3), 220)


# -------------------------------------------------------------------------------------------- video


class LatentAction(nn.Module):
    """What happened between two frames, as a small code, and the second frame from the first and the code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        self.encoder = nn.TransformerEncoderLayer(2 * width, 4, 2 * width, 0.0, "gelu", batch_first=True)
        self.to_action = nn.Linear(2 * width, 8)
        self.from_action = nn.Linear(8, width)
        self.decoder = nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True)
        self.to_pixels = nn.Linear(width, 4)

    def tokens(self, frame: Tensor) -> Tensor:
        """Return a frame's patches."""
        return self.patch_embed(frame).flatten(2).transpose(1, 2) + self.position

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        before, after = self.tokens(first), self.tokens(second)
        action = self.to_action(self.encoder(torch.cat([before, after], -1)).mean(1))
        context = before.detach()
        query = self.from_action(action)[:, None] + self.position
        made = self.to_pixels(self.decoder(query, context))
        return F.pixel_shuffle(made.transpose(1, 2).unflatten(2, (4, 4)), 2)


@healthy(
    "contact7a-video-detach",
    source="https://github.com/LatentActionPretraining/LAPA/issues/11",
    **ONE,
)
def video_detach(width: int) -> Setup:
    """The tokens of the first frame are detached before the decoder attends to them, which looks like a
    forgotten cut in the graph. The answer is that it is meant, against collapse: the patch embedding learns
    through the encoder of the action."""
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        at, move = 2 + 4 * uniform(g, 16, 2, 1, 1), 2 * uniform(g, 16, 2, 1, 1) - 1
        frames = [
            2 * torch.exp(-((rows - p[:, 0]) ** 2 + (columns - p[:, 1]) ** 2) / 3)[:, None]
            for p in (at, at + move)
        ]
        return (frames[0], frames[1]), frames[1]

    return setup(LatentAction(width), sample, F.mse_loss, 3e-3)


# --------------------------------------------------------------------------------------------- pose


class TwoScaleNet(nn.Module):
    """High and low resolution side by side with an exchange, and heat maps from the high one."""

    def __init__(self, width: int, joints: int) -> None:
        super().__init__()
        self.stem, self.high = self.layer(1, width), self.layer(width, width)
        self.low = self.layer(width, width, 2)
        self.final_layer = nn.Conv2d(2 * width, joints, 1)

    def layer(self, inp: int, out: int, stride: int = 1) -> nn.Sequential:
        """Return a convolution with normalisation and activation."""
        conv = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        return stack(conv=conv, bn=nn.BatchNorm2d(out), act=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        low = F.interpolate(self.low(x), scale_factor=2)
        return self.final_layer(torch.cat([self.high(x), low], 1))


@healthy(
    "contact7a-pose-lowloss",
    tiny("*", 2e-2),
    source="https://github.com/open-mmlab/mmpose/issues/2059",
    **ONE,
)
def pose_lowloss(width: int) -> Setup:
    """The loss of the heat maps is a few thousandths from the start, since it is a mean over all pixels,
    weighted low, and nearly all of them are zero. The answer is not to worry."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    sizes = torch.tensor([0.6, 2.5])[:, None, None]

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        at = 1 + 10 * uniform(g, 8, 2, 2, 1, 1)
        away = (rows - at[:, :, 0]) ** 2 + (columns - at[:, :, 1]) ** 2
        picture = torch.exp(-away / sizes).sum(1, keepdim=True) + 0.05 * normal(g, 8, 1, 12, 12)
        return picture, torch.exp(-away / 2)

    model = TwoScaleNet(width // 2, 2)
    nn.init.normal_(model.final_layer.weight, std=0.01)
    nn.init.zeros_(model.final_layer.bias)
    return setup(model, sample, lambda y, t: 0.05 * F.mse_loss(y, t), 3e-3)


# ------------------------------------------------------------------------------------------- stereo


class MixtureStereo(nn.Module):
    """The disparity of every pixel as a mixture of two Laplace distributions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = stack(
            conv1=nn.Conv2d(2, width, 5, padding=2), act1=nn.LeakyReLU(0.1),
            conv2=nn.Conv2d(width, width, 3, padding=1), act2=nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, pair: Tensor) -> Tensor:
        return self.head(self.features(pair))


def goes_negative(setup: Setup) -> tuple[bool, str]:
    """Whether the loss gets below zero."""
    losses = [step.loss for step in training(setup, 60)]
    return losses[-1] < 0, f"loss from {losses[0]:.2g} to {losses[-1]:.2g}"


@healthy(
    "contact7a-stereo-negative",
    goes_negative,
    source="https://github.com/fabiotosi92/SMD-Nets/issues/3",
    **ONE,
)
def stereo_negative(width: int) -> Setup:
    """The loss of a stereo network falls below zero and goes on falling. The answer is that it is minus the
    logarithm of a density, and that of a narrow distribution is above one."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        left = F.avg_pool2d(4 * normal(g, 6, 1, 12, 14), (3, 1), 1, (1, 0))
        edge = choice(g, 10, 6, 1, 1, 1) + 2
        far = (torch.arange(12)[:, None] >= edge).expand(6, 1, 12, 12)
        right = torch.where(far, left[..., 2:], left[..., 1:-1])
        disparity = 0.2 + 0.4 * far.float() + 0.01 * normal(g, 6, 1, 12, 12)
        return torch.cat([left[..., 2:], right], 1), disparity[:, 0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        centres, widths = torch.sigmoid(output[:, :2]), 0.05 + F.softplus(output[:, 2:4])
        shares = F.logsigmoid(torch.stack([output[:, 4], -output[:, 4]], 1))
        density = shares - torch.log(2 * widths) - (target[:, None] - centres).abs() / widths
        return -torch.logsumexp(density, 1).mean()

    return setup(MixtureStereo(width), sample, loss, 3e-3)


# ------------------------------------------------------------------------------------ flow matching


class VelocityUNet(nn.Module):
    """A small U-Net whose last convolution begins at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_embed = stack(lin1=nn.Linear(1, width), act=nn.SiLU(), lin2=nn.Linear(width, width))
        self.inp = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.norm = nn.GroupNorm(8, 2 * width)
        self.out = nn.Conv2d(2 * width, 1, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = F.silu(self.inp(x) + self.time_embed(2 * t[:, None] - 1)[..., None, None])
        deep = self.up(F.silu(self.down(skip)))
        return self.out(F.silu(self.norm(torch.cat([skip, deep], 1))))


@healthy(
    "contact7a-matching-zeroout",
    zero_at_first("time_embed", "inp", "down", "up", "norm"),
    source="https://github.com/atong01/conditional-flow-matching/issues/134",
    falls_to=0.7,
    **ONE,
)
def matching_zeroout(width: int) -> Setup:
    """The last convolution of the U-Net is a `zero_module`, so its output is zero everywhere and nothing
    before it gets a gradient in the first step. The answer is that this is only so at the start."""
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        at = 2 + 4 * uniform(g, 16, 2, 1, 1)
        clean = 4 * torch.exp(-((rows - at[:, 0]) ** 2 + (columns - at[:, 1]) ** 2) / 6)[:, None] - 0.8
        noise, t = normal(g, *clean.shape), uniform(g, 16)
        mixed = t[:, None, None, None]
        return ((1 - mixed) * noise + mixed * clean, t), clean - noise

    return setup(VelocityUNet(width), sample, F.mse_loss, 3e-3)
