"""Cases from public reports: slots, queries and rays in pictures and clouds, and graphs."""

from __future__ import annotations

import math
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import Claim, alike, huge, no_gradient, training
from .data import choice, discs, normal, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick

W = 16
ONE = {"widths": (W,), "dtypes": (FLOAT32,)}


# ---------------------------------------------------------------------------- slots, queries, rays


class _Slots(nn.Module):
    """Slots that compete for the tokens of a picture, from a learnt distribution of starts."""

    def __init__(self, width: int, number: int, reparametrized: bool) -> None:
        super().__init__()
        self.number, self.reparametrized = number, reparametrized
        self.mu = nn.Parameter(torch.randn(1, 1, width))
        self.log_sigma = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_in, self.norm_slots = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        b, _, d = tokens.shape
        spread = torch.distributions.Normal(
            self.mu.expand(b, self.number, -1), self.log_sigma.exp().expand(b, self.number, -1)
        )
        slots = spread.rsample() if self.reparametrized else spread.sample()
        tokens = self.norm_in(tokens)
        k, v = self.to_k(tokens), self.to_v(tokens)
        for _ in range(3):
            q = self.to_q(self.norm_slots(slots))
            share = (k @ q.transpose(1, 2) / math.sqrt(d)).softmax(-1) + 1e-8
            share = share / share.sum(1, keepdim=True)
            update = share.transpose(1, 2) @ v
            slots = self.gru(update.reshape(-1, d), slots.reshape(-1, d)).view(b, -1, d)
        return slots


class _SlotPictures(nn.Module):
    def __init__(self, width: int, reparametrized: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.place = nn.Parameter(0.3 * torch.randn(64, width))
        self.slots = _Slots(width, 3, reparametrized)
        self.decoder = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 2))

    def forward(self, picture: Tensor) -> Tensor:
        tokens = self.encoder(picture).flatten(2).transpose(1, 2) + self.place
        painted = self.decoder(self.slots(tokens)[:, :, None] + self.place)
        colour, weight = painted.unbind(-1)
        return (colour * weight.softmax(1)).sum(1).view_as(picture)


def _two_discs(g: torch.Generator) -> tuple[Tensor, Tensor]:
    first, second = discs(8, 8)(g)[1], discs(8, 8)(g)[1]
    picture = torch.maximum(first, 0.6 * second)
    return picture, picture


@sick(
    "contact5b-slots-sampled-start",
    [("DEAD", "slots")],
    no_gradient("slots.mu", "slots.log_sigma"),
    source="https://github.com/evelinehong/slot-attention-pytorch/issues/4",
    **ONE,
)
def slots_sampled_start(sick: bool, width: int) -> Setup:
    """The slots start from a draw of a normal distribution whose mean and spread are to be learnt; the draw
    is cut from the graph, so those two never move. Repaired by the reparametrized draw."""
    return setup(_SlotPictures(width, reparametrized=not sick), _two_discs, F.mse_loss)


class _QueryLayer(nn.Module):
    """A layer of a detection decoder: the places of the queries are added to queries and keys only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(width, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, target: Tensor, memory: Tensor, place: Tensor) -> Tensor:
        q = target + place
        target = self.norm1(target + self.own(q, q, target, need_weights=False)[0])
        seen = self.cross(target + place, memory, memory, need_weights=False)[0]
        target = self.norm2(target + seen)
        return self.norm3(target + self.feed(target))


class _PointDetector(nn.Module):
    """Boxes of a cloud of points, by queries to the features of its points."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.point1, self.point2 = nn.Conv1d(3, width, 1), nn.Conv1d(width, width, 1)
        self.query = nn.Embedding(3, width)
        self.decoder = nn.ModuleList([_QueryLayer(width) for _ in range(2)])
        self.box = nn.Linear(width, 3)

    def forward(self, points: Tensor) -> Tensor:
        h = self.point2(F.relu(self.point1(points.transpose(1, 2))))
        if self.pooled:
            h = h.amax(2, keepdim=True).expand(-1, -1, points.shape[1])
        memory = h.transpose(1, 2)
        place = self.query.weight.expand(len(points), -1, -1)
        target = torch.zeros_like(place)
        for layer in self.decoder:
            target = layer(target, memory, place)
        return self.box(target)


