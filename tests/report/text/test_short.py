"""The short text: cause, evidence and fix on one screen, whatever was found."""

from __future__ import annotations

import attrs
import pytest

from gradflow.records import Cause, IssueSeverity, IssueType, Provenance, TrialsRecord
from gradflow.report import short_text
from gradflow.report.text.short import MAX_LINES, WIDTH
from tests.samples import chain_record, make_issue, sick_chain


def many(count: int, severity: IssueSeverity = IssueSeverity.HIGH) -> tuple:
    return tuple(
        make_issue(
            f"fc{i}",
            IssueType.DEAD,
            severity,
            description="No unit of it fires, for any sample of any batch. " * 4,
            recommended_actions=("Let some units fire by another initialisation. " * 3, "Or use GELU. " * 9),
        )
        for i in range(1, count + 1)
    )


def test_a_sick_model_line_by_line() -> None:
    record, issues, causes = sick_chain()
    issues = (attrs.evolve(issues[0], recommended_actions=("Use ReLU.", "Add a norm.")), *issues[1:])
    causes = [attrs.evolve(causes[0], issues=issues[:2])]
    lines = short_text(record, issues, causes).splitlines()
    assert lines[:12] == [
        "gradflow: VANISHING in fc1, which explains 1 of 2 other issues",
        "  Chain: 5 layer calls, 320 parameters; loss 2.31 -> 2.3; 20 steps, parameters held fixed (no",
        "  optimizer given: what its steps do is not judged)",
        "",
        "1. [CRITICAL] VANISHING in fc1 (Linear), confidence 0.80",
        "   Cause     Every layer hands on one hundredth of its gradient.",
        "   Measured  gain 0.01 in fc5",
        "   Change    1. Use ReLU.",
        "             2. Add a norm.",
        "   Explains  VANISHING in fc2",
        "2. [LOW] UNSTABLE in fc4 (Linear): The gradient at fc4 is as good as gone.",
        "",
    ]
    assert lines[-2].startswith("Issues: 1 CRITICAL, 1 HIGH, 1 LOW. Healthy: 2 of 5 layer calls")
    assert 'report.text("full")' in lines[-1]


def test_a_healthy_model() -> None:
    lines = short_text(chain_record(), (), ()).splitlines()
    assert lines[0] == "gradflow: no illness found"
    assert lines[-2] == "Issues: none. Healthy: 5 of 5 layer calls have no issue."
    assert len(lines) == 6


@pytest.mark.parametrize("with_causes", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 200])
@pytest.mark.parametrize("num_notes", [0, 1, 5])
def test_it_fits_one_screen_whatever_was_found(count: int, num_notes: int, with_causes: bool) -> None:
    issues = many(count)
    causes = [
        Cause(layer=i.layer, issue_type=i.issue_type, mechanism="It gets no gradient. " * 12, issues=(i,),
              confidence=0.8, evidence=("a (Linear): gradient norm 0", "b (Linear): none (cause)"))
        for i in issues
    ]  # fmt: skip
    provenance = Provenance(notes=["Something that one must know of these numbers. " * 9] * num_notes)
    record = chain_record(depth=3, provenance=provenance)
    text = short_text(record, issues, causes if with_causes else (), [f"line {i}" for i in range(60)])
    lines = text.splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= WIDTH
    assert "1. [HIGH] DEAD in fc1" in text
    assert "Let some units fire" in text
    assert ("Measured  b (Linear): none (cause)" in text) is with_causes
    if count == 200:
        assert any(line.startswith("... and ") for line in lines)


def test_graver_ones_get_more_room_and_those_left_out_are_counted() -> None:
    issues = many(40)
    lines = short_text(chain_record(depth=2), issues, ()).splitlines()
    told = sum(line[:1].isdigit() for line in lines)
    assert f"... and {40 - told} more." in lines
    assert 3 < told < 40
    assert sum(line.startswith("   Cause ") for line in lines) >= 1


def test_low_remarks_take_a_line_or_two_each() -> None:
    lines = short_text(chain_record(), many(3, IssueSeverity.LOW), ()).splitlines()
    assert sum("Cause " in line for line in lines) == 1  # the first is told whole
    assert lines[-4].startswith("   another initialisation. Let")


def test_summaries_are_shown_as_far_as_there_is_room() -> None:
    text = short_text(chain_record(), (), (), ["Outliers:", "  fc1  5%"])
    assert "\n\nOutliers:\n  fc1  5%\n\nIssues: none" in text
    long = short_text(chain_record(), (), (), [f"row {i}" for i in range(90)])
    assert len(long.splitlines()) == MAX_LINES
    assert "row 16\n... 73 more line(s)\n\nIssues:" in long


def test_trials_that_came_to_nothing_are_told() -> None:
    record, issues, causes = sick_chain()
    trials = TrialsRecord(
        trials=(), steps=50, seeds=3, optimizer="Adam", num_batches=0, notes=("No remedy is known.",)
    )
    told = "  Tried: 0 fix(es) tried on copies, 50 steps of Adam, up to 3 seed(s), on 0 batches. No remedy is"
    assert told in short_text(record, issues, causes, (), trials)
    assert "Tried" not in short_text(record, issues, causes)


def test_notes_are_told_up_to_two() -> None:
    record = chain_record(provenance=Provenance(notes=("one", "two", "three", "four")))
    text = short_text(record, (), ())
    assert "  Note: one\n  Note: two\n  ... and 2 more note(s)\n" in text
