"""Records through JSON: everything comes back as it was, and nothing wrong is accepted."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from gradflow.errors import RecordFormatError
from gradflow.records import (
    FlowRecord,
    Issue,
    ReservoirDynamics,
    from_plain,
    issue_type,
    to_plain,
)
from gradflow.records.saving import registered
from gradflow.report import Report
from tests.records.saving.samples import Share, extras, full_record
from tests.samples import chain_record, make_issue, sick_chain

TEXT = full_record().to_json()


def changed(*path: Any, to: Any) -> str:
    """Return the JSON of a record with one value changed."""
    data = json.loads(TEXT)
    place = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = to
    return json.dumps(data)


def test_a_record_with_everything_comes_back_equal() -> None:
    record = full_record()
    again = FlowRecord.from_json(TEXT)
    assert again == record
    assert hash(again) == hash(record)
    assert again.to_json() == TEXT
    assert json.loads(TEXT, parse_constant=lambda word: pytest.fail(word)) is not None


def test_extras_come_back_as_what_they_were() -> None:
    again, given_ = FlowRecord.from_json(TEXT).extras, extras()
    assert list(again) == list(given_)
    assert (again["word"], again["mark"]["$mark"], again["complex"]) == ("nan", -math.inf, 1 - 2j)
    assert math.isnan(again["share"])
    assert again["list"] == (1, (2.5, None), True)
    assert type(again["list"][2]) is bool
    assert again["by step"] == {0: "a", 4: {"x": (1,)}, (1, "b"): 2}
    for name, array in given_["arrays"].items():
        found = again["arrays"][name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
        assert not found.flags.writeable
    assert type(again["own"]["fc1"]) is Share
    assert again["own"]["fc1"] == given_["own"]["fc1"]
    assert again["own"]["fc1"].parts["deep"].tolist() == [1.0]


def test_a_class_that_is_not_registered_comes_back_as_a_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registered._BY_NAME, "Share")
    found = FlowRecord.from_json(TEXT).extras["own"]["fc1"]
    assert list(found) == ["layer", "shares", "parts"]
    assert (found["layer"], found["shares"][0], found["parts"]["deep"].tolist()) == ("fc1", 0.1, [1.0])


def test_a_registered_class_that_refuses_its_fields_is_told() -> None:
    wrong = {"$record": "Share", "fields": {"colour": 1}}
    with pytest.raises(
        RecordFormatError, match=r"extras\.own: expected the fields of the registered Share, but"
    ):
        FlowRecord.from_json(changed("extras", "own", to=wrong))


def test_a_list_is_no_array_of_a_registered_class() -> None:
    array = {"$array": "float64", "shape": [1], "values": [1.0]}
    wrong = {"$record": "Share", "fields": {"layer": "fc1", "shares": [array]}}
    with pytest.raises(RecordFormatError, match=r"extras\.own\.fields\.shares: expected an array, got list"):
        FlowRecord.from_json(changed("extras", "own", to=wrong))


def test_mappings_of_records_come_back_as_records() -> None:
    part = ReservoirDynamics(spectral_radius=0.5, gradient_profile=[0.1, 1.0], readout_profile=[])
    whole = ReservoirDynamics(gradient_profile=[1.0], readout_profile=[], layers={"rnn": part})
    again = from_plain(ReservoirDynamics, json.loads(json.dumps(to_plain(whole))))
    assert again == whole
    assert type(again.layers["rnn"]) is ReservoirDynamics


def test_issues_of_an_own_type_come_back_in_a_report() -> None:
    record, issues, causes = sick_chain()
    own = make_issue("fc1", issue_type("OUTLIERS"), metrics={"word": "inf", "depth": (1, (math.nan,))})
    cause = attrs.evolve(causes[0], issue_type=own.issue_type, issues=(own,))
    report = Report(record=record, issues=[*issues, own], causes=[cause], lines=["a", "b"])
    again = Report.from_json(report.to_json())
    assert again == report
    assert hash(again) == hash(report)
    assert again.issues[-1].issue_type == issue_type("OUTLIERS")
    assert again.issues[-1].metrics["word"] == "inf"


# ------------------------------------------------------------------------------ where it comes from


@pytest.mark.parametrize("name", ["r.json", "record", "ä ö.txt"])
def test_a_path_is_a_path_also_as_a_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = full_record()
    record.to_json(name)
    for source in (name, Path(name), str(tmp_path / name), os.fspath(tmp_path / name)):
        assert FlowRecord.from_json(source) == record


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("r.json", r"there is no file 'r\.json' in "),
        ("record", "expected JSON, but the text is not JSON"),
        ("", "the text is not JSON"),
        ("a\0b", "the text is not JSON"),
        (None, "expected JSON text or a path, got NoneType"),
        (b"{}", "expected JSON text or a path, got bytes"),
        ({}, "expected JSON text or a path, got dict"),
        ("null", "expected an object for FlowRecord, got null"),
        ("[" * 100_000, "nested without end"),
        ('{"format": ' + "[" * 50_000 + "1" + "]" * 50_000 + "}", "nested without end"),
        ('{"format": ' + "1" * 5000 + "}", "the text is not JSON: Exceeds the limit"),
        ('{"format": 1, "format": 1}', "expected every key of an object once, got 'format' twice"),
        ('{"format": NaN}', "expected strict JSON, got NaN"),
        (Report(record=chain_record()).to_json(), r"got a whole report, which Report\.from_json reads"),
    ],
)
def test_what_is_no_record_at_all_is_told(
    source: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordFormatError, match=f"^from_json: .*{message}"):
        FlowRecord.from_json(source)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80abc", b"", b"PK\x03\x04"])
def test_a_file_that_is_no_text_is_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(content)
    with pytest.raises(RecordFormatError, match="the text is not JSON"):
        FlowRecord.from_json(path)


def test_a_path_to_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FlowRecord.from_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT, "expected a report, an object with the keys ok"),
        ("[]", "expected a report"),
        ('{"ok": true}', "expected format 1, got None"),
        ('{"ok": true, "format": true}', "expected format 1, got True"),
        (Report(record=chain_record()).to_json().replace('"ok": true', '"ok": false'), "ok: expected True"),
    ],
)
def test_what_is_no_report_is_told(text: str, message: str) -> None:
    with pytest.raises(RecordFormatError, match=message):
        Report.from_json(text)


# ------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["losses"], "hello", "losses: expected a list, got str 'hello'"),
        (["losses"], None, "losses: expected a list, got null"),
        (["losses"], [1.0, [2], 3], "losses[1]: expected a number, 'nan', 'inf' or '-inf', got list"),
        (["losses"], [1.0, 2.0], "losses: expected 3 entries, one for each step, got 2"),
        (["losses"], [[1], [2], [3]], "losses[0]: expected a number, 'nan', 'inf' or '-inf', got list"),
        (["losses"], [1, 2, "infinity"], "losses[2]: expected a number, 'nan', 'inf' or '-inf', got str"),
        (["losses"], [1, 2, 2**53 + 1], "losses[2]: expected a number, 'nan', 'inf' or '-inf', got int"),
        (["losses"], [True, 1, 2], "losses[0]: expected a number, 'nan', 'inf' or '-inf', got bool True"),
        (["steps"], "abc", "steps: expected a whole number, got str 'abc'"),
        (["steps"], 99, "losses: expected 99 entries, one for each step, got 3"),
        (["steps"], 3.0, "steps: expected a whole number, got float 3.0"),
        (["steps"], True, "steps: expected a whole number, got bool True"),
        (["format"], True, "expected format 1, got True"),
        (["format"], 1.0, "expected format 1, got 1.0"),
        (["layers"], None, "layers: expected a list, got null"),
        (["layers"], {}, "layers: expected a list, got dict"),
        (["layers", 1, "name"], [1], "layers[1].name: expected a text, got list"),
        (["layers", 1, "parameters"], "abc", "layers[1].parameters: expected a list, got str 'abc'"),
        (["layers", 0, "num_elements"], [1, "nan", 2], "layers[0].num_elements[1]: expected a whole number"),
        (["layers", 0, "num_elements"], [1, 2, 10**30], "layers[0].num_elements[2]: expected a whole number"),
        (["layers", 0, "num_elements"], [1, 2, 2.0], "layers[0].num_elements[2]: expected a whole"),
        (["layers", 0, "called"], [True, False, 1], "layers[0].called[2]: expected true or false, got int 1"),
        (["layers", 0, "composite"], 0, "layers[0].composite: expected true or false, got int 0"),
        (["layers", 0, "colour"], 0, "layers[0]: LayerRecord: missing fields [], unknown fields ['colour']"),
        (["activations", 0, "never_fired"], "x", "activations[0].never_fired: expected a number"),
        (["numerics", 0, "input_min"], None, "numerics[0].input_min: expected a number"),
        (["provenance", "versions"], None, "provenance.versions: expected an object, got null"),
        (["provenance", "versions"], {"a": 1}, "provenance.versions.a: expected a text, got int 1"),
        (["provenance", "seed"], 1.5, "provenance.seed: expected a whole number, got float 1.5"),
        (["provenance", "learning_rates"], ["x"], "provenance.learning_rates[0]: expected a number"),
        (["provenance"], 3, "provenance: expected an object for Provenance, got int 3"),
        (["graph_record", "steps"], [0], "graph_record.nodes[0].grad_norm: expected 1 entries, one for each"),
        (["graph_record", "edges", 1, "flow"], [1.0], "graph_record.edges[1].flow: expected 2 entries"),
        (["transformer", "steps"], [0], "transformer.attention[0].num_keys: expected 1 entries"),
        (["transformer", "attention", 0, "entropy"], [1.0, 2.0], "attention[0].entropy[0]: expected a list"),
        (["transformer", "attention", 0, "entropy"], [[1.0], []], "entropy[1]: expected 1 entries"),
        (["recurrences", 0, "levels", 0, "gradient_profile"], 1, "gradient_profile: expected lists in"),
        (["recurrences", 0, "measured_steps"], [0], "recurrences[0].num_steps: expected 1 entries"),
        (["recurrences", 0, "measured_steps"], [0, "x"], "recurrences[0].measured_steps[1]: expected"),
        (["policy", "steps"], [], "policy.distributions[0].num_samples: expected 0 entries"),
        (["policy", "distributions", 0, "discrete"], "yes", "policy.distributions[0].discrete: expected"),
        (["extras"], [], "extras: expected an object, got list"),
        (["extras"], {"$text": "nan"}, "extras: expected an object, got dict"),
        (["extras", "number"], {"$bytes": 1}, "extras.number: expected one mark of $array, $complex, $text"),
        (["extras", "number"], {"$text": "word"}, "extras.number.$text: expected 'nan', 'inf'"),
        (["extras", "number"], {"$text": "nan", "x": 1}, "extras.number: expected one mark"),
        (["extras", "number"], {"$complex": [1.0]}, "extras.number.$complex: expected two numbers, got list"),
        (["extras", "number"], {"$complex": ["a", 1.0]}, "extras.number.$complex[0]: expected a number"),
        (["extras", "number"], {"$pairs": [[1]]}, "extras.number.$pairs: expected a list of pairs"),
        (["extras", "number"], {"$pairs": [[1, 2], [1, 3]]}, "extras.number.$pairs: expected every key once"),
        (
            ["extras", "number"],
            {"$pairs": [[{"$array": "int8", "shape": [1], "values": [1]}, 2]]},
            "extras.number.$pairs: expected keys that have a hash",
        ),
        (["extras", "number"], {"$record": 3, "fields": {}}, "extras.number: expected the name of a class"),
        (["extras", "arrays", "floats", "$array"], "float128", "arrays.floats.$array: expected one of"),
        (["extras", "arrays", "floats", "shape"], [3], "arrays.floats.values: expected as many numbers as"),
        (["extras", "arrays", "floats", "shape"], [-2, -2], "arrays.floats.values: expected as many numbers"),
        (["extras", "arrays", "floats", "shape"], [2.0], "arrays.floats.shape[0]: expected a whole number"),
        (["extras", "arrays", "one", "shape"], [1] * 99, "arrays.one: expected a shape of an array"),
        (["extras", "arrays", "whole", "values"], [0, 1, 256], "values[2]: expected a whole number from 0"),
        (["extras", "arrays", "halves", "values"], [0.1, 2.0], "values: expected numbers that float32 holds"),
        (["extras", "arrays", "halves", "values"], [1e300, 2.0], "values[0]: expected a finite number"),
        (["extras", "arrays", "texts", "values"], ["a\0", "b"], "texts that do not end in a zero character"),
        (["extras", "arrays", "texts", "values"], ["a", 1], "values[1]: expected a text, got int 1"),
        (["extras", "arrays", "truth", "values"], [1, 0], "values[0]: expected true or false, got int 1"),
    ],
)  # fmt: skip
def test_the_field_that_is_wrong_is_told(path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(RecordFormatError, match="^from_json: .*" + re.escape(message)):
        FlowRecord.from_json(changed(*path, to=value))


@pytest.mark.parametrize("new", ["1e999", "-1e999", "9" * 400])
def test_numbers_that_no_float_holds_are_refused(new: str) -> None:
    with pytest.raises(RecordFormatError, match=r"losses\[0\]: expected a (finite )?number.*got"):
        FlowRecord.from_json(changed("losses", to=[0.5, 1.0, 2.0]).replace("0.5", new, 1))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("severity", "AWFUL", "severity: expected one of CRITICAL, HIGH, MEDIUM, LOW, INFO, got str 'AWFUL'"),
        ("severity", 1, "severity: expected one of CRITICAL"),
        ("severity", ["HIGH"], "severity: expected one of CRITICAL"),
        ("issue_type", "vanishing", "issue_type: expected a type of issue: a name in capitals, got str 'van"),
        ("issue_type", None, "issue_type: expected a text, got null"),
        ("metrics", 1, "metrics: expected an object, got int 1"),
    ],
)
def test_an_issue_with_a_wrong_field_is_refused(field: str, value: Any, message: str) -> None:
    data = {**to_plain(make_issue()), field: value}
    with pytest.raises(RecordFormatError, match=re.escape(message)):
        from_plain(Issue, data)


def test_deep_data_in_extras_is_refused_and_not_a_crash() -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    with pytest.raises(RecordFormatError, match="expected at most 128 lists or objects in one another"):
        FlowRecord.from_json(changed("extras", "number", to=deep))
