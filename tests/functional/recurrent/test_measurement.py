"""`recurrence()`: what a run records of recurrent layers, call by call, and what it leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.functional import recurrence
from gradflow.functional.measurement import Session
from gradflow.functional.recurrent import measurement as recurrent
from gradflow.functional.recurrent.measurement import RecurrenceSession
from gradflow.functional.recurrent.numbers import Budget, profile_error, standard_error
from gradflow.functional.reverse.flushing import flushes, flushing
from gradflow.records import FlowRecord, RecurrentLevelRecord
from tests.functional.recurrent.models import Loop, inputs, last_step, layer, looped, measured, only, weighed
from tests.functional.snapshots import difference, snapshot


def test_every_call_of_a_layer_is_a_record_and_every_look_a_row() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer("gru")

        def forward(self, x: Tensor) -> Tensor:
            return (self.rnn(x)[0][-1] - self.rnn(x.flip(0))[0][-1]).square().sum()

    batches = [inputs(n, seed=n) for n in (5, 7, 6, 6, 4)]
    record = measured(Siamese(), batches, lambda y: y, steps=5)
    assert [r.name for r in record.recurrences] == ["rnn", "rnn@1"]
    first = record.recurrences[0]
    assert first.measured_steps.tolist() == [0, 4]  # both ends of the run
    assert FlowRecord.from_json(record.to_json()) == record
    exact = measured(Siamese(), batches, lambda y: y, steps=5, measurement=recurrence(exact=True))
    every = exact.recurrences[0]
    assert every.measured_steps.tolist() == [0, 1, 4]
    assert every.num_steps.tolist() == [5, 7, 4]
    profile = every.levels[0].gradient_profile
    assert profile.shape == (3, 7)
    assert np.isnan(profile).sum(1).tolist() == [2, 0, 3]
    assert np.isfinite(profile[:, -1]).all()  # they end together
    assert np.isnan(every.levels[0].hidden_rms)[:, -1].tolist() == [True, False, True]  # they begin together
    np.testing.assert_allclose(first.levels[0].gradient_profile[:, -4:], profile[[0, 2], -4:])


def test_hidden_states_and_gates() -> None:
    module = layer("lstm")
    record = only(measured(module, [inputs()], weighed))
    level = record.levels[0]
    _, (_, _), every = looped(module, inputs())
    expected = [float(h.detach().square().mean().sqrt()) for h in every[0]]
    np.testing.assert_allclose(level.hidden_rms[0], expected, rtol=1e-9)
    assert level.cell_rms.shape == (1, 6)
    assert [gate.name for gate in level.gates] == ["input", "forget", "candidate", "output"]
    forget = level.gate("forget")
    assert forget is not None
    assert 0.3 < forget.mean[0] < 0.7
    assert level.gate("reset") is None
    bare = only(measured(module, [inputs()], weighed, measurement=recurrence(states=False))).levels[0]
    assert bare.hidden_rms.size == bare.cell_rms.size == 0
    assert attrs.evolve(bare, hidden_rms=level.hidden_rms, cell_rms=level.cell_rms) == level


def test_gates_that_are_saturated_and_those_that_do_nothing() -> None:
    module = layer("lstm")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0.copy_(torch.tensor([-20.0, 7.0, 5.0, 0.0]).repeat_interleave(4))
    level = only(measured(module, [inputs()], lambda r: r[0].sum())).levels[0]
    seen = {g.name: (g.mean[0], g.saturated_share[0], g.idle_share[0]) for g in level.gates}
    assert seen["input"] == pytest.approx((0.0, 1.0, 1.0), abs=1e-6)
    assert seen["forget"][1:] == (1.0, 1.0)  # 1 − σ(7) = 0.0009 is less than a tenth of a step in six
    assert seen["candidate"][1] == 1.0
    assert math.isnan(seen["candidate"][2])
    assert seen["output"] == pytest.approx((0.5, 0.0, 0.0))
    long = only(measured(module, [inputs(200)], lambda r: r[0].sum())).levels[0]
    forget = long.gate("forget")
    assert forget is not None
    assert (forget.saturated_share[0], forget.idle_share[0]) == (1.0, 0.0)  # in 200 steps it does something


def test_what_gets_no_gradient_is_not_measured() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = layer("gru"), nn.Linear(4, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0].detach())

    assert measured(Frozen(), [inputs()], lambda y: y.sum()).recurrences == ()
    assert measured(nn.Linear(3, 1).double(), [inputs()], lambda y: y.sum()).recurrences == ()


def test_a_gradient_of_zero() -> None:
    record = only(measured(layer("gru"), [inputs()], lambda r: 0.0 * r[0].sum()))
    assert not record.levels[0].gradient_profile.any()
    assert math.isnan(record.heard_share[0])
    assert record.read_share[0] == 0.0


class Own(nn.GRU):
    """A GRU by its class, with a forward of its own."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        output, last = super().forward(input, hx)
        return output.cumsum(0), last


