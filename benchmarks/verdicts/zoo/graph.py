"""Networks over graphs, points and sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import alike, every, growing, not_finite, rank_below, stuck
from .data import Setup, choice, normal, seeded, setup, stack, uniform
from .registry import healthy, sick

NODES, KINDS = 24, 3


def ring() -> Tensor:
    """Return the adjacency of a ring with some random links across."""
    links = (uniform(seeded(31), NODES, NODES) < 0.12).float()
    links = ((links + links.T + torch.eye(NODES).roll(1, 0) + torch.eye(NODES).roll(-1, 0)) > 0).float()
    return links.fill_diagonal_(0)


def node_task(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return features of all nodes and their kinds, which the features tell with some noise."""
    kinds = choice(g, KINDS, NODES)
    return normal(seeded(32), KINDS, 8)[kinds] + 0.5 * normal(g, NODES, 8), kinds


class Graph(nn.Module):
    """Layers that each take (features, matrix of links), between an embedding and a head per node."""

    def __init__(self, width: int, layers: list[nn.Module], links: Tensor) -> None:
        super().__init__()
        self.embed, self.layers, self.head = (
            nn.Linear(8, width),
            nn.ModuleList(layers),
            nn.Linear(width, KINDS),
        )
        self.register_buffer("links", links)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of every node."""
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, self.links)
        return self.head(h)


class Mean(nn.Module):
    """A layer that averages the neighbours; with `skip`, it adds a part of that to the node itself."""

    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        self.fc, self.skip = nn.Linear(width, width), skip
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")
        self.norm = nn.LayerNorm(width) if skip else nn.Identity()

    def forward(self, h: Tensor, links: Tensor) -> Tensor:
        """Return the new features of every node."""
        new = F.relu(self.fc(links @ self.norm(h)))
        return h + 0.2 * new if self.skip else new


@sick(
    "graph-neighbours-summed",
    [("EXPLODING", "layers")],
    growing("embed", "layers.7", 200.0),
    allow=["UNSTABLE", "NUMERICAL", "SATURATION"],
)
def neighbours_summed(sick: bool, width: int) -> Setup:
    """Eight layers add up their neighbours and divide by nothing: signal and gradient grow by the degree in
    each. Divided by the degree they keep their size."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(width, width)
            nn.init.orthogonal_(self.fc.weight)

        def forward(self, h: Tensor, links: Tensor) -> Tensor:
            return (
                F.leaky_relu(self.fc(h + links @ h), 0.3)
                if sick
                else h + F.leaky_relu(self.fc(links @ h), 0.3) / 4
            )

    links = ring()
    if not sick:
        links = links / links.sum(1, keepdim=True)
    return setup(Graph(width, [Sum() for _ in range(8)], links), node_task, F.cross_entropy, 3e-3)


@sick(
    "graph-sixteen-averages",
    [("BOTTLENECK", "layers")],
    alike("layers.15", 0.05),
    allow=["VANISHING", "DEAD"],
    source="https://arxiv.org/abs/1801.07606",
)
def sixteen_averages(sick: bool, width: int) -> Setup:
    """Sixteen layers average the neighbourhood and forget the node itself: all nodes become alike. A skip and
    a norm per layer keep them apart."""
    links = ring() + torch.eye(NODES)
    links = links / links.sum(1, keepdim=True)
    net = Graph(width, [Mean(width, skip=not sick) for _ in range(16)], links)
    return setup(net, node_task, F.cross_entropy, 5e-3)


@sick("graph-mean-over-no-neighbours", [("NUMERICAL", "*")], not_finite())
def mean_over_none(sick: bool, width: int) -> Setup:
    """Two nodes have no neighbour, and the average divides by the number of them: 0/0."""
    links = ring()
    links[:2], links[:, :2] = 0, 0

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.other = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, h: Tensor, links: Tensor) -> Tensor:
            degree = links.sum(1, keepdim=True)
            return F.relu(self.own(h) + self.other(links @ h / (degree if sick else degree.clamp(min=1))))

    return setup(Graph(width, [Layer(), Layer()], links), node_task, F.cross_entropy, 1e-2)


