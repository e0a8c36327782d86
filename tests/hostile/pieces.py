"""Pieces that models are put together from, each with a bad habit of its own, and what makes them fail."""

from __future__ import annotations

import collections
import copy
import functools
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.modeling_outputs import CausalLMOutput


class Boom(Exception):
    """What is raised on purpose."""


class Fuse:
    """Raises when it has been lit a number of times; what was counted is no state of the model."""

    lit, limit = 0, 0

    @classmethod
    def light(cls) -> None:
        cls.lit += 1
        if cls.lit == cls.limit:
            raise Boom


class Piece(nn.Module):
    """A layer with a habit; fails when its fuse is lit often enough."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        found = self.act(x, h)
        Fuse.light()
        return h if found is None else found

    def act(self, x: Tensor, h: Tensor) -> Tensor | None:
        raise NotImplementedError


class Object:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


class Slotted:
    __slots__ = ("__count", "seen")

    def __init__(self) -> None:
        self.__count, self.seen = 0, [0]

    def grow(self) -> None:
        self.__count += 1
        self.seen.append(self.__count)


class Counting(Piece):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.seen, self.last = 0, {-1}, collections.deque([0], maxlen=2)
        self.nested, self.slotted = {"a": [{"b": [1]}]}, Slotted()

    def act(self, x: Tensor, h: Tensor) -> None:
        self.count += 1
        self.seen.add(self.count)
        self.last.append(self.count)
        self.nested["a"][0]["b"].append(self.count)
        self.slotted.grow()
        self.late = h.detach()


class Teaching(Piece):
    """An average of itself in a place where no state dict finds it."""

    def __init__(self, place: int) -> None:
        super().__init__()
        teacher = nn.Sequential(copy.deepcopy(self.fc), nn.BatchNorm1d(4))
        self.place = place
        held: Any = [
            lambda: [teacher], lambda: {"t": (teacher,)}, lambda: Object(t=teacher), lambda: lambda: teacher,
        ][place]()  # fmt: skip
        object.__setattr__(self, "held", held)

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        held = self.held
        teacher = [
            lambda: held[0], lambda: held["t"][0], lambda: held.t, lambda: held(),
        ][self.place]()  # fmt: skip
        with torch.no_grad():
            for mine, theirs in zip(self.fc.parameters(), teacher[0].parameters(), strict=True):
                theirs.lerp_(mine.detach() + 1, 0.1)
        return h - teacher(x).detach()


class Adapting(Piece):
    """Steps a parameter of its own by its own optimizer and scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.optimizer = torch.optim.Adam([self.shift], lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        own = self.optimizer.param_groups[0]["params"][0]
        own.grad = torch.ones(4)
        self.optimizer.step()
        self.scheduler.step()
        return h + self.shift


class Threaded(Piece):
    def act(self, x: Tensor, h: Tensor) -> Tensor:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(torch.tanh(h.detach() * 2)))
        thread.start()
        thread.join()
        return h + found[0]


class Cloning(Piece):
    """Runs a copy of a part of itself, made in one of several ways."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.way, self.kept = way, []

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        ways: list[Callable[[Any], Any]] = [
            copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy,
            lambda m: copy.deepcopy([m])[0],
        ]  # fmt: skip
        clone = ways[self.way](self.fc)
        if self.way != 2:
            with torch.no_grad():
                clone.weight.add_(1.0)
        self.kept.append(clone)
        return h + clone(x).detach()


class Drawing(Piece):
    """Draws from generators of every kind, its own and those of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_random, self.numpy_random = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.legacy, self.python = [np.random.RandomState(1)], {"r": random.Random(1)}
        self.sobol = torch.quasirandom.SobolEngine(4, scramble=True, seed=0)
        own = torch.Generator().manual_seed(2)
        self.noise = lambda: torch.rand((), generator=own)

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        own = self.numpy_random.random() + self.legacy[0].rand() + self.python["r"].random()
        shared = np.random.rand() + random.random()
        h = h + float(torch.rand((), generator=self.torch_random)) + float(torch.rand(())) + own + shared
        return h + self.sobol.draw(1) + float(self.noise())


class Buffering(Piece):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("none", None)
        self.plain, self.array = torch.zeros(4), np.zeros((2, 2))
        object.__setattr__(self, "norm", nn.BatchNorm1d(4))

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.none = h.detach()
        self.plain.add_(1.0)
        self.array += 1
        return self.norm(h)


