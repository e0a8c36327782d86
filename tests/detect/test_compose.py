"""Detectors as values: combinators, `detect`, and what is said of wrong input."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradflow as gf
from gradflow.detect import (
    all_of,
    check_detectors,
    default_detectors,
    detect,
    only,
    remap,
    vanishing,
    without,
)
from gradflow.errors import PipelineError, RecordInputError
from gradflow.pipelines import Pipeline, flow
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType, Role, issue_type
from tests.detect.builders import Layer, decaying, flow_record
from tests.samples import make_issue

RECORD = decaying(5, 1e-3)


def finds(*issues: Issue):
    """A detector that reports just these."""

    def detector(record: FlowRecord) -> Iterable[Issue]:
        return issues

    return detector


TYPES = [*IssueType, issue_type("OUTLIERS"), issue_type("ASLEEP")]
ISSUES = st.lists(
    st.builds(
        make_issue,
        st.sampled_from(["fc0", "fc1", "fc2", "elsewhere"]),
        st.sampled_from(TYPES),
        st.sampled_from(list(IssueSeverity)),
        description=st.sampled_from(["one", "two"]),
    ),
    max_size=8,
)


@given(ISSUES, st.randoms())
def test_order_of_detectors_does_not_matter(issues: list[Issue], draw: random.Random) -> None:
    shuffled = draw.sample(issues, len(issues))
    assert detect(RECORD, [finds(i) for i in issues]) == detect(RECORD, [finds(i) for i in shuffled])


@given(ISSUES)
def test_one_issue_for_each_layer_and_type_gravest_first(issues: list[Issue]) -> None:
    found = detect(RECORD, finds(*issues))
    keys = [(i.layer, i.issue_type) for i in found]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {(i.layer, i.issue_type) for i in issues}
    assert [i.severity.rank for i in found] == sorted((i.severity.rank for i in found), reverse=True)
    for issue in found:
        alike = [i for i in issues if (i.layer, i.issue_type) == (issue.layer, issue.issue_type)]
        assert issue.severity == max(i.severity for i in alike)


@given(ISSUES)
def test_only_and_its_complement_give_the_whole(issues: list[Issue]) -> None:
    part = list(only(finds(*issues), "fc*")(RECORD))
    rest = list(only(finds(*issues), lambda name: not name.startswith("fc"))(RECORD))
    assert sorted(map(str, part + rest)) == sorted(map(str, issues))


@given(ISSUES, st.sets(st.sampled_from(TYPES)))
def test_without_leaves_out_just_those(issues: list[Issue], types: set[IssueType]) -> None:
    assert list(without(finds(*issues), *types)(RECORD)) == [i for i in issues if i.issue_type not in types]


@given(ISSUES)
def test_remap_by_mapping_and_by_function_agree(issues: list[Issue]) -> None:
    mapping = {IssueSeverity.LOW: IssueSeverity.HIGH, IssueSeverity.CRITICAL: IssueSeverity.INFO}
    by_mapping = list(remap(finds(*issues), mapping)(RECORD))
    by_function = list(remap(finds(*issues), lambda i: mapping.get(i.severity, i.severity))(RECORD))
    assert by_mapping == by_function
    assert by_mapping == [attrs.evolve(i, severity=mapping.get(i.severity, i.severity)) for i in issues]


def test_merged_issues_keep_actions_and_metrics_of_both() -> None:
    grave = make_issue(
        "fc1",
        recommended_actions=("a",),
        metrics={"x": 1},
        evidence=Evidence(roles=Role.STARVED, num_calls=3),
    )
    light = make_issue(
        "fc1",
        severity=IssueSeverity.LOW,
        recommended_actions=("b", "a"),
        metrics={"x": 2, "y": 3},
        evidence=Evidence(roles=Role.ABSORBING, origin="fc2", growth=2.0, num_calls=2),
    )
    (issue,) = detect(RECORD, [finds(light), finds(grave)])
    assert issue.severity is IssueSeverity.CRITICAL
    assert issue.recommended_actions == ("a", "b")
    assert dict(issue.metrics) == {"x": 1, "y": 3}
    both = (Role.STARVED, Role.ABSORBING)
    assert issue.evidence == Evidence(roles=both, origin="fc2", growth=2.0, num_calls=3)


def test_of_what_becomes_of_a_gradient_merged_issues_keep_what_the_graver_tells() -> None:
    blocked = make_issue("fc1", evidence=Evidence(roles=Role.BLOCKED, origin="fc2"))
    silent = make_issue(
        "fc1", severity=IssueSeverity.LOW, evidence=Evidence(roles=(Role.PARTLY_SILENT, Role.STARVED))
    )
    (issue,) = detect(RECORD, [finds(silent), finds(blocked)])
    assert issue.evidence == Evidence(roles=(Role.BLOCKED, Role.STARVED), origin="fc2")


def test_all_of_reports_what_any_reports() -> None:
    one, two = make_issue("fc1"), make_issue("fc2")
    assert list(all_of(finds(one), finds(two))(RECORD)) == [one, two]


def test_only_takes_several_globs() -> None:
    issues = [make_issue(name) for name in ("encoder.0", "decoder.0", "head")]
    assert [i.layer for i in only(finds(*issues), ["encoder.*", "head"])(RECORD)] == ["encoder.0", "head"]


def test_default_detectors_find_nothing_in_an_empty_record() -> None:
    assert detect(FlowRecord(steps=0, losses=np.empty(0), layers=(), parameters=())) == ()
    assert len(default_detectors()) > len(IssueType)


def test_a_pipeline_is_a_detector_and_pipelines_add_up() -> None:
    quick = Pipeline("quick", [vanishing()])
    both = quick + finds(make_issue("fc9", severity=IssueSeverity.INFO))
    assert quick(RECORD) == detect(RECORD, vanishing()) == detect(RECORD, quick)
    assert detect(RECORD, both)[-1].layer == "fc9"
    assert (quick + Pipeline("deep", [], detail="full")).detail == "full"
    assert (quick + flow()).name == "quick+flow"
    assert [i.layer for i in detect(RECORD, flow())] == [i.layer for i in detect(RECORD)]


def test_thresholds_of_the_flow_pipeline_reach_the_detectors() -> None:
    mild = decaying(4, 0.2)
    assert not detect(mild, flow())
    assert detect(mild, flow(vanishing_threshold=1e-1))


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("vanishing", "expected a pipeline, a detector .* got str"),
        (3, "or an iterable of detectors, got int"),
        ({"a": 1}, "got dict"),
        (Pipeline, "got the class Pipeline. Make one first"),
        ([vanishing(), "dead"], "expected every detector to be a function .* got 'dead'"),
        ([Pipeline], "A factory must be called"),
    ],
)
def test_wrong_pipelines_are_told_how_to_mend_them(pipeline: Any, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        detect(RECORD, pipeline)


def test_a_detector_that_returns_no_issues_is_named() -> None:
    with pytest.raises(PipelineError, match=r"vanishing returned function.*must be called first"):
        detect(RECORD, vanishing)
    with pytest.raises(PipelineError, match=r"returned int; expected an iterable of Issue"):
        detect(RECORD, lambda record: 3)
    with pytest.raises(PipelineError, match="gave str 'x'; expected only Issue"):
        detect(RECORD, lambda record: ["x"])


@pytest.mark.parametrize("wrong", [{"issue_type": "OUTLIERS"}, {"severity": "HIGH"}, {"issue_type": None}])
def test_an_issue_of_no_type_or_severity_is_told_with_its_detector(wrong: Any) -> None:
    def careless(record: FlowRecord) -> Iterable[Issue]:
        return [attrs.evolve(make_issue(), **wrong)]

    with pytest.raises(PipelineError, match=r"careless gave an issue of type .*issue_type\("):
        detect(RECORD, careless)


def test_own_types_are_sorted_behind_the_seven_and_merged_by_value() -> None:
    own = [make_issue("fc1", issue_type("OUTLIERS"), recommended_actions=(str(i),)) for i in range(2)]
    found = detect(RECORD, finds(*own, make_issue("fc1", issue_type("ASLEEP")), make_issue("fc1")))
    assert [i.issue_type.value for i in found] == ["VANISHING", "ASLEEP", "OUTLIERS"]
    assert found[2].recommended_actions == ("0", "1")
    assert [i.issue_type.value for i in without(finds(*found), issue_type("OUTLIERS"))(RECORD)] == [
        "VANISHING",
        "ASLEEP",
    ]


def test_the_record_comes_first() -> None:
    with pytest.raises(RecordInputError, match="detect: expected a FlowRecord, got list"):
        detect([vanishing()], RECORD)  # type: ignore[arg-type]


def test_diagnose_tells_a_wrong_pipeline_before_it_runs() -> None:
    with pytest.raises(PipelineError, match="^diagnose: expected a pipeline, a detector .* got int"):
        gf.diagnose(None, None, pipeline=5)  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="^diagnose_custom: expected a pipeline, a detector .* got int"):
        gf.diagnose_custom(None, None, pipeline=5)  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="^Pipeline: expected a pipeline, a detector .* got int"):
        Pipeline("five", 5)  # type: ignore[arg-type]


def one_line(record: FlowRecord) -> list[str]:
    return [f"{len(record)} layer calls"]


def test_summaries_tell_lines_and_add_up() -> None:
    one = Pipeline("one", [], summaries=one_line)
    two = one + Pipeline(
        "two", [], summaries=[lambda record: "first\nsecond", one_line, lambda record: ["", "a"]]
    )
    assert one.lines(RECORD) == ("5 layer calls",)
    assert two.lines(RECORD) == ("5 layer calls", "first", "second", "", "a")
    assert (flow() + two).lines(RECORD) == two.lines(RECORD)
    assert (one + vanishing()).lines(RECORD) == one.lines(RECORD)
    assert flow().lines(RECORD) == ()


@pytest.mark.parametrize("wrong", ["text", 3, [one_line, 3], [Pipeline]])
def test_what_are_no_summaries_is_refused(wrong: Any) -> None:
    with pytest.raises(PipelineError, match="Pipeline: expected summaries to be functions from a FlowRecord"):
        Pipeline("wrong", [], summaries=wrong)


@pytest.mark.parametrize("told", [None, 3, [1], ["a", b"b"]])
def test_a_summary_that_gives_no_lines_is_named(told: Any) -> None:
    def wordless(record: FlowRecord) -> Any:
        return told

    with pytest.raises(PipelineError, match="summary .*wordless returned .*; expected lines of text"):
        Pipeline("wrong", [], summaries=wordless).lines(RECORD)


def test_wrong_arguments_of_combinators() -> None:
    wrong: Any = 3
    given_text: Any = lambda issue: "HIGH"  # noqa: E731
    with pytest.raises(PipelineError, match="only: expected a glob"):
        only(vanishing(), wrong)
    with pytest.raises(PipelineError, match="without: expected members of IssueType, got 3"):
        without(vanishing(), wrong)
    with pytest.raises(PipelineError, match="remap: expected a mapping of severities"):
        remap(vanishing(), wrong)
    with pytest.raises(PipelineError, match="remap: expected an IssueSeverity for 'fc0', got 'HIGH'"):
        list(remap(vanishing(), given_text)(RECORD))
    with pytest.raises(PipelineError, match="Pipeline: expected detail 'cheap' or 'full', got 'deep'"):
        Pipeline("p", [], detail="deep")
    with pytest.raises(PipelineError, match="expected every detector"):
        all_of(wrong)


def test_none_stands_for_the_default_detectors() -> None:
    assert len(check_detectors(None)) == len(default_detectors())
    assert not detect(flow_record(Layer(name="fc")))
