"""What sessions measure is in the record: extras, names that are taken, values that cannot be kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import MeasurementError
from gradflow.functional.attention.measurement import attention
from gradflow.records import RecurrenceRecord, TransformerRecord


@attrs.frozen
class Giving:
    """A measurement whose session gives just these values."""

    given: Mapping[str, Any] = attrs.field(eq=False, hash=False)
    names: tuple[str, ...] = ()
    number: int = 0  # tells one from another

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> gf.Session:
        return Says(self.given)


class Says(gf.Session):
    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given

    def fields(self) -> Mapping[str, Any]:
        return self.given

    def notes(self) -> tuple[str, ...]:
        return ("It said so.",)


calls: list[int] = []


def loss_of(y: Tensor) -> Tensor:
    calls.append(1)
    return y.square().mean()


def run(*measurements: Any) -> gf.FlowRecord:
    torch.manual_seed(0)
    calls.clear()
    return gf.analyze(nn.Linear(4, 2), [torch.randn(8, 4)] * 3, loss_of, steps=3, measurements=measurements)


def test_what_a_session_measured_is_in_extras_and_comes_back_from_json() -> None:
    record = run(Giving({"share": {"fc": np.array([0.5])}, "word": "x"}), Giving({"more": [1, 2]}, number=1))
    assert record.extras == {"share": {"fc": np.array([0.5])}, "word": "x", "more": (1, 2)}
    assert record.extras["share"]["fc"].tolist() == [0.5]
    assert record.extras["more"] == (1, 2)
    assert record.provenance.notes == ("It said so.", "It said so.")
    assert gf.FlowRecord.from_json(record.to_json()) == record
    with pytest.raises(TypeError, match="does not support item assignment"):
        record.extras["word"] = "y"  # type: ignore[index]


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(gf.FlowRecord)])
def test_a_declared_name_of_a_field_is_an_error_before_the_run(name: str) -> None:
    with pytest.raises(
        MeasurementError, match=f"gives {name!r}, which is a field of FlowRecord itself. Give it"
    ):
        run(Giving({}, names=(name,)))
    assert calls == []


def test_a_name_that_two_declare_is_an_error_before_the_run() -> None:
    pipeline = gf.Pipeline("one", [], measurements=[Giving({}, names=("share",))])
    other = gf.Pipeline("other", [], measurements=[Giving({}, names=("share",), number=1)])
    with pytest.raises(
        MeasurementError, match=r"number=1\) gives 'share', and so does .*number=0\)\. One of them"
    ):
        gf.diagnose(nn.Linear(4, 2), [torch.randn(8, 4)], loss_of, pipeline=pipeline + other)
    assert calls == []


def test_the_same_measurement_twice_is_measured_once() -> None:
    once = Giving({"share": 1}, names=("share",))
    assert dict(run(once, once).extras) == {"share": 1}


def test_names_that_nobody_declared_lose_nothing() -> None:
    giving = [Giving({"share": i}, number=i) for i in range(3)]
    record = run(*giving)
    assert dict(record.extras) == {"share": 0, "share@2": 1, "share@3": 2}
    assert "'share' was given before: that of Says is extras['share@2']." in record.provenance.notes


@pytest.mark.parametrize(
    "name", ["layers", "steps", "losses", "provenance", "policy", "transformer", "recurrences"]
)
def test_undeclared_names_of_fields_are_extras_too(name: str) -> None:
    record = run(Giving({name: (1, "x")}))
    assert dict(record.extras) == {name: (1, "x")}
    assert record.steps == 3
    assert [layer.type for layer in record.layers] == ["Linear"]
    assert record.transformer == TransformerRecord()
    assert record.policy is None


def test_records_of_the_library_fill_their_fields() -> None:
    made = TransformerRecord(steps=(0,))
    recurrence = RecurrenceRecord(
        name="r", module="r", type="GRU", kind="gru", measured_steps=[0], num_steps=[1], read_share=[1.0],
        heard_share=[1.0], state_error=[0.0], levels=(),
    )  # fmt: skip
    record = run(Giving({"transformer": made, "recurrences": (recurrence,)}))
    assert record.transformer == made
    assert record.recurrences == (recurrence,)
    assert not record.extras
    assert not run(attention()).extras


def test_what_cannot_be_kept_is_left_out_with_a_note_that_tells_how_to_mend_it() -> None:
    record = run(Giving({"good": 1, "tensor": torch.ones(2), "deep": {"a": [object()]}}))
    assert dict(record.extras) == {"good": 1}
    first, second, _ = record.provenance.notes
    assert first.startswith(
        "What Says measured is left out: extras['tensor'] is of class Tensor, expected numbers"
    )
    assert "tensor.tolist() is plain data" in first
    assert "extras['deep']['a'][0] is of class object" in second


def test_fields_that_are_no_mapping_are_noted() -> None:
    record = run(Giving(None))  # type: ignore[arg-type]
    assert not record.extras
    assert record.provenance.notes[0] == (
        "What Says measured is left out: fields() gave NoneType, expected a mapping."
    )


def test_one_name_may_be_declared_as_a_text() -> None:
    with pytest.raises(MeasurementError, match="gives 'losses', which is a field"):
        run(Giving({}, names="losses"))  # type: ignore[arg-type]
