"""Pictures, graphs and series that did not learn, as reported by strangers."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import every, flat, huge, not_finite, rank_below, stuck
from .contact15a_1 import still
from .data import Sample, choice, discs, normal, seeded, setup, sgd, stack, textures, uniform
from .registry import FLOAT32, Setup, sick


class Resa(nn.Module):
    """Feature rows and columns that are passed on to others over growing strides, in float16."""

    def __init__(self, width: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.rows = nn.ModuleList(
            nn.Conv2d(width, width, (1, 3), padding=(0, 1), bias=False) for _ in range(3)
        )
        self.columns = nn.ModuleList(
            nn.Conv2d(width, width, (3, 1), padding=(1, 0), bias=False) for _ in range(3)
        )
        for conv in (*self.rows, *self.columns):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = x.half()
        for dim, convs in ((2, self.rows), (3, self.columns)):
            for sign in (1, -1):
                for stride, conv in zip((1, 2, 4), convs, strict=True):
                    passed = F.conv2d(y.roll(sign * stride, dim).float(), conv.weight, padding=conv.padding)
                    y = y + self.alpha * F.relu(passed.half())
        return y.to(x.dtype)


@sick(
    "contact15a-segmentation-half",
    [("NUMERICAL", "resa")],
    not_finite(8),
    allow=("EXPLODING",),
    source="https://github.com/ZJULearning/resa/issues/48",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def segmentation_half(sick: bool, width: int) -> Setup:
    """A recurrent aggregation adds features to features again and again, and in float16 their sums leave its
    range, so that the loss is NaN. A smaller weight of what is passed on repairs it."""
    model = stack(
        stem=nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        resa=Resa(width, 2.0 if sick else 0.1),
        norm=nn.BatchNorm2d(width),
        head=nn.Conv2d(width, 1, 1),
    )
    return setup(model, discs(), F.binary_cross_entropy_with_logits, 3e-3)


def grainy(plain: Sample, noise: float = 1.5) -> Sample:
    """Return the same pictures under more noise."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, kind = plain(g)
        return x + noise * normal(g, *x.shape), kind

    return sample


class Fuse(nn.Module):
    """Two levels of features, weighted by learned positive numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        weight = F.relu(self.weight)
        weight = weight / (weight.sum() + 1e-4)
        upper = F.interpolate(coarse, scale_factor=2.0)
        return self.conv(F.silu(weight[0] * fine + weight[1] * upper))


class Pyramid(nn.Module):
    """A classifier on a pyramid of features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU())
        self.fuse = Fuse(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.down(fine)
        return self.head(self.fuse(fine, coarse).mean((2, 3)))


@sick(
    "contact15a-vision-fusion",
    [("DEAD", "fuse")],
    still("fuse.weight", 0.9),
    source="https://github.com/bubbliiiing/efficientdet-pytorch/issues/37",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def vision_fusion(sick: bool, width: int) -> Setup:
    """The optimizer's groups are collected from convolutions and linear layers only: the weights of a feature
    pyramid's fusion have gradients, but no group, and stay at one. All parameters in a group repair it."""
    model = Pyramid(width)

    def grouped() -> list[Tensor]:
        kinds = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return [p for m in kinds for p in m.parameters()]

    return setup(model, grainy(textures()), F.cross_entropy, 3e-3, trains=grouped if sick else None)


class Patches(nn.Module):
    """A small vision transformer whose new head starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.body = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.body(x)).mean(1))


@sick(
    "contact15a-vision-slow",
    [("UNSTABLE", "*")],
    stuck(0.6, steps=40),
    allow=("VANISHING", "NUMERICAL", "DEAD"),
    source="https://github.com/jeonsworld/ViT-pytorch/issues/42",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def vision_slow(sick: bool, width: int) -> Setup:
    """The rate has been turned down to 1e-8 in search of a remedy: the zero head's logits are still of the
    order of 1e-7 after the training, and both classes are equally likely. A usual rate repairs it."""
    return setup(Patches(width), grainy(textures(2)), F.cross_entropy, sgd(1e-8 if sick else 3e-2, 0.9))


class Wearable(nn.Module):
    """Attention over the sensors' tokens that are kept, in rows that may have none."""

    def __init__(self, width: int, guarded: bool) -> None:
        super().__init__()
        self.guarded = guarded
        self.embed = nn.Linear(4, width)
        self.attention = Masked(width, guarded)
        self.head = stack(norm=nn.LayerNorm(width), out=nn.Linear(width, 3))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(x, kept)).mean(1))


