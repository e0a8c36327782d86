"""Types of issues of one's own, and what is said of wrong records, issues and causes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import gradflow as gf
from gradflow.detect import explain
from gradflow.errors import PipelineError, RecordInputError
from gradflow.records import (
    IssueType,
    OwnIssueType,
    check_causes,
    check_issues,
    check_record,
    issue_type,
    type_place,
)
from gradflow.report import Report
from tests.samples import chain_record, make_issue, sick_chain


def test_own_types_are_equal_by_value_and_known_by_name() -> None:
    own = issue_type("OUTLIERS")
    assert own == OwnIssueType("OUTLIERS")
    assert hash(own) == hash(OwnIssueType("OUTLIERS"))
    assert own != OwnIssueType("OTHERS")
    assert (own.name, own.value, repr(own)) == ("OUTLIERS", "OUTLIERS", "OwnIssueType('OUTLIERS')")
    assert pickle.loads(pickle.dumps(own)) == own
    assert gf.issue_type is issue_type
    assert gf.OwnIssueType is OwnIssueType


@pytest.mark.parametrize("member", list(IssueType))
def test_names_of_the_seven_give_the_seven(member: IssueType) -> None:
    assert issue_type(member.value) is member
    with pytest.raises(
        PipelineError, match=f"{member.value} is one of the seven .* IssueType.{member.value}"
    ):
        OwnIssueType(member.value)


@pytest.mark.parametrize("name", ["outliers", "", "OUT LIERS", "1ST", 3, None, "OUTLIERS\n"])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(PipelineError, match="expected a name in capitals, digits and underscores, got"):
        issue_type(name)


def test_own_types_are_sorted_behind_the_seven_by_name() -> None:
    types = [issue_type(name) for name in ("ZZ", "AA", "SATURATION", "VANISHING")]
    assert [t.value for t in sorted(types, key=type_place)] == ["VANISHING", "SATURATION", "AA", "ZZ"]


@pytest.mark.parametrize("wrong", [None, 5, "record", [chain_record()]])
def test_what_is_no_record_is_refused(wrong: Any) -> None:
    for name, call in (
        ("detect", lambda: gf.detect(wrong)),
        ("find_causes", lambda: gf.find_causes(wrong, ())),
        ("explain", lambda: explain(wrong, ())),
        ("Report", lambda: Report(record=wrong)),
    ):
        with pytest.raises(
            RecordInputError, match=rf"^{name}: expected a FlowRecord, got {type(wrong).__name__}: "
        ):
            call()


def test_a_report_in_the_place_of_its_record() -> None:
    with pytest.raises(RecordInputError, match="got Report: pass its `record`"):
        check_record("detect", Report(record=chain_record()))


@pytest.mark.parametrize("wrong", [None, 5, "issues", {}])
def test_what_are_no_issues_or_causes_is_refused(wrong: Any) -> None:
    got = type(wrong).__name__
    record = chain_record()
    for name, call in (
        ("find_causes", lambda: gf.find_causes(record, wrong)),
        ("explain", lambda: explain(record, wrong)),
        ("Report", lambda: Report(record=record, issues=wrong)),
    ):
        with pytest.raises(
            RecordInputError, match=f"^{name}: expected an iterable of Issue, got {got}: detect"
        ):
            call()
    with pytest.raises(
        RecordInputError, match=f"Report: expected an iterable of Cause, got {got}: find_causes"
    ):
        Report(record=record, causes=wrong)


def test_issues_and_causes_are_not_taken_for_each_other() -> None:
    record, issues, causes = sick_chain()
    assert check_issues("f", iter(issues)) == issues
    assert check_causes("f", list(causes)) == causes
    with pytest.raises(RecordInputError, match="Report: expected only Issue, got Cause"):
        Report(record=record, issues=causes)  # type: ignore[arg-type]
    with pytest.raises(RecordInputError, match="Report: expected only Cause, got Issue"):
        Report(record=record, causes=[make_issue()])  # type: ignore[list-item]
