"""The account of reach in runs of every kind: transforms, checkpoints, unknown ends, fused parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.records import ReachAccount, ReachRecord, Reason


def squares(y: Any) -> Tensor:
    return y.square().mean()


def account(
    model: nn.Module, batches: Any, loss: Callable[[Any], Tensor] = squares, **options: Any
) -> ReachAccount:
    options = {"steps": 4} | options
    found = gf.analyze(model, batches, loss, **options).reach
    assert found is not None
    assert found.num_reached + sum(found.totals().values()) == found.num_elements
    return found


def only(found: ReachAccount, parameter: str) -> ReachRecord:
    (part,) = found.of(parameter)
    return part


class Dead(nn.Module):
    """Units 0 and 2 of the first layer never fire."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.kind = nn.Linear(4, 6), nn.Linear(6, 2), kind
        with torch.no_grad():
            self.a.bias[[0, 2]] = -100.0
            self.a.bias[[1, 3, 4, 5]] = 3.0

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind:
            h = checkpoint(self.body, x, use_reentrant=self.kind == "reentrant")
            return self.b(h)  # type: ignore[arg-type]
        return self.b(self.body(x))


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options", [{}, {"transform": "vjp"}, {"detail": "full"}, {"steps": 1}, {"steps": 9}]
)
@pytest.mark.parametrize("kind", ["", "checkpoint"])
def test_units_that_are_off(kind: str, options: dict[str, Any]) -> None:
    if kind and options.get("transform") == "vjp":
        pytest.skip("vjp takes no checkpoints")
    found = account(Dead(kind), lambda: X, **options)
    for name in ("a.weight", "a.bias"):
        part = only(found, name)
        assert (part.reason, part.axis, part.slices) == (Reason.OFF, 0, ((0, 1), (2, 3)))
        assert part.op == "relu"
    part = only(found, "b.weight")
    assert (part.reason, part.axis, part.slices) == (Reason.ZERO_FACTOR, 1, ((0, 1), (2, 3)))
    assert part.num_elements == 4


def test_inside_a_reentrant_checkpoint_nothing_is_explained() -> None:
    x = X.clone().requires_grad_(True)
    found = account(Dead("reentrant"), lambda: x)
    assert set(found.totals()) == {Reason.UNEXPLAINED}
    assert only(found, "a.bias").slices == ((0, 1), (2, 3))


class Counted(Dead):
    """Counts how often it is called."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        return super().forward(x)


CALLS: list[int] = []


def test_a_run_whose_end_nobody_knew_is_looked_at_again() -> None:
    def batches() -> Iterator[Tensor]:
        yield from [X] * 3

    CALLS.clear()
    found = account(Counted(), batches(), steps=20)
    assert found.step == 2
    assert only(found, "a.bias").reason is Reason.OFF
    assert len(CALLS) == 4


def test_no_step_is_run_twice_where_the_end_is_known_or_all_is_reached() -> None:
    CALLS.clear()
    account(Counted(), [X] * 3)
    assert len(CALLS) == 3
    alive = Counted()
    nn.init.constant_(alive.a.bias, 5.0)
    assert account(alive, iter([X] * 3), steps=20).step == -1
    assert len(CALLS) == 6


def test_gates_and_blocks_are_told_by_name() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    one_step = torch.randn(8, 1, 3)
    found = account(Gates(), lambda: one_step)  # the state before the first step is zero
    assert only(found, "rnn.weight_hh_l0").reason is Reason.ZERO_FACTOR
    forget = only(found, "rnn.weight_ih_l0")
    assert forget.block == "forget gate block"
    assert forget.reason is Reason.ZERO_FACTOR


def test_one_reason_for_all_where_the_loss_is_empty() -> None:
    found = account(Dead(), lambda: X, lambda y: (y * (y > 1e9)).sum())
    assert found.num_reached == 0
    assert set(found.totals()) == {Reason.NO_LOSS}


def test_rounding_noise_is_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
    found = account(model, lambda: X, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert only(found, "0.bias").reason is Reason.BY_MATHEMATICS
    assert found.num_elements - found.num_reached == 6


def test_parameters_of_a_loss_are_in_the_account() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

        def forward(self, y: Tensor) -> Tensor:
            return (y * self.used).square().mean()

    found = account(nn.Linear(4, 2), lambda: X, Weighted())
    assert found.num_elements == 15
    assert only(found, "loss_fn.unused").reason is Reason.CUT


def test_a_backward_that_cannot_be_called_again_leaves_the_run_whole() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            ctx.kept = [x]
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * (ctx.kept.pop() > 0)

    class Net(Dead):
        def body(self, x: Tensor) -> Tensor:
            return Once.apply(self.a(x))  # type: ignore[return-value]

    record = gf.analyze(Net(), lambda: X, squares, steps=4)
    assert record.reach is not None
    assert set(record.reach.totals()) == {Reason.UNEXPLAINED}
    assert any("could not be found" in note and "pop" in note for note in record.provenance.notes)


def test_a_sum_of_reasons_in_words() -> None:
    part = only(account(Dead(), lambda: X), "a.weight")
    assert part.part == "rows 0, 2 of 6"
    assert part.share == pytest.approx(1 / 3)