@sick("graph-inverse-distance-of-one-point", [("NUMERICAL", "*")], not_finite(loss=False))
def inverse_distance(sick: bool, width: int) -> Setup:
    """Pair weights 1/r are put to zero where r is zero, by `where`, after the division: the forward is clean
    and the backward is 0 times infinity. The zero must be taken out before the division."""

    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.value = nn.Linear(8, 3), nn.Linear(8, width)
            self.head = nn.Linear(width, KINDS)

        def forward(self, x: Tensor) -> Tensor:
            p = self.place(x)
            square = (p[:, None] - p[None]).square().sum(-1)
            if not sick:
                square = torch.where(square > 0, square, torch.ones_like(square))
            apart = 1 - torch.eye(len(x), dtype=x.dtype)
            pull = torch.where(apart > 0, 1 / (square + (0 if sick else 1e-3)), torch.zeros_like(square))
            value = self.value(x)
            pull = pull / (1 + pull)
            return self.head(F.relu(value + pull @ value / len(x)))

    return setup(Points(), node_task, F.cross_entropy, 1e-2)


@sick(
    "graph-readout-of-one-number",
    [("BOTTLENECK", "readout")],
    every(rank_below("readout", 1.01), stuck(0.25, steps=200)),
    allow=["VANISHING"],
    steps=200,
)
def readout_of_one(sick: bool, width: int) -> Setup:
    """Six properties of a set of points are told from its sum over one channel; the sum over all channels
    tells them."""
    k = 1 if sick else width

    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = stack(
                fc0=nn.Linear(6, width), act0=nn.GELU(), fc1=nn.Linear(width, width), act1=nn.GELU()
            )
            self.readout = nn.Linear(width, k)
            self.head = stack(fc0=nn.Linear(k, width), act=nn.GELU(), fc1=nn.Linear(width, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.readout(self.point(x).mean(1)))

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 1, 6) + normal(g, 64, 10, 6)
        return x, x.mean(1)

    return setup(Sets(), sample, F.mse_loss, 1e-2)


@healthy("graph-ok-two-averages")
def ok_two_averages(width: int) -> Setup:
    """Two layers of plain averaging, as most graph networks have: nodes grow alike a little, and that
    helps."""
    links = ring() + torch.eye(NODES)
    kinds = choice(seeded(33), KINDS, NODES).sort().values

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        return normal(seeded(34), KINDS, 8)[kinds] + 0.7 * normal(g, NODES, 8), kinds

    same = (kinds[:, None] == kinds[None]).float()
    links = links * (0.2 + same)
    net = Graph(width, [Mean(width, False), Mean(width, False)], links / links.sum(1, keepdim=True))
    return setup(net, sample, F.cross_entropy, 1e-2)


@healthy("graph-ok-padded-batch")
def ok_padded_batch(width: int) -> Setup:
    """Graphs of unlike size in one batch: up to half of the rows are padding, and have no gradient."""

    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.node, self.link = nn.Linear(6, width), nn.Linear(width, width)
            self.head = nn.Linear(width, KINDS)

        def forward(self, x: Tensor, links: Tensor, real: Tensor) -> Tensor:
            h = F.relu(self.node(x)) * real[..., None]
            h = h + F.relu(self.link(links @ h / links.sum(-1, keepdim=True).clamp(min=1))) * real[..., None]
            return self.head(h.sum(1) / real.sum(1, keepdim=True))

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        kind = choice(g, KINDS, 24)
        real = (torch.arange(10) < 5 + choice(g, 6, 24, 1)).float()
        x = normal(seeded(35), KINDS, 6)[kind][:, None] + normal(g, 24, 10, 6)
        links = (uniform(g, 24, 10, 10) < 0.4).float() * real[:, :, None] * real[:, None]
        return (x * real[..., None], links, real), kind

    return setup(Batch(), sample, F.cross_entropy, 5e-3)
