"""Causes: which issue explains which."""

from __future__ import annotations

import random
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.detect import detect, explain, find_causes
from gradflow.records import Evidence, FlowRecord, IssueSeverity, IssueType, NumericalRecord, Role, issue_type
from tests.detect.builders import STEPS, Layer, activation, decaying, flow_record
from tests.samples import make_issue

LOST = np.full(STEPS, np.nan)


def causes(record: FlowRecord) -> list[tuple[str, str, int]]:
    return [(c.layer, c.issue_type.value, len(c.issues)) for c in find_causes(record, detect(record))]


EVIDENCE = st.builds(
    Evidence,
    roles=st.lists(st.sampled_from(list(Role)), max_size=2),
    origin=st.sampled_from([None, "fc1", "fc3"]),
    developed=st.booleans(),
    num_calls=st.sampled_from([1, 2]),
    no_input=st.booleans(),
)
ISSUES = st.lists(
    st.builds(
        make_issue,
        st.sampled_from([f"fc{i}" for i in range(5)]),
        st.sampled_from([*IssueType, issue_type("OUTLIERS"), issue_type("ASLEEP")]),
        st.sampled_from(list(IssueSeverity)),
        evidence=EVIDENCE,
    ),
    max_size=8,
    unique_by=lambda i: (i.layer, i.issue_type),
)


@given(ISSUES, st.randoms())
def test_every_issue_has_one_cause_whatever_the_order(issues: list[Any], draw: random.Random) -> None:
    record = decaying(5, 0.5)
    amended, found = explain(record, issues)
    assert [(i.layer, i.issue_type) for i in amended] == [(i.layer, i.issue_type) for i in issues]
    told = [(i.layer, i.issue_type) for c in found for i in c.issues]
    assert sorted(map(str, told)) == sorted(str((i.layer, i.issue_type)) for i in issues)
    assert all(c.issues[0].layer == c.layer and c.issues[0].issue_type is c.issue_type for c in found)
    assert all(0 <= c.confidence <= 1 and c.reason for c in found)


def test_an_issue_of_an_own_type_is_a_cause_and_no_victim() -> None:
    record = decaying(5, 0.02)
    own = [make_issue(f"fc{i}", issue_type("OUTLIERS"), metrics={}) for i in range(3)]
    amended, found = explain(record, [*detect(record), *own])
    theirs = [c for c in found if c.issue_type == issue_type("OUTLIERS")]
    assert [c.layer for c in theirs] == ["fc0", "fc1", "fc2"]  # like parts: the first
    assert all(c.confidence == 0.5 and "a type of one's own" in c.reason for c in theirs)
    assert all("Explained by" not in i.description for i in amended if i.issue_type == issue_type("OUTLIERS"))
    assert [c.layer for c in found if c.issue_type is IssueType.VANISHING] == ["fc0"]


def test_no_issues_no_causes() -> None:
    assert explain(decaying(3, 1.0), ()) == ((), ())


def test_uniform_decay_is_one_cause_told_where_it_shows_most() -> None:
    record = decaying(6, 0.02)
    amended, (cause,) = explain(record, detect(record))
    assert (cause.layer, cause.issue_type) == ("fc0", IssueType.VANISHING)
    assert all("Explained by VANISHING in fc0." in i.description for i in amended if i.layer != "fc0")
    assert any("(cause)" in line for line in cause.evidence)


def test_an_embedding_is_not_where_a_stack_loses_its_gradient() -> None:
    record = decaying(6, 0.02)
    table = attrs.evolve(record.layers[0], type="Embedding")
    assert causes(attrs.evolve(record, layers=[table, *record.layers[1:]]))[0][:2] == ("fc1", "VANISHING")


def test_what_absorbs_explains_what_it_starves() -> None:
    record = flow_record(
        Layer(name="a", grad=1e-6),
        Layer(name="b", grad=1e-6),
        Layer(name="tiny", gain=1e-6),
        Layer(name="head"),
    )
    assert causes(record) == [("tiny", "VANISHING", 3)]


