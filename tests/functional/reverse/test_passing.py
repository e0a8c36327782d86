"""Gradients that are let go as they arrive tell the same as those that are kept, and take no memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional.reverse import passing as passing_module
from gradflow.functional.reverse.passing import Passed, passing, size_of, zeros_in
from gradflow.functional.run import step as step_module


class Odd(nn.Module):
    """Tied weights, a sparse embedding, units that are off, and a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6, sparse=True)
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outer.weight = self.inner.weight
        self.idle = nn.Parameter(torch.ones(2))
        with torch.no_grad():
            self.inner.bias[:2] = -50.0

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(self.words(x)).relu()).mean(1)


def record_of(model: nn.Module, batch: object, loss_fn: object, **options: object) -> gf.FlowRecord:
    return gf.analyze(model, [batch], loss_fn, steps=1, **options)  # type: ignore[arg-type]


def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have gradients kept, as in runs of several steps."""
    monkeypatch.setattr(
        step_module, "passing", lambda *_, **__: contextlib.nullcontext(lambda name, found: found)
    )


CASES = {
    "odd": (Odd, torch.arange(10).reshape(2, 5), lambda y: y.square().mean()),
    "tiny gradients": (lambda: nn.Linear(4, 3), torch.ones(5, 4), lambda y: 1e-28 * y.sum()),
    "half precision": (lambda: nn.Linear(4, 3).bfloat16(), torch.ones(5, 4).bfloat16(), lambda y: y.mean()),
    "NaN": (lambda: nn.Linear(4, 3), torch.ones(5, 4), lambda y: (y - y).sqrt().sum()),
}


@pytest.mark.parametrize("case", CASES)
def test_records_are_the_same_as_with_gradients_that_are_kept(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, batch, loss_fn = CASES[case]
    torch.manual_seed(0)
    model = make()
    found = record_of(model, batch, loss_fn)
    kept(monkeypatch)
    assert found.to_json() == record_of(model, batch, loss_fn).to_json()


def test_hooks_of_the_user_come_first() -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.register_hook(lambda g: 10 * g)
    found = record_of(model, torch.ones(1, 3), lambda y: y.sum())
    assert float(found.parameters[0].grad_norm[0]) == pytest.approx(10 * np.sqrt(3))


def test_no_gradient_stands_while_the_next_ones_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten layers, never two gradients at once; without it, all of them."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(10)))
    standing: list[torch.multiprocessing.reductions.StorageWeakRef] = []
    most = 0
    read = Passed.of.__func__

    def counted(cls: type[Passed], gradient: Tensor, *, closely: bool) -> Passed:
        nonlocal most
        standing.append(torch.multiprocessing.reductions.StorageWeakRef(gradient.untyped_storage()))
        most = max(most, sum(not storage.expired() for storage in standing))
        return read(cls, gradient, closely=closely)

    monkeypatch.setattr(passing_module.Passed, "of", classmethod(counted))
    record_of(model, torch.randn(2, 64), lambda y: y.square().mean())
    assert len(standing) == 10
    assert most == 1


def test_what_is_read_equals_a_plain_count() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(7, 5) * (torch.rand(7, 5) > 0.4)
    closely, plainly = (Passed.of(gradient, closely=way) for way in (True, False))
    assert float(size_of(closely, exact=True)) == pytest.approx(float(gradient.double().norm()), rel=1e-14)
    assert float(size_of(plainly, exact=False)) == pytest.approx(float(gradient.square().sum()), rel=1e-6)
    number = sum(value == 0 for value in gradient.flatten().tolist())
    assert int(zeros_in(closely)) == int(zeros_in(plainly)) == number
    assert closely.mask is not None
    assert torch.equal(closely.mask, gradient != 0)
    assert plainly.mask is None
    small = Passed.of(1e-30 * gradient, closely=False)  # whose squares underflow
    wanted = 1e-30 * float(gradient.double().norm())
    assert float(size_of(small, exact=True)) == pytest.approx(wanted, rel=1e-5)


def test_no_hook_is_left() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ZeroDivisionError), passing({"x": x}, closely=True):
        raise ZeroDivisionError
    (gradient,) = torch.autograd.grad((2 * x).sum(), x)
    assert gradient.tolist() == [2.0, 2.0, 2.0]
