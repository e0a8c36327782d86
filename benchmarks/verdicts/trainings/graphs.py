"""Trainings on graphs: nodes, whole graphs, edges, and sets; and mixtures of experts."""

from __future__ import annotations

import functools

import networkx as nx
import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .data import Figure, accuracy, choice, explained, normal, rows, seeded, table, training, uniform
from .registry import Training, healthy
from .tables import mlp


@functools.lru_cache
def karate() -> tuple[Tensor, Tensor]:
    """Return the adjacency of Zachary's karate club with own loops, and the side that each one took."""
    graph = nx.karate_club_graph()
    sides = [int(graph.nodes[node]["club"] == "Officer") for node in graph]
    matrix = torch.tensor(nx.to_numpy_array(graph) > 0, dtype=torch.float32)
    return matrix + torch.eye(len(matrix)), torch.tensor(sides)


@functools.lru_cache
def blocks(number: int = 120, kinds: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return a graph whose nodes mostly know those of their own kind: adjacency, features, kinds."""
    kind = np.arange(number) % kinds
    rng = np.random.default_rng(0)
    near = rng.random((number, number)) < np.where(kind[:, None] == kind, 0.15, 0.01)
    near = np.triu(near, 1)
    matrix = torch.tensor((near | near.T).astype(np.float32)) + torch.eye(number)
    target = torch.tensor(kind)
    features = F.one_hot(target, kinds).float() @ normal(seeded(71), kinds, 8)
    return matrix, features + 2.0 * normal(seeded(72), number, 8), target


def normalised(matrix: Tensor) -> Tensor:
    """Return the adjacency over the root of both degrees."""
    root = matrix.sum(1).rsqrt()
    return root[:, None] * matrix * root


class Gcn(nn.Module):
    """Two graph convolutions over a fixed graph."""

    def __init__(self, matrix: Tensor, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Buffer(matrix)
        self.first, self.second, self.drop = (
            nn.Linear(inputs, size),
            nn.Linear(size, outputs),
            nn.Dropout(0.3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a logit row for every node."""
        x = F.relu(self.matrix @ self.first(x))
        return self.matrix @ self.second(self.drop(x))


@healthy("graph-karate-convolution-two-labels", 150, at_least=0.9)
def karate_club() -> Training:
    """The karate club: one label on either side is known, and nothing but the graph."""
    matrix, side = karate()
    model = Gcn(normalised(matrix), 34, 16, 2)
    x, known = torch.eye(34), torch.tensor([0, 33])

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output[known], target[known])

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)
    return training(model, lambda g: (x, side), loss, optimizer, accuracy(x, side))