class Bare(nn.GRU):
    """Another one, which returns something else."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input, hx)[0]


@pytest.mark.parametrize("kind", [Own, Bare])
def test_what_computes_something_else_is_told_and_left_out(kind: type[nn.GRU]) -> None:
    module = kind(3, 4).double()
    record = measured(module, [inputs()], lambda r: (r[0] if isinstance(r, tuple) else r).sum())
    assert record.recurrences == ()
    assert "is a recurrent layer by its class, but does not compute" in record.provenance.notes[-1]


def test_states_that_could_not_be_computed_again_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not measured(layer("tanh"), [inputs()], weighed).provenance.notes
    monkeypatch.setattr(recurrent, "_INEXACT", -1.0)
    record = measured(layer("tanh"), [inputs()], weighed)
    assert "only to a relative error of more than a percent" in record.provenance.notes[-1]
    assert record.recurrences


@attrs.frozen
class Budgeted:
    """`recurrence()` with a budget of its own."""

    budget: Budget

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        return RecurrenceSession(modules, self.budget)


def test_of_a_batch_too_large_some_samples_stand_for_all() -> None:
    module, x = layer("lstm", num_layers=2, dropout=0.5), inputs(6, 1).expand(6, 64, 3).contiguous()
    whole = measured(module, [x], weighed, mode="eval")
    few = Budgeted(Budget(numbers=6 * 32 * 16))
    some = measured(module, [x], weighed, mode="eval", measurement=few)
    assert "was measured on 16 of 64 samples" in some.provenance.notes[-1]
    a, b = only(whole).levels[0].gradient_profile, only(some).levels[0].gradient_profile
    np.testing.assert_allclose(a, b, rtol=0.5)  # of the same order: the weights of the loss differ
    alike = [
        only(measured(module, [x], lambda r: r[0].sum(), mode="eval", measurement=m))
        .levels[0]
        .gradient_profile
        for m in (few, recurrence(), Budgeted(Budget(samples=5)))
    ]
    np.testing.assert_allclose(alike[0], alike[1])
    np.testing.assert_allclose(alike[2], alike[1])
    dropped = only(measured(module, [x], weighed, measurement=few))
    assert dropped.state_error[0] < 1e-12  # masks are drawn for all, then chosen


def test_how_far_off_sampled_numbers_are() -> None:
    """Over draws of the measured samples, the deviations are as large as the errors that are told."""
    module, x = layer("lstm"), inputs(6, 64)
    whole = only(measured(module, [x], last_step)).levels[0]
    assert whole.profile_error.tolist() == [0.0]
    far, told, radii, exponents = [], [], [], []
    for seed in range(12):
        drawn = x[:, torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
        few = Budgeted(Budget(samples=12))
        level = only(measured(module, [drawn], last_step, measurement=few)).levels[0]
        ratio = level.gradient_profile[0] / whole.gradient_profile[0] - 1.0
        far.append(np.abs(ratio).max())
        told.append(float(level.profile_error[0]))
        radii.append((level.spectral_radius[0], level.spectral_error[0]))
        exponents.append((level.lyapunov[0], level.lyapunov_error[0]))
    assert 0.5 < np.mean(far) / np.mean(told) < 1.5
    for found in (radii, exponents):
        means, errors = np.array(found).T
        assert 0.4 < means.std() / errors.mean() < 1.6


def test_errors_in_closed_form() -> None:
    norms = np.array([[1.0, 3.0], [0.0, 0.0]])
    squares = np.array([1.0, 9.0])
    of_mean = squares.std(ddof=1) / math.sqrt(2) / squares.mean()
    assert profile_error(norms, np.array([0, 0]), 8) == pytest.approx(of_mean / 2 * math.sqrt(1 - 2 / 8))
    assert profile_error(norms, np.array([0, 0]), 2) == 0.0
    assert math.isnan(profile_error(norms[:, :1], np.array([0]), 8))
    assert profile_error(norms, np.array([-1, -1]), 8) == 0.0
    values = torch.tensor([1.0, 2.0, 4.0, math.nan, math.inf])
    assert standard_error(values) == pytest.approx(np.std([1.0, 2.0, 4.0], ddof=1) / math.sqrt(3))
    assert math.isnan(standard_error(values[:1]))


def test_what_a_look_costs() -> None:
    """One level, read at the last step: forward, one way back, four Jacobians whole, and four tangents."""
    record = only(measured(layer("gru"), [inputs(20)], last_step))
    ih, hh, rows = 12 * 3, 12 * 4, 20 * 4
    products = rows * (ih + hh) + rows * hh + 8 * 4 * hh + 20 * 4 * hh
    assert record.cost[0] == pytest.approx(products / (3 * rows * (ih + hh)))
    assert record.num_samples.tolist() == [4]
    loop = only(measured(Loop(layer("gru")), [inputs(20)], last_step))
    assert loop.cost[0] == pytest.approx(record.cost[0] + rows * hh / (3 * rows * (ih + hh)))


@pytest.mark.parametrize("loop", [False, True])
def test_the_share_of_subnormal_steps(loop: bool) -> None:
    module = layer("relu", torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_hh_l0.copy_(1e-4 * torch.eye(4))
        module.bias_ih_l0.fill_(1.0)
    model = Loop(module) if loop else module
    record = only(measured(model, [inputs(12, dtype=torch.float32)], lambda r: r[0][-1].sum()))
    assert record.subnormal_share[0] == pytest.approx(2 / 12)  # 1e-40 and 1e-44
    with flushing():
        record = only(measured(model, [inputs(12, dtype=torch.float32)], lambda r: r[0][-1].sum()))
        assert flushes()
    assert record.subnormal_share[0] == 0.0
    assert not flushes()


def test_long_sequences_carry_a_tangent_for_some_steps() -> None:
    packed = pack_sequence([inputs(9, 1)[:, 0], inputs(3, 1)[:, 0]])
    module = layer("tanh", bidirectional=True)
    few = Budgeted(Budget(steps=4))
    record = only(measured(module, lambda: (packed,), lambda r: r[0].data.sum(), measurement=few))
    assert all(np.isfinite(level.lyapunov).all() for level in record.levels)


def test_inside_a_reentrant_checkpoint_nothing_is_measured() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer("gru")

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: self.rnn(x)[0], x.clone().requires_grad_(), use_reentrant=True)

    assert measured(Checkpointed(), [inputs()], lambda y: y.sum()).recurrences == ()


def test_under_vjp_the_first_step_is_measured() -> None:
    record = only(measured(layer("gru"), [inputs()] * 3, weighed, steps=3, transform="vjp"))
    assert record.measured_steps.tolist() == [0]


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_nothing_is_changed(name: str) -> None:
    module = layer(name, num_layers=2, dropout=0.4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    before = snapshot(module, optimizer)
    measured(module, [inputs()] * 6, weighed, steps=6, optimizer=optimizer)
    assert difference(before, snapshot(module, optimizer)) == ""
    loop = Loop(layer(name))
    before = snapshot(loop)
    measured(loop, [inputs()] * 2, last_step, steps=2)
    assert difference(before, snapshot(loop)) == ""


def test_nothing_is_changed_where_the_loss_raises() -> None:
    module = layer("lstm", num_layers=2, dropout=0.4)
    before = snapshot(module)
    calls: list[int] = []

    def loss(result: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")
        return weighed(result)

    with pytest.raises(RuntimeError, match="stop"):
        measured(module, [inputs()] * 3, loss, steps=3)
    assert difference(before, snapshot(module)) == ""


@pytest.mark.parametrize("loop", [False, True])
def test_the_weights_are_those_of_the_step(loop: bool) -> None:
    module = Loop(layer("lstm")) if loop else layer("lstm", num_layers=2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    record = only(measured(module, [inputs()] * 3, last_step, steps=3, optimizer=optimizer))
    assert record.state_error.max() < 1e-12
    radius = record.levels[0].spectral_radius
    assert not np.allclose(radius[0], radius[-1], rtol=1e-3)


def test_the_run_itself_is_as_without() -> None:
    module = layer("lstm", num_layers=2, dropout=0.4)
    with_it = measured(module, [inputs()] * 6, weighed, steps=6)
    plain = gf.analyze(module, [inputs()] * 6, weighed, steps=6, seed=0)
    assert attrs.evolve(with_it, recurrences=()) == plain


def test_levels_are_records_by_name() -> None:
    level = RecurrentLevelRecord(
        level="l0", **dict.fromkeys(
            ("gradient_profile", "state_profile", "readout_profile", "spectral_radius", "spectral_residual",
             "lyapunov", "hidden_rms", "cell_rms"), ()))  # fmt: skip
    assert level.gate("forget") is None
