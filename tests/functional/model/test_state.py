"""Parameters and buffers as values: working copies, the swap, and the pure call."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from gradflow.errors import ModelInputError
from gradflow.functional import analyze, call
from gradflow.functional.model.state import Swap, copy_buffers, copy_parameters

X = torch.randn(6, 3)


class Tied(nn.Module):
    """A weight under two names, a buffer under two names, and a parameter that is absent."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.b.weight = self.a.weight
        self.c = nn.Linear(3, 2, bias=False)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.inner = nn.Module()
        self.inner.register_buffer("scale_again", self.scale)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return self.c(self.bn(self.b(self.a(x))) * self.inner.scale_again) + shift


def test_copies_are_leaves_with_the_same_values_each_once() -> None:
    model = Tied()
    model.a.bias.requires_grad_(False)
    model.c.weight.tag = "kept"  # type: ignore[attr-defined]
    copies = copy_parameters(model)
    assert list(copies) == [name for name, _ in model.named_parameters()]
    assert "b.weight" not in copies
    for name, parameter in model.named_parameters():
        copy = copies[name]
        assert torch.equal(copy, parameter)
        assert copy.data_ptr() != parameter.data_ptr()
        assert copy.is_leaf
        assert copy.requires_grad == parameter.requires_grad
        assert copy.grad is None
        assert isinstance(copy, nn.Parameter)
    assert copies["c.weight"].tag == "kept"  # type: ignore[attr-defined]
    buffers = copy_buffers(model)
    assert list(buffers) == [name for name, _ in model.named_buffers()]
    assert "inner.scale_again" not in buffers
    assert buffers["scale"].data_ptr() != model.scale.data_ptr()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.LazyLinear(3)),
            r"'0.weight' belongs to a lazy module that has not seen a batch yet",
        ),
        (nn.Linear(2, 2, device="meta"), r"'weight' is on the meta device and has no values\. Materialise"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_parameters_without_values(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelInputError, match=message):
        copy_parameters(model)
    with pytest.raises(ModelInputError, match=message):
        analyze(model, [X], lambda y: y.mean())


def test_buffers_without_values() -> None:
    bn = nn.BatchNorm1d(3)
    bn.running_mean = torch.empty(3, device="meta")
    with pytest.raises(ModelInputError, match=r"'running_mean' is on the meta device"):
        copy_buffers(bn)


def test_the_swap_fills_every_name_and_puts_the_very_objects_back() -> None:
    model = Tied()
    before = {n: (p, id(p)) for n, p in model.named_parameters(remove_duplicate=False)}
    new = {name: torch.zeros_like(p) for name, p in copy_parameters(model).items()}
    buffer = torch.ones(3)
    swap = Swap(model)
    with swap({**new, "scale": buffer}):
        assert model.a.weight is model.b.weight is new["a.weight"]
        assert model.scale is model.inner.scale_again is buffer
        assert swap.current({"scale": buffer, "a.weight": buffer}) == {
            "scale": buffer,
            "a.weight": new["a.weight"],
        }
        model.scale = torch.full((3,), 5.0)  # a model that rebinds its buffer
        assert swap.current({"scale": buffer})["scale"] is model.scale
    after = {n: (p, id(p)) for n, p in model.named_parameters(remove_duplicate=False)}
    assert [v[1] for v in after.values()] == [v[1] for v in before.values()]
    assert model.scale is model.inner.scale_again
    assert torch.equal(model.scale, torch.full((3,), 2.0))


def test_names_that_the_swap_is_not_given_stay() -> None:
    model = Tied()
    bias = torch.zeros(3)
    with Swap(model)({"a.bias": bias, "unknown": bias}):
        assert model.a.bias is bias
        assert model.b.bias is not bias


def test_the_swap_puts_back_after_an_exception_and_nests() -> None:
    model = nn.Linear(3, 2)
    weight = model.weight
    swap, one, two = Swap(model), torch.ones(2, 3), torch.zeros(2, 3)
    with swap({"weight": one}):
        with swap({"weight": two}):
            assert model.weight is two
        assert model.weight is one

    def failing() -> None:
        with swap({"weight": one}):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert model.weight is weight


def test_a_swap_with_a_prefix_and_known_names() -> None:
    model = Tied()
    known = {id(model.c.weight): "head"}
    new, other = torch.zeros(2, 3), torch.ones(3)
    with Swap(model, "loss.", known)({"head": new, "loss.a.bias": other}):
        assert model.c.weight is new
        assert model.a.bias is other


@pytest.mark.parametrize("train", [True, False])
def test_call_is_functional_call_that_hands_the_buffers_back(train: bool) -> None:
    model = Tied().train(train)
    parameters = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    output, new = call(model, parameters, buffers, (X,), {"shift": 3.0})
    working = {name: b.clone() for name, b in buffers.items()}
    expected = functional_call(model, {**parameters, **working}, (X,), {"shift": 3.0})
    assert torch.equal(output, expected)
    assert new.keys() == buffers.keys()
    for name in buffers:
        assert torch.equal(new[name], working[name])
    assert torch.equal(new["bn.running_mean"], buffers["bn.running_mean"]) != train
    assert int(model.bn.num_batches_tracked) == 0  # type: ignore[arg-type]


def test_call_copies_buffers_that_it_is_not_given() -> None:
    model = Tied()
    output, new = call(model, {}, {"scale": torch.ones(3)}, (X,))
    assert torch.equal(model.bn.running_mean, torch.zeros(3))  # type: ignore[arg-type]
    assert new.keys() == {name for name, _ in model.named_buffers()}
    assert int(new["bn.num_batches_tracked"]) == 1
    torch.testing.assert_close(2 * (output), functional_call(model, {"scale": torch.full((3,), 2.0)}, (X,)))


def test_parameters_of_a_class_of_the_users_keep_their_class() -> None:
    class Marked(nn.Parameter):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Marked(torch.randn(3, 2), requires_grad=True)
            self.frozen = Marked(torch.randn(2), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            assert type(self.weight) is type(self.frozen) is Marked
            return x @ self.weight + self.frozen

    model = Model()
    copies = copy_parameters(model)
    assert [p.requires_grad for p in copies.values()] == [True, False]
    record = analyze(model, [X], lambda y: y.square().mean())
    (gradient,) = torch.autograd.grad(model(X).square().mean(), [model.weight])
    assert record.parameter("weight").grad_norm == pytest.approx(float(gradient.norm()))


def test_call_composes_with_grad_and_vmap() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(3)]
    stacked, _ = stack_module_state(models)  # type: ignore[arg-type]

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return call(models[0], parameters, {}, (X,))[0].square().mean()

    gradients = vmap(grad(loss))(stacked)
    for i, model in enumerate(models):
        plain = torch.autograd.grad(model(X).square().mean(), list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), plain, strict=True):
            torch.testing.assert_close(gradients[name][i], gradient)


def test_errors_name_the_cure() -> None:
    with pytest.raises(ModelInputError, match=re.escape("`model.to_empty(device=...)`")):
        copy_parameters(nn.Linear(1, 1, device="meta"))
