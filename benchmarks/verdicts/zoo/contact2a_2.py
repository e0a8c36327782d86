"""First contact, round 2a, part 2: cases from public reports on images and motion.

Every sick case re-creates, in a small model, the structure and the mechanism of the report that it names; the
repair is the one of its thread, or what its field settled on. They were written without seeing any verdict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from .claims import growing, no_gradient, zero_at_first
from .data import normal, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick

# ----------------------------------------------------------------------------------------- pictures


def _smooth(g: Generator, number: int, channels: int, size: int) -> Tensor:
    """Return smooth random pictures with values in [0, 1]."""
    coarse = uniform(g, number, channels, 4, 4)
    return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(0, 1)


def _shrunk(number: int = 8, size: int = 12, peak: float = 1.0):
    """Pictures shrunk to half their size, and the pictures."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        sharp = peak * (0.7 * _smooth(g, number, 3, size) + 0.3 * _smooth(g, number, 3, size).round())
        return F.avg_pool2d(sharp, 2), sharp

    return sample


class _ResBlock(nn.Module):
    """Two convolutions beside the identity, without a norm."""

    def __init__(self, width: int, res_scale: float):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.res_scale = res_scale
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res_scale * self.conv2(F.relu(self.conv1(x)))


class _Upscaler(nn.Module):
    """Residual super-resolution by two, with a long skip and a shuffle of pixels at its end."""

    def __init__(self, width: int, blocks: int, res_scale: float):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(_ResBlock(width, res_scale) for _ in range(blocks))
        self.tail = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = skip = self.head(x)
        for block in self.body:
            features = block(features)
        return F.pixel_shuffle(self.tail(features + skip), 2)


