"""Any change to the JSON of a record is refused, or read as just what it says."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow.errors import RecordFormatError
from gradflow.records import FlowRecord
from gradflow.records.saving import registered
from tests.records.saving.samples import Share, full_record

TEXT = full_record().to_json()
KEYS = ["$array", "$pairs", "$record", "$text", "$complex", "fields", "shape", "values", "name"]
NUMBERS = ("nan", "inf", "-inf")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats()
    | st.sampled_from(["nan", "inf", "", "DEAD", "$text", "int8", "text", "Share"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of everything in JSON data but the whole."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


PLACES = places(json.loads(TEXT))


@st.composite
def mutations(draw: st.DrawFn) -> Any:
    """Return the data of a record with one to three changes."""
    data = json.loads(TEXT)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(PLACES))
        place = data
        try:
            for part in path[:-1]:
                place = place[part]
            present = place[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
        if isinstance(place, str):
            continue
        change = draw(st.sampled_from(["set", "remove", "copy", "wrap", "swap", "nudge"]))
        if change == "set":
            place[path[-1]] = draw(json_values)
        elif change == "remove":
            del place[path[-1]]
        elif change == "wrap":
            place[path[-1]] = [present]
        elif change == "nudge" and isinstance(present, (int, float)):
            place[path[-1]] = present + draw(st.sampled_from([1, -1, 0.5, 2**62, 1e300]))
        elif change == "swap" or isinstance(place, dict):
            other = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            place[path[-1]], place[other] = place[other], place[path[-1]]
        else:
            place.insert(path[-1], copy.deepcopy(present))
    return data


def says(data: Any) -> Any:
    """Return data as it is written: pairs whose keys are names as an object, an unknown class too."""
    if isinstance(data, list):
        return [says(value) for value in data]
    if not isinstance(data, dict):
        return data
    if data.keys() == {"$pairs"}:
        pairs = says(data["$pairs"])
        # "inf" stands for the number, whose name as a text is {"$text": "inf"}
        if all(isinstance(k, str) and not k.startswith("$") and k not in NUMBERS for k, _ in pairs):
            return dict(pairs)
        return {"$pairs": pairs}
    if data.keys() == {"$record", "fields"} and registered.registered(data["$record"]) is None:
        return says(data["fields"])
    return {key: says(value) for key, value in data.items()}


def same(said: Any, written: Any) -> bool:
    """Whether what was written down again says the same; fields that were left out have their default."""
    if isinstance(said, dict):
        return isinstance(written, dict) and all(
            k in written and same(v, written[k]) for k, v in said.items()
        )
    if isinstance(said, list):
        return isinstance(written, list) and len(said) == len(written) and all(map(same, said, written))
    return isinstance(said, bool) == isinstance(written, bool) and said == written


def check(text: str) -> None:
    try:
        record = FlowRecord.from_json(text)
    except RecordFormatError:
        return
    assert same(says(json.loads(text)), json.loads(record.to_json()))
    assert FlowRecord.from_json(record.to_json()) == record
    hash(record)


@settings(max_examples=300, deadline=None)
@given(mutations())
def test_changed_data_is_refused_or_read_as_what_it_says(data: Any) -> None:
    check(json.dumps(data))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, len(TEXT) - 1),
    st.sampled_from(['"', "0", "9", "e", "-", "}", "]", "[", "{", ",", ".", "", "\0"]),
)
def test_changed_text_is_refused_or_read_as_what_it_says(at: int, letter: str) -> None:
    check(TEXT[:at] + letter + TEXT[at + 1 :])
    check(TEXT[:at] + letter + TEXT[at:])


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_any_extras_are_refused_or_read_as_what_they_say(value: Any) -> None:
    check(
        json.dumps(
            {"format": 1, "steps": 0, "losses": [], "layers": [], "parameters": [], "extras": {"x": value}}
        )
    )


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
    | st.complex_numbers() | st.sampled_from(["nan", "inf", "-inf", "$x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.text(max_size=2)), inner, max_size=3
    ) | st.builds(lambda value: Share("s", [], value), inner),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=3), plain, max_size=3))
def test_plain_data_and_records_in_extras_always_come_back(found: Any) -> None:
    record = FlowRecord(steps=0, losses=[], layers=(), parameters=(), extras=found)
    again = FlowRecord.from_json(record.to_json())
    assert again == record
    assert repr(again.extras) == repr(record.extras)


def test_the_key_of_a_pair_may_be_a_number_that_json_has_not() -> None:
    data = json.loads(TEXT)
    data["extras"]["mark"] = {"$pairs": [["-inf", "$mark"]]}
    check(json.dumps(data))
    assert FlowRecord.from_json(json.dumps(data)).extras["mark"] == {float("-inf"): "$mark"}
