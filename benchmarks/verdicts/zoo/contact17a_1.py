"""Image classification, detection, segmentation and fine-tuning: cases after reports of users."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .claims import every, fading, huge, no_gradient, not_finite, weak
from .data import choice, factors, normal, seeded, setup, sgd, stack, textures, trained, uniform
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


@sick(
    "contact17a-cls-lenet",
    [("VANISHING", "features")],
    every(fading("features.conv1", "classifier.out", 5e-5), weak("features", "classifier", 0.01)),
    allow=("BOTTLENECK",),
    source="https://github.com/d2l-ai/d2l-en/issues/1917",
    **ONE,
)
def lenet(sick: bool, width: int) -> Setup:
    """LeNet with sigmoids stands still for epochs after a port between frameworks: every sigmoid and the
    small weights of the default start shrink the gradient on its way to the convolutions. ReLU in their
    place repairs it."""
    act = nn.Sigmoid if sick else nn.Tanh
    features = stack(
        conv1=nn.Conv2d(3, 8, 3, padding=1),
        act1=act(),
        pool1=nn.AvgPool2d(2),
        conv2=nn.Conv2d(8, 16, 3, padding=1),
        act2=act(),
        pool2=nn.AvgPool2d(2),
        flat=nn.Flatten(),
    )
    classifier = stack(
        fc1=nn.Linear(64, width),
        act1=act(),
        fc2=nn.Linear(width, width),
        act2=act(),
        out=nn.Linear(width, 4),
    )
    model = stack(features=features, classifier=classifier)
    return setup(model, textures(4, 32), F.cross_entropy, sgd(0.1))


def organs(number: int = 8, size: int = 16) -> object:
    """Noisy slices with one small bright organ, and its mask."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        centre = 3 + (size - 6) * uniform(g, number, 2, 1, 1)
        mask = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < 5).float()[:, None]
        return 0.8 * mask + 0.5 * normal(g, number, 1, size, size), mask

    return sample


class SmallUNet(nn.Module):
    """A net with one step down, one up, and a skip."""

    def __init__(self, width: int, last: nn.Module) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.mid = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.dec = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(width, 1, 1), last)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc(x)
        low = F.interpolate(self.mid(F.max_pool2d(skip, 2)), scale_factor=2)
        return self.head(self.dec(torch.cat([skip, low], 1)))


@sick(
    "contact17a-med-reluhead",
    [("DEAD", "head")],
    no_gradient("enc", "mid", "dec", "head", after=15),
    allow=("SATURATION",),
    source="http://www.dtcms.com/a/394596.html",
    **ONE,
)
def reluhead(sick: bool, width: int) -> Setup:
    """A CT segmentation net that ends in a ReLU is trained by a cross entropy that wants logits: background
    pushes the last layer below zero, the ReLU is dead for every pixel, the loss stays at 0.693 and all masks
    are empty. Without the ReLU the logits may be negative, and it learns."""
    model = SmallUNet(width, nn.ReLU() if sick else nn.Identity())
    return setup(model, organs(), F.binary_cross_entropy_with_logits, 1e-2)


