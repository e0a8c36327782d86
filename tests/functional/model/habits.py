"""A model of bad habits: whatever a forward pass may do to what is not its own, one function each."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Meter:
    """An object of a user's own class."""

    def __init__(self) -> None:
        self.total, self.history, self.best = 0.0, [], {"value": torch.zeros(2)}

    def update(self, value: float) -> None:
        self.total += value
        self.history.append(value)
        self.best["value"].add_(1.0)


@dataclass(slots=True)
class Slotted:
    """An object whose attributes are in slots."""

    count: int = 0
    seen: list[int] = field(default_factory=list)


class Boom(Exception):
    """What a model or a loss raises in these tests."""


Habit = Callable[["Creature", Tensor], Any]


def _write_weight(m: Creature, h: Tensor) -> None:
    with torch.no_grad():
        m.out.weight.clamp_(-0.1, 0.1)
        m.fc1.bias.data.add_(1.0)


def _replace(m: Creature, h: Tensor) -> None:
    m.out.weight = nn.Parameter(m.out.weight.detach().clone())


def _grow(m: Creature, h: Tensor) -> None:
    m.add_module("late", nn.Linear(2, 2))
    m.register_buffer("late_buffer", torch.ones(2))
    m.late_attribute = h.detach()


def _shrink(m: Creature, h: Tensor) -> None:
    m.__dict__.pop("gone", None)


def _slots(m: Creature, h: Tensor) -> None:
    m.slotted.count += 1
    m.slotted.seen.append(m.slotted.count)


def _global_random(m: Creature, h: Tensor) -> Tensor:
    return h + 1e-3 * torch.rand(()) + 1e-3 * np.random.rand() + 1e-3 * random.random()


def _own_random(m: Creature, h: Tensor) -> Tensor:
    noise = m.torch_random.initial_seed() * 0 + float(torch.rand((), generator=m.torch_random))
    return h + 1e-3 * (noise + m.numpy_random.random() + m.legacy_random.rand() + m.python_random.random())


HABITS: dict[str, Habit] = {
    "counts": lambda m, h: setattr(m, "calls", m.calls + 1),
    "keeps activations": lambda m, h: m.kept.append(h),
    "keeps the last few": lambda m, h: m.last.append(float(h.detach().sum())),
    "fills a set": lambda m, h: m.seen.add(len(m.seen)),
    "fills a nested dict": lambda m, h: m.table["deep"]["list"].append(h.detach()),
    "clears a list": lambda m, h: m.full.clear(),
    "writes a plain tensor": lambda m, h: m.tally.add_(1.0),
    "writes a plain tensor's data": lambda m, h: m.tally.data.mul_(2.0),
    "joins a plain tensor to the graph": lambda m, h: m.joined.add_(h.mean()),
    "asks a plain tensor for a gradient": lambda m, h: m.asked.requires_grad_(),
    "writes a parameter that it holds": lambda m, h: m.held["bias"].data.add_(1.0),
    "writes a buffer that it holds": lambda m, h: m.held["mean"].add_(1.0),
    "drops a gradient that it holds": lambda m, h: setattr(m.held["bias"], "grad", None),
    "leaves a gradient on a tensor": lambda m, h: setattr(m.tally, "grad", torch.ones_like(m.tally)),
    "freezes a parameter that it holds": lambda m, h: m.held["bias"].requires_grad_(False),
    "resizes a plain tensor": lambda m, h: m.resized.resize_(5).zero_(),
    "writes a tensor in a tuple": lambda m, h: m.pair[0].add_(1.0),
    "writes an array": lambda m, h: np.add(m.array, 1, out=m.array),
    "writes a sparse tensor": lambda m, h: m.adjacency.mul_(2.0),
    "updates an object": lambda m, h: m.meter.update(1.0),
    "updates an object with slots": _slots,
    "draws from its generators": _own_random,
    "draws global random numbers": _global_random,
    "writes its parameters": _write_weight,
    "replaces a parameter": _replace,
    "rebinds a buffer": lambda m, h: setattr(m, "mean", 0.9 * m.mean + 0.1 * h.detach().mean(0)),
    "writes a buffer": lambda m, h: m.mean.add_(0.1),
    "grows": _grow,
    "shrinks": _shrink,
    "switches modes": lambda m, h: m.drop.train(not m.drop.training),
    "freezes itself": lambda m, h: m.fc1.bias.requires_grad_(False),
    "drops gradients": lambda m, h: setattr(m.out.weight, "grad", None),
    "sets the default dtype": lambda m, h: torch.set_default_dtype(torch.float64),
    "patches a forward": lambda m, h: setattr(m.act, "forward", F.relu),
    "registers a hook": lambda m, h: m.act.register_forward_hook(lambda *_: None) and None,
    "writes its input": lambda m, h: None,  # before the first layer takes it
}


class Creature(nn.Module):
    """A small network with tied weights, batch norm, dropout, and the habits it was given."""

    def __init__(self, habits: tuple[str, ...]) -> None:
        super().__init__()
        self.fc1, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.4)
        self.act, self.fc2, self.out = nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)
        self.fc2.weight = self.fc1.weight
        self.register_buffer("mean", torch.zeros(4))
        self.habits = habits
        self.calls, self.gone, self.fails_at = 0, "here", -1
        self.kept, self.last, self.seen = [], collections.deque([1.0], maxlen=3), {-1}
        self.table, self.full = {"deep": {"list": [0]}}, [1, [2], 3]
        self.tally, self.resized, self.pair = torch.ones(3), torch.ones(2), (torch.ones(2), 1)
        self.joined, self.asked = torch.zeros(()), torch.ones(2)
        self.held = {"bias": self.out.bias, "mean": self.mean}
        self.array, self.adjacency = np.arange(3), torch.eye(2).to_sparse()
        self.meter, self.slotted = Meter(), Slotted()
        self.torch_random = torch.Generator().manual_seed(1)
        self.numpy_random, self.legacy_random = np.random.default_rng(1), np.random.RandomState(1)
        self.python_random = random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        if "writes its input" in self.habits:
            x.mul_(1.5)
        h = self.bn(self.fc1(x))
        for habit in self.habits:
            found = HABITS[habit](self, h)
            h = found if isinstance(found, Tensor) and found.shape == h.shape and found.grad_fn else h
        h = self.fc2(self.act(self.drop(h)))
        if self.fails_at == 0:
            raise Boom("in the model")
        self.fails_at -= 1
        return self.out(h)


def make_optimizer(kind: str | None, model: nn.Module) -> torch.optim.Optimizer | None:
    if kind is None:
        return None
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    kept = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    for p, _, _ in kept:
        p.grad = torch.ones_like(p)
    optimizer.step()  # so that it has a state
    with torch.no_grad():
        for p, values, grad in kept:
            p.copy_(values)
            p.grad = grad
    return optimizer
