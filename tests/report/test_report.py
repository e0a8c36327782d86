"""`Report`: the verdict, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from gradflow.records import FlowRecord, IssueSeverity
from gradflow.report import Report, report_html, report_text
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


def test_print_is_the_console_text() -> None:
    report = sick_report()
    assert str(report) == report_text(report.record, report.issues, report.causes)
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
    assert set(data) == {"format", "ok", "record", "issues", "causes"}
    assert (data["format"], data["ok"]) == (1, False)
    assert FlowRecord.from_json(json.dumps(data["record"])) == report.record
    assert [issue["layer"] for issue in data["issues"]] == ["fc1", "fc2", "fc4"]
    assert data["issues"][0]["severity"] == "CRITICAL"
    assert data["causes"][0]["issues"] == data["issues"][:2]


def test_html_is_written_as_the_page(tmp_path: Path) -> None:
    report, path = sick_report(), tmp_path / "report.html"
    report.to_html(path)
    assert path.read_text(encoding="utf-8") == report_html(report.record, report.issues, report.causes)