def test_a_layer_that_outputs_zero_under_a_rectifier_explains_the_one_before() -> None:
    record = flow_record(
        Layer(name="fc1", grad=0.0),
        Layer(name="fc2", grad=0.0, gain=0.0, op="relu"),
        Layer(name="fc3"),
        activations=[
            activation("fc2:relu", "fc2", "relu", "rectifier", never_fired=1.0, fired_share=np.zeros(STEPS))
        ],
    )
    assert causes(record) == [("fc2", "DEAD", 2)]


def test_a_silent_layer_explains_those_that_it_silences_behind_it() -> None:
    def silent(name: str) -> Any:
        return activation(
            f"{name}:relu", name, "relu", "rectifier", never_fired=1.0, fired_share=np.zeros(STEPS)
        )

    record = flow_record(
        Layer(name="fc1", grad=0.0),
        Layer(name="fc2", grad=0.0, op="relu"),
        Layer(name="fc3", grad=0.0, op="relu", fields={"input_rms": np.zeros(STEPS)}),
        Layer(name="head"),
        activations=[silent("fc2"), silent("fc3")],
    )
    assert causes(record) == [("fc2", "DEAD", 3)]


def test_a_silent_module_is_explained_by_what_feeds_it() -> None:
    record = flow_record(
        Layer(name="fc", grad=0.0),
        Layer(name="act", gain=None),
        Layer(name="head"),
        activations=[
            activation("act", "act", "relu", "rectifier", never_fired=1.0, fired_share=np.zeros(STEPS))
        ],
    )
    assert causes(record) == [("fc", "DEAD", 2)]


def test_the_cause_of_a_cut_is_the_layer_whose_output_is_cut() -> None:
    why = {"reachable": False, "reason": "its output goes on without its gradient: detach before head"}
    record = flow_record(
        *(Layer(name=f"enc.{i}", grad=LOST) for i in range(3)),
        Layer(name="head"),
        edges=[("head", "loss")],
        cuts=[
            ("enc.0", "enc.1", "no gradient needed"),
            ("enc.1", "enc.2", "no gradient needed"),
            ("enc.2", "head", "detach"),
        ],
        nodes={f"enc.{i}": why for i in range(3)},
    )
    assert causes(record) == [("enc.2", "DEAD", 3)]


def test_two_cuts_of_their_own_are_two_causes() -> None:
    record = flow_record(
        Layer(name="a", grad=LOST),
        Layer(name="b", grad=LOST),
        Layer(name="head"),
        edges=[("head", "loss")],
        cuts=[("a", "b", "argmax"), ("b", "head", "detach")],
    )
    assert {c[:2] for c in causes(record)} == {("a", "DEAD"), ("b", "DEAD")}


def test_saturation_explains_what_vanishes_before_it() -> None:
    record = flow_record(
        Layer(name="a", grad=1e-7),
        Layer(name="b", grad=1e-6, op="sigmoid"),
        Layer(name="head"),
        activations=[activation("b:sigmoid", "b", "sigmoid", "bounded", saturated_share=np.full(8, 0.99))],
    )
    assert causes(record)[0][:2] == ("b", "SATURATION")
    assert len(causes(record)) == 1


def overflow(op: str, largest: float) -> FlowRecord:
    grads = [1e6, 1e4, 100.0, 1.0]
    born = NumericalRecord(
        step=0, layer="fc3", layer_type="Linear", op=op, phase="forward", value="inf", input_max=largest
    )
    return flow_record(
        *(Layer(name=f"fc{i}", grad=g, gain=20.0) for i, g in enumerate(grads)),
        numerics=[born],
        losses=np.full(STEPS, np.inf),
    )


@pytest.mark.parametrize(
    ("op", "largest", "first"),
    [
        ("linear", 1e30, "EXPLODING"),
        ("exp", 90.0, "NUMERICAL"),
        ("layer_norm", 1e21, "EXPLODING"),
        ("grad", 1.8, "NUMERICAL"),
        ("grad", 1e21, "EXPLODING"),
    ],
)
def test_an_overflow_is_explained_by_growth_unless_the_operation_has_a_domain(
    op: str, largest: float, first: str
) -> None:
    assert causes(overflow(op, largest))[0][1] == first


@pytest.mark.parametrize("op", ["exp", "grad"])
def test_a_derivative_in_the_model_that_overflows_after_steps_is_explained_by_growth(op: str) -> None:
    record = overflow(op, 1.8)
    later = attrs.evolve(record, numerics=[attrs.evolve(record.numerics[0], step=3)])
    assert (causes(later)[0][1] == "EXPLODING") is (op == "grad")


