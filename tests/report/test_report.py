"""`Report`: the verdict, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from gradflow.errors import RecordInputError
from gradflow.records import FlowRecord, IssueSeverity, issue_type
from gradflow.report import Report, full_text, report_html, short_text
from tests.samples import chain_record, make_issue, sick_chain


def sick_report() -> Report:
    record, issues, causes = sick_chain()
    return Report(record=record, issues=issues, causes=causes)


@pytest.mark.parametrize(
    ("severity", "ok"),
    [
        (IssueSeverity.CRITICAL, False),
        (IssueSeverity.HIGH, False),
        (IssueSeverity.MEDIUM, False),
        (IssueSeverity.LOW, True),
        (IssueSeverity.INFO, True),
    ],
)
def test_ok_is_no_issue_of_medium_or_above(severity: IssueSeverity, ok: bool) -> None:
    assert Report(record=chain_record()).ok
    assert Report(record=chain_record(), issues=[make_issue(severity=severity)]).ok is ok


def test_print_is_the_short_text() -> None:
    report = sick_report()
    parts = (report.record, report.issues, report.causes, report.lines)
    assert str(report) == report.text() == report.text("short") == short_text(*parts)
    assert report.text("full") == full_text(*parts)
    with pytest.raises(ValueError, match="which must be short or full, got 'long'"):
        report.text("long")  # type: ignore[arg-type]
    assert repr(report) == "Report(Chain: sick, 3 issues, 1 causes)"
    assert repr(Report(record=chain_record())) == "Report(Chain: ok, 0 issues, 0 causes)"


def test_report_is_frozen_and_holds_tuples() -> None:
    report = Report(record=chain_record(), issues=[make_issue()])
    assert isinstance(report.issues, tuple)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        report.issues = ()  # type: ignore[misc]
    assert report == Report(record=chain_record(), issues=[make_issue()])


def test_json_holds_everything(tmp_path: Path) -> None:
    report, path = sick_report(), tmp_path / "report.json"
    text = report.to_json(path)
    assert path.read_text(encoding="utf-8") == text
    data = json.loads(text)
    assert set(data) == {"format", "ok", "record", "issues", "causes", "lines", "trials"}
    assert (data["format"], data["ok"]) == (1, False)
    assert FlowRecord.from_json(json.dumps(data["record"])) == report.record
    assert [issue["layer"] for issue in data["issues"]] == ["fc1", "fc2", "fc4"]
    assert data["issues"][0]["severity"] == "CRITICAL"
    assert data["causes"][0]["issues"] == data["issues"][:2]


def test_html_is_written_as_the_page(tmp_path: Path) -> None:
    report, path = sick_report(), tmp_path / "report.html"
    report.to_html(path)
    page = report_html(report.record, report.issues, report.causes, report.lines)
    assert path.read_text(encoding="utf-8") == page


def test_json_comes_back(tmp_path: Path) -> None:
    report, path = attrs.evolve(sick_report(), lines=["a", "b"]), tmp_path / "report.json"
    text = report.to_json(path)
    assert Report.from_json(text) == Report.from_json(path) == Report.from_json(str(path)) == report
    assert Report.from_json(path).to_json() == text


def test_lines_are_shown_in_the_text_and_on_the_page_and_nothing_is_there_without() -> None:
    report = attrs.evolve(sick_report(), lines="Outliers:\n  fc1 <b>  5%")
    assert report.lines == ("Outliers:", "  fc1 <b>  5%")
    assert "\n\nOutliers:\n  fc1 <b>  5%\n\nHealthy: " in report.text("full")
    assert "\n\nOutliers:\n  fc1 <b>  5%\n\nIssues: " in str(report)
    page = report_html(report.record, (), (), report.lines)
    assert '<pre class="mono">Outliers:\n  fc1 &lt;b&gt;  5%</pre>' in page
    assert "<pre" not in report_html(report.record, (), ())
    assert report.text("full").replace("Outliers:\n  fc1 <b>  5%\n\n", "") == sick_report().text("full")


@pytest.mark.parametrize("wrong", [None, 3, [3], ["a", None]])
def test_what_are_no_lines_is_refused(wrong: Any) -> None:
    with pytest.raises(RecordInputError, match="Report: expected lines of text, got"):
        Report(record=chain_record(), lines=wrong)


def test_own_types_of_issues_are_shown_everywhere(tmp_path: Path) -> None:
    record, _, causes = sick_chain()
    issue = make_issue("fc1", issue_type("OUTLIERS"))
    cause = attrs.evolve(causes[0], issue_type=issue.issue_type, issues=(issue,))
    report = Report(record=record, issues=[issue], causes=[cause])
    assert str(report).startswith("gradflow: OUTLIERS in fc1\n")
    assert "[CRITICAL] OUTLIERS in fc1 (Linear)" in str(report)
    assert "Cause 1: OUTLIERS in fc1" in report.text("full")
    report.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("OUTLIERS") >= 3
    assert json.loads(report.to_json())["issues"][0]["issue_type"] == "OUTLIERS"
