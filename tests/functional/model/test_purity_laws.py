"""The purity contract, as a property over models, options and failures."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradflow as gf


class Notes:
    """A user's own object, kept on a module."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.best = 1.0


class Net(nn.Module):
    """BatchNorm, Dropout, tied weights, state outside buffers, and every kind of random number."""

    def __init__(self, *, writes: bool, writes_weights: bool, swaps_buffer: bool) -> None:
        super().__init__()
        self.fc1, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.fc2, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.fc2.weight = self.fc1.weight
        self.register_buffer("mean", torch.zeros(4))
        self.calls, self.kept, self.table = 0, [], {"last": None}
        self.total, self.notes = torch.zeros(3), Notes()
        self.torch_rng, self.numpy_rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.python_rng = random.Random(1)
        self.writes, self.writes_weights, self.swaps_buffer = writes, writes_weights, swaps_buffer

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.drop(self.bn(self.fc1(x)))
        self.kept.append(h)
        self.table["last"] = h
        if self.writes:
            self.total += 1.0
        self.notes.seen.append(self.calls)
        self.notes.best *= 0.5
        self.later = h.detach()
        if self.swaps_buffer:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        if self.writes_weights:
            with torch.no_grad():
                self.out.weight.clamp_(-0.1, 0.1)
        noise = torch.rand(4) + torch.rand(4, generator=self.torch_rng)
        shift = np.random.rand() + self.numpy_rng.random() + random.random() + self.python_rng.random()
        return self.out(torch.relu(self.fc2(h + 0.01 * noise * shift)))


def snapshot(model: Net, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Everything that must be as before, values copied and identities by id."""
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # type: ignore[index]
        "position": np.random.get_state()[2],
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "own": (
            model.torch_rng.get_state(),
            model.numpy_rng.bit_generator.state,
            model.python_rng.getstate(),
        ),
        "state": (
            model.calls,
            list(map(id, model.kept)),
            dict(model.table),
            model.total.clone(),
            id(model.total),
        ),
        "notes": (id(model.notes), list(model.notes.seen), model.notes.best),
        "later": hasattr(model, "later"),
    }
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), p.grad.clone())
        found[f"parameter {name}"] = (id(p), p.detach().clone(), p._version, p.requires_grad, grad)
    for name, b in model.named_buffers():
        found[f"buffer {name}"] = (id(b), b.clone(), b._version)
    for name, m in model.named_modules():
        found[f"module {name}"] = (
            m.training,
            sorted(m.__dict__),
            "forward" in m.__dict__,
            len(m._forward_hooks),
        )
    if optimizer is not None:
        found["optimizer"] = copy.deepcopy(optimizer.state_dict())
        found["held"] = [id(p) for g in optimizer.param_groups for p in g["params"]]
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    frozen=st.booleans(),
    graded=st.booleans(),
    evaluated=st.sampled_from([(), ("bn",), ("drop", "fc1"), ("",)]),
    optimizer=st.sampled_from([None, "sgd", "adam"]),
    transform=st.sampled_from(["fused", "vjp"]),
    detail=st.sampled_from(["cheap", "full"]),
    fails=st.sampled_from([None, None, "model", "loss", "batch", "number"]),
    detached=st.booleans(),
    nan=st.booleans(),
    grad=st.booleans(),
    mode=st.sampled_from(["train", "eval", "keep"]),
    seed=st.sampled_from([None, 7]),
    writes_weights=st.booleans(),
    swaps_buffer=st.booleans(),
)
def test_everything_is_as_before(
    frozen: bool, graded: bool, evaluated: tuple[str, ...], optimizer: str | None, transform: Any,
    detail: Any,
    fails: str | None, detached: bool, nan: bool, grad: bool, mode: Any, seed: int | None,
    writes_weights: bool, swaps_buffer: bool,
) -> None:  # fmt: skip
    torch.manual_seed(3)
    writes = transform != "vjp"  # torch.func refuses to write in place to what is no argument
    model = Net(writes=writes, writes_weights=writes and writes_weights, swaps_buffer=swaps_buffer)
    if graded:
        model(torch.randn(5, 4)).sum().backward()
    model.fc2.bias.requires_grad_(not frozen)
    for name in evaluated:
        model.get_submodule(name).training = False
    made: Any = None
    if optimizer is not None:
        parameters = list(model.parameters())
        made = torch.optim.SGD(parameters, 0.1, 0.9) if optimizer == "sgd" else torch.optim.Adam(parameters)
        if graded:
            before = [p.detach().clone() for p in parameters]
            made.step()
            with torch.no_grad():
                for p, old in zip(parameters, before, strict=True):
                    p.copy_(old)
    batch, count = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), [0]

    def draw() -> Tensor:
        count[0] += 1
        if fails == "batch" and count[0] == 3:
            raise KeyError("batch")
        return batch * (float("nan") if nan and count[0] == 2 else 1.0)

    def loss(y: Tensor) -> Any:
        torch.rand(2)
        if fails == "loss" and count[0] == 3:
            raise ZeroDivisionError("loss")
        value = (y.detach() if detached else y).square().sum()
        return float(value.detach()) if fails == "number" else value

    if fails == "model":
        model.fc2.register_forward_pre_hook(lambda m, x: 1 / 0 if count[0] == 3 else None)
    with torch.set_grad_enabled(grad):
        before_run = snapshot(model, made)
        kept = batch.clone()
        options = {"optimizer": made, "transform": transform, "detail": detail, "mode": mode, "seed": seed}
        if fails is None:
            gf.diagnose(model, draw, loss, steps=4, **options)
        else:
            with pytest.raises((ZeroDivisionError, KeyError, gf.GradflowError)):
                gf.diagnose(model, draw, loss, steps=4, **options)
        after = snapshot(model, made)
    assert torch.equal(batch, kept)
    for key, value in before_run.items():
        assert same(value, after[key]), key
    assert before_run.keys() == after.keys()
