"""Small sick models, and what holds their every bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradflow.remedies as r


def dead_net() -> nn.Sequential:
    """Return a network whose hidden units never fire."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    nn.init.constant_(net[0].bias, -9.0)
    return net


def drawn(number: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Return batches of a task that is easily learnt."""
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, 8, generator=g) for _ in range(number)]
    return [(x, x[:, :1] - x[:, 1:2]) for x in inputs]


def bits(model: nn.Module, optimizer: Optimizer) -> tuple[Any, ...]:
    """Return all that a trial might change of a model, an optimizer and the random states, as values."""
    return (
        {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        copy.deepcopy(optimizer.state_dict()),
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


def same(a: Any, b: Any) -> bool:
    """Whether two nests of values are equal bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def with_targets_kept() -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor], dict[str, Tensor]]:
    """Return batches without targets, a loss that knows those of the latest, and where it knows them from."""
    latest: dict[str, Tensor] = {}
    g = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        x = torch.randn(32, 8, generator=g)
        latest["y"] = x[:, :1] - x[:, 1:2]
        return x

    return draw, lambda output: nn.functional.mse_loss(output, latest["y"]), latest


def net() -> nn.Sequential:
    """Return a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def applied(remedy: r.Remedy, model: nn.Module, seed: int = 3) -> nn.Module:
    """Return the model after a remedy, drawn with a seed."""
    optimizer = torch.optim.SGD(list(model.parameters()) or [torch.zeros(1)], 0.1)
    torch.manual_seed(seed)
    return remedy.apply(model, optimizer)[0]


def x(number: int = 5) -> Tensor:
    """Return inputs of `net`."""
    return torch.randn(number, 4, generator=torch.Generator().manual_seed(2))


def equal(a: nn.Module, b: nn.Module) -> None:
    """Assert that all parameters are the same bit for bit."""
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)
