"""`HistoryRecord` and the numbers it is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradflow as gf
from gradflow.errors import RecordFormatError, RecordInputError, UnknownLayerError
from gradflow.records import EventRecord, HistoryRecord, IssueSeverity, IssueType, every_scalar, few_scalars


def event(since: int, layer: str = "fc", **fields: object) -> EventRecord:
    return EventRecord(
        layer=layer,
        issue_type=IssueType.DEAD,
        severity=IssueSeverity.HIGH,
        since=since,
        told=since + 3,
        **fields,  # type: ignore[arg-type]
    )


def test_names_may_come_and_go() -> None:
    history = (
        HistoryRecord.empty().with_look(0, {"a": 1.0}).with_look(5, {"b": 2.0, "a": 3.0}).with_look(9, {})
    )
    np.testing.assert_array_equal(history["a"], [1.0, 3.0, np.nan])
    np.testing.assert_array_equal(history["b"], [np.nan, 2.0, np.nan])
    assert "a" in history
    assert "c" not in history
    assert len(history) == 3
    with pytest.raises(UnknownLayerError, match="no entry named 'c'"):
        history["c"]


def test_what_is_known_later_is_added_to_its_look() -> None:
    history = HistoryRecord.empty().with_look(0, {"a": 1.0}).with_look(5, {"a": 2.0})
    later = history.with_numbers(0, {"b": 7.0, "a": 0.5})
    np.testing.assert_array_equal(later["a"], [0.5, 2.0])
    np.testing.assert_array_equal(later["b"], [7.0, np.nan])
    assert history["a"].tolist() == [1.0, 2.0], "the former one is what it was"
    with pytest.raises(UnknownLayerError, match="no entry named '3'"):
        history.with_numbers(3, {})


def test_looks_go_forward() -> None:
    history = HistoryRecord.empty().with_look(5, {})
    with pytest.raises(RecordInputError, match="step 5 is not after the last look, at step 5"):
        history.with_look(5, {})


def test_an_event_is_replaced_by_its_later_state() -> None:
    history = HistoryRecord.empty().with_events(event(10), event(4, "other"))
    assert [e.since for e in history.events] == [4, 10]
    over = history.with_events(event(10, until=50))
    assert [(e.since, e.until) for e in over.events] == [(4, None), (10, 50)]
    again = over.with_events(event(90))
    assert [(e.since, e.until) for e in again.events] == [(4, None), (10, 50), (90, None)]


@given(st.integers(4, 40), st.integers(1, 400))
def test_thinned_it_is_bounded_and_ends_as_before(most: int, looks: int) -> None:
    values = np.arange(looks, dtype=float)[:, None]
    history = HistoryRecord(steps=np.arange(looks) * 3, names=("a",), values=values)
    thin = history.thinned(most)
    assert len(thin) == min(looks, len(thin)) <= max(most, 1)
    assert thin.steps[0] == 0
    recent = min(most // 2, looks)
    assert thin.steps[-recent:].tolist() == history.steps[-recent:].tolist()
    assert (thin["a"] * 3).tolist() == thin.steps.tolist()
    assert thin.thinned(most) == thin


def test_thinned_again_and_again_it_keeps_the_far_past() -> None:
    history = HistoryRecord.empty()
    for step in range(2000):
        history = history.with_look(step, {"a": float(step)}).thinned(32)
    steps = history.steps
    assert len(steps) <= 32
    assert steps[0] == 0
    assert ((steps > 0) & (steps < 1500)).any(), "not the last looks alone"


def test_json_round_trip() -> None:
    history = HistoryRecord.empty().with_types({"fc": "Linear"}).with_events(event(1)).with_notes("a note")
    history = history.with_look(0, {"a": np.inf}).with_look(1, {"b": np.nan})
    assert HistoryRecord.from_json(history.to_json()) == history
    with pytest.raises(RecordFormatError, match="steps"):
        HistoryRecord.from_json('{"format": 1}')


def test_scalars_are_those_of_the_record() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    batch = torch.randn(16, 4), torch.randint(0, 2, (16,))
    record = gf.diagnose(model, [batch], nn.CrossEntropyLoss(), steps=1).record
    found = every_scalar(record)
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found["gradient_norm"] == pytest.approx(norms.norm().item(), rel=1e-5)
    assert found["weight_rms/2.weight"] == pytest.approx(
        model[2].weight.square().mean().sqrt().item(), rel=1e-5
    )
    grad = model[2].weight.grad
    assert grad is not None
    assert found["weight_gradient_rms/2.weight"] == pytest.approx(
        grad.square().mean().sqrt().item(), rel=1e-5
    )
    assert found["gradient_zero_share/2.weight"] == pytest.approx((grad == 0).float().mean().item())
    hidden = model[:2](batch[0])
    assert found["output_zero_share/1"] == pytest.approx((hidden == 0).float().mean().item())
    assert found["never_fired/1"] == pytest.approx((hidden <= 0).all(0).float().mean().item())
    few = few_scalars(record)
    linear = [found[f"gradient_rms/{name}"] for name in ("0", "2", "4")]
    assert few["gradient_rms/Linear/median"] == pytest.approx(np.median(linear))
    assert few["gradient_rms/Linear/worst"] == min(linear)
    assert few["never_fired/relu/worst"] == max(found["never_fired/1"], found["never_fired/3"])
    assert few["weight_rms/Linear.weight/worst"] == max(found[f"weight_rms/{n}.weight"] for n in "024")
    assert few["loss"] == found["loss"]


def test_few_scalars_do_not_grow_with_depth() -> None:
    def few(depth: int) -> set[str]:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())]
        record = gf.analyze(nn.Sequential(*layers), [torch.randn(8, 4)], lambda y: y.square().mean(), steps=1)
        return set(few_scalars(record))

    assert few(2) == few(12)
