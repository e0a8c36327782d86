"""What modules hold besides the tensors that are swapped is put back, wherever it is held."""

from __future__ import annotations

import collections
import contextlib
import functools
import queue
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import gradflow as gf
from gradflow.errors import NotRestoredError
from gradflow.functional.model.memory import ModuleState
from gradflow.functional.model.undo import same_bits
from tests.functional.snapshots import content, difference, snapshot

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def square(y: Tensor) -> Tensor:
    return y.square().mean()


class Holder:
    """An object of a user's own class."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


class Private:
    """Keeps what it holds in a slot of a private name."""

    __slots__ = ("__held", "late")

    def __init__(self, held: Any) -> None:
        self.__held = held

    @property
    def held(self) -> Any:
        return self.__held

    @held.setter
    def held(self, value: Any) -> None:
        self.__held = value


class Stubborn:
    """Refuses to be compared, hashed and written to."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        vars(self)["count"] = 0

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError("not to be compared")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("not to be written to")


class Keeper(nn.Module):
    """Calls what it is given with itself in its forward; `held` is what that changes."""

    def __init__(self, make: Callable[[], Any], change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fc, self.count, self.change = nn.Linear(4, 4), 0, change
        object.__setattr__(self, "held", make())

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        with torch.no_grad():
            self.change(self.held)
        return self.fc(x)


def teacher() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def learn(module: nn.Module) -> None:
    """Change all tensors of a module, in every way."""
    for p in module.parameters():
        p.lerp_(p + 1, 0.1)
        p.data.mul_(2.0)
        p.requires_grad_(False)
    for b in module.buffers():
        b.add_(1)
    module(torch.randn(8, 4))
    module.register_buffer("late", torch.ones(2))


def with_state() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    optimizer.step()
    return optimizer


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        group["params"][0].grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["params"][0].grad.add_(1.0)


def schedule(kind: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: kind(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9), *args)


def output_of(logits: Tensor) -> Any:
    return CausalLMOutput(logits=logits)  # type: ignore[arg-type]


def closure_over(held: Any) -> Callable[[], Any]:
    return lambda: held


def with_default(held: Any) -> Callable[[], Any]:
    return lambda default=held: default


class Named(dict):  # type: ignore[type-arg]
    """A dict with attributes of its own that refuses to be cleared."""

    def clear(self) -> None:
        raise TypeError("not to be cleared")

    __delitem__ = update = clear  # type: ignore[assignment]


def grow(named: Any) -> None:
    dict.__setitem__(named, "more", 1)
    named.last = "here"


def chain(length: int) -> Any:
    held: Any = [torch.zeros(1)]
    for _ in range(length):
        held = [held]
    return held


def deepest(held: Any) -> Any:
    while not isinstance(held, Tensor):
        held = held[0]
    return held


def dropped(held: Any) -> Any:
    held.data = torch.full((2, 2), 7.0)
    held.add_(1.0)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "module itself": (teacher, learn),
    "module in a list": (lambda: [teacher()], lambda h: learn(h[0])),
    "module in a nested dict": (lambda: {"a": ({"b": teacher()},)}, lambda h: learn(h["a"][0]["b"])),
    "module in an object": (lambda: Holder(net=teacher()), lambda h: learn(h.net)),
    "module in a slot": (lambda: Private([teacher()]), lambda h: learn(h.held[0])),
    "module in a closure": (lambda: closure_over(teacher()), lambda h: learn(h())),
    "modules in a closure's list": (lambda: closure_over([teacher()]), lambda h: learn(h()[0])),
    "module of a bound method": (lambda: teacher().forward, lambda h: learn(h.__self__)),
    "module in a partial": (lambda: functools.partial(F.relu, teacher()), lambda h: learn(h.args[0])),
    "module in a default": (lambda: with_default(teacher()), lambda h: learn(h())),
    "module as a key": (lambda: {teacher(): 1}, lambda h: learn(next(iter(h)))),
    "generator in a closure": (lambda: closure_over(random.Random(1)), lambda h: h().random()),
    "slot that is set": (lambda: Private(1), lambda h: setattr(h, "held", 2)),
    "slot that is new": (lambda: Private(1), lambda h: setattr(h, "late", 2)),
    "optimizer": (with_state, step),
    "optimizer in a list": (lambda: [with_state()], lambda h: step(h[0])),
    "optimizer in a closure": (lambda: closure_over(with_state()), lambda h: step(h())),
    "StepLR": (schedule(torch.optim.lr_scheduler.StepLR, 1), lambda h: h.step()),
    "OneCycleLR": (schedule(torch.optim.lr_scheduler.OneCycleLR, 1.0, 10), lambda h: h.step()),
    "plateau": (schedule(torch.optim.lr_scheduler.ReduceLROnPlateau), lambda h: h.step(1.0)),
    "loss scaler": (lambda: torch.amp.GradScaler("cpu"), lambda h: (h.scale(torch.ones(1)), h.update(3.0))),
    "Sobol": (lambda: torch.quasirandom.SobolEngine(4, scramble=True, seed=0), lambda h: h.draw(8)),
    "distribution": (
        lambda: torch.distributions.Normal(torch.zeros(2), torch.ones(2)),
        lambda h: (h.loc.add_(1.0), setattr(h, "scale", torch.zeros(2))),
    ),
    "bit generator": (lambda: np.random.PCG64(1), lambda h: h.random_raw()),
    "random": (lambda: random.Random(1), lambda h: h.random()),
    "model output": (lambda: output_of(torch.zeros(1)), lambda h: h.__setitem__("logits", torch.ones(2))),
    "model output, more keys": (
        lambda: output_of(torch.zeros(1)), lambda h: setattr(h, "loss", torch.ones(2)),
    ),
    "dict that refuses": (Named, grow),
    "ordered dict": (lambda: collections.OrderedDict(a=1, b=2), lambda h: h.move_to_end("a")),
    "counter": (collections.Counter, lambda h: h.update("abc")),
    "array that grows": (lambda: np.zeros(2), lambda h: (h.resize(4, refcheck=False), h.fill(1.0))),
    "array of objects": (lambda: np.array([Holder(n=1)], dtype=object), lambda h: setattr(h[0], "n", 2)),
    "object that refuses": (Stubborn, lambda h: vars(h).update(count=1)),
    "list of objects that refuse": (lambda: [Stubborn()], lambda h: h.append(Stubborn())),
    "nested tensor": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda h: h.mul_(2.0),
    ),
    "compressed tensor": (lambda: torch.eye(3).to_sparse_csr(), lambda h: h.values().mul_(2.0)),
    "tensor with attributes": (lambda: Holder(t=torch.ones(2)), lambda h: setattr(h.t, "note", "here")),
    "tensor on other memory": (lambda: torch.zeros(3), dropped),
    "deep chain": (lambda: chain(5000), lambda h: deepest(h).add_(1.0)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_module_holds_is_as_before(kind: str, fails: bool) -> None:
    torch.manual_seed(0)
    make, change = KINDS[kind]
    model = Keeper(make, change)

    def loss(y: Tensor) -> Tensor:
        if fails and model.count > 2:
            raise LookupError("in the loss")
        return square(y)

    def look() -> Any:
        return model.count, content(looks.get(kind, lambda held: held)(model.held))

    before = look()
    with pytest.raises(LookupError) if fails else contextlib.nullcontext():
        gf.analyze(model, [X] * 4, loss)
    assert difference(before, look()) == ""
    model(X)
    assert difference(before, look()) != ""  # the check itself: a plain call leaves a trace


looks: dict[str, Callable[[Any], Any]] = {  # what a snapshot does not look into
    "deep chain": deepest,
    "compressed tensor": lambda held: str(held.values().tolist()),
    "module of a bound method": lambda held: held.__self__,
    "module in a partial": lambda held: held.args[0],
    "module in a default": lambda held: held(),
    "module as a key": lambda held: next(iter(held)),
    "modules in a closure's list": lambda held: held(),
    "generator in a closure": lambda held: held(),
    "optimizer in a closure": lambda held: held(),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_the_models_own_optimizer_may_step_a_parameter_of_the_model() -> None:
    class Adapting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.a = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))
            self.optimizer = torch.optim.Adam([self.a], lr=0.1)
            self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)

        def forward(self, x: Tensor) -> Tensor:
            own = self.optimizer.param_groups[0]["params"][0]
            own.grad = torch.ones(4)
            self.optimizer.step()
            self.scheduler.step()
            return self.fc(x) + self.a

    model = Adapting()
    model.a.grad = torch.full((4,), 2.0)
    before = snapshot(model)
    gf.analyze(model, [X] * 3, square)
    after = snapshot(model)
    for found in (before, after):
        found.pop("version of a")  # which never goes back
    assert difference(before, after) == ""


