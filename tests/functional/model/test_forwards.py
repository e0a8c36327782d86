"""Calls are led past a function from where copies do not take it along, and nothing of it is left."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional.model.layers import led
from gradflow.functional.tap.asked import Asked
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.tapped import TappedModel
from gradflow.functional.tap.taps import tapped
from tests.functional.snapshots import difference, snapshot
from tests.models import GUESSES

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    """A layer with its own parameter, that others are made from."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) + self.shift


def by_attributes(module: Any) -> Any:
    new = type(module)()
    vars(new).update(vars(module))
    vars(new)["_parameters"] = {k: nn.Parameter(p.detach().clone()) for k, p in module._parameters.items()}
    return new


def by_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_file(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_reduction(module: Any) -> Any:
    make, args, state = module.__reduce_ex__(4)[:3]
    new = make(*args)
    new.__setstate__(copy.deepcopy(state))
    return new


def by_list(module: Any) -> Any:
    return copy.deepcopy({"all": [module, (module,)]})["all"][1][0]


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a list": by_list,
    "pickle": by_pickle,
    "torch.save": by_file,
    "reduce": by_reduction,
    "attributes": by_attributes,
}


class Target(nn.Module):
    """Has its part run beside a copy of it that is moved away."""

    def __init__(self, copied: Callable[[Any], Any]) -> None:
        super().__init__()
        self.part, self.head, self.copied, self.kept = Part(), nn.Linear(4, 1), copied, [0]

    def forward(self, x: Tensor) -> Tensor:
        clone = self.copied(self.part)
        with torch.no_grad():
            clone.weight.add_(1.0)
        clone.shift = 0.5
        KEPT.append(clone)
        return self.head(self.part(x) + clone(x).detach())


KEPT: list[Any] = []


def square(y: Tensor) -> Tensor:
    return y.square().mean()


@pytest.mark.parametrize("transform", ["fused", "vjp"])
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_part_runs_as_itself_and_is_no_part_of_the_model(kind: str, transform: Any) -> None:
    if transform == "vjp" and kind in ("pickle", "torch.save"):
        pytest.skip("tensors of a transform have no memory that could be written to a file")
    torch.manual_seed(1)
    model = Target(COPIES[kind])
    loss = square(model(X))
    gradient = torch.autograd.grad(loss, model.part.weight)[0]
    KEPT.clear()
    before = snapshot(model)
    record = gf.analyze(model, [X] * 3, square, transform=transform)
    assert difference(before, snapshot(model)) == ""
    np.testing.assert_allclose(record.losses, [float(loss.detach())] * 3, rtol=1e-6)
    np.testing.assert_allclose(record.parameter("part.weight").grad_norm, float(gradient.norm()), rtol=1e-5)
    assert [layer.name for layer in record] == ["part", "head"]
    for clone in KEPT:  # kept after the run, each works by itself with the values it was copied with
        assert "forward" not in vars(clone)
        assert torch.equal(clone.weight, model.part.weight + 1.0)
        assert torch.equal(clone(X), torch.tanh(X @ clone.weight) + 0.5)
        if transform == "fused":  # a copy that was made under a transform can no longer be trained
            square(clone(X)).backward()
            assert clone.weight.grad is not None
        with torch.no_grad():
            clone.weight.zero_()
    assert model.part.weight.abs().sum() > 1


