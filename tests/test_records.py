"""The records: read-only, equal by content, and the same after a trip through JSON."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.errors import RecordFormatError, UnknownLayerError
from gradflow.records import (
    ActivationRecord,
    EdgeRecord,
    Evidence,
    FlowRecord,
    GraphRecord,
    IssueSeverity,
    IssueType,
    LayerRecord,
    NodeRecord,
    NumericalRecord,
    ParameterRecord,
    Provenance,
    Role,
    from_plain,
    to_plain,
)
from tests.samples import chain_record, layer_record, make_issue, sick_chain

STEPS = 3
reals = st.floats(width=64) | st.just(float("nan")) | st.just(-float("nan")) | st.just(float("inf"))
floats = st.lists(reals, min_size=STEPS, max_size=STEPS)
bools = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)
sizes = st.lists(st.integers(0, 2**40), min_size=STEPS, max_size=STEPS)
names = st.text(max_size=8)
shapes = st.lists(st.integers(0, 10**6), max_size=3)
name_tuples = st.lists(names, max_size=2)

layers = st.builds(
    LayerRecord,
    name=names,
    module=names,
    type=names,
    call=st.integers(0, 3),
    order=st.integers(0, 9),
    composite=st.booleans(),
    parameters=name_tuples,
    shape=shapes,
    called=bools,
    reached=bools,
    grad_norm=floats,
    grad_finite=bools,
    num_elements=sizes,
    input_rms=floats,
    output_rms=floats,
    output_finite=bools,
    output_zero_share=floats,
    output_variation=floats,
)
parameters = st.builds(
    ParameterRecord,
    name=names,
    layer=names,
    shape=shapes,
    dtype=names,
    trainable=st.booleans(),
    reached=bools,
    grad_norm=floats,
    grad_finite=bools,
    grad_zero_share=floats,
    norm=floats,
)
activations = st.builds(
    ActivationRecord,
    name=names,
    op=names,
    kind=st.sampled_from(["rectifier", "bounded", "softmax"]),
    functional=st.booleans(),
    layer=names,
    num_units=st.integers(0, 99),
    fired_share=floats,
    saturated_share=floats,
    input_rms=floats,
    never_fired=reals,
    always_saturated=reals,
)
numerics = st.builds(
    NumericalRecord,
    step=st.integers(0, 9),
    layer=names,
    layer_type=names,
    op=names,
    phase=st.sampled_from(["input", "parameter", "forward", "backward"]),
    value=st.sampled_from(["nan", "inf"]),
    input_min=reals,
    input_max=reals,
)
graphs = st.builds(
    GraphRecord,
    nodes=st.lists(
        st.builds(
            NodeRecord,
            name=names,
            kind=names,
            shape=shapes,
            taken=shapes,
            grad_norm=floats,
            input_grad_norm=floats,
            effective_rank=floats,
        ),
        max_size=2,
    ),
    edges=st.lists(st.builds(EdgeRecord, source=names, target=names, flow=floats), max_size=2),
    steps=st.lists(st.integers(0, 9), min_size=STEPS, max_size=STEPS),
)
provenances = st.builds(
    Provenance,
    versions=st.dictionaries(names, st.sampled_from(["2.13.0", "0.1.0"]), max_size=2),
    seed=st.none() | st.integers(-(2**63), 2**63),
    learning_rates=st.lists(reals, max_size=2),
    notes=name_tuples,
)
records = st.builds(
    FlowRecord,
    steps=st.just(STEPS),
    losses=floats,
    layers=st.lists(layers, max_size=2),
    parameters=st.lists(parameters, max_size=2),
    activations=st.lists(activations, max_size=2),
    numerics=st.lists(numerics, max_size=2),
    never_called=name_tuples,
    graph_record=st.none() | graphs,
    provenance=provenances,
)


def same_bits(a: Any, b: Any) -> bool:
    """Compare two records field by field without their own `==`, which is under test."""
    if attrs.has(type(a)):
        return type(a) is type(b) and all(
            same_bits(getattr(a, f.name), getattr(b, f.name)) for f in attrs.fields(type(a))
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype == float)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


@given(records)
def test_json_round_trip(record: FlowRecord) -> None:
    text = record.to_json()
    again = FlowRecord.from_json(text)
    assert same_bits(record, again)
    assert again == record
    assert again.to_json() == text


def test_json_is_strict_and_tells_non_finite_numbers_as_words() -> None:
    record = chain_record(depth=1, steps=3, losses=[float("nan"), float("inf"), -float("inf")])

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    data = json.loads(record.to_json(), parse_constant=refuse)
    assert data["losses"] == ["nan", "inf", "-inf"]
    assert data["format"] == 1


def test_json_goes_to_a_file_and_comes_from_one(tmp_path: Any) -> None:
    record, path = chain_record(), tmp_path / "record.json"
    text = record.to_json(path)
    assert path.read_text() == text
    assert FlowRecord.from_json(path) == record


@pytest.mark.parametrize("position", range(4))
def test_records_that_differ_anywhere_are_not_equal(position: int) -> None:
    record = chain_record(depth=2, steps=4)
    grads = record.layers[0].grad_norm.copy()
    grads[position] *= 1.5
    other = attrs.evolve(record, layers=(attrs.evolve(record.layers[0], grad_norm=grads), record.layers[1]))
    assert record == chain_record(depth=2, steps=4)
    assert record != other


def test_nan_equals_nan_whatever_its_sign_and_wherever_it_stands() -> None:
    def activation(value: float) -> ActivationRecord:
        return ActivationRecord(
            name="a",
            op="relu",
            kind="rectifier",
            functional=True,
            layer="fc",
            num_units=4,
            fired_share=[value],
            saturated_share=[0.0],
            input_rms=[1.0],
            never_fired=value,
        )

    assert activation(float("nan")) == activation(-float("nan"))
    assert activation(float("nan")) != activation(0.5)


def test_arrays_and_mappings_are_read_only_and_copied() -> None:
    source = np.ones(3)
    layer = layer_record("fc", source)
    source[0] = 7.0
    assert layer.grad_norm.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        layer.grad_norm[0] = 2.0
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        layer.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        make_issue().metrics["median_rms"] = 1.0  # type: ignore[index]


def test_grad_rms_and_grad_zero_follow_their_definitions() -> None:
    layer = layer_record("fc", [16.0, 0.0, float("nan")])
    np.testing.assert_array_equal(layer.grad_rms, [16.0 / 8.0, 0.0, float("nan")])
    assert layer.grad_zero.tolist() == [False, True, False]


def test_a_record_is_read_by_name_and_in_order() -> None:
    record = chain_record(depth=3)
    assert [layer.name for layer in record] == ["fc1", "fc2", "fc3"]
    assert (len(record), "fc2" in record, "fc9" in record) == (3, True, False)
    assert record["fc2"] is record.layers[1]
    assert record.parameter("fc3.weight") is record.parameters[2]
    assert record.parameters_of(record["fc1"]) == record.parameters[:1]


def test_an_unknown_name_is_told_with_its_neighbours() -> None:
    record = chain_record(depth=3)
    with pytest.raises(UnknownLayerError, match=r"^no entry named 'fc'\. The nearest of 3 names: fc\d"):
        record["fc"]
    with pytest.raises(UnknownLayerError, match=r"no entry named 'fc2\.weigth'.*: fc2\.weight"):
        record.parameter("fc2.weigth")
    with pytest.raises(KeyError):
        record["fc"]


def test_repr_is_readable() -> None:
    lines = repr(chain_record(depth=2)).splitlines()
    assert lines[0] == "FlowRecord(Chain: 2 layer calls, 2 parameters, 20 steps, fused, cpu)"
    assert lines[1] == "  loss 2.31 -> 2.3"
    assert lines[3].startswith("  fc2 (Linear): grad_rms ")
    assert repr(chain_record(depth=45)).splitlines()[-1] == "  ... 5 more"
    assert "array(" not in repr(chain_record(depth=45).layers[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the text is not JSON"),
        ("[]", "expected an object for FlowRecord, got list"),
        ("{}", "expected format 1, got None"),
        ('{"format": 2}', "expected format 1, got 2"),
        ('{"format": 1, "steps": 0}', r"missing fields \['losses', 'layers', 'parameters'\]"),
        (
            '{"format": 1, "steps": 0, "losses": [], "layers": [], "parameters": [], "colour": "red"}',
            r"unknown fields \['colour'\]",
        ),
        (
            '{"format": 1, "steps": 0, "losses": [], "layers": [3], "parameters": []}',
            "expected an object for LayerRecord, got int",
        ),
    ],
)
def test_what_is_not_a_record_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecordFormatError, match=message):
        FlowRecord.from_json(text)


def test_issues_and_causes_survive_plain_data_too() -> None:
    _, issues, causes = sick_chain()
    issue = attrs.evolve(
        issues[0],
        magnitude=float("inf"),
        metrics={"depth": (1, (2, float("nan"))), "op": "relu"},
        evidence=Evidence(roles=(Role.BLOCKED, Role.STARVED), origin="", explained_by="fc2", growth=3.0),
    )
    plain = json.loads(json.dumps(to_plain(issue), allow_nan=False))
    again = from_plain(type(issue), plain)
    assert again.magnitude == float("inf")
    assert again.evidence == issue.evidence
    assert repr(again.metrics) == repr(issue.metrics)
    assert from_plain(type(causes[0]), json.loads(json.dumps(to_plain(causes[0])))) == causes[0]


def test_severities_are_ordered() -> None:
    ordered = [IssueSeverity(name) for name in ("INFO", "LOW", "MEDIUM", "HIGH", "CRITICAL")]
    assert sorted(IssueSeverity) == ordered
    assert max(IssueSeverity) is IssueSeverity.CRITICAL
    assert all(a < b and b > a and a <= b and b >= a and a <= a for a, b in pairwise(ordered))
    assert not IssueSeverity.LOW < IssueSeverity.LOW
    assert [severity.rank for severity in ordered] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("member", [*IssueSeverity, *IssueType])
def test_values_are_the_names_in_capitals(member: IssueSeverity | IssueType) -> None:
    assert member.value == member.name == member.name.upper()