class Masked(nn.Module):
    """Attention with an additive mask on keys; `guarded` opens rows in which nothing else is open."""

    def __init__(self, width: int, guarded: bool) -> None:
        super().__init__()
        self.guarded = guarded
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.zeros(kept.shape).masked_fill(~kept, -math.inf)
        if self.guarded:
            mask = torch.where(kept.any(1, keepdim=True), mask, torch.zeros(()))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + mask[:, None]
        return self.out(scores.softmax(-1) @ v)


def sensors() -> Sample:
    """Return days of sensors' tokens, of which missingness and masking leave few, and their class."""
    means = 1.5 * normal(seeded(33), 3, 4)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        kind = choice(g, 3, 32)
        present, unmasked = uniform(g, 32, 8) < 0.6, uniform(g, 32, 8) < 0.5
        return (means[kind][:, None] + normal(g, 32, 8, 4), present & unmasked), kind

    return sample


@sick(
    "contact15a-series-masked",
    [("NUMERICAL", "attention")],
    not_finite(8),
    source="https://github.com/AshleyLab/OpenMHC/issues/11",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def series_masked(sick: bool, width: int) -> Setup:
    """What is missing and what is masked leave some samples without a single key, and the softmax of a row
    of minus infinity is NaN. Opening such rows before the softmax repairs it."""
    return setup(Wearable(width, not sick), sensors(), F.cross_entropy, 3e-3)


class Forecast(nn.Module):
    """A transformer over a window, with a sigmoid behind its last layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.body = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.out = stack(full=nn.Linear(width, 1), squash=nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.embed(x)))


def loads(scaled: bool) -> Sample:
    """Return windows of seven features and a load at every step, of about ten or scaled to 0 to 1."""
    w = normal(seeded(34), 7) / math.sqrt(7)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 16, 12, 7)
        unit = torch.sigmoid(2 * (x @ w))[..., None]
        return x, unit if scaled else 8 + 4 * unit

    return sample


@sick(
    "contact15a-series-squashed",
    [("SATURATION", "out")],
    every(flat("out.squash", "sigmoid", 0.9, steps=20), stuck(1.0)),
    allow=("VANISHING", "DEAD"),
    source="https://github.com/maxjcohen/transformer/issues/27",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def series_squashed(sick: bool, width: int) -> Setup:
    """The forecast passes a sigmoid and the targets lie round ten: it sits at its upper end and the loss at
    eighty from the beginning. Targets scaled to the sigmoid's range repair it."""
    return setup(Forecast(width), loads(not sick), F.mse_loss, 1e-2)


class Convolutions(nn.Module):
    """Two graph convolutions and four linear layers, over one fixed graph."""

    def __init__(self, width: int, uniform_weights: bool) -> None:
        super().__init__()
        linked = (uniform(seeded(35), 24, 24) < 0.08).float()
        linked = ((linked + linked.T + torch.eye(24)) > 0).float()
        degree = linked.sum(1).rsqrt()
        self.register_buffer("links", degree[:, None] * linked * degree)
        self.gc1, self.gc2 = nn.Linear(4, width), nn.Linear(width, width)
        self.lay1, self.l0, self.l1 = (nn.Linear(width, width) for _ in range(3))
        self.lay2 = nn.Linear(width, 1)
        self.act = nn.LeakyReLU(0.1)
        if uniform_weights:
            for parameter in self.parameters():
                nn.init.uniform_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.links @ self.gc1(x))
        x = self.act(self.links @ self.gc2(x))
        for layer in (self.lay1, self.l0, self.l1):
            x = self.act(layer(x))
        return self.lay2(x)


def nodes() -> Sample:
    """Return features of the nodes and a number for each."""
    w = normal(seeded(36), 4)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 8, 24, 4)
        return x, torch.tanh(x @ w)[..., None]

    return sample


@sick(
    "contact15a-graph-uniform",
    [("EXPLODING", "*")],
    every(huge("*", 1e4), rank_below("l1", 1.5)),
    allow=("BOTTLENECK", "UNSTABLE", "NUMERICAL"),
    source="https://github.com/pyg-team/pytorch_geometric/issues/2020",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def graph_uniform(sick: bool, width: int) -> Setup:
    """All weights are drawn between 0 and 1: every layer multiplies its input by half its width, all units
    say the same, and the gradients are beyond use. The default draw repairs it."""
    return setup(Convolutions(width, sick), nodes(), F.mse_loss, 3e-3)
