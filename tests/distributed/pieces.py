"""Small models in pieces, one a stage of a pipeline, each with something that a cut may hide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.models import MODELS


class Doubled(nn.Module):
    """Writes to its input, so that the probe on a view before it does not fit at first."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)


def pieces(kind: str) -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]]]:
    """Return the stages of a model, in whose names those of the layers are told apart, and batches."""
    torch.manual_seed(0)
    first: nn.Module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16))
    last: nn.Module = nn.Sequential(nn.ReLU(), nn.Linear(16, 3))
    if kind == "detached":
        last = nn.Sequential(Detached(), nn.Linear(16, 3))
    elif kind == "cut":
        last = Functional(nn.Linear(16, 16), nn.Linear(16, 3))
    elif kind == "dead":
        last = nn.Sequential(Off(), nn.Linear(16, 3))
    elif kind == "frozen":
        first.requires_grad_(False)
    elif kind == "skips":
        first, last = Forked(), Joined()
    elif kind == "again":
        last = nn.Sequential(nn.Linear(16, 16), nn.Flatten(), Doubled(), nn.Linear(16, 3))
    stages = [first.double(), last.double()]
    return stages, MODELS["mlp"]("healthy")[1]


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2


class Functional(nn.Sequential):
    """Cuts what it takes off, on both of its ways."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x.detach()) + x.detach())


class Off(nn.Module):
    """A rectifier, as a function, of which a third of the units are off."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - 100.0 * (torch.arange(16) < 5))


class Forked(nn.Module):
    """Hands on two tensors, and whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(6, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.left(x)
        return F.relu(h), h + self.right(x), torch.arange(16)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, a: Tensor, b: Tensor, places: Tensor) -> Tensor:
        return self.out(F.relu(b + self.inner(a) + places))


class Chain(nn.Module):
    """All stages in one process, under the names that an analysis gives them."""

    def __init__(self, stages: list[nn.Module]) -> None:
        super().__init__()
        for i, stage in enumerate(stages):
            self.add_module(f"stage{i}", stage)

    def forward(self, x: Tensor) -> Tensor:
        return self.stage1(self.stage0(x))


class Whole(nn.Module):
    """Stages in one process, under the names that their layers have."""

    def __init__(self, stages: list[nn.Module]) -> None:
        super().__init__()
        self.forwards = [type(stage).forward for stage in stages]
        for stage in stages:
            for name, child in stage.named_children():
                self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.forwards[1](self, *self.forwards[0](self, x))
