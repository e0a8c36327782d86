"""Graph networks: cases after reports of users."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, flat, growing, training
from .data import choice, normal, seeded, setup, sgd
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


def swells(early: str, late: str, above: float) -> Claim:
    """A late layer's outputs are above a multiple of an early one's, in the first step."""

    def claim(ready: Setup) -> tuple[bool, str]:
        first = next(training(ready, 1, (early, late)))
        near, far = (first.outputs[name].detach().double().norm() for name in (early, late))
        return float(far / near) > above, f"outputs of {late} / {early} = {float(far / near):.2g}"

    return claim


def communities(nodes: int = 48, groups: int = 4, inside: float = 0.8, across: float = 0.1) -> Tensor:
    """A fixed graph's adjacency."""
    g = seeded(43)
    group = torch.arange(nodes) % groups
    chance = torch.where(group[:, None] == group[None], inside, across)
    upper = (torch.rand(nodes, nodes, generator=g) < chance).float().triu(1)
    return upper + upper.T


class Graph(nn.Module):
    """Layers that gather from neighbours by a matrix, then the products of all pairs of nodes."""

    def __init__(self, width: int, gather: Tensor) -> None:
        super().__init__()
        self.register_buffer("gather", gather)
        self.conv1, self.conv2 = nn.Linear(8, width), nn.Linear(width, width // 2)
        self.decoder = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(self.gather @ x))
        z = self.conv2(self.gather @ h)
        return self.decoder(z @ z.mT)


@sick(
    "contact17a-gnn-gaesum",
    [("SATURATION", "decoder")],
    flat("decoder", "sigmoid", 0.9),
    allow=("DEAD", "EXPLODING", "NUMERICAL"),
    source="https://github.com/pyg-team/pytorch_geometric/issues/1185",
    **ONE,
)
def gaesum(sick: bool, width: int) -> Setup:
    """A graph autoencoder's loss stays at 34.5388, the logarithm of its epsilon, once the graph has many
    edges: neighbours are summed, the products of the embeddings are huge, the decoder's sigmoid is exactly
    1 for pairs without an edge, and no gradient is left. Normalised neighbourhoods repair it."""
    edges = communities()
    full = edges + torch.eye(len(edges))
    norm = full.sum(1).rsqrt()
    gather = full if sick else norm[:, None] * full * norm[None]
    base = normal(seeded(44), 4, 8)[torch.arange(len(edges)) % 4] + 1

    def loss(prob: Tensor, _: Tensor) -> Tensor:
        found = -(prob[:, edges > 0] + 1e-15).log().mean()
        return found - (1 - prob[:, edges == 0] + 1e-15).log().mean()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return base + 0.3 * normal(g, 4, *base.shape), torch.zeros(1)

    return setup(Graph(width, gather), sample, loss, 1e-2)


class Gin(nn.Module):
    """Layers that add a node to its neighbours and transform; the graph's class from the mean of its
    nodes."""

    def __init__(self, width: int, depth: int, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        sizes = [8] + [width] * depth
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, width), nn.ReLU(), nn.Linear(width, width)) for a in sizes[:-1]
        )
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            near = edges @ x
            near = near / edges.sum(2, keepdim=True).clamp_min(1) if self.mean else near
            x = layer(x + near)
        return self.out(x.mean(1))


@sick(
    "contact17a-gnn-ginhubs",
    [("EXPLODING", "layers")],
    every(growing("layers.0", "layers.2", 20.0), swells("layers.0", "layers.2", 20.0)),
    allow=("UNSTABLE", "NUMERICAL", "SATURATION"),
    source="https://github.com/weihua916/powerful-gnns/issues/21",
    **ONE,
)
def ginhubs(sick: bool, width: int) -> Setup:
    """A GIN on social graphs whose nodes have many neighbours: each layer's sum multiplies the features by
    the degree, so they explode over the depth, the gradients with them, and the loss is NaN after a few
    steps. The mean over neighbours keeps them where they are."""
    kinds = normal(seeded(45), 3, 8)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        kind = choice(g, 3, 16)
        x = kinds[kind][:, None] + normal(g, 16, 64, 8)
        edges = (torch.rand(16, 64, 64, generator=g) < 0.8).float().triu(1)
        return (x, edges + edges.mT), kind

    return setup(Gin(width, 3, not sick), sample, F.cross_entropy, sgd(0.03, 0.9))