def test_what_a_function_refers_to_from_outside_keeps_what_it_learned() -> None:
    """The list that a hook fills, the counter of a patched function: they are there to see the run."""
    seen, model = [], nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].register_forward_hook(lambda module, args, output: seen.append(float(output.detach().sum())))
    gf.analyze(model, [X] * 3, square)
    assert len(seen) == 3


def test_threads_and_queues_of_a_model_go_on() -> None:
    class Logged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lines, self.written = nn.Linear(4, 1), queue.Queue(), Private([])
            self.thread = threading.Thread(target=self.write, daemon=True)

        def write(self) -> None:
            while (line := self.lines.get()) is not None:
                WRITTEN.append(line)

        def forward(self, x: Tensor) -> Tensor:
            self.lines.put("called")
            return self.fc(x)

    WRITTEN.clear()
    model = Logged()
    model.thread.start()
    gf.analyze(model, [X] * 3, square)
    model.lines.put(None)
    model.thread.join(10)
    assert not model.thread.is_alive()
    assert WRITTEN == ["called"] * 3


WRITTEN: list[str] = []


class Unwilling(random.Random):
    """A generator that cannot be put back."""

    def setstate(self, state: Any) -> None:
        raise NotImplementedError("no way back")


def test_what_cannot_be_put_back_is_told_and_all_else_is() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.before, self.random, self.after = nn.Linear(4, 1), [1], Unwilling(1), {"n": 1}
            self.fails = False

        def forward(self, x: Tensor) -> Tensor:
            self.before.append(2)
            self.random.random()
            self.after["n"] += 1
            if self.fails:
                raise LookupError("in the model")
            return self.fc(x)

    model = Model()
    with pytest.raises(NotRestoredError, match="1 of the objects .* NotImplementedError: no way back"):
        gf.analyze(model, [X] * 3, square)
    assert (model.before, model.after) == ([1], {"n": 1})
    model.fails = True
    with pytest.raises(LookupError, match="in the model") as caught:
        gf.analyze(model, [X] * 3, square)
    assert any("could not be put back" in note for note in caught.value.__notes__)
    assert (model.before, model.after) == ([1], {"n": 1})


def test_a_loss_with_buffers_is_put_back_where_it_is_not_swapped() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(4))

        def forward(self, y: Tensor) -> Tensor:
            self.centre.add_(y.detach().mean(0))
            return (y - self.centre).square().mean()

    model, loss = nn.Linear(4, 4), Centred()
    before = snapshot(model), content(loss)
    gf.gradient_noise(model, X, loss, method="loop")
    assert difference(before, (snapshot(model), content(loss))) == ""


def test_modules_that_are_swapped_are_remembered_without_their_values() -> None:
    model = nn.Linear(4, 4)
    state = ModuleState([model])
    with torch.no_grad():
        model.weight.zero_()
    model.weight.grad = torch.ones(4, 4)
    model.bias.requires_grad_(False)
    assert state.restore() == []
    assert not model.weight.any()
    assert model.weight.grad is None
    assert model.bias.requires_grad


def test_bits_are_compared_whatever_the_kind_of_tensor() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([float("nan"), -0.0]))
    assert not same_bits(nan, nan.double())
    assert not same_bits(nan, nan[:1])
    assert same_bits(torch.eye(2).to_sparse(), torch.eye(2).to_sparse())
    assert not same_bits(torch.eye(2).to_sparse(), 2 * torch.eye(2).to_sparse())