class Gat(nn.Module):
    """Neighbours weighed by attention, of several heads."""

    def __init__(self, near: Tensor, inputs: int, outputs: int, heads: int) -> None:
        super().__init__()
        self.near = nn.Buffer(near > 0)
        self.values = nn.Linear(inputs, heads * outputs, bias=False)
        self.left, self.right = (nn.Parameter(0.3 * torch.randn(heads, outputs)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the heads' outputs, shape (nodes, heads, outputs)."""
        value = self.values(x).unflatten(1, self.left.shape)
        score = (value * self.left).sum(-1)[:, None] + (value * self.right).sum(-1)[None]
        score = F.leaky_relu(score, 0.2).masked_fill(~self.near.unsqueeze(-1), -1e9)
        return torch.einsum("ijh,jhd->ihd", score.softmax(1), value)


class GatNet(nn.Module):
    """Two layers of graph attention."""

    def __init__(self, near: Tensor, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = Gat(near, inputs, 8, 4), Gat(near, 32, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a logit row for every node."""
        return self.second(F.elu(self.first(x)).flatten(1)).mean(1)


@healthy("graph-attention-blocks", 200, at_least=0.85)
def attention() -> Training:
    """Graph attention by hand on a graph of four circles of friends; a third of the labels is known."""
    matrix, x, kind = blocks()
    known = torch.arange(0, 120, 3)
    model = GatNet(matrix, 8, 4)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output[known], target[known])

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    return training(model, lambda g: (x, kind), loss, optimizer, accuracy(x, kind))


class Gin(nn.Module):
    """Sums over neighbours, and a sum over all nodes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Linear(a, size), nn.LayerNorm(size), nn.ReLU(), nn.Linear(size, size), nn.ReLU())
            for a in (1, size)
        )
        self.head = nn.Linear(size, 1)

    def forward(self, matrix: Tensor) -> Tensor:
        """Return one number for each graph (batch, nodes, nodes)."""
        x = torch.ones(*matrix.shape[:2], 1)
        for step in self.steps:
            x = step(x + matrix @ x)
        return self.head(x.mean(1))


@healthy("graph-count-triangles", 800, at_least=0.7)
def triangles() -> Training:
    """How closed a random graph is, from sums over neighbours."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        density = 0.1 + 0.4 * uniform(g, 32, 1, 1)
        matrix = (uniform(g, 32, 12, 12) < density).float().triu(1)
        matrix = matrix + matrix.transpose(1, 2)
        closed = torch.einsum("bii->b", matrix @ matrix @ matrix)[:, None]
        return matrix, (closed + 1).log() / 2

    return training(Gin(32), sample, F.mse_loss, 3e-3, explained(*sample(seeded(98))))


class Edges(nn.Module):
    """Messages along edges, from both ends and the edge itself, as for particles."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.message, self.update = mlp(3, size, size, act=nn.SiLU), mlp(size, size, 1, act=nn.SiLU)

    def forward(self, place: Tensor, charge: Tensor) -> Tensor:
        """Return the force on every particle, from places (batch, n, 2) and charges (batch, n)."""
        apart = place[:, :, None] - place[:, None]
        distance = apart.square().sum(-1)
        pair = torch.stack(
            [charge[:, :, None].expand_as(distance), charge[:, None].expand_as(distance), distance], -1
        )
        return (self.update(self.message(pair)) * apart).sum(2)


@healthy("graph-particles-messages", 800, at_least=0.85)
def particles() -> Training:
    """Forces between charges from messages along all edges, the same however space is turned."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        place, charge = normal(g, 16, 6, 2), 2.0 * choice(g, 2, 16, 6) - 1
        apart = place[:, :, None] - place[:, None]
        strength = charge[:, :, None] * charge[:, None] / (apart.square().sum(-1) + 0.5)
        return (place, charge), (strength[..., None] * apart).sum(2)

    return training(Edges(32), sample, F.mse_loss, 3e-3, explained(*sample(seeded(98))))


class Sets(nn.Module):
    """Each point on its own, the largest and the mean of all, and a head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.each, self.head = mlp(2, size, size), mlp(2 * size, size, 1)

    def forward(self, points: Tensor) -> Tensor:
        """Return one number for each set (batch, points, 2)."""
        h = self.each(points)
        return self.head(torch.cat([h.mean(1), h.amax(1)], 1))


@healthy("graph-sets-pooled", 600, at_least=0.9)
def sets() -> Training:
    """The spread of a set of points, whatever their order."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        points = normal(g, 32, 15, 2) * (0.3 + 1.4 * uniform(g, 32, 1, 1))
        return points, points.var(1).sum(1, keepdim=True).sqrt()

    return training(Sets(32), sample, F.mse_loss, 2e-3, explained(*sample(seeded(98))))


# ------------------------------------------------------------------------------------------- experts


class Experts(nn.Module):
    """A router that sends every sample to its best few experts."""

    def __init__(self, inputs: int, size: int, outputs: int, number: int, best: int) -> None:
        super().__init__()
        self.router, self.best, self.outputs = nn.Linear(inputs, number), best, outputs
        self.experts = nn.ModuleList(mlp(inputs, size, outputs) for _ in range(number))
        nn.init.normal_(self.router.weight, std=0.02)
        nn.init.zeros_(self.router.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and how uneven the experts' loads are."""
        share = self.router(x).softmax(1)
        top, chosen = share.topk(self.best, 1)
        top = top / top.sum(1, keepdim=True) if self.best > 1 else top
        output = x.new_zeros(len(x), self.outputs)
        for i, expert in enumerate(self.experts):
            row, place = torch.nonzero(chosen == i, as_tuple=True)
            if len(row):
                output = output.index_add(0, row, top[row, place, None] * expert(x[row]))
        load = F.one_hot(chosen, len(self.experts)).float().sum(1).mean(0)
        return output, len(self.experts) * (load * share.mean(0)).sum() / self.best


def balanced(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Return the cross entropy and a price on the unevenness."""
    return F.cross_entropy(output[0], target) + 0.2 * output[1]


def right_and_used(inputs: Tensor, target: Tensor) -> Figure:
    """Return the figure: the share of right answers, or nothing if an expert gets less than a tenth of what
    it would get if all got the same."""

    def figure(model: nn.Module) -> float:
        assert isinstance(model, Experts)
        share = model.router(inputs).topk(model.best, 1).indices
        load = F.one_hot(share, len(model.experts)).float().sum(1).mean(0)
        right = (model(inputs)[0].argmax(1) == target).float().mean()
        return float(right * (load.amin() > 0.1 * model.best / len(model.experts)))

    return figure


@healthy("experts-one-of-four-switch", 600, at_least=0.9, source="https://arxiv.org/abs/2101.03961")
def switch() -> Training:
    """Each digit goes to one of four experts, with a loss that evens out the loads."""
    x, y, xt, yt = table("digits")
    model = Experts(64, 24, 10, 4, 1)
    return training(model, rows(x, y, size=64), balanced, 3e-3, right_and_used(xt, yt))


@healthy("experts-two-of-six", 600, at_least=0.9)
def two_of_six() -> Training:
    """Each digit goes to two of six experts."""
    x, y, xt, yt = table("digits")
    model = Experts(64, 16, 10, 6, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    return training(model, rows(x, y, size=64), balanced, optimizer, right_and_used(xt, yt), clip=1.0)
