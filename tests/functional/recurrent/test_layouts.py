"""Recurrent layers in every layout and precision: packed, padded, unbatched, both ways, with dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import gradflow as gf
from gradflow.functional.recurrent import fused
from gradflow.records import FlowRecord
from tests.functional.recurrent.models import KINDS, Loop, inputs, layer, looped, measured, only, weighed


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
    monkeypatch.setattr(fused, "FOREIGN", math.inf)
    monkeypatch.setattr(fused.FusedCall, "mask", lambda *_: lambda index: None)
    assert only(measured(module, lambda: (x,), loss)).state_error[0] > 0.05


def test_where_the_masks_are_not_known_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "draws_on_cpu", lambda tensor: False)
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
