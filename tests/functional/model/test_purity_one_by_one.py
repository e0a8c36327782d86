"""Purity in one thing at a time: exceptions, hooks, modes, batches, attributes, and the other ways in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional import analyze, analyze_custom, call, graph_of
from tests.functional.model.habits import Boom, Creature, make_optimizer
from tests.functional.snapshots import difference, snapshot


class Small(nn.Module):
    """Counts its calls, and runs the hook it is given in the midst of its forward."""

    def __init__(self, inside: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.fc, self.bn, self.out, self.calls = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), 0
        self.inside = [inside]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.bn(self.fc(x))
        self.inside[0]()
        return self.out(h)


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, StopIteration, GeneratorExit])
def test_what_is_no_ordinary_exception_passes_and_leaves_no_trace(kind: type[BaseException]) -> None:
    def stop() -> None:
        if model.calls == 3:
            raise kind

    model = Small(stop)
    before = snapshot(model)
    with pytest.raises(kind):
        analyze(model, lambda: X, mean_square, steps=4)
    assert difference(before, snapshot(model)) == ""


def test_a_failure_in_a_submodule_leaves_no_forward_behind() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise Boom

    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), Failing()), nn.Linear(3, 1))
    with pytest.raises(Boom):
        analyze(model, [X], mean_square)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_forward_that_the_user_patched_is_run_and_kept() -> None:
    model, runs = Small(), []
    original = model.fc.forward

    def patched(x: Tensor) -> Tensor:
        runs.append(1)
        return original(x) * 2

    model.fc.forward = patched
    record = analyze(model, [X] * 2, mean_square, steps=2)
    assert model.fc.__dict__["forward"] is patched
    assert len(runs) == 2
    assert record["fc"].called.all()


def test_hooks_of_the_user_run_once_per_call_and_stay() -> None:
    model, seen = Small(), []
    hooks = [
        model.fc.register_forward_hook(lambda m, args, out: seen.append("after") or out * 2),
        model.fc.register_forward_pre_hook(lambda m, args: seen.append("before")),
    ]
    before = snapshot(model)
    doubled = analyze(model, [X], mean_square, steps=1)
    assert seen == ["before", "after"]
    assert difference(before, snapshot(model)) == ""
    with torch.no_grad():
        expected = float(mean_square(model.train()(X)))
    np.testing.assert_allclose(doubled.losses, expected, rtol=1e-6)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_measures_where_gradients_are_switched_off(mode: Any) -> None:
    model = Small()
    plain = analyze(model, [X] * 2, mean_square, steps=2)
    with mode():
        batch = X.clone()
        before = snapshot(model)
        record = analyze(model, [batch] * 2, mean_square, steps=2)
        assert difference(before, snapshot(model)) == ""
    assert record == plain


def test_a_nan_that_is_traced_leaves_no_trace() -> None:
    model = Creature(("counts", "keeps activations", "updates an object", "draws from its generators"))
    optimizer = make_optimizer("adam", model)
    batches = [torch.randn(6, 4) * (float("nan") if i == 1 else 1.0) for i in range(4)]
    before = snapshot(model, optimizer)
    record = analyze(model, batches, mean_square, steps=4, optimizer=optimizer)
    assert len(record.numerics) >= 1
    assert difference(before, snapshot(model, optimizer)) == ""


@pytest.mark.parametrize("run", ["custom", "graph"])
def test_the_other_ways_in_are_pure_too(run: str) -> None:
    model = Creature(("counts", "updates an object", "rebinds a buffer", "draws global random numbers"))
    before = snapshot(model)
    batch = torch.randn(6, 4)
    before["process"] = snapshot(model)["process"]
    if run == "custom":
        analyze_custom(model, lambda m, step: m(batch) + m(batch), mean_square, steps=2)
    else:
        graph_of(model, batch, mean_square)
    assert difference(before, snapshot(model)) == ""


def test_call_touches_neither_the_model_nor_what_it_is_given() -> None:
    model = Small()
    parameters = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    given = {name: b.clone() for name, b in buffers.items()}
    before = snapshot(model.fc), snapshot(model.bn), snapshot(model.out)
    output, new = call(model, parameters, buffers, (X,))
    assert difference(list(before), [snapshot(model.fc), snapshot(model.bn), snapshot(model.out)]) == ""
    assert all(torch.equal(buffers[name], given[name]) for name in buffers)
    assert not torch.equal(new["bn.running_mean"], buffers["bn.running_mean"])
    expected = torch.func.functional_call(model, {**parameters, **buffers}, (X,))
    torch.testing.assert_close(output, expected)


def test_modes_of_parts_are_kept_where_the_model_is_in_the_mode_asked_for() -> None:
    seen: list[bool] = []
    model = Small(lambda: seen.append(model.bn.training))
    model.bn.eval()
    analyze(model, [X], mean_square, steps=1)  # the model is in train mode: its parts keep theirs
    analyze(model, [X], mean_square, steps=1, mode="keep")
    model.eval()
    model.bn.train()
    analyze(model, [X], mean_square, steps=1, mode="keep")
    analyze(model, [X], mean_square, steps=1, mode="train")  # switched over as a whole
    analyze(model, [X], mean_square, steps=1, mode="eval")
    assert seen == [False, False, True, True, True]
    assert model.bn.training
    assert not model.training


def test_batches_that_the_model_writes_to_are_left_alone() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 1)

        def forward(self, x: Tensor, extra: dict[str, list[Tensor]]) -> Tensor:
            x.mul_(2.0)
            extra["list"][0].zero_()
            return self.fc(x)

    x, extra = X.clone(), {"list": [torch.ones(2)]}
    analyze(Writing(), [(x, extra)] * 3, mean_square, steps=3)
    assert torch.equal(x, X)
    assert torch.equal(extra["list"][0], torch.ones(2))


def test_a_leaf_of_the_users_that_is_no_parameter_gets_no_gradient() -> None:
    scale = torch.ones(2, requires_grad=True)
    x = X.clone().requires_grad_()
    model = Small()
    for detail in ("cheap", "full"):
        analyze(model, [x], lambda y: (y * scale).mean(), steps=1, detail=detail)
    assert scale.grad is None
    assert x.grad is None


def test_attributes_of_odd_kinds_are_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 1)
            self.meta = torch.ones(2, device="meta")
            with torch.inference_mode():
                self.inference = torch.ones(2)
            self.complex = torch.tensor([complex("nan"), 1j])
            self.nans = torch.tensor([float("nan"), 1.0])
            self.scalar = torch.tensor(float("nan"))
            self.rows = torch.eye(2).to_sparse()
            self.graph = self.fc(torch.ones(3))  # with a graph of its own
            self.large = {i: [i] for i in range(10_001)}
            self.raw, self.frozen, self.pair = bytearray(b"ab"), frozenset({1}), ([1], {2})
            self.myself = [self]

        def forward(self, x: Tensor) -> Tensor:
            self.large[-1] = [0]
            self.raw.extend(b"c")
            self.pair[0].append(2)
            self.pair[1].add(3)
            return self.fc(x)

    model = Odd()
    tensors = {
        name: (value, value._version) for name, value in vars(model).items() if name in ("complex", "nans")
    }
    analyze(model, [X] * 2, mean_square, steps=2)
    assert len(model.large) == 10_001
    assert (model.raw, model.pair) == (bytearray(b"ab"), ([1], {2}))
    assert model.myself[0] is model
    assert torch.equal(model.nans.isnan(), torch.tensor([True, False]))
    assert model.nans is tensors["nans"][0]
    assert (
        model.nans._version == tensors["nans"][1]
    )  # it was not written to, so a graph that needs it is good
    model.graph.sum().backward()
    assert model.fc.weight.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.")
def test_a_scripted_part_is_run_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 1))
    record = analyze(model, [X], mean_square)
    gradient = torch.autograd.grad(mean_square(model(X)), [model[0].weight])[0]
    np.testing.assert_allclose(record.parameter("0.weight").grad_norm, gradient.norm(), rtol=1e-6)
    assert record.parameter("1.weight").reached.all()


@pytest.mark.parametrize("way", ["closure", "partial", "object", "method"])
def test_what_a_loss_that_is_a_function_holds_is_put_back(way: str) -> None:
    """A critic with running statistics, its counter, and an optimizer that the loss steps."""
    critic = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(critic.parameters())

    class Score:
        def __init__(self) -> None:
            self.critic, self.calls = critic, 0

        def __call__(self, y: Tensor) -> Tensor:
            self.calls += 1
            optimizer.zero_grad()
            self.critic(y.detach()).mean().backward()
            optimizer.step()
            return self.critic(y).mean()

        def method(self, y: Tensor) -> Tensor:
            return self(y)

    score = Score()
    losses: dict[str, Any] = {
        "closure": lambda y: score(y),
        "partial": functools.partial(lambda s, y: s(y), score),
        "object": score,
        "method": score.method,
    }
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    record = gf.analyze(nn.Linear(3, 4), [torch.randn(8, 3)] * 4, losses[way], steps=4)
    assert record.steps == 4
    for name, value in critic.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not optimizer.state
    assert all(p.grad is None for p in critic.parameters())
