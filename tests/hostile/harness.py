"""One check for every kind of model: against plain `loss.backward()`, to the bit, with nothing left behind.

`check` runs a case the plain way, on a model of its own, and then through every way in: `analyze` in cheap
and in full detail, `diagnose`, and the transform `vjp`. Raw gradients are read by an optimizer that steps
nothing and keeps what it was handed, so that they are those a training step would get.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import GradflowError
from gradflow.records import FlowRecord
from tests.functional.naive import call_model, naive_step
from tests.functional.snapshots import difference, snapshot
from tests.models import Case

STEPS = 3  # that are compared; one more is run, since an optimizer does not step after the last


@dataclass
class Kept:
    """Gradients by step and position; a deep copy of it is itself."""

    steps: list[list[Tensor | None]] = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> Kept:
        return self


class Spy(torch.optim.Optimizer):
    """An optimizer that moves nothing and keeps the gradients it is given."""

    def __init__(self, model: nn.Module, kept: Kept) -> None:
        super().__init__(list(model.parameters()), {"kept": kept})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        found = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]
        self.param_groups[0]["kept"].steps.append(found)


@dataclass
class Plain:
    """Losses and parameter gradients of plain training steps, parameters held where they are."""

    losses: list[float]
    gradients: list[dict[str, Tensor | None]]


def seeded(case: Case) -> Callable[[], Any]:
    """Return a source of the case's batch that seeds torch at every draw."""

    def draw() -> Any:
        batch = case.batch()
        torch.manual_seed(3)
        return batch

    return draw


def plain_steps(case: Case, *, mode: str = "train") -> Plain:
    """Run the case the plain way."""
    model, draw, found = case.build(), seeded(case), Plain([], [])
    if mode != "keep":
        model.train(mode == "train")
    for _ in range(STEPS):
        for p in model.parameters():
            p.grad = None
        loss = case.loss(call_model(model, draw()))
        loss.backward()
        found.losses.append(float(loss.detach()))
        found.gradients.append({name: p.grad for name, p in model.named_parameters()})
    return found


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fail if anything of a model or of the process is not as it was afterwards."""
    before = snapshot(model)
    try:
        yield
    finally:
        assert difference(before, snapshot(model)) == ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; a NaN equals a NaN."""
    if a.layout is not b.layout or a.dtype is not b.dtype or a.shape != b.shape:
        return False
    if a.is_sparse:
        a, b = a.coalesce(), b.coalesce()
        return torch.equal(a.indices(), b.indices()) and same_bits(a.values(), b.values())
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def norm(gradient: Tensor | None) -> float:
    """Return the norm of a gradient in double precision; NaN where there is none."""
    if gradient is None:
        return float("nan")
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return float(dense.to(torch.complex128 if dense.is_complex() else torch.float64).norm())


def assert_gradients(kept: Kept, plain: Plain, *, rtol: float) -> None:
    """Compare raw gradients, to the bit where `rtol` is 0."""
    assert len(kept.steps) == STEPS
    for found, expected in zip(kept.steps, plain.gradients, strict=True):
        for mine, (name, theirs) in zip(found, expected.items(), strict=True):
            assert (mine is None) == (theirs is None), name
            if mine is not None and theirs is not None:
                if rtol:
                    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol, msg=name)
                assert rtol or same_bits(mine, theirs), name


def assert_record(record: FlowRecord, plain: Plain, *, rtol: float) -> None:
    """Compare a record's losses and norms of parameter gradients."""
    np.testing.assert_allclose(record.losses[:STEPS], plain.losses, rtol=rtol)
    for step, expected in enumerate(plain.gradients):
        assert [p.name for p in record.parameters] == list(expected)
        for p in record.parameters:
            theirs = expected[p.name]
            assert p.reached[step] == (theirs is not None), p.name
            if theirs is not None:
                np.testing.assert_allclose(p.grad_norm[step], norm(theirs), rtol=rtol, err_msg=p.name)
            else:
                assert not p.grad_norm[step] > 0, p.name


def assert_outputs(record: FlowRecord, case: Case, *, rtol: float, mode: str) -> None:
    """Compare the output gradients of every layer call with retained ones."""
    model, draw = case.build(), seeded(case)
    if mode != "keep":
        model.train(mode == "train")
    assert len(record) > 0
    for step in range(STEPS):
        naive = naive_step(model, draw(), case.loss)
        for layer in record:
            np.testing.assert_allclose(
                layer.grad_norm[step], naive.output_norm(layer.name), rtol=rtol, err_msg=layer.name
            )


def check(
    case: Case,
    *,
    rtol: float = 0.0,
    outputs: bool = True,
    mode: Any = "train",
    vjp: str = "agrees",
    note: str = "",
    loss_rtol: float = 2e-6,
) -> FlowRecord:
    """Check a case in every way in, and return its record in full detail.

    Args:
        case: model, batch and loss.
        rtol: how far gradients may be from plain ones; 0 for not a bit.
        outputs: compare the output gradients of layers with retained ones too.
        mode: as for `analyze`.
        vjp: `agrees`, `agrees to` a tolerance, or a pattern of what the transform is refused with,
            or `any` where it draws other random numbers.
        note: words that a note of the record must hold.
        loss_rtol: for norms, which are summed in the precision of the run.
    """
    plain = plain_steps(case, mode=mode)
    options: dict[str, Any] = {"mode": mode}
    record: FlowRecord | None = None
    for detail in ("cheap", "full"):
        model, kept = case.build(), Kept()
        with untouched(model):
            record = gf.analyze(
                model, seeded(case), case.loss, steps=STEPS + 1, detail=detail,
                optimizer=Spy(model, kept), **options,
            )  # fmt: skip
        if np.isfinite(plain.losses).all():  # a step is not taken otherwise
            assert_gradients(kept, plain, rtol=rtol)
        assert_record(record, plain, rtol=max(rtol, loss_rtol))
        if outputs:
            assert_outputs(record, case, rtol=max(rtol, 1e-12, loss_rtol), mode=mode)
        if note:
            assert any(note in n for n in record.provenance.notes), record.provenance.notes
    model = case.build()
    with untouched(model):
        report = gf.diagnose(model, seeded(case), case.loss, steps=STEPS, **options)
    assert str(report)
    assert_record(report.record, plain, rtol=max(rtol, loss_rtol))
    if vjp != "any":
        check_vjp(case, plain, vjp, **options)
    assert record is not None
    return record


def check_vjp(case: Case, plain: Plain, expected: str, **options: Any) -> None:
    """Check that the transform `vjp` agrees, or refuses with what was foreseen."""
    model = case.build()

    def run() -> FlowRecord:
        return gf.analyze(model, seeded(case), case.loss, steps=STEPS, transform="vjp", **options)

    with untouched(model):
        if expected.startswith("agrees"):
            rtol = float(expected.rpartition(" ")[2]) if expected != "agrees" else 2e-5
            assert_record(run(), plain, rtol=rtol)
            return
        with pytest.raises((GradflowError, RuntimeError), match=expected) as caught:
            run()
    hints = [n for n in getattr(caught.value, "__notes__", ()) if "transform='fused'" in n]
    assert isinstance(caught.value, GradflowError) or hints
