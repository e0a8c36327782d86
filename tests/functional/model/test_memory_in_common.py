"""State by parameter, parameters on one memory, frozen whole numbers, and losses of the same names."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradflow.functional import analyze
from tests.functional.snapshots import difference, snapshot

X = torch.randn(6, 3)


class Consolidated(nn.Module):
    """Weighs how far each parameter has moved, by tables that have the parameters for keys, or their ids."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)
        parameters = list(self.parameters())
        weights = [torch.rand_like(p) for p in parameters]
        old = [p.detach().clone() for p in parameters]
        by = {"object": id, "id": id}.get(kind, lambda p: p)
        table = {by(p): (w, o) for p, w, o in zip(parameters, weights, old, strict=True)}
        self.kind, self.frozen = kind, {by(self.b.bias)}
        self.table: Any = table if kind != "object" else Held([table])

    def forward(self, x: Tensor) -> Tensor:
        table = self.table if self.kind != "object" else self.table.held[0]
        loss = self.b(torch.tanh(self.a(x))).square().mean()
        for p in self.parameters():
            key = p if self.kind == "parameter" else id(p)
            if key not in self.frozen:
                weight, old = table[key]
                loss = loss + (weight * (p - old + 0.1).square()).sum()
        return loss


class Held:
    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize("transform", ["fused", "vjp"])
@pytest.mark.parametrize("kind", ["parameter", "id", "object"])
def test_tables_by_parameter_follow_the_swap(kind: str, transform: Any) -> None:
    torch.manual_seed(0)
    model = Consolidated(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model, optimizer)
    record = analyze(model, [X] * 4, None, optimizer=optimizer, transform=transform)
    assert difference(before, snapshot(model, optimizer)) == ""
    assert_trains_alike(record, model, optimizer, lambda: model(X))


def assert_trains_alike(
    record: Any, model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]
) -> None:
    """Compare with plain training: losses, and the norms of parameters before each step."""
    losses, norms = [], []
    for _ in range(record.steps):
        norms.append([float(p.detach().double().norm()) for p in model.parameters()])
        optimizer.zero_grad()
        loss = loss_of()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(record.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(np.array([p.norm for p in record.parameters]).T, norms, rtol=1e-5)


def transposed() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    return model


def one_data() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    return model


def rows() -> nn.Module:
    """Some rows of one weight are the whole of another."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 3), nn.Linear(3, 3))
    model[2].weight = nn.Parameter(model[0].weight.detach()[1:4])
    return model


def seen_by_a_buffer() -> nn.Module:
    """A buffer looks at a weight."""
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_buffer("look", model[0].weight.detach().t())
    return model


@pytest.mark.parametrize(
    ("make", "transform"),
    [
        *itertools.product([transposed, one_data, rows], ["fused", "vjp"]),
        (seen_by_a_buffer, "fused"),  # the other one hands buffers on from step to step by value
    ],
)
def test_parameters_on_one_memory_train_as_one(make: Callable[[], nn.Module], transform: Any) -> None:
    torch.manual_seed(0)
    model: Any = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    def loss_fn(y: Tensor) -> Tensor:
        look = getattr(model, "look", None)
        return (y - 1).square().mean() + (0.0 if look is None else look.square().mean())

    before = snapshot(model, optimizer)
    record = analyze(model, [X] * 4, loss_fn, optimizer=optimizer, transform=transform)
    assert difference(before, snapshot(model, optimizer)) == ""
    assert_trains_alike(record, model, optimizer, lambda: loss_fn(model(X)))
    assert model[0].weight.untyped_storage().data_ptr() == model[-1].weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("detail", ["cheap", "full"])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_frozen_parameters_of_dtypes_without_arithmetic(dtype: torch.dtype, detail: Any) -> None:
    model = nn.Linear(3, 1)
    values = torch.tensor([0.0, 1.0, 1.0])
    model.index = nn.Parameter(values.to(dtype), requires_grad=False)
    record = analyze(model, [X] * 3, lambda y: y.square().mean(), detail=detail)
    assert record.parameter("index").norm[0] == pytest.approx(2**0.5)
    assert not record.parameter("index").trainable


@pytest.mark.parametrize("kind", ["parameters", "buffers", "nested"])
def test_a_loss_whose_names_are_those_of_a_part_of_the_model(kind: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.full((1, 3), 3.0)),
                nn.Parameter(torch.full((1,), 2.0)),
            )
            self.register_buffer("count", torch.full((), 4.0))

        def forward(self, y: Tensor) -> Tensor:
            return (y * self.weight + self.bias + self.count).square().mean()

    model: Any = nn.Sequential(nn.Linear(3, 3))
    part = nn.Linear(3, 1)
    part.register_buffer("count", torch.zeros(()))
    if kind == "nested":
        model.loss_fn = nn.ModuleDict({"weight": part})
        model._loss_fn = nn.Linear(3, 3)
    elif kind == "buffers":
        model.register_module("loss_fn", nn.BatchNorm1d(3))
        model.loss_fn.register_buffer("count", torch.zeros(()))
    else:
        model.loss_fn = part
    used = nn.Sequential(*model) if kind == "buffers" else model[0]
    model.forward = lambda x: used(x)
    loss_fn = Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.01)
    record = analyze(model, [X] * 3, loss_fn, optimizer=optimizer)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_fn(model(X))
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(record.losses, losses, rtol=1e-5)
