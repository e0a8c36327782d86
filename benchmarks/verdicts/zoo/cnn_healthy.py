"""Convolutional networks that look suspicious and are well."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import (
    tiny,
    zero_at_first,
)
from .cnn import PICTURES, classifier, conv
from .data import (
    Setup,
    discs,
    setup,
    sgd,
    stack,
    textures,
    uniform,
)
from .registry import healthy


class _Residual(nn.Module):
    """A residual block with batch norms."""

    def __init__(self, width: int, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or width
        self.c0, self.n0 = conv(width, inner, bias=False), nn.BatchNorm2d(inner)
        self.c1, self.n1 = conv(inner, width, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.n1(self.c1(F.relu(self.n0(self.c0(x))))))


@healthy("cnn-ok-stochastic-depth", widths=PICTURES, source="https://arxiv.org/abs/1603.09382")
def ok_stochastic_depth(width: int) -> Setup:
    """Blocks are left out at random, so each has no gradient at all in a third of the steps."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv(3, width)
            self.blocks = nn.ModuleList([_Residual(width) for _ in range(4)])
            self.head = nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                if torch.rand(()) > 0.33:
                    h = block(h)
            return self.head(h.mean((2, 3)))

    return setup(Net(), textures(), F.cross_entropy, 3e-3)


@healthy("cnn-ok-small-unet", widths=PICTURES, source="https://arxiv.org/abs/1505.04597")
def ok_small_unet(width: int) -> Setup:
    """A U-Net with one level: two paths of unlike depth and resolution, joined by a concatenation."""

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = stack(c=conv(1, width), a=nn.ReLU())
            self.deep = stack(
                down=nn.Conv2d(width, width, 2, stride=2),
                a0=nn.ReLU(),
                c=conv(width, width),
                a1=nn.ReLU(),
                up=nn.ConvTranspose2d(width, width, 2, stride=2),
            )
            self.out = nn.Conv2d(2 * width, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.outer(x)
            return self.out(torch.cat([h, self.deep(h)], 1))

    return setup(UNet(), discs(), F.binary_cross_entropy_with_logits, 1e-2)


@healthy("cnn-ok-bias-before-norm", widths=PICTURES)
def ok_bias_before_norm(width: int) -> Setup:
    """Convolutions with a bias before a batch norm, which takes it out: its gradient is rounding only."""
    body = stack(
        c0=conv(3, width),
        n0=nn.BatchNorm2d(width),
        a0=nn.ReLU(),
        c1=conv(width, width),
        n1=nn.BatchNorm2d(width),
        a1=nn.ReLU(),
    )
    return setup(classifier(body, width), textures(), F.cross_entropy, 1e-2)


@healthy("cnn-ok-batch-norm-over-two-pictures", widths=PICTURES, steps=200)
def ok_two_pictures(width: int) -> Setup:
    """Batches of two pictures under batch norms: each takes its numbers from 128 pixels, which is enough."""
    body = stack(
        c0=conv(3, width, bias=False),
        n0=nn.BatchNorm2d(width),
        a0=nn.ReLU(),
        c1=conv(width, width, bias=False),
        n1=nn.BatchNorm2d(width),
        a1=nn.ReLU(),
    )
    return setup(classifier(body, width), textures(number=2), F.cross_entropy, 3e-3)


@healthy("cnn-ok-squeezed-blocks", widths=(16, 24, 32), source="https://arxiv.org/abs/1512.03385")
def ok_squeezed_blocks(width: int) -> Setup:
    """Residual blocks that squeeze to a quarter of their channels inside: the skip keeps the width."""
    body = nn.Sequential(*[_Residual(width, width // 4) for _ in range(4)])
    return setup(classifier(body, width, stem=conv(3, width)), textures(), F.cross_entropy, 3e-3)


@healthy(
    "cnn-ok-layer-scale",
    tiny("blocks.0.c0", 1e-4),
    widths=PICTURES,
    source="https://arxiv.org/abs/2103.17239",
)
def ok_layer_scale(width: int) -> Setup:
    """Branches start scaled by a learned 1e-5: they get next to no gradient at first, and the skip all."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.c0, self.c1 = (
                nn.GroupNorm(1, width),
                conv(width, 2 * width),
                conv(2 * width, width),
            )
            self.scale = nn.Parameter(torch.full((width, 1, 1), 1e-5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.c1(F.gelu(self.c0(self.norm(x))))

    net = stack(
        stem=conv(3, width),
        act=nn.ReLU(),
        blocks=nn.Sequential(*[Block() for _ in range(3)]),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(width, 4),
    )
    return setup(net, textures(), F.cross_entropy, 5e-3)


@healthy("cnn-ok-hard-swish-depthwise", widths=PICTURES, source="https://arxiv.org/abs/1905.02244")
def ok_hard_swish(width: int) -> Setup:
    """A mobile block: depthwise convolutions, hard swish and a hard sigmoid gate, which have flat ends."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(width, max(width // 4, 4)), nn.Linear(max(width // 4, 4), width)

        def forward(self, x: Tensor) -> Tensor:
            gate = F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
            return x * gate[..., None, None]

    body = stack(
        point=nn.Conv2d(3, width, 1),
        n0=nn.BatchNorm2d(width),
        a0=nn.Hardswish(),
        depth=conv(width, width, groups=width),
        n1=nn.BatchNorm2d(width),
        a1=nn.Hardswish(),
        gate=Gate(),
        out=nn.Conv2d(width, width, 1),
        n2=nn.BatchNorm2d(width),
    )
    return setup(classifier(body, width), textures(), F.cross_entropy, 1e-2)


@healthy(
    "cnn-ok-zero-last-gamma",
    zero_at_first("branch.c0", "branch.c1"),
    widths=PICTURES,
    source="https://arxiv.org/abs/1706.02677",
)
def ok_zero_last_gamma(width: int) -> Setup:
    """The last norm of the branch starts with a gamma of zero, as large-batch recipes do."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.head = conv(3, width), _Residual(width), nn.Linear(width, 4)
            nn.init.zeros_(self.branch.n1.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.branch(self.stem(x)).mean((2, 3)))

    return setup(Net(), textures(), F.cross_entropy, sgd(0.1, 0.9))


@healthy("cnn-ok-few-pixels-marked", widths=PICTURES, falls_to=0.7)
def ok_few_pixels_marked(width: int) -> Setup:
    """Scribble supervision: one pixel in twenty has a label, and all others get no gradient from the loss."""
    net = stack(
        body=stack(c0=conv(1, width), a0=nn.ReLU(), c1=conv(width, width), a1=nn.ReLU()),
        out=nn.Conv2d(width, 1, 1),
    )
    inner = discs(number=16)

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, mask = inner(g)
        return x, (mask, (uniform(g, *mask.shape) < 0.05).float())

    def loss(y: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        mask, marked = target
        per_pixel = F.binary_cross_entropy_with_logits(y, mask, reduction="none")
        return (per_pixel * marked).sum() / marked.sum().clamp(min=1)

    return setup(net, sample, loss, 1e-2)
