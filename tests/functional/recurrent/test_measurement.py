"""`recurrence()`: what a run hears of recurrent layers, against loops, plain autograd and other layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.functional import recurrence
from gradflow.functional.recurrent import measurement as recurrent
from gradflow.functional.recurrent import numbers as recurrent_numbers
from gradflow.records import FlowRecord, RecurrenceRecord, RecurrentLevelRecord
from tests.functional.snapshots import difference, snapshot

from .models import layer, looped, weighed

KINDS = ["tanh", "relu", "lstm", "gru"]


def inputs(steps: int = 6, samples: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, samples, 3, generator=generator, dtype=torch.float64).to(dtype)


def measured(model: nn.Module, batches: Any, loss: Callable[..., Tensor], **given: Any) -> FlowRecord:
    listens = given.pop("measurement", recurrence())
    given = {"steps": 1, "seed": 0, **given}
    return gf.analyze(model, batches, loss, measurements=[listens], **given)


def only(record: FlowRecord) -> RecurrenceRecord:
    (found,) = record.recurrences
    return found


def last_step(result: Any) -> Tensor:
    return result[0][-1].square().sum()


class Loop(nn.Module):
    """A loop over a cell with the weights of a one-level layer; returns every h, and the last state."""

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        kinds = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}
        options = {"nonlinearity": "relu"} if module.mode == "RNN_RELU" else {}
        self.cell = kinds.get(module.mode, nn.RNNCell)(module.input_size, module.hidden_size, **options)
        self.cell.to(module.weight_ih_l0.dtype)
        with torch.no_grad():
            for name, parameter in self.cell.named_parameters():
                parameter.copy_(getattr(module, f"{name}_l0"))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state, steps = None, []
        for step in x:
            state = self.cell(step, state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(steps), state


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", KINDS)
def test_profiles_are_those_of_a_loop_over_cells(name: str) -> None:
    """Two levels, both directions, a loss that reads every output and the last states."""
    module = layer(name, num_layers=2, bidirectional=True)
    output, last, every = looped(module, inputs())
    expected = torch.autograd.grad(weighed((output, last)), [h for steps in every for h in steps])
    flat = torch.stack(expected).reshape(4, 6, -1).norm(dim=-1).numpy()
    record = only(measured(module, [inputs()], weighed))
    assert [level.level for level in record.levels] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    for level, norms in zip(record.levels, flat, strict=True):
        read = norms[::-1] if level.level.endswith("reverse") else norms
        np.testing.assert_allclose(level.gradient_profile, read[None], rtol=1e-9)
    assert record.state_error[0] < 1e-12
    assert (record.num_steps[0], record.read_share[0], record.heard_share[0]) == (6, 1.0, 1.0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("read", ["last", "every", "third"])
def test_a_loop_over_a_cell_gives_the_numbers_of_the_layer(name: str, read: str) -> None:
    def loss(result: Any) -> Tensor:
        output = result[0]
        return {"last": output[-1], "every": output, "third": output[2]}[read].square().sum()

    module = layer(name)
    fused = only(measured(module, [inputs()], loss))
    loop = only(measured(Loop(module), [inputs()], loss))
    assert (fused.loop, loop.loop, loop.name, loop.type) == (
        False,
        True,
        "cell",
        f"{type(module).__name__}Cell",
    )
    assert loop.read_share == pytest.approx(fused.read_share)
    assert loop.state_error[0] < 1e-12
    if read == "third":  # the calls behind the third step get no gradient: the sequence ends there
        assert loop.heard_share == pytest.approx(fused.heard_share)
    a, b = fused.levels[0], loop.levels[0]
    for field in ("gradient_profile", "state_profile", "readout_profile", "spectral_radius", "lyapunov"):
        np.testing.assert_allclose(getattr(b, field), getattr(a, field), rtol=1e-9, err_msg=field)
    np.testing.assert_allclose(b.hidden_rms, a.hidden_rms, rtol=1e-9)
    np.testing.assert_allclose(b.cell_rms, a.cell_rms, rtol=1e-9)
    assert [gate.name for gate in a.gates] == [gate.name for gate in b.gates]
    for one, other in zip(a.gates, b.gates, strict=True):
        np.testing.assert_allclose(other.mean, one.mean, rtol=1e-9)


def test_the_state_of_an_lstm_is_h_and_c() -> None:
    """The gradient at s_{t-1} is that at s_t, times the Jacobian of the step, where nothing else is read."""
    module = layer("lstm")
    level = only(measured(module, [inputs(samples=1)], last_step)).levels[0]
    from gradflow.functional import levels_of, state_jacobians, unroll

    (track,) = unroll(levels_of(module), inputs(samples=1)).tracks
    carried = torch.cat([2 * track.after[-1][0], torch.zeros_like(track.after[-1][1])], -1)[0]
    norms = [float(carried.detach().norm())]
    for t in reversed(range(1, 6)):
        before = tuple(part.detach() for part in track.before[t])
        carried = state_jacobians(track.level.cell, track.drive[t].detach(), before)[0].T @ carried
        norms.append(float(carried.detach().norm()))
    np.testing.assert_allclose(level.state_profile[0], norms[::-1], rtol=1e-9)
    np.testing.assert_allclose(level.readout_profile, level.state_profile)
    assert level.state_size == 8


@pytest.mark.parametrize("name", KINDS)
def test_the_readout_profile_is_that_of_the_last_step_whatever_else_is_read(name: str) -> None:
    module = layer(name, num_layers=2)

    def every(result: Any) -> Tensor:
        return last_step(result) + 3 * result[0][:-1].cos().sum()

    alone, among = (only(measured(module, [inputs()], loss)) for loss in (last_step, every))
    for a, b in zip(alone.levels, among.levels, strict=True):
        np.testing.assert_allclose(b.readout_profile, a.readout_profile, rtol=1e-9)
        assert not np.allclose(b.gradient_profile, a.gradient_profile, rtol=0.1)
    assert (alone.read_share[0], among.read_share[0]) == (pytest.approx(1 / 6), 1.0)


def test_the_last_states_are_read_too() -> None:
    module = layer("gru", num_layers=2, bidirectional=True)
    by_output = only(measured(module, [inputs()], lambda r: r[0][-1, :, :4].sum() + r[0][0, :, 4:].sum()))
    by_state = only(measured(module, [inputs()], lambda r: r[1][2:].sum()))
    for a, b in zip(by_output.levels, by_state.levels, strict=True):
        np.testing.assert_allclose(b.gradient_profile, a.gradient_profile, rtol=1e-9)
        np.testing.assert_allclose(b.readout_profile, a.readout_profile, rtol=1e-9)
    assert by_state.read_share[0] == pytest.approx(2 / 6)


def test_heard_steps_are_those_that_add_to_the_weights_gradient_in_float32() -> None:
    """A linear step of 0.11: its seventh power is below 1e-6, so that seven of twelve steps are heard."""
    module = nn.RNN(3, 4, nonlinearity="relu").double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.0)
        module.weight_hh_l0.copy_(0.11 * torch.eye(4, dtype=torch.float64))
        module.bias_ih_l0.fill_(1.0)
    one = only(measured(module, [inputs(12)], lambda r: r[0][-1].sum()))
    assert one.heard_share[0] == pytest.approx(7 / 12)
    level = one.levels[0]
    np.testing.assert_allclose(
        level.gradient_profile[0], 4.0 * 0.11 ** np.arange(11.0, -1.0, -1.0), rtol=1e-9
    )
    assert level.spectral_radius[0] == pytest.approx(0.11)
    assert level.lyapunov[0] == pytest.approx(math.log(0.11))
    middle = only(measured(module, [inputs(12)], lambda r: r[0][5].sum()))
    assert middle.heard_share[0] == 1.0  # what is behind the step that is read does not count
    assert middle.levels[0].gradient_profile.shape == (1, 6)


def test_the_other_direction_hears_the_early_steps() -> None:
    module = layer("tanh", bidirectional=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.1)
    forward = only(measured(module, [inputs(40)], lambda r: r[0][-1, :, :4].sum()))
    both = only(measured(module, [inputs(40)], lambda r: r[1].sum()))
    assert forward.heard_share[0] < 0.3
    assert both.heard_share[0] == pytest.approx(2 * forward.heard_share[0], abs=0.06)


# ------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("name", ["tanh", "lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_and_padded_sequences_end_where_they_end(name: str, bidirectional: bool) -> None:
    module = layer(name, bidirectional=bidirectional)
    lengths = [3, 6, 5]
    parts = [inputs(n, 1, seed=n)[:, 0] for n in lengths]
    packed = pack_sequence(parts, enforce_sorted=False)
    record = only(
        measured(module, lambda: (packed,), lambda r: r[1][0].sum() if name == "lstm" else r[1].sum())
    )
    level = record.levels[0]
    norms = np.zeros((6, 3))
    for i, part in enumerate(parts):
        _, last, every = looped(module, part[:, None])
        h_n = last[0] if isinstance(last, tuple) else last
        found = torch.autograd.grad(h_n.sum(), every[0])
        norms[6 - len(part) :, i] = [float(g.norm()) for g in found]
    reached = np.array([1, 2, 2, 3, 3, 3])  # samples that are long enough, by distance from the end
    expected = np.sqrt(3 * (norms**2).sum(1) / np.array([1, 2, 2, 3, 3, 3])[np.argsort(reached)])
    np.testing.assert_allclose(level.gradient_profile[0], expected, rtol=1e-9)
    assert record.read_share[0] == pytest.approx((6 if bidirectional else 3) / 14)
    if not bidirectional:  # padded, and read at each sample's own end
        padded = nn.utils.rnn.pad_sequence(parts)
        ends = torch.tensor(lengths) - 1

        def read(result: Any) -> Tensor:
            return result[0][ends, torch.arange(3)].sum()

        other = only(measured(module, [padded], read)).levels[0]
        np.testing.assert_allclose(other.gradient_profile, level.gradient_profile, rtol=1e-9)
        np.testing.assert_allclose(other.readout_profile, level.readout_profile, rtol=1e-9)


def test_batch_first_unbatched_and_given_states() -> None:
    x, hx = inputs(), torch.randn(1, 4, 4, dtype=torch.float64)

    class Given(nn.Module):
        def __init__(self, module: nn.Module, hx: Tensor) -> None:
            super().__init__()
            self.rnn, self.hx = module, hx

        def forward(self, x: Tensor) -> Any:
            return self.rnn(x, hx=self.hx)

    plain = only(measured(Given(layer("gru"), hx), [x], weighed))
    first = only(measured(Given(layer("gru", batch_first=True), hx), [x.transpose(0, 1).contiguous()],
                          lambda r: weighed((r[0].transpose(0, 1), r[1]))))  # fmt: skip
    np.testing.assert_allclose(first.levels[0].gradient_profile, plain.levels[0].gradient_profile, rtol=1e-9)
    assert plain.state_error[0] < 1e-12
    alone = only(measured(Given(layer("gru"), hx[:, 0]), [x[:, 0]], lambda r: r[0].sum()))
    both = only(measured(Given(layer("gru"), hx[:, :1]), [x[:, :1]], lambda r: r[0].sum()))
    np.testing.assert_allclose(alone.levels[0].gradient_profile, both.levels[0].gradient_profile, rtol=1e-9)
    assert alone.state_error[0] < 1e-12


def test_a_projection() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=2).double()
    record = only(measured(module, [inputs()], weighed))
    assert record.state_error[0] < 1e-12
    assert record.levels[0].state_size == 7
    assert record.read_share[0] == 1.0


@pytest.mark.parametrize("form", ["time first", "batch first", "packed"])
@pytest.mark.parametrize("name", KINDS)
def test_dropout_between_levels_is_that_of_the_call(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer(name, num_layers=3, dropout=0.5, bidirectional=True, batch_first=form == "batch first")
    x: Any = inputs(6, 4)
    if form == "batch first":
        x = x.transpose(0, 1)
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor([2, 6, 3, 5]), enforce_sorted=False)

    def loss(result: Any) -> Tensor:
        return (result[0].data if isinstance(result[0], PackedSequence) else result[0]).sin().sum()

    record = measured(module, lambda: (x,), loss)
    assert only(record).state_error[0] < 1e-12
    assert not record.provenance.notes
    monkeypatch.setattr(recurrent, "_FOREIGN", math.inf)
    monkeypatch.setattr(recurrent._Listener, "_dropout", lambda *_: None)
    assert only(measured(module, lambda: (x,), loss)).state_error[0] > 0.05


def test_where_the_masks_are_not_known_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "_draws_on_cpu", lambda tensor: False)
    module = layer("gru", num_layers=2, dropout=0.5)
    record = measured(module, [inputs()], weighed)
    (note,) = record.provenance.notes
    assert "The dropout masks between the levels of 'the model' are not known" in note
    assert np.isfinite(only(record).levels[0].gradient_profile).all()
    assert only(record).state_error[0] > 0.05
    assert not measured(layer("gru", num_layers=2), [inputs()], weighed).provenance.notes


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_is_no_failure(loop: bool, value: float) -> None:
    x = inputs(dtype=torch.float32)
    x[2] = value
    module = layer("relu", torch.float32)
    record = measured(Loop(module) if loop else module, [x], lambda r: r[0].square().mean())
    assert only(record).num_steps.tolist() == [6]
    assert not any("by its class" in note for note in record.provenance.notes)
    assert FlowRecord.from_json(record.to_json()) == record
    assert gf.detect(record, gf.pipelines.recurrent()) is not None


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p: float) -> None:
    module = layer("lstm", num_layers=2, dropout=p)
    assert only(measured(module, [inputs()], weighed)).state_error[0] < 1e-12
    assert only(measured(layer("lstm", num_layers=2, dropout=0.5), [inputs()], weighed, mode="eval"))


def test_float32_on_fused_kernels() -> None:
    module = layer("lstm", torch.float32, num_layers=2, dropout=0.3)
    record = only(measured(module, [inputs(30, dtype=torch.float32)], lambda r: r[0].square().mean()))
    assert record.state_error[0] < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes(dtype: torch.dtype) -> None:
    model = layer("gru", dtype)
    record = only(measured(model, [inputs(20, dtype=dtype)], lambda r: r[0].float().square().mean()))
    assert record.state_error[0] < 0.02
    assert np.isfinite(record.levels[0].gradient_profile).all()


def test_autocast() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer("lstm", torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.rnn(x)[0].float()

    with torch.autocast("cpu", torch.bfloat16):
        record = only(measured(Cast(), [inputs(dtype=torch.float32)], lambda y: y.square().mean()))
    assert record.state_error[0] < 0.02


# ---------------------------------------------------------------------------------- loops over cells


class Custom(nn.Module):
    """A cell that a function runs as it likes."""

    def __init__(self, name: str, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.cell, self.run = Loop(layer(name)).cell, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.cell, x)


def test_two_loops_over_one_cell_are_two_sequences() -> None:
    def run(cell: Any, x: Tensor) -> Tensor:
        a = b = None
        for step in x:  # interleaved
            a = cell(step, a)
            b = cell(-step, b)
        return a + b

    record = measured(Custom("tanh", run), [inputs(5)], lambda y: y.square().sum())
    assert [r.name for r in record.recurrences] == ["cell", "cell@1"]
    assert [r.num_steps.tolist() for r in record.recurrences] == [[5], [5]]


def test_a_detached_state_begins_a_sequence_and_a_changed_one_does_not() -> None:
    def run(cell: Any, x: Tensor) -> Tensor:
        h, c = torch.zeros(2, 4, 4, dtype=x.dtype)
        total = x.new_zeros(())
        for t, step in enumerate(x):
            if t == 2:
                h, c = h.detach(), c.detach()
            h, c = cell(step, (h * 0.5 + 0.1, c))
            total = total + h.sum()
        return total

    record = measured(Custom("lstm", run), [inputs(5)], lambda y: y)
    assert [(r.name, r.num_steps.tolist()) for r in record.recurrences] == [("cell", [2]), ("cell@2", [3])]


def test_unbatched_cells_and_shrinking_batches() -> None:
    def alone(cell: Any, x: Tensor) -> Tensor:
        h = None
        for step in x:
            h = cell(step[0], h)
        return h

    record = only(measured(Custom("gru", alone), [inputs(4)], lambda y: y.sum()))
    assert record.levels[0].gradient_profile.shape == (1, 4)

    def shrinking(cell: Any, x: Tensor) -> Tensor:
        h, total = None, x.new_zeros(())
        for t, step in enumerate(x):
            h = cell(step[: 4 - t], None if h is None else h[: 4 - t])
            total = total + h.sum()
        return total

    record = only(measured(Custom("gru", shrinking), [inputs(3)], lambda y: y))
    assert record.num_steps.tolist() == [3]
    assert record.state_error[0] < 1e-12


# ------------------------------------------------------------------------------------------- the run


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
    assert first.measured_steps.tolist() == [0, 1, 4]
    assert first.num_steps.tolist() == [5, 7, 4]
    profile = first.levels[0].gradient_profile
    assert profile.shape == (3, 7)
    assert np.isnan(profile).sum(1).tolist() == [2, 0, 3]
    assert np.isfinite(profile[:, -1]).all()  # they end together
    assert np.isnan(first.levels[0].hidden_rms)[:, -1].tolist() == [True, False, True]  # they begin together
    assert FlowRecord.from_json(record.to_json()) == record


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


def test_of_a_batch_too_large_some_samples_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer("lstm", num_layers=2, dropout=0.5), inputs(6, 1).expand(6, 64, 3).contiguous()
    whole = measured(module, [x], weighed, mode="eval")
    monkeypatch.setattr(recurrent, "_MOST_NUMBERS", 6 * 32 * 16)
    some = measured(module, [x], weighed, mode="eval")
    assert "was measured on 16 of 64 samples" in some.provenance.notes[-1]
    a, b = only(whole).levels[0].gradient_profile, only(some).levels[0].gradient_profile
    np.testing.assert_allclose(a, b, rtol=0.5)  # of the same order: the weights of the loss differ
    equal = only(measured(module, [x], lambda r: r[0].sum(), mode="eval")).levels[0].gradient_profile
    monkeypatch.setattr(recurrent, "_MOST_NUMBERS", 2**25)
    np.testing.assert_allclose(
        equal, only(measured(module, [x], lambda r: r[0].sum(), mode="eval")).levels[0].gradient_profile
    )
    monkeypatch.setattr(recurrent, "_MOST_NUMBERS", 6 * 32 * 16)
    assert only(measured(module, [x], weighed)).state_error[0] < 1e-12  # masks are drawn for all, then chosen


def test_long_sequences_carry_a_tangent_for_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_numbers, "_MOST_STEPS", 4)
    packed = pack_sequence([inputs(9, 1)[:, 0], inputs(3, 1)[:, 0]])
    module = layer("tanh", bidirectional=True)
    record = only(measured(module, lambda: (packed,), lambda r: r[0].data.sum()))
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
