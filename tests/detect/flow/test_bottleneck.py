"""BOTTLENECK: waists that throttle, rectified ones, rows that become alike; and waists by design."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from gradflow.detect import bottleneck, detect, needs_depth
from gradflow.records import FlowRecord, Issue, IssueSeverity, KnowledgeRecord
from tests.detect.builders import STEPS, Layer, activation, flow_record


def sized(name: str, width: int, taken: int, **fields: Any) -> Layer:
    return Layer(name=name, fields={"shape": (32, width)}, weight={"shape": (width, taken)}, **fields)


def hourglass(width: int, *, rank: float = float("nan"), out: int = 10, **fields: Any) -> FlowRecord:
    return flow_record(
        sized("a", 64, 20),
        sized("waist", width, 64, op=fields.pop("op", "")),
        sized("b", 64, width, rank=rank),
        sized("head", out, 64),
        **fields,
    )


def seen(record: FlowRecord) -> dict[str, Issue]:
    return {issue.layer: issue for issue in detect(record, bottleneck())}


@pytest.mark.parametrize(
    ("rank", "severity"),
    [(9.0, IssueSeverity.MEDIUM), (20.0, IssueSeverity.HIGH), (3.0, IssueSeverity.INFO)],
)
def test_the_rank_behind_a_waist_decides(rank: float, severity: IssueSeverity) -> None:
    issue = seen(hourglass(2, rank=rank))["waist"]
    assert issue.severity is severity
    assert not issue.evidence.undecided


def test_without_the_rank_it_is_undecided_and_asks_for_depth() -> None:
    record = hourglass(2)
    issue = seen(record)["waist"]
    assert issue.severity is IssueSeverity.INFO
    assert needs_depth(record, [issue])
    graph = record.graph_record
    assert graph is not None
    measured = attrs.evolve(record, graph_record=attrs.evolve(graph, steps=(7,)))
    assert not needs_depth(measured, [issue])
    assert not needs_depth(attrs.evolve(record, graph_record=None), [issue])


def test_an_autoencoder_is_narrow_by_design() -> None:
    assert seen(hourglass(2, rank=30.0, out=20))["waist"].severity is IssueSeverity.INFO


@pytest.mark.parametrize(("out", "severity"), [(10, IssueSeverity.MEDIUM), (1, IssueSeverity.INFO)])
def test_a_single_number_is_too_little_unless_no_more_comes_out(out: int, severity: IssueSeverity) -> None:
    assert seen(hourglass(1, rank=1.0, out=out))["waist"].severity is severity


@pytest.mark.parametrize(("left", "severity"), [(0.1, IssueSeverity.INFO), (0.6, IssueSeverity.MEDIUM)])
def test_a_single_number_is_enough_for_data_on_a_curve(left: float, severity: IssueSeverity) -> None:
    record = hourglass(1, rank=1.0, out=20)
    known = KnowledgeRecord(step=STEPS - 1, loss=left, shuffled=1.0)
    assert seen(attrs.evolve(record, knowledge=known))["waist"].severity is severity


def test_a_first_layer_that_all_data_enter_can_be_a_waist() -> None:
    record = flow_record(sized("first", 1, 20), sized("b", 64, 1), sized("head", 10, 64))
    assert seen(record)["first"].severity is IssueSeverity.MEDIUM
    two = flow_record(
        sized("first", 1, 20),
        sized("other", 64, 20),
        sized("b", 64, 65),
        sized("head", 10, 64),
        edges=[("first", "b"), ("other", "b"), ("b", "head"), ("head", "loss")],
    )
    assert not seen(two)


def test_the_calls_of_a_siamese_waist_are_no_data_of_their_own() -> None:
    calls = [f"{name}{call}" for call in ("", "@1") for name in ("a", "waist", "b")]
    edges = [(x, y) for x, y in zip(calls, calls[1:], strict=False) if y != "a@1"]
    widths = {"a": (64, 20), "waist": (2, 64), "b": (64, 2)}
    layers = [sized(name, *widths[name.partition("@")[0]], rank=30.0) for name in calls]
    record = flow_record(*layers, edges=[*edges, ("b", "loss"), ("b@1", "loss")])
    assert seen(record)["waist"].severity >= IssueSeverity.MEDIUM


def test_what_a_generator_hands_to_a_critic_is_as_wide_as_the_data() -> None:
    record = flow_record(
        sized("gen.0", 64, 8),
        sized("gen.1", 2, 64),
        sized("critic.0", 64, 2, rank=30.0),
        sized("critic.0@1", 64, 2),
        sized("critic.1", 1, 64),
        edges=[("gen.0", "gen.1"), ("gen.1", "critic.0"), ("critic.0", "critic.1"),
               ("critic.0@1", "critic.1"), ("critic.1", "loss")],
    )  # fmt: skip
    assert seen(record)["gen.1"].severity is IssueSeverity.INFO


@pytest.mark.parametrize("width", [16, 64])
def test_a_moderate_step_down_is_no_waist(width: int) -> None:
    assert not seen(hourglass(width, rank=60.0))


def test_a_narrow_side_gate_and_a_narrow_last_layer_are_no_waists() -> None:
    gate = flow_record(
        sized("a", 64, 20),
        sized("gate", 2, 64),
        sized("up", 64, 2),
        sized("head", 10, 64),
        edges=[("a", "gate"), ("gate", "up"), ("up", "head"), ("a", "head"), ("head", "loss")],
    )
    assert not seen(gate)
    assert not seen(flow_record(sized("a", 64, 20), sized("b", 64, 64), sized("head", 1, 64)))


def test_without_a_graph_nothing_is_said() -> None:
    assert not seen(hourglass(2, graph=False))


@pytest.mark.parametrize(("width", "sick"), [(3, True), (7, False)])
def test_a_rectifier_on_a_waist_stops_whole_samples(width: int, sick: bool) -> None:
    used = activation("waist:relu", "waist", "relu", "rectifier", num_units=width)
    issue = seen(hourglass(width, op="relu", activations=[used]))["waist"]
    assert (issue.severity is IssueSeverity.MEDIUM) is sick
    silent = attrs.evolve(used, fired_share=np.zeros(STEPS))
    dead = seen(hourglass(width, op="relu", activations=[silent]))["waist"]
    assert dead.severity is IssueSeverity.INFO  # if nothing fires at all, it is dead


def smoothed(op: str, *, grad: float = 0.9, last: float = 1e-4) -> FlowRecord:
    variations = [0.9, 0.1, 0.02, last]
    layers = [
        Layer(
            name=f"conv{i}",
            op=op,
            grad=grad ** (4 - i),
            fields={"output_variation": np.full(STEPS, variation)},
        )
        for i, variation in enumerate(variations)
    ]
    return flow_record(*layers, Layer(name="head", fields={"output_variation": np.full(STEPS, last)}))


def test_rows_made_alike_by_mixing() -> None:
    issue = seen(smoothed("mm"))["conv3"]
    assert issue.severity is IssueSeverity.HIGH
    assert issue.metrics["num_mixings"] == 3
    assert "skip connections" in issue.recommended_actions[0]


@pytest.mark.parametrize(
    "record",
    [smoothed("relu"), smoothed("mm", last=0.05), smoothed("mm", grad=1e-3)],
    ids=["nothing mixes rows", "still different", "the gradient dies out"],
)
def test_rows_alike_for_other_reasons(record: FlowRecord) -> None:
    assert not [i for i in seen(record).values() if "alike" in i.description]


def test_a_constant_input_is_alike_from_the_start() -> None:
    alike = {"output_variation": np.zeros(STEPS)}
    layers = [Layer(name=f"t{i}", op="mm", fields=alike) for i in range(4)]
    assert not seen(flow_record(*layers, Layer(name="head")))
