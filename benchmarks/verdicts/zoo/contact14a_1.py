"""Failed trainings of vision, detection, registration and pruning, re-created small after public reports."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .claims import Claim, every, fades_in_time, no_gradient, stuck, tiny, training, under, weak
from .data import choice, discs, normal, setup, stack, textures, uniform
from .registry import FLOAT32, Setup, sick

_ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


def still(prefix: str, below: float, *, begin: int, end: int) -> Claim:
    """Between two steps the optimizer changes the parameters under a prefix by less than a part of them."""

    def claim(ready: Setup) -> tuple[bool, str]:
        parameters = [p for n, p in ready.model.named_parameters() if under(n, prefix)]
        before: list[Tensor] = []
        for number, _ in enumerate(training(ready, end + 1)):
            if number == begin:
                before = [p.detach().clone() for p in parameters]
        pairs = zip(parameters, before, strict=True)
        moved = sum(float((p.detach() - b).double().square().sum()) for p, b in pairs)
        ratio = (moved / sum(float(b.double().square().sum()) for b in before)) ** 0.5
        return ratio < below, f"change of {prefix} from step {begin} to {end} = {ratio:.2g} of it"

    return claim


def decaying(rate: float, every_steps: int, factor: float = 0.1):
    """Return a maker of Adam whose rate falls by a factor after every so many of its steps."""

    def make(parameters: list[Tensor]) -> Optimizer:
        optimizer = torch.optim.Adam(parameters, lr=rate)
        done = [0]

        def after(opt: Optimizer, args: object, kwargs: object) -> None:
            done[0] += 1
            if done[0] % every_steps == 0:
                for group in opt.param_groups:
                    group["lr"] *= factor

        optimizer.register_step_post_hook(after)
        return optimizer

    return make


# ------------------------------------------------------------------------------- super-resolution


class Upscaler(nn.Module):
    """A small network that doubles a picture's size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.PReLU())
        self.leave = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.enter(x))
        return F.pixel_shuffle(self.leave(h + self.block(h)), 2)


def _pairs(g: Generator) -> tuple[Tensor, Tensor]:
    large, _ = textures(number=4, size=8)(g)
    large = F.avg_pool2d(large, 3, 1, 1)
    return F.avg_pool2d(large, 2), large


@sick(
    "contact14a-superres-everybatch",
    [("UNSTABLE", "*")],
    every(still("*", 1e-4, begin=12, end=20), stuck(0.1)),
    allow=("DEAD",),
    source="https://github.com/Lornatang/SRGAN-PyTorch/issues/1",
    **_ONE,
)
def super_resolution(sick: bool, width: int) -> Setup:
    """The schedule that divides the rate by ten after half of the epochs is stepped after every batch, so
    that the rate is practically zero after a dozen steps. Repair: step it after every epoch."""
    epochs, batches = 6, 40
    half = epochs // 2
    return setup(
        Upscaler(width),
        _pairs,
        F.mse_loss,
        decaying(2e-3, half if sick else half * batches),
    )


# --------------------------------------------------------------------------------- pruned network