def _clouds(g: torch.Generator) -> tuple[Tensor, Tensor]:
    centres = 1.5 * normal(g, 16, 3, 3)
    points = centres[:, :, None] + 0.2 * normal(g, 16, 3, 8, 3)
    return points.flatten(1, 2), centres


def _matched(boxes: Tensor, centres: Tensor) -> Tensor:
    orders = [(boxes - centres[:, list(p)]).abs().mean((1, 2)) for p in permutations(range(3))]
    return torch.stack(orders, 1).amin(1).mean()


@sick(
    "contact5b-detection-same-memory",
    [("BOTTLENECK", "*")],
    alike("decoder.1", 1e-4, dim=1),
    allow=("DEAD", "VANISHING"),
    source="https://github.com/facebookresearch/detr/issues/367",
    **ONE,
)
def detection_same_memory(sick: bool, width: int) -> Setup:
    """The decoder of a detector looks at features that were pooled over all points and spread out again: the
    tokens it attends to are one and the same, so the states of its queries are too, and all boxes fall
    together. Repaired by the features of each point."""
    return setup(_PointDetector(width, pooled=sick), _clouds, _matched, 1e-2, seed=3)


class _Radiance(nn.Module):
    """Colours of rays through a field of density and shade."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 2 * width), nn.Linear(2 * width, 2 * width)
        self.sigma, self.shade = nn.Linear(2 * width, 1), nn.Linear(2 * width, 1)

    def forward(self, points: Tensor) -> Tensor:
        waves = torch.cat([points * 2.0**k for k in range(4)], -1)
        h = F.relu(self.first(torch.cat([waves.sin(), waves.cos()], -1)))
        h = F.relu(self.second(h))
        density = F.relu(self.sigma(h).squeeze(-1))
        alpha = 1 - torch.exp(-density * 0.5)
        clear = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], 1), 1)
        weight = alpha * clear[:, :-1]
        return (weight * torch.sigmoid(self.shade(h).squeeze(-1))).sum(1)


def _rays(g: torch.Generator) -> tuple[Tensor, Tensor]:
    across = 3 * uniform(g, 64, 1, 2) - 1.5
    depth = torch.linspace(-1.5, 1.5, 16)[None, :, None].expand(64, -1, 1)
    inside = across.square().sum(-1).squeeze(1) < 0.8
    return torch.cat([across.expand(-1, 16, -1), depth], -1), inside.float() * 0.8


def _empty(share: float) -> Claim:
    """More than a share of the samples has no density after some training, so nothing flows back there."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, 80, ("sigma",))
        seen = float((last.outputs["sigma"] <= 0).float().mean())
        return seen > share, f"{seen:.0%} of the samples are empty"

    return claim


@healthy("contact5b-radiance-empty-space", _empty(0.4), **ONE)
def radiance_empty_space(width: int) -> Setup:
    """A radiance field with a ReLU for its density: most samples along the rays are empty and pass nothing
    back, as they should where there is nothing; the ball in the middle is learnt."""
    return setup(_Radiance(width), _rays, F.mse_loss)


# ------------------------------------------------------------------------------------ the graphs

SIGMAS = torch.exp(torch.linspace(math.log(0.1), math.log(5.0), 40))


def _wrapped(angle: Tensor, sigma: Tensor) -> Tensor:
    """Return the score of a wrapped normal distribution at an angle."""
    turns = angle.double()[..., None] + 2 * math.pi * torch.arange(-6, 7)
    square = sigma.double()[..., None] ** 2
    return (-(turns / square) * torch.softmax(-(turns**2) / (2 * square), -1)).sum(-1)


