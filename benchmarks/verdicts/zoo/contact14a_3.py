"""Healthy trainings that look suspicious, after public reports of what is as it should be."""

from __future__ import annotations

import copy
import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .claims import Claim, flat, no_gradient, training, weak, zero_at_first
from .contact14a_1 import still
from .data import clusters, discs, grammar, normal, seeded, setup, stack, textures, token_loss, trained
from .registry import FLOAT32, Setup, healthy

_ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


def negative(*, steps: int = 120) -> Claim:
    """After some steps of training the loss is below zero."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps)
        return last.loss < 0, f"loss after {steps} steps = {last.loss:.3g}"

    return claim


def swells(early: str, late: str, above: float) -> Claim:
    """A late layer's output is above a multiple of an early one's in size."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, 1, (early, late))
        begin, end = (float(last.outputs[n].detach().double().square().mean().sqrt()) for n in (early, late))
        return end > above * begin, f"output of {late} / {early} = {end / begin:.2g}"

    return claim


# ---------------------------------------------------------------------------------------- warm-up


def warming(rate: float, steps: int):
    """Return a maker of Adam whose rate climbs from zero over some of its steps."""

    def make(parameters: list[Tensor]) -> Optimizer:
        optimizer = torch.optim.Adam(parameters, lr=0.0)
        done = [0]

        def after(opt: Optimizer, args: object, kwargs: object) -> None:
            done[0] += 1
            for group in opt.param_groups:
                group["lr"] = rate * min(1.0, done[0] / steps)

        optimizer.register_step_post_hook(after)
        return optimizer

    return make


@healthy(
    "contact14a-healthy-warmup",
    still("*", 1e-12, begin=0, end=0),
    source="https://github.com/google-research/big_transfer/issues/58",
    **_ONE,
)
def warm_up(width: int) -> Setup:
    """A linear warm-up whose rate is zero at step zero: the first step changes no weight, and the next ones
    do."""
    model = stack(
        conv1=nn.Conv2d(3, width, 3, padding=1),
        norm1=nn.GroupNorm(4, width),
        act1=nn.ReLU(),
        conv2=nn.Conv2d(width, width, 3, stride=2, padding=1),
        norm2=nn.GroupNorm(4, width),
        act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(width, 4),
    )
    return setup(model, textures(), F.cross_entropy, warming(5e-3, 10))


# ------------------------------------------------------------------------------------ uncertainty


class Weighed(nn.Module):
    """A net for a box's place, size and turn, with a learnt uncertainty for each of the three losses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(width, 2) for name in ("place", "size", "turn")})
        self.doubt = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return torch.stack([head(h) for head in self.heads.values()], 1), self.doubt


def _boxes(g: Generator) -> tuple[Tensor, Tensor]:
    x = normal(g, 48, 10)
    mix = 0.25 * normal(seeded(41), 10, 6)
    return x, torch.tanh(x @ mix).reshape(48, 3, 2) * torch.tensor([1.0, 0.5, 0.3])[:, None]


@healthy(
    "contact14a-healthy-doubt",
    negative(),
    source="https://github.com/HKUST-Aerial-Robotics/Stereo-RCNN/issues/21",
    **_ONE,
)
def doubt(width: int) -> Setup:
    """Several losses, each weighted by a learnt uncertainty whose logarithm is added: the total goes below
    zero as the errors get small."""

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        answer, log_doubt = output
        each = F.smooth_l1_loss(answer, target, reduction="none").mean((0, 2))
        return (each * torch.exp(-log_doubt) + log_doubt).sum()

    return setup(Weighed(width), _boxes, loss, 1e-2)


# ------------------------------------------------------------------------------------------ prior


@healthy(
    "contact14a-healthy-prior",
    flat("there", "sigmoid", 0.9, steps=1),
    source="https://github.com/zhangxiaosong18/FreeAnchor/issues/15",
    **_ONE,
)
def prior(width: int) -> Setup:
    """A dense detector whose last bias makes it say at first that there is nothing anywhere: the outputs sit
    near zero, the loss of the few objects is many times that of the background, and both are learnt."""
    model = stack(
        conv1=nn.Conv2d(1, width, 3, padding=1),
        act1=nn.ReLU(),
        conv2=nn.Conv2d(width, width, 3, padding=1),
        act2=nn.ReLU(),
        score=nn.Conv2d(width, 1, 1),
        there=nn.Sigmoid(),
    )
    nn.init.normal_(model.score.weight, std=0.01)
    nn.init.constant_(model.score.bias, -math.log((1 - 0.005) / 0.005))
    find = discs()

    def centres(g: Generator) -> tuple[Tensor, Tensor]:
        picture, mask = find(g)
        return picture, (F.avg_pool2d(mask, 3, 1, 1) > 0.95).float()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        each = F.binary_cross_entropy(output, target, reduction="none")
        return each.sum() / target.sum()

    return setup(model, centres, loss, 3e-3)


# -------------------------------------------------------------------------------------- zero head


@healthy(
    "contact14a-healthy-zerohead",
    zero_at_first("body"),
    source="https://github.com/google-research/big_transfer/issues/10",
    **_ONE,
)
def zero_head(width: int) -> Setup:
    """Fine-tuning with a head of zeros on a trained body: in the first step all outputs are zero and the body
    gets no gradient, from the second on it does."""
    body = stack(
        conv1=nn.Conv2d(3, width, 3, padding=1),
        act1=nn.ReLU(),
        conv2=nn.Conv2d(width, width, 3, padding=1),
        act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
    )
    before = stack(body=body, head=nn.Linear(width, 6))
    trained(setup(before, textures(kinds=6), F.cross_entropy, 5e-3, seed=5), 40)
    head = nn.Linear(width, 3)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return setup(stack(body=body, head=head), textures(kinds=3), F.cross_entropy, 2e-3)


# ----------------------------------------------------------------------------------- moving average


class Averaged(nn.Module):
    """A net beside its slow moving average, which is kept for sampling and is not trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.online = nn.Sequential(
            nn.Linear(12, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 12)
        )
        self.ema = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.ema.parameters(), self.online.parameters(), strict=True):
                slow.lerp_(fast, 1e-4)
        return self.online(x)


