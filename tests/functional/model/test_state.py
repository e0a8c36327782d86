"""Parameters and buffers as values: working copies, the swap, and the pure call."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.multiprocessing.reductions import StorageWeakRef

from gradflow.errors import ModelInputError
from gradflow.functional import analyze, call
from gradflow.functional.model import state
from gradflow.functional.model.state import LazyCopies, Swap, copy_buffers, copy_parameters
from gradflow.functional.torch_private import transform_level
from tests.functional.snapshots import difference, snapshot

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


# ------------------------------------------------------- copies that are made when they are written to


def is_shared(tensor: Tensor) -> bool:
    return torch._C._is_cow_tensor(tensor)  # type: ignore[attr-defined]


seen: list[tuple[bool, bool]] = []  # no attribute of a model: those are put back


class Writer(nn.Module):
    """Notes whether its weights share memory in the forward pass; may write to one, and keep one."""

    def __init__(self, *, writes: bool = False, keeps: list[Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.b, self.writes = nn.Linear(3, 3), nn.Linear(3, 1), writes
        self.kept = (keeps,)

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            with torch.no_grad():
                self.a.weight.mul_(0.5)
        y = self.b(self.a(x))
        if transform_level() == 0:  # a transform's own wrappers have no memory to ask about
            seen.append((is_shared(self.a.weight), is_shared(self.b.weight)))
        if self.kept[0] is not None:
            self.kept[0].append(self.a.weight.detach()[1:])
        return y


def state_of(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {
        name: (p.detach().numpy().ctypes.data, p.detach().clone()) for name, p in model.named_parameters()
    }


def assert_as_before(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, p in model.named_parameters():
        assert not is_shared(p), name
        address, values = before[name]
        assert p.data_ptr() == address, name
        assert torch.equal(p, values), name


@pytest.mark.parametrize("detail", ["cheap", "full"])
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_weights_that_are_only_read_are_not_copied(detail: str, transform: str) -> None:
    seen.clear()
    model = Writer()
    before = state_of(model)
    analyze(model, [X] * 3, lambda y: y.square().mean(), steps=3, detail=detail, transform=transform)
    assert_as_before(model, before)
    assert seen == [(True, True)] * len(seen) != []  # the first step is plain under `vjp` too


def test_weights_that_are_written_to_are_copied_then() -> None:
    seen.clear()
    model = Writer(writes=True)
    before = state_of(model)
    record = analyze(model, [X] * 3, lambda y: y.square().mean(), steps=3)
    assert_as_before(model, before)
    assert seen == [(False, True)] * len(seen) != []
    assert record.losses[0] > record.losses[-1]  # the copy that was written to was used


@pytest.mark.parametrize("raises", [False, True])
def test_a_copy_that_is_kept_has_its_own_memory_and_the_weights_keep_theirs(raises: bool) -> None:
    kept: list[Tensor] = []
    model = Writer(keeps=kept)
    before = state_of(model)
    alias = model.a.weight.detach().numpy()

    def loss(y: Tensor) -> Tensor:
        if raises:
            raise ValueError("no loss")
        return y.square().mean()

    with pytest.raises(ValueError, match="no loss") if raises else contextlib.nullcontext():
        analyze(model, [X] * 2, loss, steps=2)
    assert_as_before(model, before)
    assert all(torch.equal(rows, model.a.weight[1:]) for rows in kept)
    with torch.no_grad():
        model.a.weight.zero_()
    assert not alias.any()  # numpy's view of the weight is one still
    assert all(rows.abs().sum() > 0 for rows in kept)


def test_memory_that_cannot_be_shared_is_copied() -> None:
    array = np.ones((2, 3), dtype=np.float32)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight = nn.Parameter(torch.from_numpy(array))
    flat = torch.randn(20)
    model[1].weight = nn.Parameter(flat[:4].view(2, 2))
    model[2].weight.data.share_memory_()
    lazy = LazyCopies()
    copies = copy_parameters(model, lazy)
    assert {name for name, copy in copies.items() if is_shared(copy)} == {"0.bias", "1.bias", "2.bias"}
    copies.clear()
    lazy.__exit__()
    before = state_of(model)
    analyze(model, [X] * 2, lambda y: y.square().mean(), steps=2)
    assert_as_before(model, before)
    array[:] = 2.0
    assert model[0].weight.sum() == 12
    assert model[2].weight.is_shared()
    assert model[1].weight.untyped_storage().data_ptr() == flat.data_ptr()


def test_where_torch_cannot_share_memory_copies_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_can_be_shared", lambda tensor: False)  # as in versions without `_lazy_clone`
    seen.clear()
    model = Writer()
    before = state_of(model)
    analyze(model, [X] * 2, lambda y: y.square().mean(), steps=2)
    assert_as_before(model, before)
    assert seen == [(False, False)] * len(seen) != []


def test_what_the_plain_step_frees_is_freed() -> None:
    """A linear layer's output behind a batch of sequences is a view; a rectifier does not save its input."""
    freed: list[bool] = []

    class Feedforward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            memory = StorageWeakRef(h.untyped_storage())
            h = h.relu()
            freed.append(memory.expired())
            return self.b(h)

    model = Feedforward()
    model(torch.randn(2, 5, 3))
    assert freed == [True]
    analyze(model, [torch.randn(2, 5, 3)] * 4, lambda y: y.square().mean(), steps=4)
    assert len(freed) > 4
    assert all(freed[2:])  # all but the first step, which looks at the structure


# ------------------------------------------------- state by parameter, memory in common, frozen whole numbers


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