def _score_norms() -> Tensor:
    angle = torch.linspace(-math.pi, math.pi, 401)[:-1].double()
    turns = angle[:, None] + 2 * math.pi * torch.arange(-6, 7)
    out = []
    for sigma in SIGMAS:
        weight = torch.exp(-(turns**2) / (2 * sigma.double() ** 2)).sum(1)
        out.append((_wrapped(angle, sigma.expand(400)) ** 2 * weight / weight.sum()).sum())
    return torch.stack(out)


class _Torsions(nn.Module):
    """The score of the torsion angles of a chain, by messages between neighbouring bonds."""

    def __init__(self, width: int, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled
        self.norms: Tensor
        self.register_buffer("norms", _score_norms().float())
        self.embed = nn.Linear(3, 2 * width)
        self.message = nn.ModuleList([nn.Linear(4 * width, 2 * width) for _ in range(2)])
        self.head = nn.Linear(2 * width, 1)

    def forward(self, angle: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        noise = SIGMAS[level].log()[:, None].expand_as(angle)
        h = F.silu(self.embed(torch.stack([angle.sin(), angle.cos(), noise], -1)))
        for layer in self.message:
            around = h.roll(1, 1) + h.roll(-1, 1)
            h = h + F.silu(layer(torch.cat([h, around], -1)))
        score, norm = self.head(h).squeeze(-1), self.norms[level][:, None]
        return (score * norm.sqrt() if self.scaled else score), norm


def _twisted(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    rest = torch.tensor([0.5, -1.0, 2.0, -2.5, 1.2])
    level = choice(g, 40, 64)
    sigma = SIGMAS[level][:, None].expand(-1, 5)
    twist = sigma * normal(g, 64, 5)
    angle = torch.remainder(rest + twist + math.pi, 2 * math.pi) - math.pi
    return (angle, level), _wrapped(torch.remainder(twist + math.pi, 2 * math.pi) - math.pi, sigma).float()


@sick(
    "contact5b-torsion-score-norm",
    [("EXPLODING", "*")],
    huge("head", 1e4),
    allow=("UNSTABLE", "NUMERICAL"),
    source="https://github.com/gcorso/torsional-diffusion/issues/2",
    **ONE,
)
def torsion_score_norm(sick: bool, width: int) -> Setup:
    """The score of torsion angles is learnt with each noise level's loss over the mean square of its score,
    which is next to nothing at the largest noise: what the network puts out there is divided by it, and loss
    and gradient are of many millions. Repaired by scaling the output by the same norm."""
    return setup(
        _Torsions(width, scaled=not sick),
        _twisted,
        lambda output, score: ((output[0] - score) ** 2 / output[1]).mean(),
    )


class _DeepGraph(nn.Module):
    """Twelve layers that mix in the first features and stay near the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 2 * width), nn.Linear(2 * width, 3)
        self.weights = nn.ParameterList([0.2 * torch.randn(2 * width, 2 * width) for _ in range(12)])

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        start = h = F.relu(self.first(x))
        for depth, weight in enumerate(self.weights, 1):
            beta = math.log(0.5 / depth + 1)
            mixed = 0.8 * adjacency @ h + 0.2 * start
            h = F.relu((1 - beta) * mixed + beta * mixed @ weight)
        return self.last(h)


def _communities(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    kind = choice(g, 3, 48)
    likely = torch.where(kind[:, None] == kind, 0.3, 0.03)
    edges = (uniform(g, 48, 48) < likely).float().triu(1)
    edges = edges + edges.T + torch.eye(48)
    degree = edges.sum(1).rsqrt()
    x = F.one_hot(kind, 8).float() + normal(g, 48, 8)
    return (x, degree[:, None] * edges * degree), kind


@healthy("contact5b-graph-deep-restart", **ONE)
def graph_deep_restart(width: int) -> Setup:
    """Twelve rounds of averaging over neighbours, whose weights enter at a twentieth: the first features are
    mixed in at every round, which keeps the nodes apart, and it trains."""
    return setup(_DeepGraph(width), _communities, F.cross_entropy)