def _embeddings(g: Generator) -> tuple[Tensor, Tensor]:
    x = normal(g, 64, 12)
    return x, torch.tanh(x @ normal(seeded(42), 12, 12) / 3)


@healthy(
    "contact14a-healthy-average",
    no_gradient("ema"),
    source="https://github.com/lucidrains/DALLE2-pytorch/issues/131",
    **_ONE,
)
def average(width: int) -> Setup:
    """The moving average of a prior network hardly moves for many steps and gets no gradient, while the
    network that it follows learns."""
    return setup(Averaged(width), _embeddings, F.mse_loss, 3e-3)


# ---------------------------------------------------------------------------- architecture search


class Pick(nn.Module):
    """One-hot choices between operations, sampled, with the gradient of the soft ones."""

    def __init__(self, edges: int, choices: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(1e-3 * normal(seeded(43), edges, choices))

    def forward(self) -> Tensor:
        return F.gumbel_softmax(self.alpha, tau=2.0, hard=True)


class Cell(nn.Module):
    """Three edges in a row, each a choice between a convolution, a pooling and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.pick = Pick(3, 3)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for weights, conv, norm in zip(self.pick(), self.convs, self.norms, strict=True):
            options = torch.stack([conv(F.relu(h)), F.avg_pool2d(h, 3, 1, 1), h])
            h = norm((weights.view(3, 1, 1, 1, 1) * options).sum(0))
        return self.head(F.relu(h).mean((2, 3)))


@healthy(
    "contact14a-healthy-onehot",
    flat("pick", "softmax", 0.99),
    source="https://github.com/D-X-Y/AutoDL-Projects/issues/99",
    **_ONE,
)
def one_hot(width: int) -> Setup:
    """A differentiable search that samples one operation per edge: the weights are exactly zero or one, yet
    carry the gradient of the soft ones, so that choices and operations learn."""
    return setup(Cell(width), textures(), F.cross_entropy, 5e-3)


# ------------------------------------------------------------------------------- residual stream


class Block(nn.Module):
    """A residual block that normalises what it reads and not what it adds to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        for layer in (self.qkv, self.out, self.mlp[0], self.mlp[2]):
            nn.init.xavier_normal_(layer.weight, gain=1.0)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.norm2(x))


class PreNorm(nn.Module):
    """Eight such blocks and a last normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(8)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


@healthy(
    "contact14a-healthy-stream",
    swells("embed", "blocks", 4.0),
    source="https://github.com/microsoft/Swin-Transformer/issues/262",
    **_ONE,
)
def stream(width: int) -> Setup:
    """With normalisation before the layers the residual stream grows from block to block, since only what is
    read is normalised; a last normalisation brings it back, and it trains."""
    return setup(PreNorm(width), grammar(number=8), token_loss, 3e-3)


# ------------------------------------------------------------------------------------ switch layer


class Switch(nn.Module):
    """A layer of experts of which every token goes to one, whose input is scaled by the route's weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(12, width)
        self.router = nn.Linear(width, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(4)
        )
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.enter(x))
        weights = self.router(h).softmax(-1)
        best, chosen = weights.max(-1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, mine, expert(best[mine, None] * h[mine]))
        share = F.one_hot(chosen, 4).to(h.dtype).mean(0)
        return self.head(h + out), 4 * (share * weights.mean(0)).sum()


@healthy(
    "contact14a-healthy-switch",
    weak("router", "experts", 0.2),
    source="https://github.com/labmlai/annotated_deep_learning_paper_implementations/issues/95",
    **_ONE,
)
def switch(width: int) -> Setup:
    """A switch layer that scales the experts' input by the route's weight and not their output: the router's
    gradient comes through the experts and is small beside theirs, and it learns to route."""

    def loss(output: tuple[Tensor, Tensor], kind: Tensor) -> Tensor:
        return F.cross_entropy(output[0], kind) + 0.01 * output[1]

    return setup(Switch(width), clusters(12, 6, number=64), loss, 3e-3)