def _halved(first: nn.Conv2d, second: nn.Conv2d) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Return the two layers without the half of the channels between them that has the least weight."""
    keep = first.weight.detach().abs().sum((1, 2, 3)).topk(first.out_channels // 2).indices
    small = nn.Conv2d(first.in_channels, len(keep), 3, padding=1)
    after = nn.Conv2d(len(keep), second.out_channels, 3, padding=1)
    with torch.no_grad():
        small.weight.copy_(first.weight[keep])
        small.bias.copy_(first.bias[keep])
        after.weight.copy_(second.weight[:, keep])
        after.bias.copy_(second.bias)
    return small, after


@sick(
    "contact14a-pruning-stale",
    [("DEAD", "body")],
    still("body", 1e-9, begin=0, end=10),
    source="https://github.com/microsoft/nni/issues/4521",
    **_ONE,
)
def pruned(sick: bool, width: int) -> Setup:
    """A network is pruned by replacing its layers with narrower ones, after the optimizer got the layers'
    parameters: it updates tensors that are no longer in the network. Repair: a new optimizer."""
    body = stack(
        conv1=nn.Conv2d(3, width, 3, padding=1),
        act1=nn.ReLU(),
        conv2=nn.Conv2d(width, width, 3, padding=1),
        act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
    )
    model = stack(body=body, head=nn.Linear(width, 4))
    known = list(model.parameters())
    body.conv1, body.conv2 = _halved(body.conv1, body.conv2)
    return setup(model, textures(), F.cross_entropy, 3e-3, trains=(lambda: known) if sick else None)


# ------------------------------------------------------------------------------------------ U-Net


class Inner(nn.Module):
    """The innermost part of a U-Net, from two pixels a side to one and back."""

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, width, 2, stride=2)
        self.norm = nn.GroupNorm(width, width) if normed else nn.Identity()
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.leaky_relu(self.norm(self.down(x)), 0.2))


class UNet(nn.Module):
    """A U-Net for pictures of eight pixels a side, every picture and channel normalised by itself."""

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, width, 4, stride=2, padding=1)
        self.down2 = nn.Conv2d(width, width, 4, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(width, width)
        self.inner = Inner(width, normed)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.up1 = nn.ConvTranspose2d(2 * width, 1, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.down1(x), 0.2)
        b = F.leaky_relu(self.norm2(self.down2(a)), 0.2)
        c = torch.cat([b, self.inner(b)], 1)
        return self.up1(torch.cat([a, F.relu(self.up2(c))], 1))


@sick(
    "contact14a-translation-onepixel",
    [("DEAD", "inner")],
    weak("inner.down", "inner.up", 1e-4),
    allow=("BOTTLENECK", "VANISHING"),
    source="https://github.com/junyanz/CycleGAN/issues/55",
    **_ONE,
)
def one_pixel(sick: bool, width: int) -> Setup:
    """Instance normalisation at the bottom of a U-Net, where one pixel is left: less its mean it is zero
    for every picture, and the layer before gets no gradient. Repair: no normalisation there."""
    return setup(UNet(width, sick), discs(size=8), F.binary_cross_entropy_with_logits)


# ----------------------------------------------------------------------------------- registration


class Registration(nn.Module):
    """Predicts where every pixel of a fixed picture comes from, and warps the moving one's label map."""

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.flow = nn.Sequential(
            nn.Conv2d(2, width, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, width, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, 2, 5, padding=2),
        )

    def forward(self, fixed: Tensor, moving: Tensor, labels: Tensor) -> Tensor:
        side = fixed.shape[-1]
        flow = self.flow(torch.cat([fixed, moving], 1)).permute(0, 2, 3, 1)
        one = torch.eye(2, 3).expand(len(fixed), 2, 3)
        grid = F.affine_grid(one, [len(fixed), 1, side, side], align_corners=False)
        return F.grid_sample(labels, grid + flow, mode=self.mode, align_corners=False)


