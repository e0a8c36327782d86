"""Which modules are layers, and which calls of them a run has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn

from gradflow.functional import analyze, layers
from gradflow.functional.model.layers import ancestors, callable_modules, is_layer, owner


class Owning(nn.Module):
    """Owns a parameter and has a child."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fc = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), True),
        (nn.ReLU(), True),
        (nn.Identity(), True),
        (nn.BatchNorm1d(2, affine=False), True),
        (nn.LSTM(2, 2), True),
        (nn.MultiheadAttention(2, 1), True),
        (Owning(), True),
        (nn.Sequential(nn.ReLU()), False),
        (nn.TransformerEncoderLayer(4, 2), False),
        (parametrizations.weight_norm(nn.Linear(2, 2, bias=False)), True),
        (nn.Linear(2, 2).requires_grad_(False), True),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_a_layer_owns_a_parameter_or_has_no_children(module: nn.Module, expected: bool) -> None:
    assert is_layer(module) is expected


def test_layers_by_name_in_the_order_of_registration() -> None:
    model = nn.ModuleDict(
        {
            "b": nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2))]),
            "a": Owning(),
            "p": nn.ParameterList([torch.ones(2)]),
            "w": parametrizations.weight_norm(nn.Linear(2, 2)),
        }
    )
    assert list(layers(model)) == ["b.0", "b.1.0", "b.1.1", "a", "a.fc", "w"]
    assert layers(model)["a.fc"] is model["a"].fc


def test_a_shared_module_has_one_name() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(layers(model)) == ["0", "1"]
    record = analyze(model, [torch.randn(3, 2)], lambda y: y.mean())
    assert [(layer.name, layer.call) for layer in record] == [("0", 0), ("1", 0), ("0@1", 1)]
    assert {p for layer in record for p in layer.parameters} == {"0.weight", "0.bias"}


def test_the_machinery_of_parametrizations_belongs_to_its_module() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(2, 2)))
    names = list(callable_modules(model))
    assert names == ["", "0"]
    record = analyze(model, [torch.randn(3, 2)], lambda y: y.mean())
    assert record["0"].type == "ParametrizedLinear"
    assert set(record["0"].parameters) == {"0.bias", "0.parametrizations.weight.original"}
    assert {p.layer for p in record.parameters} == {"0"}


def test_owners_and_ancestors() -> None:
    modules = callable_modules(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), Owning()))
    assert owner("0.0.weight", modules) == "0.0"
    assert owner("1.scale", modules) == "1"
    assert owner("weight", {"": nn.Linear(1, 1)}) == ""
    assert ancestors("") == []
    assert ancestors("a") == [""]


def test_an_attention_module_is_the_layer_of_its_output_projection() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0])

    record = analyze(Model(), [torch.randn(2, 3, 4)], lambda y: y.square().mean())
    assert [layer.name for layer in record] == ["attention", "out"]
    assert "attention.out_proj.weight" in record["attention"].parameters
    assert record.never_called == ()
    assert record.parameter("attention.out_proj.weight").layer == "attention.out_proj"


def test_a_parent_that_uses_a_childs_parameters_without_calling_it_is_the_layer() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.child.weight + self.child.bias)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.unused = Parent(), nn.Linear(3, 1), Parent()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    for transform in ("fused", "vjp"):
        record = analyze(
            Model(), [torch.randn(5, 3)] * 2, lambda y: y.square().mean(), steps=2, transform=transform
        )
        assert [(layer.name, layer.type) for layer in record] == [("one", "Parent"), ("two", "Linear")]
        assert set(record["one"].parameters) == {"one.child.weight", "one.child.bias"}
        assert record.never_called == ("unused.child",)


def test_a_model_that_is_a_layer_itself_has_the_empty_name() -> None:
    record = analyze(Owning(), [torch.randn(5, 3)], lambda y: y.square().mean())
    assert [(layer.name, layer.composite) for layer in record] == [("", True), ("fc", False)]
    assert record[""].parameters == ("scale",)


def test_what_the_code_that_ran_would_call_is_passed_by_and_what_it_forgets_is_not() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.tower, self.forgotten = (nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.spare = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

        def see(self, image: Tensor) -> Tensor:
            return self.tower(image)

        def helper_of_nobody(self) -> Tensor:
            return self.forgotten(torch.ones(2))

        def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
            if image is not None:
                x = x + self.see(image) + sum(part(x) for part in self.spare)
            return self.experts[0](self.used(x))

    record = analyze(Model(), [torch.ones(3, 2)], lambda y: y.sum())
    assert set(record.never_called) == {"tower.0", "forgotten.0", "experts.1", "spare.0", "spare.1"}
    assert set(record.passed_by) == {"tower.0", "spare.0", "spare.1"}


class Mixing(nn.Module):
    """Has its parameters in a container, and multiplies by each."""

    def __init__(self, make: Callable[[list[nn.Parameter]], nn.Module]) -> None:
        super().__init__()
        self.held = make([nn.Parameter(torch.randn(2, 2)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.held.parameters():
            x = torch.tanh(x @ weight)
        return x


CONTAINERS: dict[str, Callable[[list[nn.Parameter]], nn.Module]] = {
    "list": nn.ParameterList,
    "dict": lambda weights: nn.ParameterDict({f"w{i}": w for i, w in enumerate(weights)}),
    "list of lists": lambda weights: nn.ModuleList(nn.ParameterList([w]) for w in weights),
    "dict of dicts": lambda weights: nn.ModuleDict({"a": nn.ParameterDict({"w": weights[0]}),
                                                    "b": nn.ParameterDict({"w": weights[1]})}),
    "list in a list": lambda weights: nn.ModuleList([nn.ModuleList([nn.ParameterList(weights)])]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_a_module_whose_parameters_are_all_in_containers_is_the_layer(kind: str, detail: Any) -> None:
    torch.manual_seed(0)
    model = Mixing(CONTAINERS[kind])
    x = torch.randn(5, 2)
    assert list(layers(model)) == [""]
    record = analyze(model, [x], lambda y: y.square().mean(), detail=detail)
    gradients = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    found = [p.grad_norm[0] for p in record.parameters]
    np.testing.assert_allclose(found, [float(g.norm()) for g in gradients], rtol=1e-6)
    assert {p.layer for p in record.parameters} == {""}
    whole = nn.Sequential(nn.Linear(2, 2), model, nn.Linear(2, 1))
    names = [layer.name for layer in analyze(whole, [x], lambda y: y.square().mean(), detail=detail)]
    assert names == ["0", "1", "2"]


def test_containers_without_parameters_make_no_layer() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameters_, self.parts = nn.ParameterList(), nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](x)

    assert list(layers(Empty())) == ["parts.0"]
