"""Models inside something else: parametrizations, checkpoints, functions, compilers, data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gradflow as gf
from tests.hostile.harness import check
from tests.models import CASES as MODELS
from tests.models import Case, squares


def vectors() -> Tensor:
    return torch.randn(5, 6)


def around(layer: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Return a model with such a layer between two plain ones."""
    return lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer(), nn.Linear(6, 2))


# ----------------------------------------------------------------------------------- parametrizations


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Exponential(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matrix_exp(x * self.power)


def parametrized(*parts: nn.Module) -> nn.Module:
    layer = nn.Linear(6, 6)
    for part in parts:
        parametrize.register_parametrization(layer, "weight", part)
    return layer


class CachedWeights(nn.Module):
    """Computes a parametrized weight once for two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = parametrized(Symmetric()), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return self.out(self.layer(torch.tanh(self.layer(x))))


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "of a weight": lambda: parametrized(Symmetric()),
    "two of a weight, with a parameter": lambda: parametrized(Symmetric(), Exponential()),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "weight norm, old": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "spectral norm, old": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(6, 6), "weight", 0.4),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations(name: str) -> None:
    check(Case(around(PARAMETRIZED[name]), vectors, squares))


def test_a_parametrization_that_is_cached() -> None:
    check(Case(CachedWeights, vectors, squares), rtol=1e-6)


# --------------------------------------------------------------------------------------- checkpoints


class Checkpointed(nn.Module):
    """A checkpointed part with dropout, that uses a layer from around it as well."""

    def __init__(self, reentrant: bool, foreign: Tensor | None = None) -> None:
        super().__init__()
        self.inp, self.a, self.b, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.drop, self.reentrant, self.foreign = nn.Dropout(0.3), reentrant, [foreign]

    def part(self, h: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.a(h)))
        return self.b(h) * (1.0 if self.foreign[0] is None else self.foreign[0])

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.part, self.inp(x), use_reentrant=self.reentrant)
        return self.out(checkpoint(self.part, h, use_reentrant=self.reentrant) + h)


class Segments(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inp, self.reentrant = nn.Linear(6, 6), reentrant
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.body, 2, self.inp(x), use_reentrant=self.reentrant)


class Nested(nn.Module):
    """A checkpoint in a checkpoint, that uses a parameter which a list holds and a tensor from outside."""

    def __init__(self, reentrant: bool, foreign: Tensor | None = None) -> None:
        super().__init__()
        self.inp, self.a, self.b, self.reentrant = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            reentrant,
        )
        self.held, self.foreign = [self.a.weight], [foreign]

    def inner(self, h: Tensor) -> Tensor:
        h = torch.tanh(h @ self.held[0])
        return h if self.foreign[0] is None else h * self.foreign[0]

    def outer(self, h: Tensor) -> Tensor:
        return self.b(checkpoint(self.inner, self.a(h), use_reentrant=self.reentrant))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.outer, self.inp(x), use_reentrant=self.reentrant)


# PyTorch says so of any checkpoint in a reentrant one
INNER = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")


@INNER
@pytest.mark.parametrize("reentrant", [True, False])
def test_nested_checkpoints_with_a_parameter_that_is_held(reentrant: bool) -> None:
    case = Case(lambda: Nested(reentrant), vectors, squares)
    check(case, outputs=False, rtol=1e-6, vjp="checkpoint|setup_context|saved_tensors_hooks|beforehand")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [Checkpointed, Segments])
def test_checkpoints(make: Any, reentrant: bool) -> None:
    # a checkpoint is run twice, so that the naive version, with its hooks, sees its layers twice
    case = Case(lambda: make(reentrant), vectors, squares)
    record = check(case, outputs=False, vjp="checkpoint|setup_context|saved_tensors_hooks|torch.func")
    assert all(layer.reached.all() for layer in record)


@INNER
@pytest.mark.parametrize("detail", ["cheap", "full"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [Checkpointed, Nested])
def test_a_tensor_of_the_users_inside_a_checkpoint_gets_no_gradient(
    make: Any, reentrant: bool, detail: Any
) -> None:
    foreign = torch.ones(6, requires_grad=True)
    graded = torch.ones(6, requires_grad=True)
    kept = graded.grad = torch.full((6,), 7.0)
    model = make(reentrant, foreign)
    record = gf.analyze(model, [vectors()] * 3, squares, detail=detail)
    assert foreign.grad is None
    model.foreign[0] = graded
    gf.analyze(model, [vectors()] * 3, squares, detail=detail)
    assert graded.grad is kept
    assert kept.tolist() == [7.0] * 6
    assert all(p.reached.all() for p in record.parameters)


# -------------------------------------------------------------------------- functions and operators


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(sign := x.sign())
        return x * weight, sign

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad * weight * 0.5, (grad * x).sum(0)


class InPlaceFunction(torch.autograd.Function):
    """Writes to its input and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(x)
        return x.mul_(3.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 3.0


class StraightThrough(torch.autograd.Function):
    """In the style that `torch.func` takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (grad,) = grad_outputs
        return grad.clamp(-0.01, 0.01)


class Functions(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.out, self.kind = nn.Linear(6, 6), nn.Linear(6, 2), kind
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.weight
        if self.kind == "old":
            h = OldStyle.apply(h, self.weight)[0]
        elif self.kind == "in place":
            h = InPlaceFunction.apply(h.clone())
        elif self.kind == "straight through":
            h = StraightThrough.apply(h * 10)
        else:
            h = scaled_sine(h, self.weight)
        return self.out(h)


@torch.library.custom_op("gradflow_tests::scaled_sine", mutates_args=())
def scaled_sine(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).sin()


def _scaled_sine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    inner = grad * (x * weight).cos()
    return inner * weight, (inner * x).sum(0)


scaled_sine.register_autograd(
    _scaled_sine_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)

FUNCTIONS = {
    "old": "setup_context", "in place": "setup_context", "straight through": "agrees",
    "custom op": "setup_context",
}  # fmt: skip


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_and_operators_of_the_users(kind: str) -> None:
    check(Case(lambda: Functions(kind), vectors, squares), vjp=FUNCTIONS[kind])


# ----------------------------------------------------------------------------------- compiled, scripted


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="eager")
    return model


COMPILED: dict[str, Callable[[], Any]] = {
    "the whole model": lambda: torch.compile(mlp(), backend="eager"),
    "the whole model, by aot_eager": lambda: torch.compile(mlp(), backend="aot_eager"),
    "a part": around(lambda: torch.compile(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), backend="eager")),
    "in place": compiled_in_place,
}


# the compiler looks at the gradients of what it is given, and warnings are errors here
CALM = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning", "ignore:Guards may run slower on Python 3.13.0"
)


@CALM
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    """The naive version, whose hooks a compiler does not expect, is left out."""
    record = check(Case(COMPILED[name], vectors, squares), outputs=False, rtol=1e-6)
    assert sum(layer.type == "Linear" for layer in record) == 3
    assert all(layer.reached.all() for layer in record)


@CALM
def test_a_compiled_function_of_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)
            self.inner = torch.compile(lambda h: torch.sin(h) * 2, backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.inner(self.a(x)))

    check(Case(Model, vectors, squares), outputs=False, rtol=1e-6)


SCRIPTED: dict[str, Callable[[], Any]] = {
    "a scripted layer": around(lambda: torch.jit.script(nn.Linear(6, 6))),
    "a scripted part": around(lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))),
    "a traced part": around(lambda: torch.jit.trace(nn.Sequential(nn.Linear(6, 6)), torch.ones(5, 6))),
    "scripted as a whole": lambda: torch.jit.script(mlp()),
    "traced as a whole": lambda: torch.jit.trace(mlp(), torch.ones(5, 6)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.")
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_and_traced(name: str) -> None:
    """What is scripted is one layer, seen from outside; a record says so."""
    record = check(Case(SCRIPTED[name], vectors, squares), outputs=False, rtol=1e-6, note="TorchScript")
    assert all(layer.reached.all() for layer in record)
    names = ["(model)"] if "whole" in name else ["0", "1", "2", "3"]
    assert [layer.name or "(model)" for layer in record] == names
    assert all(p.reached.all() for p in record.parameters)


# ------------------------------------------------------------------------------------- data parallelism


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_distributed_data_parallel(options: dict[str, Any]) -> None:
    def make() -> nn.Module:
        return nn.parallel.DistributedDataParallel(MODELS["cnn"].build(), **options)

    case = Case(make, MODELS["cnn"].draw, squares)
    record = check(case, outputs=False, note="of this process")
    assert record.parameters[0].name == "module.0.weight"


@pytest.mark.usefixtures("group")
def test_a_distributed_model_trains_on_after_it_was_analysed() -> None:
    model = nn.parallel.DistributedDataParallel(MODELS["cnn"].build())
    twin, batch = MODELS["cnn"].build(), MODELS["cnn"].batch()
    for turn in range(3):
        if turn:
            gf.analyze(model, [batch] * 2, squares)
        for m in (model, twin):
            m.zero_grad()
            torch.manual_seed(turn)
            squares(m(batch)).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    assert model.require_backward_grad_sync
    assert model.require_forward_param_sync


@pytest.mark.usefixtures("group")
def test_a_distributed_model_exchanges_nothing_with_other_processes() -> None:
    model, seen = nn.parallel.DistributedDataParallel(nn.BatchNorm1d(6)), []

    def see(*_: Any) -> None:
        seen.append((model.require_backward_grad_sync, model.require_forward_param_sync))

    model.module.register_forward_pre_hook(see)
    gf.analyze(model, [vectors()] * 3, squares)
    assert set(seen) == {(False, False)}


def test_data_parallel_without_devices() -> None:
    check(Case(lambda: nn.DataParallel(MODELS["cnn"].build()), MODELS["cnn"].draw, squares), outputs=False)
