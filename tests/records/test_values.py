"""Values that do not change: the read-only mapping, what freezing does, and what cannot be kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.errors import MeasurementError
from gradflow.records import FlowRecord, ReadOnlyMapping, frozen
from gradflow.records.values import MAX_DEPTH, unkept

NAN = float("nan")
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.text(max_size=2), values, max_size=4)


@given(mappings)
def test_a_mapping_reads_like_the_dict_it_was_made_of(items: dict[str, Any]) -> None:
    made = ReadOnlyMapping(items)
    assert list(made) == list(items)
    assert list(reversed(made)) == list(reversed(items))
    assert len(made) == len(items)
    assert made == items
    assert made == ReadOnlyMapping(copy.deepcopy(items))
    assert hash(made) == hash(ReadOnlyMapping(copy.deepcopy(items)))
    assert {**made} == dict(made) == made | {} == {} | made
    assert all(name in made and made.get(name) is made[name] for name in items)


@given(mappings)
def test_a_mapping_survives_pickle_and_copies(items: dict[str, Any]) -> None:
    made = ReadOnlyMapping(items)
    for again in (pickle.loads(pickle.dumps(made)), copy.copy(made), copy.deepcopy(made)):
        assert again == made
        assert hash(again) == hash(made)
        assert repr(again) == repr(made)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1, "b": 1}),
        ({"a": np.zeros(2)}, {"a": np.ones(2)}),
        ({"a": np.zeros(2)}, {"a": np.zeros((2, 1))}),
        ({"a": np.zeros(2)}, {"a": np.zeros(2, np.float32)}),
        ({"a": {"b": (NAN,)}}, {"a": {"b": (0.0,)}}),
        ({"a": complex(NAN, 1)}, {"a": complex(NAN, 2)}),
    ],
)
def test_mappings_that_differ_are_not_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert ReadOnlyMapping(one) == ReadOnlyMapping(copy.deepcopy(one))
    assert ReadOnlyMapping(one) != ReadOnlyMapping(other)
    assert ReadOnlyMapping(one) != 3


def test_nothing_in_a_mapping_can_be_changed() -> None:
    source = {"inner": {"shares": np.ones(2)}, "list": [1, [2]]}
    made: Any = ReadOnlyMapping(source)
    source["inner"]["shares"][0] = 7.0  # type: ignore[index]
    assert made["inner"]["shares"].tolist() == [1.0, 1.0]
    assert made["list"] == (1, (2,))
    for again in (made, pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        with pytest.raises(TypeError, match="does not support item assignment"):
            again["x"] = 1
        with pytest.raises(TypeError, match="does not support item deletion"):
            del again["inner"]
        with pytest.raises(TypeError, match="does not support item assignment"):
            again["inner"]["x"] = 1
        with pytest.raises(ValueError, match="read-only"):
            again["inner"]["shares"][0] = 1.0
        with pytest.raises(AttributeError, match="a ReadOnlyMapping is read-only: '_items' cannot be set"):
            again._items = {}
        with pytest.raises(AttributeError, match="read-only: '_items' cannot be deleted"):
            del again._items


def test_nan_is_one_object_and_numpy_scalars_are_plain() -> None:
    made = frozen([np.float32(0.5), -float("nan"), np.bool_(True), np.int8(3)])
    assert [type(v) for v in made] == [float, float, bool, int]
    assert frozen(float("nan")) is frozen(-np.float64("nan"))
    assert frozen(np.array([NAN, -NAN])).tobytes() == frozen(np.array([-NAN, NAN])).tobytes()
    wide = np.array([1.5, 2.5]).astype(">f8")
    assert frozen(wide).dtype.isnative
    assert frozen(wide).tolist() == [1.5, 2.5]


@attrs.frozen
class Pair:
    first: Any
    second: Any = None


class Tensor:
    """By name what a tensor is."""


def nested(depth: int) -> Any:
    return (nested(depth - 1),) if depth else 0


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({1, 2}, "^x is of class set, expected numbers, texts, NumPy arrays"),
        ({"a": [0, object()]}, r"^x\['a'\]\[1\] is of class object"),
        (Pair(1, {"b": b""}), r"^x\.second\['b'\] is of class bytes"),
        (Tensor(), r"A record holds no tensor: tensor\.tolist\(\) is plain data"),
        (np.array([None]), "^x is an array of object, expected numbers, booleans or texts"),
        (np.array(["2024-01-01"], "M8[D]"), "^x is an array of datetime64"),
        ({frozenset(): 1}, r"^x has the key frozenset\(\), expected a text, a number"),
        ({NAN: 1}, "^x has the key nan"),
        (nested(MAX_DEPTH + 2), f"lies in more than {MAX_DEPTH} containers"),
    ],
)
def test_what_cannot_be_kept_is_told_with_its_place(value: Any, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(unkept(value, "x"))
    with pytest.raises(MeasurementError, match=problem.replace("^x", r"^FlowRecord: extras\['x'\]")):
        FlowRecord(steps=0, losses=[], layers=(), parameters=(), extras={"x": value})


@pytest.mark.parametrize(
    "value", [None, 1, "a", 1j, np.ones(2), {(1, "a"): [{2: None}]}, Pair(1, 2), nested(30)]
)
def test_what_can_be_kept(value: Any) -> None:
    assert unkept(value, "x") == ""