class Cells(nn.Module):
    """A one-stage detector's classification branch: a probability for each cell and class."""

    def __init__(self, width: int, kinds: int, prior: float | None) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )
        self.head = stack(cls=nn.Conv2d(width, kinds, 3, padding=1), prob=nn.Sigmoid())
        if prior is not None:
            nn.init.constant_(self.head.cls.bias, -math.log((1 - prior) / prior))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def marks(kinds: int = 3, number: int = 8, size: int = 12) -> object:
    """Pictures with two marked cells; the mark's height is its class. The target is one-hot, per cell."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        where, kind = choice(g, size * size, number, 2), choice(g, kinds, number, 2)
        target = torch.zeros(number, kinds, size * size)
        for n in range(number):
            for spot, what in zip(where[n], kind[n], strict=True):
                target[n, :, spot] = 0
                target[n, what, spot] = 1
        heights = torch.tensor([1.5, 3.0, -2.0])[:kinds]
        x = (target * heights[:, None]).sum(1).view(number, 1, size, size)
        return x + 0.1 * normal(g, number, 1, size, size), target.view(number, kinds, size, size)

    return sample


def focal(prob: Tensor, target: Tensor) -> Tensor:
    """Focal loss with clamped probabilities, over the number of positives."""
    prob = prob.clamp(1e-4, 1 - 1e-4)
    alpha = torch.where(target > 0, 0.25, 0.75)
    right = torch.where(target > 0, prob, 1 - prob)
    return -(alpha * (1 - right) ** 2 * right.log()).sum() / target.sum()


@sick(
    "contact17a-det-focalclamp",
    [("SATURATION", "head")],
    no_gradient("body", "head", after=10),
    allow=("DEAD", "UNSTABLE"),
    source="https://github.com/zylo117/Yet-Another-EfficientDet-Pytorch/issues/274",
    **ONE,
)
def focalclamp(sick: bool, width: int) -> Setup:
    """A detector trained from scratch by SGD with a rate of 0.08: the first steps throw all class
    probabilities under the clamp of the focal loss at 0.0001, where there is no gradient, and the loss stays
    at 2.302 for good. The prior's bias and a rate of 0.002 keep them in range."""
    model = Cells(width, 3, None if sick else 0.01)
    return setup(model, marks(), focal, sgd(0.08 if sick else 0.002, 0.9))


class BoxNet(nn.Module):
    """From a picture to the centre and the size of one box, as parts of the picture or in pixels."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.box = nn.Linear(width * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.box(self.body(x)).sigmoid()


def boxes(scale: float, number: int = 16, size: int = 16) -> object:
    """Pictures with one bright rectangle; the target is its centre and size, times a scale."""
    grid = (torch.arange(size) + 0.5) / size

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        extent = 0.2 + 0.4 * uniform(g, number, 2)
        centre = extent / 2 + (1 - extent) * uniform(g, number, 2)
        inside = (grid[None, None] - centre[..., None]).abs() < extent[..., None] / 2
        picture = (inside[:, 1, :, None] & inside[:, 0, None, :]).float()[:, None]
        return picture + 0.1 * normal(g, number, 1, size, size), scale * torch.cat([centre, extent], 1)

    return sample


def ciou(box: Tensor, target: Tensor) -> Tensor:
    """Complete IoU loss with the denominator of the aspect term's gradient left out, as for parts of 1."""
    low = torch.maximum(box[:, :2] - box[:, 2:] / 2, target[:, :2] - target[:, 2:] / 2)
    high = torch.minimum(box[:, :2] + box[:, 2:] / 2, target[:, :2] + target[:, 2:] / 2)
    inner = (high - low).clamp_min(0).prod(1)
    iou = inner / (box[:, 2:].prod(1) + target[:, 2:].prod(1) - inner)
    first = torch.minimum(box[:, :2] - box[:, 2:] / 2, target[:, :2] - target[:, 2:] / 2)
    last = torch.maximum(box[:, :2] + box[:, 2:] / 2, target[:, :2] + target[:, 2:] / 2)
    far = (box[:, :2] - target[:, :2]).square().sum(1) / (last - first).square().sum(1)
    w, h = box[:, 2], box[:, 3]
    with torch.no_grad():
        arc = torch.atan(target[:, 2] / target[:, 3]) - torch.atan(w / h)
        v = 4 / math.pi**2 * arc**2
        weight = v / (1 - iou + v)
        twice = 2 * w
    aspect = 8 / math.pi**2 * arc * ((w - twice) * h)
    return (1 - iou + far + weight * aspect).mean()


@sick(
    "contact17a-det-pixelciou",
    [("EXPLODING", "*")],
    huge("*", 50.0),
    allow=("UNSTABLE", "SATURATION"),
    source="https://github.com/Zzh-tju/DIoU-SSD-pytorch/issues/4",
    **ONE,
)
def pixelciou(sick: bool, width: int) -> Setup:
    """A CIoU loss whose aspect term leaves out a denominator, which is sound for sizes between 0 and 1, gets
    boxes in pixels: that term grows with the square of the size and its gradient swamps all others. Boxes as
    parts of the picture repair it."""
    scale = 640.0 if sick else 1.0
    return setup(BoxNet(width, scale), boxes(scale), ciou, sgd(0.1))