def _moved(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    centre = 4 + 4 * uniform(g, 8, 2, 1, 1)
    shift = 4 * uniform(g, 8, 2, 1, 1) - 2

    def disc(c: Tensor) -> Tensor:
        return ((rows - c[:, 0]) ** 2 + (columns - c[:, 1]) ** 2 < 9).float()[:, None]

    fixed, moving = disc(centre + shift), disc(centre)
    noise = 0.1 * normal(g, 2, 8, 1, 12, 12)
    return (fixed + noise[0], moving + noise[1], moving), fixed


def dice(output: Tensor, target: Tensor) -> Tensor:
    """Return one less the mean Dice coefficient."""
    both = (output * target).sum((1, 2, 3))
    return 1 - ((2 * both + 1) / (output.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1)).mean()


@sick(
    "contact14a-registration-nearest",
    [("DEAD", "flow")],
    no_gradient("flow"),
    source="https://github.com/microsoft/Recursive-Cascaded-Networks/issues/35",
    **_ONE,
)
def registration(sick: bool, width: int) -> Setup:
    """A Dice loss on the warped segmentation is to train the flow, but label maps are warped with the nearest
    neighbour, which has no gradient to where it looks. Repair: warp them linearly."""
    return setup(Registration(width, "nearest" if sick else "bilinear"), _moved, dice, 2e-3)


# -------------------------------------------------------------------------------------- detection

_SIZES, _STRIDES = (10.0, 20.0, 40.0), (8, 16, 32)


class Head(nn.Module):
    """One scale's predictions: the box and whether there is one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.box = nn.Conv2d(width, 4, 1)
        self.there = nn.Conv2d(width, 1, 1)


class Detector(nn.Module):
    """Finds one square of three sizes; each size has its own scale and anchor."""

    def __init__(self, width: int, anchors: tuple[float, ...]) -> None:
        super().__init__()
        self.anchors = anchors
        self.stem = nn.Conv2d(1, width, 8, stride=8)
        self.stem2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.stem3 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.heads = nn.ModuleDict({name: Head(width) for name in ("small", "medium", "large")})

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        a = F.leaky_relu(self.stem(x), 0.1)
        b = F.leaky_relu(self.stem2(a), 0.1)
        c = F.leaky_relu(self.stem3(b), 0.1)
        found = []
        scales = zip((a, b, c), self.heads.values(), self.anchors, _STRIDES, strict=True)
        for h, head, anchor, stride in scales:
            raw = head.box(h)
            at = torch.arange(h.shape[-1], dtype=h.dtype)
            cells = torch.stack(torch.meshgrid(at, at, indexing="ij"))
            centre = (cells + raw[:, :2].sigmoid()) * stride
            size = raw[:, 2:].exp() * anchor * stride
            found.append((torch.cat([centre, size], 1), head.there(h)[:, 0]))
        return found


def _squares(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    number = 12
    kind = torch.arange(number) % 3
    size = torch.tensor(_SIZES)[kind] * (0.8 + 0.4 * uniform(g, number))
    centre = size[:, None] / 2 + (64 - size[:, None]) * uniform(g, number, 2)
    at = torch.arange(64)
    near = (at[None, None] - centre[..., None]).abs() < size[:, None, None] / 2
    picture = (near[:, 0, :, None] & near[:, 1, None, :]).float()[:, None]
    box = torch.cat([centre, size[:, None].expand(-1, 2)], 1)
    return picture + 0.1 * normal(g, number, 1, 64, 64), (kind, box)


def giou(p: Tensor, t: Tensor) -> Tensor:
    """Return the generalised overlap of boxes given by centre and size."""
    plo, phi = p[:, :2] - p[:, 2:] / 2, p[:, :2] + p[:, 2:] / 2
    tlo, thi = t[:, :2] - t[:, 2:] / 2, t[:, :2] + t[:, 2:] / 2
    both = (torch.minimum(phi, thi) - torch.maximum(plo, tlo)).clamp_min(0).prod(1)
    union = p[:, 2:].prod(1) + t[:, 2:].prod(1) - both
    hull = (torch.maximum(phi, thi) - torch.minimum(plo, tlo)).prod(1)
    return both / union - (hull - union) / hull


def detection_loss(output: list[tuple[Tensor, Tensor]], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of boxes and of their presence, summed over the scales."""
    kind, box = target
    total = torch.zeros(())
    for scale, ((boxes, there), stride) in enumerate(zip(output, _STRIDES, strict=True)):
        mine = (kind == scale).nonzero()[:, 0]
        cell = (box[mine, :2] / stride).long().clamp(0, there.shape[-1] - 1)
        total = total + (1 - giou(boxes[mine, :, cell[:, 0], cell[:, 1]], box[mine])).mean()
        wanted = torch.zeros_like(there)
        wanted[mine, cell[:, 0], cell[:, 1]] = 1
        total = total + F.binary_cross_entropy_with_logits(there, wanted)
    return total


@sick(
    "contact14a-detection-anchors",
    [("VANISHING", "heads.large")],
    tiny("heads.large.box", 0.02),
    allow=("BOTTLENECK", "EXPLODING", "DEAD", "SATURATION"),
    source="https://github.com/YunYang1994/tensorflow-yolov3/issues/296",
    **_ONE,
)
def anchors(sick: bool, width: int) -> Setup:
    """Anchors in pixels where the code multiplies them by the scale's stride: the boxes of the coarse scales
    are up to 32 times too large, overlap next to nothing of the object, and the overlap's gradient is lost.
    Repair: anchors divided by the strides."""
    units = _SIZES if sick else tuple(s / d for s, d in zip(_SIZES, _STRIDES, strict=True))
    return setup(
        Detector(width, units),
        _squares,
        detection_loss,
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    )


# ------------------------------------------------------------------------------ padded questions


class Question(nn.Module):
    """Classifies a question by an LSTM's last output."""

    def __init__(self, width: int, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.embed = nn.Embedding(40, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embed(words))
        last = outputs[:, -1] if self.padded else outputs[torch.arange(len(words)), lengths - 1]
        return self.head(last)


def _questions(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    kind, lengths = choice(g, 3, 24), 4 + choice(g, 5, 24)
    words = 1 + choice(g, 13, 24, 40) + 13 * (uniform(g, 24, 40) < 0.6) * kind[:, None]
    return (words * (torch.arange(40) < lengths[:, None]), lengths), kind


@sick(
    "contact14a-questions-padded",
    [("VANISHING", "lstm")],
    fades_in_time("lstm", 0.01, sound=8),
    allow=("BOTTLENECK", "DEAD"),
    source="https://github.com/thtrieu/qclass_dl/issues/1",
    **_ONE,
)
def questions(sick: bool, width: int) -> Setup:
    """Short questions are padded to forty words, and the classifier takes the LSTM's very last output, by
    when the words are forgotten. Repair: take the output at each question's own last word."""
    return setup(Question(width, sick), _questions, F.cross_entropy, 5e-3)
