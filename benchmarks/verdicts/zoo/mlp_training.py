"""Plain feed-forward networks: the rate of learning, saturation, and passages that are too narrow."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import (
    every,
    flat,
    jumps,
    rank_below,
    rises,
    stuck,
)
from .data import (
    Setup,
    clusters,
    normal,
    setup,
    sgd,
    stack,
    surface,
    trained,
    two_sides,
)
from .mlp import he, tower
from .registry import sick

# ----------------------------------------------------------------------------------------- UNSTABLE


@sick(
    "mlp-descent-rate-too-high",
    [("UNSTABLE", "*")],
    rises(20.0),
    allow=["EXPLODING", "DEAD", "NUMERICAL", "SATURATION"],
    dtypes=(torch.float32,),
)
def descent_rate_too_high(sick: bool, width: int) -> Setup:
    """Plain descent at a rate of 3 on a regression: each step lands further up the other side."""
    net = stack(
        fc0=nn.Linear(10, width),
        act0=nn.Tanh(),
        fc1=nn.Linear(width, width),
        act1=nn.Tanh(),
        out=nn.Linear(width, 1),
    )
    return setup(net, surface(10), F.mse_loss, sgd(3.0 if sick else 0.05))


@sick(
    "mlp-momentum-too-high",
    [("UNSTABLE", "*")],
    rises(5.0),
    allow=["EXPLODING", "DEAD", "SATURATION", "NUMERICAL"],
)
def momentum_too_high(sick: bool, width: int) -> Setup:
    """Momentum of 0.99 at a rate made for none: steps add up to ten times as much, and overshoot."""
    net = stack(fc0=nn.Linear(10, width), act0=nn.ReLU(), out=nn.Linear(width, 1))
    return setup(net, surface(10), F.mse_loss, sgd(0.3, 0.99) if sick else sgd(0.02, 0.9))


@sick(
    "mlp-batch-norm-over-pairs",
    [("UNSTABLE", "norm")],
    flat("norm", "one", 0.8),
    allow=["SATURATION", "VANISHING", "BOTTLENECK"],
    steps=300,
)
def batch_norm_over_pairs(sick: bool, width: int) -> Setup:
    """Batches of two under a batch norm: each feature becomes +1 and -1; batches of 32 have a spread."""
    net = stack(
        fc=nn.Linear(10, width, bias=False),
        norm=nn.BatchNorm1d(width),
        act=nn.Tanh(),
        out=nn.Linear(width, 4),
    )
    return setup(net, clusters(10, 4, number=2 if sick else 32), F.cross_entropy, 5e-3)


@sick(
    "mlp-insurance-claims",
    [("UNSTABLE", "*")],
    jumps(30.0),
    allow=["EXPLODING"],
)
def insurance_claims(sick: bool, width: int) -> Setup:
    """Claims with a heavy tail under a squared error: one policy in a hundred sets the gradient; take
    logs."""
    net = stack(fc0=nn.Linear(10, width), act0=nn.SiLU(), out=nn.Linear(width, 1))
    w = normal(torch.Generator().manual_seed(5), 10, 1) / 3

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 32, 10)
        heavy = (torch.rand(32, 1, generator=g) < 0.01).float()
        claim = torch.exp(0.5 * (x @ w) + 0.3 * normal(g, 32, 1) + 7 * heavy) / 2
        return x, claim if sick else torch.log1p(claim).clamp(max=2.0)

    return setup(net, sample, F.mse_loss, 3e-3, seed=3)


# --------------------------------------------------------------------------------------- SATURATION


@sick(
    "mlp-sensor-counts-into-tanh",
    [("SATURATION", "first")],
    flat("first.act", "tanh", 0.9),
    allow=["VANISHING", "BOTTLENECK", "UNSTABLE"],
)
def sensor_counts(sick: bool, width: int) -> Setup:
    """Converter counts from 0 to 4095 go into a tanh layer as they are: it is at its ends for all samples."""
    net = stack(
        first=stack(fc=nn.Linear(12, width), act=nn.Tanh()),
        second=stack(fc=nn.Linear(width, width), act=nn.Tanh()),
        out=nn.Linear(width, 4),
    )
    inner = clusters(12, 4)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = inner(g)
        return (2048 + 500 * x).clamp(0, 4095) if sick else x / 2, y

    return setup(net, sample, F.cross_entropy, 3e-3)


@sick(
    "mlp-clamped-output",
    [("SATURATION", "out")],
    flat("out", "clamp", 0.9),
    allow=["DEAD", "VANISHING"],
)
def clamped_output(sick: bool, width: int) -> Setup:
    """A safety clamp to [-1, 1] on a regression whose targets lie round 8; once out there, nothing
    returns."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = tower([10, width], nn.ReLU, he), nn.Linear(width, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.out(self.hidden(x))
            return y.clamp(-1.0, 1.0) if sick else y

    return trained(setup(Net(), surface(10, shift=8.0), F.mse_loss, 2e-2), 40 if sick else 0)


@sick(
    "mlp-sigmoid-into-logit-loss",
    [("SATURATION", "probability")],
    flat("probability", "sigmoid", 0.8),
    allow=["VANISHING"],
)
def sigmoid_into_logit_loss(sick: bool, width: int) -> Setup:
    """Probabilities go into a loss that takes logits: its floor is 0.5, and pushing at it flattens the
    sigmoid."""
    net = stack(
        hidden=tower([10, width], nn.ReLU, he),
        out=nn.Linear(width, 1),
        probability=nn.Sigmoid() if sick else nn.Identity(),
    )
    ready = setup(net, two_sides(10), F.binary_cross_entropy_with_logits, 3e-2)
    return trained(ready, 300) if sick else ready


# --------------------------------------------------------------------------------------- BOTTLENECK


@sick(
    "mlp-narrow-rectified-passage",
    [("BOTTLENECK", "passage")],
    every(rank_below("passage", 2.01), stuck(0.3, steps=200)),
    allow=["DEAD", "VANISHING"],
    steps=200,
)
def narrow_passage(sick: bool, width: int) -> Setup:
    """Ten classes through a passage of two rectified units; one as wide as its neighbours lets them by."""
    k = 2 if sick else width
    net = stack(
        up=tower([16, width], nn.ReLU, he),
        passage=stack(fc=nn.Linear(width, k), act=nn.ReLU()),
        down=tower([k, width], nn.ReLU, he),
        head=nn.Linear(width, 10),
    )
    return setup(net, clusters(16, 10, number=64), F.cross_entropy, 1e-2)


@sick(
    "mlp-constant-initialisation",
    [("BOTTLENECK", "*")],
    every(rank_below("fc0", 1.01), rank_below("fc1", 1.01, steps=50)),
    allow=["VANISHING", "DEAD"],
)
def constant_initialisation(sick: bool, width: int) -> Setup:
    """All weights start at one value: all units of a layer are one unit, and stay so; draw them at random."""
    net = stack(
        fc0=nn.Linear(12, width),
        act0=nn.Tanh(),
        fc1=nn.Linear(width, width),
        act1=nn.Tanh(),
        head=nn.Linear(width, 4),
    )
    if sick:
        for layer in (net.fc0, net.fc1):
            nn.init.constant_(layer.weight, 1 / layer.in_features), nn.init.zeros_(layer.bias)
    return setup(net, clusters(12, 4), F.cross_entropy, 5e-3)
