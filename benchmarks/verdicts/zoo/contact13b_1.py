"""Small vision, speech, segmentation and implicit-surface models after public reports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .claims import flat, no_gradient, weak
from .data import discs, series, setup, stack, textures, uniform
from .registry import FLOAT32, Setup, sick


class _Kernels(nn.Module):
    """Two convolutions of different size whose outputs are mixed channel by channel."""

    def __init__(self, width: int, shared: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.small = nn.Conv2d(width, width, 3, padding=1)
        self.large = nn.Conv2d(width, width, 5, padding=2)
        self.squeeze = nn.Linear(width, width // 2)
        self.select = nn.Linear(width // 2, width if shared else 2 * width)
        self.head = nn.Linear(width, 4)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        parts = torch.stack([self.small(x).relu(), self.large(x).relu()], 1)
        told = self.squeeze(parts.sum(1).mean((2, 3))).relu()
        if self.shared:
            scores = torch.stack([self.select(told), self.select(told)], 1)
        else:
            scores = self.select(told).unflatten(1, (2, -1))
        mixed = (scores.softmax(1)[..., None, None] * parts).sum(1)
        return self.head(mixed.mean((2, 3)))


@sick(
    "contact13b-vision-selective",
    [("DEAD", "select")],
    weak("select", "head", 1e-5),
    allow=("VANISHING",),
    source="https://github.com/suvojit-0x55aa/A2S2K-ResNet/issues/4",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def vision_selective(sick: bool, width: int) -> Setup:
    """The scores of the two kernels come from one and the same layer on the same input, so that the softmax
    between them is one half for ever and the scoring layer has no say and no gradient. Repair: a score of its
    own for each kernel."""
    return setup(_Kernels(width, sick), textures(), F.cross_entropy)


class _FrontBlock(nn.Module):
    """Convolutions over time with a shortcut and dropout at the end."""

    def __init__(self, width: int, lost: bool) -> None:
        super().__init__()
        self.convs = stack(
            first=nn.Conv1d(width, width, 3, padding=1),
            act=nn.LeakyReLU(),
            second=nn.Conv1d(width, width, 3, padding=1),
        )
        self.reduce = nn.Conv1d(width, width, 1)
        self.norm = nn.GroupNorm(1, width)
        self.drop = nn.Dropout(0.1)
        self.lost = lost

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.convs(x) + self.reduce(x))
        return self.drop(x if self.lost else out)


class _Front(nn.Module):
    def __init__(self, width: int, lost: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.Sequential(_FrontBlock(width, lost), _FrontBlock(width, lost))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x).relu().transpose(1, 2))
        return self.head(x.amax(2))


@sick(
    "contact13b-speech-frontend",
    [("DEAD", "blocks")],
    no_gradient("blocks"),
    source="https://github.com/speechbrain/speechbrain/issues/1124",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def speech_frontend(sick: bool, width: int) -> Setup:
    """The last line of a convolution block puts the block's input through the dropout instead of its result,
    which throws both branches away. Repair: dropout of the result."""
    return setup(_Front(width, sick), series(), F.cross_entropy)


class _Pyramid(nn.Module):
    """An encoder of three stages, whose outputs a decoder adds up."""

    def __init__(self, width: int, order: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList(
            stack(
                conv=nn.Conv2d(width, width, 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(width),
                act=nn.ReLU(),
            )
            for _ in range(3)
        )
        self.up = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.head = nn.Conv2d(width, 1, 1)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        size, total = x.shape[-2:], x
        for number, lateral in zip(self.order, self.up, strict=True):
            x = self.down[number](x)
            total = total + F.interpolate(lateral(x), size)
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return self.head(total.relu())


@sick(
    "contact13b-segmentation-pyramid",
    [("DEAD", "down.2")],
    no_gradient("down.2"),
    source="https://github.com/simonpf/quantnn/pull/2",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def segmentation_pyramid(sick: bool, width: int) -> Setup:
    """The forward pass uses the second stage of the encoder at the third step again; the third stage is never
    used. Repair: each step its own stage."""
    model = _Pyramid(width, (0, 1, 1) if sick else (0, 1, 2))
    return setup(model, discs(), F.binary_cross_entropy_with_logits)


class _Surface(nn.Module):
    """A signed distance of points from a deep perceptron, with or without the input again on the way."""

    def __init__(self, width: int, skips: bool, depth: int = 16) -> None:
        super().__init__()
        self.inlet = nn.Linear(3, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 1)
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.inlet(x), beta=100)
        for layer in self.layers:
            new = F.softplus(layer(x), beta=100)
            x = x + 0.5 * new if self.skips else new
        return self.head(x)


def _ball(g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = 2 * uniform(g, 64, 3) - 1
    return x, x.norm(dim=1, keepdim=True) - 0.6


@sick(
    "contact13b-implicit-surface",
    [("VANISHING", "*")],
    weak("inlet", "head", 1e-2),
    allow=("BOTTLENECK",),
    source="https://github.com/amosgropp/IGR/issues/11",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def implicit_surface(sick: bool, width: int) -> Setup:
    """A plain stack of many layers with the usual initialisation: the distance hardly depends on the point,
    and the first layers get next to no gradient. Repair: skip connections."""
    return setup(_Surface(width, not sick), _ball, F.l1_loss, 1e-3)


class _Wave(nn.Module):
    """A network for y with 0.5 y'' + y = 0: returns the residual, y(0) and y'(0)."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.net = stack(
            lin1=nn.Linear(1, width),
            act1=nn.Tanh(),
            lin2=nn.Linear(width, width),
            act2=nn.Tanh(),
            lin3=nn.Linear(width, width),
            act3=nn.Tanh(),
            out=nn.Linear(width, 1),
        )
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.zeros(1, 1), self.size * x]).requires_grad_()
        y = self.net(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return torch.cat([(0.5 * curve + y)[1:].flatten(), y[0] - 1, slope[0]])


def _interval(g: torch.Generator) -> tuple[Tensor, None]:
    return 2 * uniform(g, 64, 1) - 1, None


@sick(
    "contact13b-physics-interval",
    [("SATURATION", "net")],
    flat("net.act1", "tanh", 0.6),
    allow=("VANISHING", "BOTTLENECK", "DEAD"),
    source="https://github.com/lululxvi/deepxde/issues/321",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def physics_interval(sick: bool, width: int) -> Setup:
    """The equation is posed on an interval from -300 to 300 and the network reads the bare coordinate: its
    first tanh is flat nearly everywhere, the second derivative is zero, and all that is learned is a spike at
    the origin. Repair: an interval of a few units."""

    def loss(output: Tensor, _: None) -> Tensor:
        return output[:-2].square().mean() + output[-2:].square().sum()

    return setup(_Wave(width, 300.0 if sick else 2.0), _interval, loss, 1e-3)