class Caching(Piece):
    def __init__(self) -> None:
        super().__init__()
        self.last = CausalLMOutput(logits=torch.zeros(1))  # type: ignore[arg-type]
        self.outputs: list[Any] = [torch.zeros(1)]
        self.spread = torch.distributions.Normal(torch.zeros(4), torch.ones(4))
        self.ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    def act(self, x: Tensor, h: Tensor) -> None:
        self.last["logits"] = h.detach()
        self.outputs[0].add_(1.0)
        self.outputs.append(h)
        self.spread.loc.add_(1.0)
        self.ragged.mul_(2.0)


class Rearranging(Piece):
    """Replaces parameters, freezes, switches modes, registers hooks, adds modules."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.extra = nn.Dropout(0.5), nn.Parameter(torch.ones(4))
        self.gone = "here"

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        self.drop.train(not self.drop.training)
        self.extra = nn.Parameter(self.extra.detach() * 2)
        self.fc.bias.requires_grad_(not self.fc.bias.requires_grad)
        self.fc.register_forward_hook(lambda *_: None)
        self.fc.add_module("late", nn.Linear(1, 1))
        self.__dict__.pop("gone", None)
        return self.drop(h) * self.extra.detach()


class Weighing(Piece):
    """Holds tables by parameter, and parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {p: torch.ones_like(p) for p in self.fc.parameters()}
        self.ids, self.listed = {id(p): 1 for p in self.fc.parameters()}, [self.fc.weight]
        self.weights = nn.ParameterList([nn.Parameter(torch.eye(4))])

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        for p in self.fc.parameters():
            self.ids[id(p)] += 1
            self.table[p].add_(1.0)
        return h @ self.weights[0] + self.listed[0].sum() * 0.01


class Attending(Piece):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.kept = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), []

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        y, weights = self.attention(h[None], h[None], h[None])
        self.kept.append(weights)
        return h + y[0]


class Recurring(Piece):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.state = nn.LSTM(4, 4, batch_first=True), [torch.zeros(1, 1, 4)] * 2

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        y, state = self.rnn(h[None], tuple(self.state))
        self.state = [s.detach() for s in state]
        return y[0]


class Normed(Piece):
    def __init__(self) -> None:
        super().__init__()
        self.inner = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.norm, self.twin = nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 4)
        self.twin.weight = nn.Parameter(self.fc.weight.detach().t())

    def act(self, x: Tensor, h: Tensor) -> Tensor:
        return self.twin(self.norm(self.inner(h)))


class Writing(Piece):
    """Writes to its parameters, by every way, and to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {"bias": self.fc.bias}

    def act(self, x: Tensor, h: Tensor) -> None:
        with torch.no_grad():
            self.fc.weight.clamp_(-0.5, 0.5)
            self.held["bias"].add_(1.0)
        self.fc.bias.data.mul_(0.5)
        self.held["bias"].grad = None
        x.data.mul_(1.5)


PIECES: list[Callable[[], nn.Module]] = [
    Counting, Adapting, Threaded, Drawing, Buffering, Caching, Rearranging, Weighing, Attending, Recurring,
    Normed, Writing, *(functools.partial(Teaching, i) for i in range(4)),
    *(functools.partial(Cloning, i) for i in range(4)), lambda: nn.Dropout(0.3),
    lambda: nn.ReLU(inplace=True),
]  # fmt: skip


class Loss(nn.Module):
    """A loss with a parameter and a memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.count, self.seen = nn.Parameter(torch.ones(1)), 0, [0.0]
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, y: Tensor) -> Tensor:
        self.count += 1
        self.mean.mul_(0.9)
        self.seen.append(1.0)
        Fuse.light()
        return (y * self.scale).square().mean()


class OfOutput(nn.Module):
    """Takes the loss of the first thing that it is given."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, result: Any) -> Tensor:
        return self.loss(result[0])


def plain_loss(y: Tensor) -> Tensor:
    Fuse.light()
    return F.huber_loss(y, torch.ones_like(y))


class Sharp(torch.optim.Optimizer):
    """Takes its gradient where the weights have been moved."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for p in held:
            p.add_(self.state[p].setdefault("move", 0.01 * p.grad))
        closure()
        for p in held:
            p.sub_(self.state[p].pop("move")).sub_(p.grad, alpha=0.01)