class Lora(nn.Module):
    """A frozen linear layer with a low-rank addition that starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_down = nn.Linear(base.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_up(self.lora_down(x))


class Denoiser(nn.Module):
    """Blocks on the way down, under checkpoints if asked, and blocks on the way up."""

    def __init__(self, width: int, size: int = 16) -> None:
        super().__init__()
        self.conv_in = nn.Linear(size, width)
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.conv_out = nn.Linear(width, size)
        self.checkpoints, self.inputs_require_grad = False, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        if self.inputs_require_grad:
            h.requires_grad_(True)
        skips = []
        for block in self.down:
            h = checkpoint(self.run, block, h, use_reentrant=True) if self.checkpoints else self.run(block, h)
            skips.append(h)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            h = self.run(block, h) + skip
        return self.conv_out(h)

    @staticmethod
    def run(block: nn.Module, h: Tensor) -> Tensor:
        return h + F.silu(block(h))


@sick(
    "contact17a-tune-unetlora",
    [("DEAD", "down")],
    no_gradient("down", after=8),
    source="https://github.com/kohya-ss/sd-scripts/issues/821",
    **ONE,
)
def unetlora(sick: bool, width: int) -> Setup:
    """LoRA on a denoiser's blocks with re-entrant checkpoints on the way down: with all layers before it
    frozen the input of a checkpoint needs no gradient, so nothing in it gets one and all these additions stay
    at zero, while those on the way up learn. Making the first activations require a gradient repairs it."""

    def noisy(shift: float) -> object:
        clean = factors(16, 3, 64)
        turn = torch.linalg.qr(normal(seeded(31), 16, 16))[0] if shift else torch.eye(16)

        def sample(g: Generator) -> tuple[Tensor, Tensor]:
            x = 2 * clean(g)[0] @ turn + shift
            noise = normal(g, *x.shape)
            return 0.7 * x + 0.7 * noise, noise

        return sample

    model = Denoiser(width)
    trained(setup(model, noisy(0.0), F.mse_loss, 3e-3), 300)
    model.requires_grad_(False)
    for blocks in (model.down, model.up):
        for i, block in enumerate(blocks):
            blocks[i] = Lora(block)
    model.checkpoints, model.inputs_require_grad = True, not sick
    return setup(model, noisy(1.0), F.mse_loss, 1e-2)


class HalfDenoiser(nn.Module):
    """A noise predictor that computes in the dtype of its weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = stack(
            first=nn.Linear(17, width),
            act1=nn.SiLU(),
            mid=nn.Linear(width, width),
            act2=nn.SiLU(),
            out=nn.Linear(width, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.net.first.weight.dtype)).float()


def diffusion(number: int = 64) -> object:
    """Noisy points of a low-rank set with the noise's level beside them; the target is the noise."""
    clean = factors(16, 3, number)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, t = clean(g)[0], uniform(g, number, 1)
        noise = normal(g, *x.shape)
        angle = t * math.pi / 2
        return torch.cat([x * angle.cos() + noise * angle.sin(), t], 1), noise

    return sample


@sick(
    "contact17a-diff-halfadam",
    [("NUMERICAL", "net")],
    not_finite(8),
    allow=("UNSTABLE",),
    source="https://github.com/jinxixiang/magic_animate_unofficial/issues/6",
    **ONE,
)
def halfadam(sick: bool, width: int) -> Setup:
    """A denoiser's weights are kept in float16 and Adam has its usual epsilon: squared gradients and the
    epsilon both round to zero there, the step divides by zero, and the loss is NaN after the first step. With
    weights in float32 nothing rounds away."""
    model = HalfDenoiser(width)
    return setup(model.half() if sick else model, diffusion(), F.mse_loss, 3e-3)
