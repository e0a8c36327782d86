"""Annotations of GitHub Actions: one line each, escaped as the runner reads them."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from gradflow.records import IssueSeverity
from gradflow.report import Report
from tests.samples import chain_record, make_issue, sick_chain


def read(line: str) -> tuple[str, dict[str, str], str]:
    """Return level, properties and message of a command, as GitHub's runner takes it apart."""
    assert line.startswith("::")
    head, _, message = line[2:].partition("::")
    level, _, told = head.partition(" ")

    def plain(text: str, escapes: str) -> str:
        for escape in escapes.split():
            text = text.replace(escape, chr(int(escape[1:], 16)))
        return text.replace("%25", "%")

    pairs = [pair.partition("=") for pair in told.split(",")]
    return level, {k: plain(v, "%0D %0A %3A %2C") for k, _, v in pairs}, plain(message, "%0D %0A")


def test_a_line_for_each_issue_with_level_place_title_and_facts() -> None:
    record, issues, causes = sick_chain()
    report = Report(record=record, issues=issues, causes=causes)
    first, second, third = map(read, report.annotations("src/net.py", line=7).splitlines())
    assert first == (
        "error",
        {"file": "src/net.py", "line": "7", "title": "gradflow: [CRITICAL] VANISHING in fc1 (Linear)"},
        "The gradient at fc1 is as good as gone.\n"
        "Cause: VANISHING in fc1, confidence 0.80: Every layer hands on one hundredth of its gradient.\n"
        "Evidence: gain 0.01 in fc5; median_rms 2.34e-09\n"
        "Change: Use ReLU and He initialisation.",
    )
    assert second[0] == "error"
    assert third[::2] == ("notice", "The gradient at fc4 is as good as gone.\nEvidence: median_rms 2.34e-09")
    assert "file" not in read(report.annotations().splitlines()[0])[1]
    assert "line" not in read(report.annotations(Path("net.py")).splitlines()[0])[1]


@pytest.mark.parametrize(
    ("severity", "level"),
    [*zip(IssueSeverity, ["error", "error", "warning", "notice", "notice"], strict=True)],
)
def test_levels(severity: IssueSeverity, level: str) -> None:
    report = Report(record=chain_record(), issues=[make_issue(severity=severity)])
    assert read(report.annotations())[0] == level


HOSTILE = "50% of a,b: c::d%0A=\r\n::error::e"


def test_hostile_names_break_nothing_out() -> None:
    issue = make_issue(HOSTILE, description=HOSTILE, recommended_actions=(HOSTILE,), layer_type=HOSTILE)
    text = Report(record=chain_record(), issues=[issue]).annotations(f"dir\\{HOSTILE}")
    assert "\n" not in text
    assert "\r" not in text
    level, properties, message = read(text)
    assert level == "error"
    assert properties["file"] == f"dir/{HOSTILE}"
    assert properties["title"] == f"gradflow: [CRITICAL] VANISHING in {HOSTILE} ({HOSTILE})"
    assert message == f"{HOSTILE}\nEvidence: median_rms 2.34e-09\nChange: {HOSTILE}"


def test_without_issues_one_notice_and_an_error_where_nothing_was_measured() -> None:
    level, properties, message = read(Report(record=chain_record()).annotations("net.py"))
    assert (level, properties["title"]) == ("notice", "gradflow: no illness found")
    assert message == "Chain: 5 layer calls, 320 parameters; loss 2.31 -> 2.3"
    failed = chain_record(steps=0, depth=0)
    failed = attrs.evolve(failed, provenance=attrs.evolve(failed.provenance, notes=("It raised.",)))
    level, properties, _ = read(Report(record=failed).annotations())
    assert (level, properties["title"]) == ("error", "gradflow: nothing could be measured")
