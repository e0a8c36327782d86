"""Models that are wired in unusual ways: tied, called again, kept in plain lists, frozen, cut or grown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import NoTrainableParametersError
from tests.hostile.harness import check
from tests.models import CASES as MODELS
from tests.models import Case, squares


def vectors() -> Tensor:
    return torch.randn(5, 4)


def tokens() -> Tensor:
    return torch.randint(0, 11, (3, 5))


class TiedTwice(nn.Module):
    """Embedding and head share a weight, as do two inner layers and their batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.body.weight
        self.norm = nn.LayerNorm(6)
        self.same_norm = self.norm
        self.bias = nn.Parameter(torch.zeros(11))

    def forward(self, t: Tensor) -> Tensor:
        h = self.same_norm(torch.tanh(self.body(self.embedding(t))))
        h = self.norm(self.again(h) + h)
        return F.linear(h, self.embedding.weight, self.bias)


class TiedByFunction(nn.Module):
    """The decoder is the encoder's weight transposed, and a part of it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x)) @ self.encoder.weight * self.encoder.weight[0].exp()


class Repeated(nn.Module):
    """One layer at many depths, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.act = nn.Linear(4, 4), nn.ELU()
        self.chain = nn.Sequential(self.cell, self.act, self.cell)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x + 0.3 * self.act(self.cell(x))
        return self.chain(x)


class LengthOfData(nn.Module):
    """Runs its cell until the data say stop, and its branch as they say."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        while x.norm() < 30:
            x = 1.5 * x + torch.tanh(self.cell(x))
        return self.left(x) if x.sum() > 0 else self.right(x)


class Node(nn.Module):
    """A recursive tree, one module for all depths."""

    def __init__(self) -> None:
        super().__init__()
        self.join, self.leaf = nn.Linear(8, 4), nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return self.leaf(x)
        half = x.shape[1] // 2
        return torch.tanh(self.join(torch.cat([self(x[:, :half]), self(x[:, half:])], 1)))


class InPlainList(nn.Module):
    """Keeps its layers where PyTorch does not look, and calls them from a function."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.hidden = nn.Linear(4, 4), [nn.Linear(4, 4), nn.Linear(4, 4)]
        self.by_name = {"out": self.known}

    def forward(self, x: Tensor) -> Tensor:
        return run_all(self.hidden, self.by_name["out"](x))


