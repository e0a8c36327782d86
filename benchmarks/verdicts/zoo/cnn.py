"""Convolutional networks: blocks, heads, norms, and what happens to pictures on their way in."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .claims import every, fading, no_gradient, rank_below, stuck
from .data import Setup, discs, setup, sgd, stack, textures
from .registry import FLOAT32, sick

PICTURES = (8, 16, 24)


def conv(a: int, b: int, **settings: object) -> nn.Conv2d:
    """Return a convolution of three by three at He's initialisation."""
    layer = nn.Conv2d(a, b, 3, padding=1, **settings)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def classifier(body: nn.Module, width: int, kinds: int = 4, **before: nn.Module) -> nn.Sequential:
    """Return the body, a global average and a linear head."""
    return stack(
        **before, body=body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(width, kinds)
    )


# --------------------------------------------------------------------------------------------- DEAD


@sick("cnn-loss-on-side-output", [("DEAD", "decoder")], no_gradient("decoder"), widths=PICTURES)
def loss_on_side_output(sick: bool, width: int) -> Setup:
    """A segmenter returns its side output twice, so the loss never sees the decoder; one is the decoder's."""

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = stack(c0=conv(1, width), a0=nn.ReLU(), c1=conv(width, width), a1=nn.ReLU())
            self.side = nn.Conv2d(width, 1, 1)
            self.decoder = stack(c0=conv(width, width), act=nn.ReLU(), c1=nn.Conv2d(width, 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.encoder(x)
            side, mask = self.side(h), self.decoder(h)
            return (side, side) if sick else (mask, side)

    def loss(output: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        main, side = (F.binary_cross_entropy_with_logits(y, mask) for y in output)
        return main + 0.3 * side

    return setup(Segmenter(), discs(), loss, 1e-2)


@sick(
    "cnn-pooled-in-numpy", [("DEAD", "features")], no_gradient("features"), widths=PICTURES, dtypes=(FLOAT32,)
)
def pooled_in_numpy(sick: bool, width: int) -> Setup:
    """A median over the picture is taken in NumPy and made a tensor again, which forgets where it is from."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = stack(c0=conv(3, width), a0=nn.ReLU(), c1=conv(width, width), a1=nn.ReLU())
            self.head = nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.features(x).flatten(2)
            pooled = torch.as_tensor(h.detach().numpy()).mean(-1) if sick else h.mean(-1)
            return self.head(pooled)

    return setup(Net(), textures(), F.cross_entropy, 1e-2)


@sick(
    "cnn-checkpointed-stem",
    [("DEAD", "stem")],
    no_gradient("stem"),
    widths=PICTURES,
    source="https://docs.pytorch.org/docs/stable/checkpoint.html",
)
def checkpointed_stem(sick: bool, width: int) -> Setup:
    """Reentrant checkpointing of the first stage, whose input is a picture and needs no gradient: no gradient
    for its weights either. The non-reentrant kind has no such condition."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = stack(c0=conv(3, width), a0=nn.ReLU(), c1=conv(width, width), a1=nn.ReLU())
            self.tail = classifier(stack(c=conv(width, width), a=nn.ReLU()), width)

        def forward(self, x: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.tail(checkpoint(self.stem, x, use_reentrant=sick))

    return setup(Net(), textures(), F.cross_entropy, 3e-3)


@sick(
    "cnn-instance-norm-after-pooling",
    [("DEAD", "squeeze")],
    no_gradient("squeeze"),
    allow=["BOTTLENECK"],
    widths=PICTURES,
    steps=200,
)
def norm_after_pooling(sick: bool, width: int) -> Setup:
    """An instance norm, by hand, of pictures pooled to one pixel: each value is its own mean and becomes
    zero. It belongs before the pooling."""

    def normalised(h: Tensor) -> Tensor:
        centred = h - h.mean((2, 3), keepdim=True)
        return centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze = stack(c0=conv(3, width), a0=nn.ReLU(), c1=conv(width, width))
            self.head = nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.squeeze(x)
            h = (
                normalised(h.mean((2, 3), keepdim=True))
                if sick
                else F.relu(normalised(h)).mean((2, 3), keepdim=True)
            )
            return self.head(h.flatten(1))

    return setup(Net(), textures(), F.cross_entropy, 1e-2)


@sick("cnn-attention-pool-over-one", [("DEAD", "scorer")], no_gradient("scorer"), widths=PICTURES)
def attention_pool_over_one(sick: bool, width: int) -> Setup:
    """Attention pooling takes its softmax over the last dimension, which has one entry, and not over the
    places: all weights are one, and the scorer gets nothing."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = stack(c=conv(3, width), a=nn.ReLU())
            self.scorer = nn.Linear(width, 1)
            self.head = nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.features(x).flatten(2).transpose(1, 2)
            weight = self.scorer(h).softmax(-1 if sick else 1)
            return self.head((weight * h).sum(1) / (h.shape[1] if sick else 1))

    return setup(Net(), textures(), F.cross_entropy, 1e-2)


@sick(
    "cnn-weights-rounded",
    [("DEAD", "*")],
    no_gradient("c0", "c1"),
    widths=PICTURES,
    source="https://arxiv.org/abs/1712.05877",
)
def weights_rounded(sick: bool, width: int) -> Setup:
    """Weights are rounded to eight bits in every forward; without a straight-through estimator no convolution
    learns, and the head hides it."""

    class Rounded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            step = self.weight.detach().abs().amax() / 127
            low = torch.round(self.weight / step) * step
            weight = low if sick else self.weight + (low - self.weight).detach()
            return F.conv2d(x, weight, padding=1)

    net = stack(
        c0=Rounded(3, width, 3, bias=False),
        a0=nn.ReLU(),
        c1=Rounded(width, width, 3, bias=False),
        a1=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(width, 4),
    )
    return setup(net, textures(), F.cross_entropy, 1e-2)


# ---------------------------------------------------------------------------------------- VANISHING


@sick(
    "cnn-old-gaussian-init",
    [("VANISHING", "body")],
    fading("body.c0", "body.c9", 1e-5),
    widths=PICTURES,
    allow=["BOTTLENECK"],
    source="https://arxiv.org/abs/1409.1556",
)
def old_gaussian_init(sick: bool, width: int) -> Setup:
    """Ten plain convolutions with weights of size 0.01, as in recipes for five; He's initialisation."""
    layers: dict[str, nn.Module] = {}
    for i in range(10):
        layers[f"c{i}"] = conv(3 if i == 0 else width, width)
        if sick:
            nn.init.normal_(layers[f"c{i}"].weight, std=0.01)
        nn.init.zeros_(layers[f"c{i}"].bias)
        layers[f"a{i}"] = nn.LeakyReLU(0.1)
    return setup(classifier(stack(**layers), width), textures(), F.cross_entropy, 1e-3)


class _Branch(nn.Module):
    """A residual block that scales its branch, and may have lost its skip."""

    def __init__(self, width: int, scale: float, skip: bool) -> None:
        super().__init__()
        self.c0, self.c1, self.scale, self.skip = conv(width, width), conv(width, width), scale, skip

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * self.c1(F.relu(self.c0(x)))
        return x + h if self.skip else h


@sick(
    "cnn-skip-forgotten",
    [("VANISHING", "blocks")],
    fading("stem", "blocks.5", 1e-3),
    allow=["BOTTLENECK"],
    widths=PICTURES,
    source="https://arxiv.org/abs/1602.07261",
)
def skip_forgotten(sick: bool, width: int) -> Setup:
    """Residual branches scaled by 0.1 in blocks whose skip got lost: each keeps a tenth of the gradient."""
    blocks = nn.Sequential(*[_Branch(width, 0.1, skip=not sick) for _ in range(6)])
    net = stack(
        stem=conv(3, width),
        blocks=blocks,
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(width, 4),
    )
    return setup(net, textures(), F.cross_entropy, sgd(0.02, 0.9))


@sick(
    "cnn-carry-of-highway-forgotten",
    [("VANISHING", "gated")],
    fading("gated.0", "gated.9", 1e-5),
    allow=["BOTTLENECK"],
    widths=PICTURES,
    source="https://arxiv.org/abs/1505.00387",
)
def carry_forgotten(sick: bool, width: int) -> Setup:
    """Ten highway layers whose gates start at a tenth, so that what is not changed is carried; and the carry
    was left out of the sum."""

    class Highway(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.gate = conv(width, width), nn.Conv2d(width, width, 1)
            nn.init.constant_(self.gate.bias, -2.0)

        def forward(self, x: Tensor) -> Tensor:
            new, gate = F.relu(self.c(x)), torch.sigmoid(self.gate(x))
            return gate * new if sick else gate * new + (1 - gate) * x

    net = stack(
        stem=conv(3, width),
        gated=nn.Sequential(*[Highway() for _ in range(10)]),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(width, 4),
    )
    return setup(net, textures(), F.cross_entropy, 2e-3)


# --------------------------------------------------------------------------------------- BOTTLENECK


@sick(
    "cnn-one-channel-on-main-path",
    [("BOTTLENECK", "squeeze")],
    every(rank_below("squeeze", 1.01), stuck(0.2, steps=200)),
    allow=["VANISHING", "DEAD"],
    widths=PICTURES,
    steps=200,
)
def one_channel(sick: bool, width: int) -> Setup:
    """Colours for sixteen classes go through one channel of an unfinished 1x1 convolution; give it the
    width."""
    k = 1 if sick else width
    net = stack(
        c0=conv(3, width),
        a0=nn.ReLU(),
        squeeze=nn.Conv2d(width, k, 1),
        a1=nn.ReLU(),
        c1=conv(k, width),
        a2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(width, 16),
    )
    return setup(net, textures(kinds=16, number=48), F.cross_entropy, 5e-3)
