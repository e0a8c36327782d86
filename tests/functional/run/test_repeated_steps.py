"""Steps that repeat the one before are read without a look at each call, and say what a full look would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.functional.reach import arrived
from gradflow.functional.reverse import reverse
from gradflow.functional.run.history import History
from gradflow.functional.tap.recorder import Recorder

WIDTH, STEPS = 6, 24


class Chosen(nn.Module):
    """One of two like modules runs in each step, drawn at random: with parameters, or without."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.ways = nn.Linear(WIDTH, WIDTH), nn.ModuleList([make(), make()])
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.ways[int(torch.randint(2, ()))](self.a(x)))


class Crossed(nn.Module):
    """Two like modules are called in one order, on one of two outputs each, drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = [self.a(x), 3 * self.b(x)]
        k = int(torch.randint(2, ()))
        y[k], y[1 - k] = self.first(y[k]), self.second(y[1 - k])
        return y[0] + y[1]


class Pair(nn.Module):
    """Two layers, and a count of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.step = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), 0


class Twice(Pair):
    """A layer that is called once or twice, and every third step not in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        y = self.a(x)
        if self.step % 3 == 0:
            y = y.detach()
        return self.b(self.a(y).relu() if self.step % 4 == 0 else y)


class Hooked(Pair):
    """A hook on a tensor changes the gradient, in every other step."""

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        y = self.a(x)
        if self.step % 2:
            y.register_hook(lambda g: 2 * g)
        return self.b(y)


class Frozen(Pair):
    """Which of two layers trains changes from step to step."""

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        self.a.requires_grad_(self.step % 5 != 0)
        return self.b(self.a(x).tanh())


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Any = checkpoint(self.b, self.a(x).relu(), use_reentrant=self.reentrant)
        return y


def stack(act: Callable[[], nn.Module]) -> nn.Module:
    first = nn.Linear(WIDTH, 9)
    nn.init.constant_(first.bias[:3].detach(), -4.0)  # units that fire in few steps, or in none
    return nn.Sequential(first, act(), nn.Dropout(0.2), nn.Linear(9, WIDTH), act())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)),
    "rectified": lambda: stack(nn.ReLU),
    "in place": lambda: stack(lambda: nn.ReLU(inplace=True)),
    "one of two linear": lambda: Chosen(lambda: nn.Linear(WIDTH, WIDTH)),
    "one of two rectifiers": lambda: Chosen(nn.ReLU),
    "one of two nested": lambda: Chosen(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())),
    "crossed": Crossed,
    "twice": Twice,
    "hooked": Hooked,
    "frozen": Frozen,
    "checkpointed": lambda: Checkpointed(reentrant=False),
    "checkpointed, reentrant": lambda: Checkpointed(reentrant=True),
    "tiny": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Scaled(1e-25)),
}


class Scaled(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return self.by * x


def record_of(name: str, *, training: bool) -> str:
    torch.manual_seed(1)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(8, WIDTH, generator=generator) for _ in range(STEPS)]
    optimizer = torch.optim.SGD(model.parameters(), 0.05) if training else None
    return gf.analyze(model, batches, lambda y: y.square().mean(), steps=STEPS, optimizer=optimizer).to_json()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_repeated_steps_say_what_a_full_look_would(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[bool] = []
    tensors_again = History._tensors_again

    def counted(self: History, *args: Any) -> Any:
        again.append((found := tensors_again(self, *args)) is not None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(History, "_tensors_again", counted)
        found = record_of(name, training=training)
    if name in ("plain", "rectified", "in place"):
        assert sum(again) > STEPS // 2
    monkeypatch.setattr(Recorder, "repeats", property(lambda self: False))
    monkeypatch.setattr(arrived, "is_plain", lambda x: False)
    monkeypatch.setattr(
        reverse,
        "plain_gradients",
        lambda loss, inputs, retain_graph: torch.autograd.grad(
            loss, inputs, retain_graph=retain_graph, allow_unused=True
        ),
    )
    assert found == record_of(name, training=training)