def run_all(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = torch.tanh(layer(x))
    return x


class RegisteredInPlainList(nn.Module):
    """Registers its layers, and calls them through a plain list of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.steps = [self.layers[0], torch.tanh, self.layers[1], lambda x: F.gelu(self.layers[2](x))]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class OwnParameters(nn.Module):
    """Parameters of the model itself, in lists and dicts, beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)
        self.scales = nn.ParameterList([torch.ones(4), torch.randn(4)])
        self.by_name = nn.ParameterDict({"shift": torch.randn(4)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x + self.token) * self.scales[0]
        return h * self.scales[1] + self.by_name["shift"]


class HeldParameters(nn.Module):
    """Uses its parameters through a plain list, a tuple and an object that it filled when it was built."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.held = [self.first.weight, self.second.weight]
        self.pair = (self.second.bias, "bias")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.held[0])
        return self.third(self.first(h) @ self.held[1] + self.pair[0])


class ClosedOver(nn.Module):
    """Calls a function that holds a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        scale = self.scale
        self.function = lambda h: torch.sigmoid(h * scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


class ClassLevel(nn.Module):
    """A registry of functions on the class."""

    ops: ClassVar[dict[str, Any]] = {"square": torch.square, "tanh": torch.tanh}

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.ops.values():
            x = op(self.inner(x))
        return x


class SetsRequiresGrad(nn.Module):
    """Freezes and thaws a layer, and asks for gradients of its input, in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        self.b.weight.requires_grad_(False)
        h = self.b(torch.tanh(self.a(x)))
        self.b.weight.requires_grad_(True)
        return h


class SetsGradMode(nn.Module):
    """Runs parts without grad mode, with it again inside, and passes what has a graph through them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.same, self.off = nn.Identity(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            h = self.same(h)  # the very tensor, with its graph
            target = self.b(h)
            with torch.enable_grad():
                h = torch.tanh(self.c(h))
        torch.set_grad_enabled(False)
        offset = h.mean()
        torch.set_grad_enabled(True)
        return self.off(h - target + offset)


class InferenceTarget(nn.Module):
    """A teacher that runs in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            target = self.teacher(x)
        return self.student(x) - target.clone()


class PartlyFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.a.requires_grad_(False)
        self.c.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))


class Adapter(nn.Module):
    """A trained low-rank part beside frozen weights, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x + self.up(self.down(x)))


class Unused(nn.Module):
    """A layer that is never called, and one whose output goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.never, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.spare(x)
        return self.a(x)


def sparse(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 5, sparse=True, **options), nn.Flatten(), nn.Linear(25, 2))


def bag(mode: str) -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(11, 5, sparse=True, mode=mode), nn.Linear(5, 2))


CASES: dict[str, Case] = {
    "tied": MODELS["tied"],
    "tied twice": Case(TiedTwice, tokens, squares),
    "tied by a function": Case(TiedByFunction, vectors, squares),
    "called many times": Case(Repeated, vectors, squares),
    "a loop as long as the data say": Case(LengthOfData, vectors, squares),
    "a loop as long as a batch says": MODELS["loop"],
    "a recursion": Case(Node, lambda: torch.randn(3, 8), squares),
    "layers in a list of functions": Case(RegisteredInPlainList, vectors, squares),
    "parameters of the model itself": Case(OwnParameters, vectors, squares),
    "functions on the class": Case(ClassLevel, vectors, squares),
    "sets requires_grad": Case(SetsRequiresGrad, vectors, squares),
    "sets the grad mode": Case(SetsGradMode, vectors, squares),
    "inference mode inside": Case(InferenceTarget, vectors, squares),
    "partly frozen": Case(PartlyFrozen, vectors, squares),
    "an adapter on frozen layers": Case(Adapter, vectors, squares),
    "unused layers": Case(Unused, vectors, squares),
    "sparse embedding": Case(sparse, tokens, squares),
    "sparse embedding with padding": Case(lambda: sparse(padding_idx=0), tokens, squares),
    "sparse embedding bag, sum": Case(lambda: bag("sum"), tokens, squares),
    "sparse embedding bag, mean": Case(lambda: bag("mean"), tokens, squares),
}
NO_VJP = {
    "sets requires_grad": "requires_grad",
    "inference mode inside": "inference tensor",
}


@pytest.mark.parametrize("name", CASES)
def test_wiring(name: str) -> None:
    check(CASES[name], vjp=NO_VJP.get(name, "agrees"))


@pytest.mark.parametrize(("transform", "detail"), [("fused", "cheap"), ("fused", "full"), ("vjp", "cheap")])
def test_what_is_not_reached_in_a_step_is_told_from_what_is_zero(transform: Any, detail: Any) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor, side: Tensor, scale: Tensor) -> Tensor:
            return (self.left if side else self.right)(self.a(x)) * scale

    sides, scales = (True, False, True, False, True, False), (1.0, 0.0, 1.0, 1.0, 0.0, 1.0)
    batches = [(vectors(), torch.tensor(a), torch.tensor(b)) for a, b in zip(sides, scales, strict=True)]
    record = gf.analyze(Branches(), batches, squares, transform=transform, detail=detail)
    for name, taken in (("left", sides), ("right", [not side for side in sides])):
        weight = record.parameter(f"{name}.weight")
        assert weight.reached.tolist() == list(taken)
        assert np.isnan(weight.grad_norm).tolist() == [not side for side in taken]
        zero = [side and scale == 0 for side, scale in zip(taken, scales, strict=True)]
        assert (weight.grad_norm == 0).tolist() == zero


@pytest.mark.parametrize("make", [HeldParameters, ClosedOver])
def test_parameters_used_past_their_modules(make: Any) -> None:
    check(Case(make, vectors, squares), rtol=1e-6, vjp="beforehand")


def test_layers_that_pytorch_does_not_know_of_are_run_and_not_measured() -> None:
    """Their parameters are no parameters of the model: no optimizer would step them either."""
    record = check(Case(InPlainList, vectors, squares))
    assert [layer.name for layer in record] == ["known"]


def test_layers_that_pytorch_does_not_know_of_keep_their_gradients() -> None:
    model = InPlainList()
    kept = model.hidden[0].weight.grad = torch.ones(4, 4)
    gf.analyze(model, [vectors()], squares)
    assert model.hidden[0].weight.grad is kept
    assert torch.equal(kept, torch.ones(4, 4))
    assert model.hidden[1].weight.grad is None


@pytest.mark.parametrize("model", [nn.Linear(4, 2).requires_grad_(False), nn.Sequential(nn.ReLU())])
def test_none_trainable(model: nn.Module) -> None:
    with pytest.raises(NoTrainableParametersError, match=r"requires a gradient.*requires_grad_\(True\)"):
        gf.analyze(model, [vectors()], squares)


def test_a_frozen_layer_is_not_judged_for_its_missing_gradient() -> None:
    report = gf.diagnose(CASES["an adapter on frozen layers"].build(), vectors, squares, steps=3)
    frozen = [p for p in report.record.parameters if not p.trainable]
    assert [p.name for p in frozen] == ["base.0.weight", "base.0.bias", "base.2.weight", "base.2.bias"]
    assert not any(issue.layer == "base.0" and issue.issue_type.value == "DEAD" for issue in report.issues)
    assert all(not np.any(p.reached) for p in frozen)