@sick(
    "contact2a-restore-residuals_in_255",
    [("EXPLODING", "*")],
    growing("head", "body.15", 30.0),
    allow=("UNSTABLE", "NUMERICAL"),
    source="https://github.com/laoyangui/DLSN/issues/1",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def residuals_in_255(sick: bool, width: int) -> Setup:
    """A deep super-resolution network without norms adds full residuals for pictures of values up to 255:
    features and gradients grow with every block. Repaired by values up to 1 and a small residual scale."""
    model = _Upscaler(width, 16, 1.0 if sick else 0.1)
    return setup(model, _shrunk(peak=255.0 if sick else 1.0), F.l1_loss, 1e-3)


class _GatedBlock(nn.Module):
    """A restoration block whose two branches are scaled by parameters that start at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.attend, self.mix = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.depthwise(self.expand(self.norm1(x))).chunk(2, 1)
        y = a * b
        x = x + self.beta * self.mix(y * self.attend(y.mean((2, 3), keepdim=True)))
        a, b = self.up(self.norm2(x)).chunk(2, 1)
        return x + self.gamma * self.down(a * b)


class _Restorer(nn.Module):
    """Adds to a noisy picture what blocks of simple gates make of it."""

    def __init__(self, width: int):
        super().__init__()
        self.intro, self.ending = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.blocks = nn.ModuleList(_GatedBlock(width) for _ in range(3))

    def forward(self, noisy: Tensor) -> Tensor:
        x = self.intro(noisy)
        for block in self.blocks:
            x = block(x)
        return noisy + self.ending(x)


@healthy(
    "contact2a-restore-zero_scaled_branches",
    zero_at_first("blocks.0.expand", "blocks.1.up", "blocks.2.mix"),
    widths=(16,),
    dtypes=(FLOAT32,),
)
def zero_scaled_branches(width: int) -> Setup:
    """A denoiser of gated blocks without activations, whose branches start at a scale of zero: nothing inside
    them has a gradient in the first step, and the scales' own gradient opens them."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        clean = _smooth(g, 8, 3, 12)
        return clean + 0.3 * normal(g, 8, 3, 12, 12), clean

    return setup(_Restorer(width), sample, F.mse_loss, 3e-3)


# ------------------------------------------------------------------------------------------- motion


def _moved(number: int = 8, size: int = 12):
    """Pairs of frames, the second a shift of the first by up to two pixels: (frames, second frame)."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        wide = _smooth(g, number, 1, size + 4)
        shift = torch.randint(0, 5, (number, 2), generator=g).tolist()
        second = torch.stack(
            [p[:, y : y + size, x : x + size] for p, (y, x) in zip(wide, shift, strict=True)]
        )
        return torch.cat([wide[:, :, 2:-2, 2:-2], second], 1), second

    return sample


def _splat(frame: Tensor, flow: Tensor, *, to_nearest: bool) -> Tensor:
    """Move every pixel of a frame, (N, 1, H, W), along a flow, (N, 2, H, W), and return where they land."""
    number, _, high, wide = frame.shape
    rows, columns = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    y, x = rows + flow[:, 0], columns + flow[:, 1]
    corners = [(y.round(), x.round())] if to_nearest else []
    if not to_nearest:
        corners = [(y.floor() + i, x.floor() + j) for i in (0, 1) for j in (0, 1)]
    out = torch.zeros(number, high * wide)
    for cy, cx in corners:
        part = frame.new_ones(()) if to_nearest else (1 - (y - cy).abs()) * (1 - (x - cx).abs())
        inside = (cy >= 0) & (cy < high) & (cx >= 0) & (cx < wide)
        index = (cy.clamp(0, high - 1) * wide + cx.clamp(0, wide - 1)).long()
        out = out.scatter_add(1, index.flatten(1), (frame[:, 0] * part * inside).flatten(1))
    return out.view(number, 1, high, wide)


class _FlowNet(nn.Module):
    """Features of both frames, their products at small displacements, and the flow."""

    def __init__(self, width: int):
        super().__init__()
        self.encode = nn.Conv2d(1, width, 3, padding=1)
        self.estimate = nn.Conv2d(25 + width, width, 3, padding=1)
        self.predict = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        one, two = F.leaky_relu(self.encode(first), 0.1), F.leaky_relu(self.encode(second), 0.1)
        high, wide = one.shape[2:]
        near = F.pad(two, (2, 2, 2, 2))
        cost = [(one * near[:, :, i : i + high, j : j + wide]).mean(1) for i in range(5) for j in range(5)]
        hidden = F.leaky_relu(self.estimate(torch.cat([torch.stack(cost, 1), one], 1)), 0.1)
        return self.predict(hidden)


class _Synthesis(nn.Module):
    """The next frame, from the first one moved along the flow and touched up."""

    def __init__(self, width: int, *, to_nearest: bool):
        super().__init__()
        self.flow_net = _FlowNet(width)
        self.fill, self.touch = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.to_nearest = to_nearest

    def forward(self, frames: Tensor) -> Tensor:
        first, second = frames[:, :1], frames[:, 1:]
        flow = self.flow_net(first, second)
        moved = _splat(first, flow, to_nearest=self.to_nearest)
        return moved + self.touch(F.relu(self.fill(torch.cat([moved, first], 1))))


@sick(
    "contact2a-motion-rounded_forward_warp",
    [("DEAD", "flow_net")],
    no_gradient("flow_net"),
    source="https://github.com/lizhihao6/Forward-Warp/issues/11",
    steps=150,
    widths=(16,),
    dtypes=(FLOAT32,),
)
def rounded_forward_warp(sick: bool, width: int) -> Setup:
    """Optical flow learnt without labels through a forward warp that rounds where each pixel lands: no
    gradient reaches the flow, and only the last layers learn. Repaired by sharing each among four pixels."""
    return setup(_Synthesis(width, to_nearest=sick), _moved(), F.l1_loss, 2e-3)


class _Stereo(nn.Module):
    """A volume of costs over disparities, convolved and read out as the mean disparity."""

    def __init__(self, width: int, disparities: int):
        super().__init__()
        self.features = nn.ModuleList(
            [nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)]
        )
        self.aggregate = nn.ModuleList([nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 1, 3, padding=1)])
        self.disparities = disparities

    def _describe(self, x: Tensor) -> Tensor:
        return self.features[1](F.relu(self.features[0](x)))

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one = checkpoint(self._describe, left, use_reentrant=False)
            two = checkpoint(self._describe, right, use_reentrant=False)
            shifted = [F.pad(two, (d, 0))[..., : two.shape[-1]] for d in range(self.disparities)]
            cost = torch.stack([(one * s).mean(1) for s in shifted], 1)[:, None]
            cost = cost + self.aggregate[1](F.relu(self.aggregate[0](cost)))
        weights = F.softmax(5 * cost.squeeze(1).float(), 1)
        return {"disparity": (weights * torch.arange(self.disparities)[:, None, None]).sum(1)}


def _pairs_of_views(number: int = 4, size: int = 12, disparities: int = 4):
    """Left and right views of a plane before another one, and the disparity, for dotted pictures."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        right = normal(g, number, 1, size, size + disparities)
        depth = torch.randint(0, disparities, (number, 1, 1), generator=g)
        disparity = depth.expand(number, size, size).clone()
        disparity[:, size // 3 : 2 * size // 3] = torch.randint(0, disparities, (number, 1, 1), generator=g)
        index = disparities + torch.arange(size) - disparity
        left = right[:, 0].gather(2, index)[:, None]
        return (left, right[..., disparities:]), disparity.float()

    return sample


@healthy("contact2a-motion-checkpointed_stereo", steps=150, widths=(16,), dtypes=(FLOAT32,))
def checkpointed_stereo(width: int) -> Setup:
    """Stereo matching whose features are checkpointed and computed again, whose convolutions run in bfloat16
    under autocast, and whose softmax over disparities is sharp: all of it on purpose."""
    model = _Stereo(width, 4)
    return setup(model, _pairs_of_views(), lambda out, d: F.smooth_l1_loss(out["disparity"], d), 5e-3)
