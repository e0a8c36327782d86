"""Training loops of many kinds, each a function of what wraps a step: the same code, watched or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Around = Callable[[int], contextlib.AbstractContextManager[Any]]
Loop = Callable[[nn.Module, int, Around], None]


def told(step: Any, loss: Tensor) -> Tensor:
    """Hand a loss over, where there is somebody to take it."""
    if step is not None:
        step(loss)
    return loss


class Residual(nn.Module):
    """Dropout, batch norm, an activation in place, an identity, functional activations, reuse."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.norm, self.relu, self.drop = nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.skip = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.a(x)))
        h = self.skip(h) + self.drop(torch.tanh(self.b(h)))
        h = h + F.relu(self.b(h))
        h += 0.1
        return self.head(h)


class Words(nn.Module):
    """Attention, whose outputs are views, on embedded words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.flat, self.head = nn.Flatten(), nn.Linear(80, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = (x[:, :5].abs() * 10).long() % 11
        return self.head(self.flat(self.block(self.embed(words))))


class Recurrent(nn.Module):
    """An LSTM, of whose output one step is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(2, 8, num_layers=2, dropout=0.1, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(len(x), 4, 2))[0][:, -1])


class Pictures(nn.Module):
    """Convolutions and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(16, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, None])


class Checkpointed(nn.Module):
    """A checkpoint of either kind, in which dropout draws."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant))


class Aliasing(nn.Module):
    """What a probe that makes a new tensor would break: outputs and inputs written to afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.keeps, self.skip, self.head = Keeps(), nn.Identity(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.keeps(x)
        again = self.skip(h)
        again *= 0.5  # and so is `h`, and what the layer keeps
        flat = h.view(-1)
        flat += 0.1
        return self.head(h + self.keeps.kept)


class Keeps(nn.Linear):
    """A layer that keeps its output."""

    def __init__(self) -> None:
        super().__init__(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "words": Words,
    "recurrent": Recurrent,
    "pictures": Pictures,
    "checkpoint": lambda: Checkpointed(False),
    "reentrant": lambda: Checkpointed(True),
    "aliasing": Aliasing,
}


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    """Draw a batch that can be learned."""
    x = torch.randn(size, 8)
    return x, x[:, :3].argmax(1)


def plain(model: nn.Module, steps: int, around: Around) -> None:
    """Forward, loss, backward, update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for now in range(steps):
        x, y = batch()
        with around(now) as step:
            optimizer.zero_grad()
            loss = told(step, F.cross_entropy(model(x), y))
            loss.backward()
            optimizer.step()


def accumulating(model: nn.Module, steps: int, around: Around) -> None:
    """Two micro-batches a step, the gradients clipped, the zeros kept."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for now in range(steps):
        with around(now) as step:
            optimizer.zero_grad(set_to_none=False)
            for x, y in (batch(8), batch(8)):
                loss = told(step, F.cross_entropy(model(x), y))
                (loss / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()


def scaled(model: nn.Module, steps: int, around: Around, dtype: torch.dtype = torch.float16) -> None:
    """Autocast, and a GradScaler whose scale overflows at the beginning."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=20)
    for now in range(steps):
        x, y = batch()
        with around(now) as step:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = told(step, F.cross_entropy(model(x), y))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()


def penalised(model: nn.Module, steps: int, around: Around) -> None:
    """A penalty on the gradient at the input, which is differentiated twice."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for now in range(steps):
        x, y = batch()
        x.requires_grad_()
        with around(now) as step:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            told(step, loss + slope.square().sum()).backward()
            optimizer.step()


def closures(model: nn.Module, steps: int, around: Around) -> None:
    """LBFGS, which evaluates the loss several times a step."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    for now in range(steps):
        x, y = batch()
        with around(now) as step:

            def closure(x: Tensor = x, y: Tensor = y, step: Any = step) -> Tensor:
                optimizer.zero_grad()
                loss = told(step, F.cross_entropy(model(x), y))
                loss.backward()
                return loss

            optimizer.step(closure)


def evaluating(model: nn.Module, steps: int, around: Around) -> None:
    """An evaluation amid the step, and a part of the parameters alone differentiated."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chosen = [p for p in model.parameters() if p.requires_grad][1:]
    for now in range(steps):
        x, y = batch()
        with around(now) as step:
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
            optimizer.zero_grad()
            loss = told(step, F.cross_entropy(model(x), y))
            loss.backward(inputs=chosen, retain_graph=True)
            (0.1 * loss).backward()
            optimizer.step()


LOOPS: dict[str, Loop] = {
    "plain": plain,
    "accumulating": accumulating,
    "scaled": scaled,
    "penalised": penalised,
    "closures": closures,
    "evaluating": evaluating,
}
# A second derivative that these models do not have, what reentrant checkpoints refuse, and half precision of
# an LSTM on a CPU.
CANNOT = {
    ("penalised", "recurrent"), ("penalised", "reentrant"), ("evaluating", "reentrant"),
    ("penalised", "words"), ("scaled", "recurrent"),
}  # fmt: skip
