"""Copies that are made when they are written to: who reads, writes, keeps or frees what memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradflow.functional import analyze
from gradflow.functional.model import state
from gradflow.functional.model.state import LazyCopies, copy_parameters
from gradflow.functional.torch_private import transform_level

X = torch.randn(6, 3)


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
    # All but the first step, which looks at the structure, and the last, which keeps the last layer's rows.
    assert all(freed[2:-1])
