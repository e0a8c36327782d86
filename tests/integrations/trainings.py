"""Small seeded trainings that the tests of callbacks and trackers run with and without a monitor."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gradflow as gf

Batch = tuple[Tensor, Tensor]


def network(*, dead: bool = False) -> nn.Sequential:
    """Return a classifier of four numbers with dropout and batch norm; its rectifiers are dead if asked."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, 3),
    )  # fmt: skip
    if dead:
        with torch.no_grad():
            model[4].bias.fill_(-100.0)
    return model


def batches(number: int, size: int = 16) -> list[Batch]:
    """Return batches with something to learn in them."""
    drawn = torch.Generator().manual_seed(1)
    xs = torch.randn(number, size, 4, generator=drawn)
    return [(x, x[:, :3].argmax(1)) for x in xs]


def bits(model: nn.Module) -> str:
    """Return what tells a model's state, bit for bit, and every random state, from any other."""
    found = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    found.update(repr((random.getstate(), np.random.get_state()[1:])).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train(
    watch: Callable[[nn.Module, Any], gf.Monitor], *, steps: int = 60, dead: bool = False
) -> gf.Monitor:
    """Run a plain training with a monitor that `watch` makes of (model, optimizer)."""
    model, loss_fn = network(dead=dead), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer)
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        monitor((x, y), loss=loss)
    return monitor
