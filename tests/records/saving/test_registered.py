"""Pickles and copies of records, reports and graphs, and classes of one's own by their names."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest

import gradflow as gf
from gradflow.errors import MeasurementError
from gradflow.graph import LayerGraph
from gradflow.records import ActionDistribution, AttentionStats, FlowRecord, array_field
from gradflow.records.saving.registered import name_of, registered
from gradflow.report import Report
from tests.records.saving.samples import Share, full_record
from tests.samples import sick_chain


def sick_report() -> Report:
    record, issues, causes = sick_chain()
    return Report(record=record, issues=issues, causes=causes, lines=["one", "two"])


def graph() -> LayerGraph:
    made = full_record().graph
    assert made.nx is not None  # works out what it keeps
    return made


WAYS: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    *(lambda value, p=p: pickle.loads(pickle.dumps(value, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)),
]


def parts(value: Any) -> Any:
    """Yield everything that a record is made of."""
    yield value
    if attrs.has(type(value)):
        for field in attrs.fields(type(value)):
            yield from parts(getattr(value, field.name))
    elif isinstance(value, tuple):
        for entry in value:
            yield from parts(entry)
    elif hasattr(value, "values"):
        for entry in value.values():
            yield from parts(entry)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [full_record, sick_report, graph])
def test_copies_are_equal_hash_alike_and_are_as_read_only(make: Callable[[], Any], way: Any) -> None:
    value = make()
    again = way(value)
    assert again == value
    assert hash(again) == hash(value)
    arrays = [part for part in parts(again) if isinstance(part, np.ndarray)]
    assert arrays
    assert not any(array.flags.writeable for array in arrays)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        again.record = None


def test_records_cross_to_another_process_and_back() -> None:
    sent = (full_record(), sick_report(), graph())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(copy.deepcopy, sent).result(timeout=120) == sent


def test_a_graph_that_crossed_answers_as_before() -> None:
    made = graph()
    again = pickle.loads(pickle.dumps(made))
    assert [again[name] for name in again] == [made[name] for name in made]
    assert again.bottlenecks() == made.bottlenecks()


def test_records_with_numbers_that_are_missing_are_equal_after_pickle() -> None:
    stats = AttentionStats(num_heads=1, **{f.name: float("nan") for f in attrs.fields(AttentionStats)[1:]})
    assert pickle.loads(pickle.dumps(stats)) == stats


def test_every_record_of_the_library_is_registered_under_its_name() -> None:
    assert registered("FlowRecord") is FlowRecord
    assert registered("ActionDistribution") is ActionDistribution
    assert name_of(FlowRecord) == "FlowRecord"


def test_a_class_of_one_s_own_is_registered_with_and_without_a_name() -> None:
    assert registered("Share") is Share
    named: Any = gf.register_record(name="share, version 2")(
        attrs.frozen(type("Other", (), {"x": attrs.field()}))
    )
    assert registered("share, version 2") is named
    assert name_of(named) == "share, version 2"


def test_a_class_defined_again_takes_the_place_of_the_former() -> None:
    def define() -> Any:
        @gf.register_record
        @attrs.frozen
        class Again:
            values: Any = array_field()

        return Again

    first, second = define(), define()
    assert first is not second
    assert registered("Again") is second


def test_what_cannot_be_registered_is_told() -> None:
    @attrs.define
    class Mutable:
        x: int = 0

    for wrong in (Mutable, int, 3, Share("a", [1.0])):
        with pytest.raises(MeasurementError, match="register_record: expected a frozen attrs class, got"):
            gf.register_record(wrong)  # type: ignore[call-overload]

    with pytest.raises(MeasurementError, match=r"'Share' is the name of tests\..*Share. Give .* another one"):

        @gf.register_record(name="Share")
        @attrs.frozen
        class Another:
            x: int = 0
