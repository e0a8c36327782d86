"""The purity contract: whatever is run and whatever fails, everything of the user's is as it was.

The property test builds a model out of habits, each of which leaves another trace (a counter, a kept
activation, a generator that moves on, ...), and compares everything that is reachable from it.
"""

from __future__ import annotations

import collections
import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradflow.errors import GradflowError
from gradflow.functional import analyze, analyze_custom, call, graph_of
from tests.functional.snapshots import difference, snapshot


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
# torch.func refuses to write to captured tensors and to freeze; the run raises, and must be pure all the same
RAISES_IN_VJP = {name for name in HABITS if name.startswith("write")} | {
    "resizes a plain tensor", "updates an object", "freezes itself", "freezes a parameter that it holds",
    "joins a plain tensor to the graph", "asks a plain tensor for a gradient",
}  # fmt: skip


WRITES_ORIGINALS = {"writes a parameter that it holds", "writes a buffer that it holds"}


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


FAILURES = (None, "draw", "model", "loss", "detached loss", "progress", "deepen")


@contextlib.contextmanager
def surroundings(kind: str) -> Iterator[None]:
    """Run under another grad mode or default dtype."""
    if kind == "no_grad":
        with torch.no_grad():
            yield
    elif kind == "double":
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        yield


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


runs = st.fixed_dictionaries(
    {
        "habits": st.lists(st.sampled_from(sorted(HABITS)), unique=True, max_size=6).map(tuple),
        "failure": st.sampled_from(FAILURES),
        "optimizer": st.sampled_from([None, "sgd", "adam"]),
        "transform": st.sampled_from(["auto", "fused", "vjp"]),
        "detail": st.sampled_from(["cheap", "full"]),
        "mode": st.sampled_from(["train", "eval", "keep"]),
        "seed": st.sampled_from([None, 5]),
        "around": st.sampled_from(["", "no_grad", "double"]),
        "graded": st.booleans(),
        "frozen": st.booleans(),
        "evaluated": st.sets(st.sampled_from(["", "bn", "drop", "fc2"]), max_size=3),
    }
)


def run(
    *,
    habits: tuple[str, ...],
    failure: str | None,
    optimizer: str | None,
    transform: Any,
    detail: Any,
    mode: Any,
    seed: int | None,
    around: str,
    graded: bool,
    frozen: bool,
    evaluated: set[str],
) -> None:
    torch.manual_seed(0)
    model = Creature(habits)
    if graded:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    model.fc2.bias.requires_grad_(not frozen)
    for name in evaluated:
        model.get_submodule(name).training = False
    made = make_optimizer(optimizer, model)
    model.fails_at = 2 if failure == "model" else -1
    batch, steps = torch.randn(6, 4), 0
    dtype = torch.float32

    def draw() -> Tensor:
        nonlocal steps
        steps += 1
        if failure == "draw" and steps == 3:
            raise Boom("in the draw")
        return batch

    def loss(y: Tensor) -> Tensor:
        torch.rand(1)
        if failure == "loss" and steps == 3:
            raise Boom("in the loss")
        return (y.detach() if failure == "detached loss" else y).square().mean()

    def progress(done: int, of: int) -> None:
        if failure == "progress" and done == 3:
            raise Boom("in the progress")

    def deepen(record: Any) -> bool:
        if failure == "deepen":
            raise Boom("in the judgement")
        return True

    with surroundings(around):
        before, drawn = snapshot(model, made), batch.clone()
        error: Exception | None = None
        try:
            record = analyze(
                model, draw, loss, steps=4, optimizer=made, transform=transform, detail=detail, mode=mode,
                seed=seed, progress=progress, deepen=deepen,
            )  # fmt: skip
        except Exception as found:
            error = found
        after = snapshot(model, made)
    if WRITES_ORIGINALS & set(habits):  # the values are put back; a version counter never goes back
        before, after = ({k: v for k, v in found.items() if "version" not in k} for found in (before, after))
    assert difference(before, after) == ""
    assert torch.equal(batch, drawn)
    assert batch.dtype == dtype
    if failure == "deepen" and detail == "full":
        failure = None  # not asked then
    if failure == "detached loss":
        expected: Any = GradflowError
    elif transform == "vjp" and RAISES_IN_VJP & set(habits):
        expected = (Boom, RuntimeError)
    else:
        expected = Boom if failure else type(None)
    if not (transform == "vjp" and error is None):
        assert isinstance(error, expected), repr(error)
    if error is None:
        assert record.steps == 4
        assert np.isfinite(record.losses).all()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs)
def test_everything_is_as_before(options: dict[str, Any]) -> None:
    run(**options)


PLAIN: dict[str, Any] = {
    "failure": None, "optimizer": None, "transform": "fused", "detail": "cheap", "mode": "train",
    "seed": None, "around": "", "graded": True, "frozen": False, "evaluated": set(),
}  # fmt: skip


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("failure", [None, "loss"])
def test_every_habit_leaves_no_trace(habit: str, failure: str | None) -> None:
    run(**{**PLAIN, "habits": (habit,), "failure": failure, "optimizer": "adam"})


@pytest.mark.parametrize("habit", HABITS)
def test_a_snapshot_sees_every_habit(habit: str) -> None:
    """The check itself: a plain call leaves a trace with the habit, and none without it."""
    for habits in ((), (habit,)):
        model = Creature(habits)
        model.drop.training = model.bn.training = False
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        batch = torch.randn(6, 4)
        before, drawn = snapshot(model), batch.clone()
        try:
            model(batch)
            model.fails_at += 1  # which every call takes one from
            changed = difference(before, snapshot(model)) != "" or not torch.equal(batch, drawn)
        finally:
            torch.set_default_dtype(torch.float32)
        assert changed == bool(habits)


@pytest.mark.parametrize("failure", [f for f in FAILURES if f])
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_every_failure_leaves_no_trace(failure: str, transform: str) -> None:
    habits = ("counts", "keeps activations", "fills a nested dict", "draws global random numbers")
    run(**{**PLAIN, "habits": habits, "failure": failure, "transform": transform, "optimizer": "sgd"})


# --------------------------------------------------------------------------------- one thing at a time


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