def test_a_shallow_copy_shares_the_parameters_and_is_no_part_of_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: Tensor) -> Tensor:
            twin = copy.copy(self.part)
            twin.shift = 3.0
            return self.part(x) + twin(x)

    torch.manual_seed(1)
    model = Model()
    loss = square(model(X))
    gradient = torch.autograd.grad(loss, model.part.weight)[0]
    record = gf.analyze(model, [X], square)
    assert record.losses[0] == pytest.approx(float(loss.detach()))
    assert record.parameter("part.weight").grad_norm[0] == pytest.approx(float(gradient.norm()))
    assert [layer.name for layer in record] == ["part"]


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_a_meta_learning_step_on_a_copy_of_the_whole_model(transform: Any) -> None:
    class Learner(nn.Module):
        """Takes one inner step from its own parameters, through a skeleton that is a copy of its net."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            skeleton = copy.deepcopy(self.net)
            own = dict(self.net.named_parameters())
            inner = square(torch.func.functional_call(skeleton, own, (x,)))
            steps = torch.autograd.grad(inner, list(own.values()), create_graph=True)
            fast = {name: p - 0.1 * g for (name, p), g in zip(own.items(), steps, strict=True)}
            return self.net(x) - torch.func.functional_call(skeleton, fast, (x,)) + 1.0

    torch.manual_seed(1)
    model = Learner()
    loss = square(model(X))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    record = gf.analyze(model, [X] * 2, square, transform=transform)
    np.testing.assert_allclose(record.losses, [float(loss.detach())] * 2, rtol=1e-6)
    found = [p.grad_norm[0] for p in record.parameters]
    np.testing.assert_allclose(found, [float(g.norm()) for g in gradients], rtol=1e-4)


def test_copies_in_the_loss_the_batches_and_the_progress() -> None:
    torch.manual_seed(1)
    model, clones = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def keep(value: Any) -> Any:
        clones.append((copy.deepcopy(model), model[0].weight.detach().clone()))
        return value

    gf.analyze(
        model, lambda: keep(X), lambda y: keep(square(y)), steps=3, optimizer=optimizer,
        progress=lambda *_: keep(None),
    )  # fmt: skip
    assert len(clones) == 9 + GUESSES
    for clone, weight in clones:
        assert torch.equal(clone[0].weight, weight)
        torch.testing.assert_close(
            clone(X), F.linear(F.linear(X, weight, clone[0].bias), *clone[1].parameters())
        )
        assert all(p.is_leaf and p.requires_grad for p in clone.parameters())


def test_a_forward_that_the_user_put_on_a_module_is_copied_as_it_was() -> None:
    def twice(self: nn.Linear, x: Tensor) -> Tensor:
        return 2 * nn.Linear.forward(self, x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.a.forward = types.MethodType(twice, self.a)  # type: ignore[method-assign]
            self.b.forward = functools.partial(twice, self.b)  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            clones = copy.deepcopy((self.a, self.b))
            with torch.no_grad():
                for clone in clones:
                    clone.weight.zero_()
                    clone.bias.fill_(1.0)
            outputs = [clone(x) for clone in clones]
            assert all(torch.equal(y, torch.full_like(y, 2.0)) for y in outputs)
            return self.b(self.a(x)) + outputs[0]

    torch.manual_seed(1)
    model = Model()
    loss = square(model(X))
    record = gf.analyze(model, [X], square)
    assert record.losses[0] == pytest.approx(float(loss.detach()))
    assert [layer.name for layer in record] == ["a", "b"]
    assert vars(model.a)["forward"].__func__ is twice


def global_forward(x: Tensor) -> Tensor:
    return 3 * x


def test_a_forward_that_the_user_put_on_a_module_is_pickled_as_it_was() -> None:
    model, found = nn.Sequential(nn.Linear(4, 4), nn.Identity()), []
    model[1].forward = global_forward  # type: ignore[method-assign]
    with tapped(TappedModel.of(model)):
        assert inspect.signature(model[1].forward) == inspect.signature(global_forward)
        found.append(pickle.loads(pickle.dumps(model[1])))
    assert torch.equal(found[0](X), 3 * X)
    assert b"gradflow" not in pickle.dumps(found[0])


def test_classes_and_modules_are_as_before_after_an_exception() -> None:
    class Base(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    class Derived(Base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Derived(), nn.BatchNorm1d(4))
    kinds = [nn.Linear, nn.Sequential, nn.BatchNorm1d, Base, Derived]
    before = [dict(vars(kind)) for kind in kinds]
    with pytest.raises(ZeroDivisionError):
        gf.analyze(model, [X], square)
    for kind, was in zip(kinds, before, strict=True):
        now = dict(vars(kind))
        assert now.keys() == was.keys()
        assert now["forward"] is was["forward"] if "forward" in was else True
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_that_calls_the_one_it_overrides_is_one_call() -> None:
    class Base(nn.Linear):
        pass

    class Derived(Base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + nn.Linear.forward(self, x)

    model = nn.Sequential(Derived(4, 4), Base(4, 4), nn.Linear(4, 1))
    record = gf.analyze(model, [X], square)
    assert [layer.name for layer in record] == ["0", "1", "2"]


def test_other_modules_of_a_class_are_left_alone_while_one_is_tapped() -> None:
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    taps = TappedModel.of(model)
    recorder = Recorder(taps, Asked())
    with tapped(taps), taps.heard_by(recorder):
        assert torch.equal(other(X), F.linear(X, other.weight, other.bias))
        assert recorder.calls == []
        model(X)
        assert [call.name for call in recorder.calls] == [""]


@pytest.mark.parametrize("kind", ["holder", "patched", "scripted"])
@pytest.mark.filterwarnings("ignore:`torch.jit.")
def test_what_a_run_learns_is_not_put_back_by_it(kind: str) -> None:
    """A parent that uses a child's parameters is made a layer in the first step, which starts again then."""

    class Holder(nn.Module):
        """Has parameters, and no `forward`."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held, self.out = Holder(), nn.Linear(4, 1)
            if kind == "scripted":
                self.held = torch.jit.script(nn.Linear(4, 4, bias=False))
            elif kind == "patched":
                self.held.forward = global_forward  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ self.held.weight)

    model = Model()
    for detail in ("cheap", "full"):
        record = gf.analyze(model, [X] * 2, square, detail=detail)  # type: ignore[arg-type]
        assert [layer.name for layer in record] == ["", "out"]
        gradient = torch.autograd.grad(square(model(X)), model.held.weight)[0]
        assert record.parameter("held.weight").grad_norm[0] == pytest.approx(float(gradient.norm()))


@pytest.mark.parametrize("kind", [k for k in COPIES if k not in ("pickle", "torch.save")])
def test_copies_run_as_themselves_in_every_way_in(kind: str) -> None:
    """`layer_gain` and attention run the model too, and lead calls of their own."""
    torch.manual_seed(1)
    model = Target(COPIES[kind])
    before = snapshot(model)
    outputs: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, args: outputs.append(args[0].detach().clone()))
    expected = model(X) is not None and outputs.pop()
    before = snapshot(model)
    gain = gf.functional.layer_gain(model, "part", X, num_probes=4, seed=1)
    assert torch.equal(outputs[0], expected)
    assert difference(before, snapshot(model)) == ""
    alone = gf.functional.layer_gain(nn.Sequential(model.part), "0", X, num_probes=4, seed=1)
    assert gain.gain == pytest.approx(alone.gain)


def test_a_tap_that_a_shallow_copy_took_along_rests_afterwards() -> None:
    model, calls = nn.Sequential(nn.Identity()), []
    model[0].forward = global_forward  # type: ignore[method-assign]

    with led({"0": model[0]}, calls.append):
        clone = copy.copy(model[0])
        model(X)
    assert torch.equal(clone(X), 3 * X)
    assert calls == ["0"]
    assert vars(model[0])["forward"] is global_forward
