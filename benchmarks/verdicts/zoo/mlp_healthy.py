"""Plain feed-forward networks that look suspicious and are well."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import (
    huge,
    tiny,
    weak,
    zero_at_first,
)
from .data import (
    Setup,
    adam,
    clusters,
    setup,
    stack,
    surface,
    trained,
)
from .mlp import he, tower
from .registry import healthy


@healthy("mlp-ok-zero-last-layer", zero_at_first("hidden"), source="https://arxiv.org/abs/1901.09321")
def ok_zero_last_layer(width: int) -> Setup:
    """The last layer starts at zero, so the hidden ones get nothing in the first step, and all after it."""
    net = stack(hidden=tower([12, width, width], nn.ReLU, he), head=nn.Linear(width, 4))
    nn.init.zeros_(net.head.weight)
    return setup(net, clusters(12, 4), F.cross_entropy, 5e-3)


@healthy("mlp-ok-log-softmax-twice")
def ok_log_softmax_twice(width: int) -> Setup:
    """`LogSoftmax` before a cross entropy that takes it again: the second one changes nothing."""
    net = stack(hidden=tower([12, width], nn.ReLU, he), head=nn.Linear(width, 6), log=nn.LogSoftmax(-1))
    return setup(net, clusters(12, 6), F.cross_entropy, 1e-2)


@healthy("mlp-ok-scaled-loss", huge("*", 1e3), source="https://arxiv.org/abs/1710.03740")
def ok_scaled_loss(width: int) -> Setup:
    """The loss is multiplied by 16384 for half precision, and Adam does not care: gradients of thousands."""
    net = stack(hidden=tower([12, width, width], nn.GELU), head=nn.Linear(width, 1))
    return setup(net, surface(12), lambda y, t: 16384 * F.mse_loss(y, t), adam(5e-3))


@healthy("mlp-ok-small-loss", tiny("*", 1e-5))
def ok_small_loss(width: int) -> Setup:
    """The loss is a millionth (squared metres of millimetres): gradients of 1e-6, which Adam makes up for."""
    net = stack(hidden=tower([12, width, width], nn.GELU), head=nn.Linear(width, 1))
    maker = lambda p: torch.optim.Adam(p, lr=5e-3, eps=1e-15)  # noqa: E731
    return setup(net, surface(12), lambda y, t: 1e-6 * F.mse_loss(y, t), maker)


@healthy("mlp-ok-bag-of-words")
def ok_bag_of_words(width: int) -> Setup:
    """Inputs of 400 words with eight of them set: most columns of the first weight get no gradient at all."""
    net = stack(fc=nn.Linear(400, width), act=nn.ReLU(), head=nn.Linear(width, 4))

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 4, (32,), generator=g)
        words = torch.randint(0, 100, (32, 8), generator=g) * 4 + y[:, None]
        return torch.zeros(32, 400).scatter_(1, words, 1.0), y

    return setup(net, sample, F.cross_entropy, 1e-2)


@healthy("mlp-ok-strong-dropout", steps=200, falls_to=0.85)
def ok_strong_dropout(width: int) -> Setup:
    """Dropout of 0.7 makes every step's gradient another one; that is its purpose."""
    net = stack(
        fc0=nn.Linear(12, width),
        act0=nn.ReLU(),
        drop0=nn.Dropout(0.7),
        fc1=nn.Linear(width, width),
        act1=nn.ReLU(),
        drop1=nn.Dropout(0.7),
        head=nn.Linear(width, 4),
    )
    return setup(net, clusters(12, 4), F.cross_entropy, 5e-3)


@healthy("mlp-ok-converged", tiny("*", 2e-2), converged=True, dtypes=(torch.float32,))
def ok_converged(width: int) -> Setup:
    """A classifier at the end of its training: sure, right, and hence with hardly any gradient left."""
    net = stack(hidden=tower([12, width], nn.ReLU, he), head=nn.Linear(width, 4))
    return trained(setup(net, clusters(12, 4, spread=0.3), F.cross_entropy, 1e-2), 250)


@healthy("mlp-ok-sixteen-layers-of-gelu", weak("body.fc15", "body", 0.9), falls_to=0.85)
def ok_sixteen_layers(width: int) -> Setup:
    """Sixteen layers with skips and norms in between: deep, and every layer gets its share."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

        def forward(self, h: Tensor) -> Tensor:
            return h + 0.5 * F.gelu(self.fc(self.norm(h)))

    blocks = {f"fc{i}": Block() for i in range(16)}
    net = stack(stem=nn.Linear(12, width), body=stack(**blocks), head=nn.Linear(width, 4))
    return setup(net, clusters(12, 4), F.cross_entropy, 1e-3)
