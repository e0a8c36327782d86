"""Markdown of a report: what Markdown makes of it is what was meant, and it fits a comment."""

from __future__ import annotations

import html
import re

import attrs
import pytest

from gradflow.records import Cause, IssueSeverity, IssueType, Provenance
from gradflow.report import Report
from gradflow.report.text.markdown import MAX_LETTERS, escaped
from tests.samples import chain_record, make_issue, sick_chain

HOSTILE = "a|b *c* _d_ __init__ `e` ``f`` [g](h) <i> &lt; ~~j~~ $k$ \\ !l # m\n- n\n\n1. o"


def seen(markdown: str) -> str:
    """Return what a reader sees of Markdown."""
    page = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False}).render(markdown)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def test_a_sick_model_line_by_line() -> None:
    record, issues, causes = sick_chain()
    lines = Report(record=record, issues=issues, causes=causes).markdown().splitlines()
    assert lines[:16] == [
        "### gradflow: VANISHING in fc1, which explains 1 of 2 other issues",
        "",
        "Issues: 1 CRITICAL, 1 HIGH, 1 LOW. Healthy: 2 of 5 layer calls have no issue.",
        "",
        "Chain: 5 layer calls, 320 parameters; loss 2.31 -\\> 2.3; 20 steps, parameters held fixed (no "
        "optimizer given: what its steps do is not judged); train mode, cpu, float32, seed 0",
        "",
        "**1. [CRITICAL] VANISHING in `fc1`**, confidence 0.80: Every layer hands on one hundredth of its "
        "gradient.",
        "",
        "- Evidence: gain 0.01 in fc5",
        "- Evidence: gain 0.01 in fc4",
        "- **Change:** Use ReLU and He initialisation.",
        "- Explains 1 more issue(s)",
        "",
        "<details><summary>All 3 issue(s)</summary>",
        "",
        "**[CRITICAL] VANISHING in `fc1`** (Linear)",
    ]
    assert lines[-1] == "</details>"


def test_a_healthy_model() -> None:
    told = Report(record=chain_record()).markdown()
    assert told.startswith("### gradflow: no illness found\n\nIssues: none. Healthy: 5 of 5 layer calls")
    assert "<details>" not in told


def test_texts_are_shown_as_they_are() -> None:
    assert seen(f"- x: {escaped(HOSTILE)}") == "x: " + " ".join(HOSTILE.split())


@pytest.mark.parametrize("name", [HOSTILE, "`", "a`b``c", "|", " ", "<details>", "x" * 300])
def test_names_are_shown_as_they_are(name: str) -> None:
    record, _, causes = sick_chain()
    issue = make_issue(name, description=HOSTILE, layer_type="K<T>", recommended_actions=(HOSTILE,))
    cause = attrs.evolve(causes[0], layer=name, issues=(issue,), mechanism=HOSTILE, evidence=(HOSTILE,))
    provenance = Provenance(model=HOSTILE, notes=(HOSTILE,))
    record = attrs.evolve(record, provenance=provenance)
    report = Report(record=record, issues=[issue], causes=[cause], lines=["```", HOSTILE, "````"])
    text, flat, shown = seen(report.markdown()), " ".join(HOSTILE.split()), " ".join(name.split())
    assert f"[CRITICAL] VANISHING in {shown}".rstrip() in text
    assert text.count(flat) >= 7
    assert "Note: " + flat in text
    assert "K<T>" in text


def test_it_fits_a_comment_whatever_was_found() -> None:
    issues = tuple(
        make_issue(f"layer{i}", IssueType.DEAD, IssueSeverity.HIGH, description="It is dead. " * 30)
        for i in range(500)
    )
    causes = [
        Cause(layer=i.layer, issue_type=i.issue_type, mechanism="It gets nothing. " * 20, issues=(i,),
              confidence=0.5, evidence=["a line of evidence"] * 30)
        for i in issues
    ]  # fmt: skip
    for some in (causes, ()):
        told = Report(record=chain_record(), issues=issues, causes=some, lines=["x" * 70] * 900).markdown()
        assert len(told) <= MAX_LETTERS
        assert told.startswith("### gradflow: DEAD in layer0")
        assert re.search(r"\.\.\. and \d+ more, see the JSON\.\n\n</details>\n$", told)
    assert len(told) > 0.8 * MAX_LETTERS
    told = Report(record=chain_record(), issues=issues, causes=causes).markdown()
    left_out = int(re.findall(r"\.\.\. and (\d+) more, see", told)[0])
    assert left_out == 500 - told.partition("<details>")[2].count("**[HIGH] DEAD")
    assert "more part(s), see the JSON." in told