@pytest.mark.parametrize(("step", "first"), [(0, "NUMERICAL"), (3, "EXPLODING")])
def test_an_exponential_that_overflows_after_steps_is_explained_by_growth_that_was_there(
    step: int, first: str
) -> None:
    record = overflow("exp", 90.0)
    later = attrs.evolve(record, numerics=[attrs.evolve(record.numerics[0], step=step)])
    assert causes(later)[0][1] == first


def test_steps_that_are_too_large_explain_what_was_not_there_before() -> None:
    wild = np.array([1.0, 900.0, 3000.0, 200.0, 100.0, 50.0, 50.0, 50.0])
    fired = np.array([0.5, 0.2, 0, 0, 0, 0, 0, 0])
    record = flow_record(
        Layer(name="fc", grad=wild, op="relu"),
        Layer(name="head", grad=wild),
        optimizer="Adam",
        activations=[activation("fc:relu", "fc", "relu", "rectifier", never_fired=0.4, fired_share=fired)],
    )
    (first, *_) = causes(record)
    assert first == ("head", "UNSTABLE", 2)
    fixed = attrs.evolve(record, provenance=attrs.evolve(record.provenance, optimizer=""))
    assert len(causes(fixed)) == 2


def test_growth_is_told_in_the_part_that_grows_most() -> None:
    record = flow_record(
        Layer(name="embed", grad=12.0**5, op="mm"),
        *(Layer(name=f"layers.{i}", grad=12.0 ** (4 - i), op="mm") for i in range(5)),
        Layer(name="head"),
    )
    assert causes(record)[0][:2] == ("layers.0", "EXPLODING")


def test_saturation_at_one_call_speaks_for_the_module() -> None:
    full = np.full(STEPS, 0.95)
    record = flow_record(
        Layer(name="gate", op="sigmoid", grad=1e-6),
        Layer(name="gate@1", op="sigmoid", grad=1e-6),
        Layer(name="head"),
        edges=[("gate", "op:gate"), ("op:gate", "gate@1"), ("gate@1", "op:gate@1"), ("op:gate@1", "head"),
               ("head", "loss")],
        activations=[
            activation("gate:sigmoid", "gate", "sigmoid", "bounded", saturated_share=full),
            activation("gate@1:sigmoid", "gate@1", "sigmoid", "bounded", saturated_share=full * 0.9),
        ],
    )  # fmt: skip
    assert [c[:2] for c in causes(record)] == [("gate", "SATURATION")]


def test_the_gravest_cause_comes_first() -> None:
    record = decaying(4, 1.0)
    issues = [
        make_issue("fc0", IssueType.SATURATION, IssueSeverity.LOW),
        make_issue("fc3", IssueType.NUMERICAL, IssueSeverity.CRITICAL, evidence=Evidence(op="exp")),
    ]
    assert [c.layer for c in find_causes(record, issues)] == ["fc3", "fc0"]
    assert find_causes(record, issues)[0].confidence > find_causes(record, issues)[1].confidence


def test_without_a_graph_the_confidence_is_lower() -> None:
    with_graph = find_causes(decaying(6, 0.02), detect(decaying(6, 0.02)))[0]
    record = decaying(6, 0.02, graph=False)
    without_graph = find_causes(record, detect(record))[0]
    assert without_graph.layer == with_graph.layer
    assert without_graph.confidence < with_graph.confidence


@pytest.mark.parametrize(
    ("developed", "severity"), [(True, IssueSeverity.HIGH), (False, IssueSeverity.CRITICAL)]
)
def test_what_steps_have_made_of_a_model_is_no_graver_than_those_steps(
    developed: bool, severity: IssueSeverity
) -> None:
    jumps = make_issue("fc3", IssueType.UNSTABLE, IssueSeverity.HIGH, evidence=Evidence(roles=Role.JUMPING))
    grown = make_issue(
        "fc1", IssueType.EXPLODING, IssueSeverity.CRITICAL, evidence=Evidence(developed=developed)
    )
    amended, _ = explain(decaying(4, 1.0), [jumps, grown])
    assert amended[1].severity is severity
    assert (amended[1].evidence.explained_by == "fc3") is developed
