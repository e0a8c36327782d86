"""The text of a summary and the full text of a report, line by line."""

from __future__ import annotations

import attrs
import pytest

from gradflow.diagnosis import diagnose
from gradflow.records import EdgeRecord, GraphRecord, IssueSeverity, IssueType, NodeRecord, Provenance
from gradflow.report import full_text, summary_text
from gradflow.report.wording import healthy_layers, loss_line, measured_facts, verdict
from tests.pipelines.models import case
from tests.samples import chain_record, make_issue, sick_chain


def test_summary_has_the_lines_of_the_class_face() -> None:
    issues = (
        make_issue("fc1"),
        make_issue("fc2"),
        make_issue("fc3", IssueType.DEAD, IssueSeverity.LOW),
    )
    expected = [
        "[WARNING] Found 3 gradient issue(s):",
        "CRITICAL: 2 issue(s)",
        "LOW: 1 issue(s)",
        "",
        "Details:",
        "=" * 80,
    ]
    text = summary_text(issues)
    assert text.splitlines()[:6] == expected
    assert text.split("\n\n")[2:] == [str(issue) for issue in issues]


def test_summary_of_nothing_is_ok() -> None:
    assert summary_text([]) == "[OK] No gradient issues found."


def test_summary_shows_all_issues_unless_told_otherwise() -> None:
    issues = [make_issue(f"fc{i}") for i in range(30)]
    assert summary_text(issues).count("Description:") == 30
    short = summary_text(issues, limit=4)
    assert short.count("Description:") == 4
    assert short.endswith("\n... and 26 more.")
    assert "more." not in summary_text(issues[:4], limit=4)


def test_report_tells_the_verdict_then_causes_then_issues() -> None:
    record, issues, causes = sick_chain()
    lines = full_text(record, issues, causes).splitlines()
    assert lines[:8] == [
        "gradflow: VANISHING in fc1, which explains 1 of 2 other issues",
        "  model    Chain: 5 layer calls, 320 parameters",
        "  steps    20 steps, parameters held fixed (no optimizer given: what its steps do is not judged)",
        "  run      train mode, cpu, float32, seed 0",
        "  reverse  fused: no outer transform; detail: cheap",
        "  graph    not taken",
        "  loss     2.31 -> 2.3",
        "",
    ]
    assert lines[8:16] == [
        "Cause 1: VANISHING in fc1 (confidence 0.80)",
        "  Every layer hands on one hundredth of its gradient.",
        "  Confidence: the decay is the same at every layer",
        "  Evidence:",
        "    - gain 0.01 in fc5",
        "    - gain 0.01 in fc4",
        "  Explains: VANISHING in fc1, VANISHING in fc2",
        "",
    ]
    assert lines[16] == "[WARNING] Found 3 gradient issue(s):"
    assert lines[-1] == "Healthy: 2 of 5 layer calls have no issue."


def test_report_of_a_healthy_model() -> None:
    lines = full_text(chain_record(), (), ()).splitlines()
    assert lines[0] == "gradflow: no illness found"
    assert "[OK] No gradient issues found." in lines
    assert lines[-1] == "Healthy: 5 of 5 layer calls have no issue."


def test_a_cause_of_many_issues_names_the_first_of_them() -> None:
    record, _, causes = sick_chain()
    many = tuple(make_issue(f"fc{i}") for i in range(9))
    text = full_text(record, many, [attrs.evolve(causes[0], issues=many)])
    assert "VANISHING in fc5, and 3 more" in text
    assert "VANISHING in fc6," not in text


@pytest.mark.parametrize(
    ("issues", "causes", "expected"),
    [
        ((), (), "no illness found"),
        (
            (make_issue("a", severity=IssueSeverity.LOW),),
            (),
            "no illness found, 1 remark(s) of LOW or INFO",
        ),
        ((make_issue("", severity=IssueSeverity.MEDIUM),), (), "VANISHING in (model)"),
    ],
)
def test_verdict_without_causes(issues: tuple, causes: tuple, expected: str) -> None:
    assert verdict(issues, causes) == expected


def test_verdict_of_one_issue_and_its_cause() -> None:
    _, issues, causes = sick_chain()
    assert verdict(issues[:1], [attrs.evolve(causes[0], issues=issues[:1])]) == "VANISHING in fc1"


def test_facts_tell_what_a_reader_must_know_to_trust_the_numbers() -> None:
    provenance = Provenance(
        model="Net",
        requested_steps=20,
        mode="eval",
        optimizer="Adam",
        learning_rates=(1e-3, 1e-4),
        transform="vjp",
        detail="full",
        notes=("the loss was NaN in step 3",),
    )
    node = NodeRecord(name="a", kind="layer", grad_norm=[1.0], input_grad_norm=[1.0], effective_rank=[1.0])
    graph = GraphRecord(
        nodes=[node], edges=[EdgeRecord(source="a", target="a", flow=[1.0, 2.0])], steps=[0, 1]
    )
    record = chain_record(steps=7, provenance=provenance, graph_record=graph)
    assert measured_facts(record) == [
        (
            "steps",
            "7 steps (of 20 asked for: the batches ended), "
            "a copy of the parameters stepped by a copy of Adam (lr 0.001, 0.0001)",
        ),
        ("run", "eval mode, cpu, no dtype, no seed"),
        ("reverse", "vjp; detail: full"),
        ("graph", "flow on every edge in 2 steps, 1 nodes, 1 edges"),
        ("note", "the loss was NaN in step 3"),
    ]
    topology = chain_record(graph_record=attrs.evolve(graph, steps=()))
    assert ("graph", "topology only, 1 nodes, 1 edges") in measured_facts(topology)


def test_loss_line_counts_steps_without_a_finite_loss() -> None:
    record = chain_record(steps=3, losses=[1.0, float("nan"), 0.5])
    assert loss_line(record) == "1 -> 0.5 (not finite in 1 of 3 steps)"
    assert loss_line(chain_record(depth=0, steps=0, losses=[])) == "none"


def test_healthy_layers_are_those_without_an_issue() -> None:
    record, issues, _ = sick_chain()
    assert healthy_layers(record, issues) == ("fc3", "fc5")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("encoder", ["attention", "0.layers.0.self_attn"]),
        ("lstm", ["recurrent", "rnn"]),
        ("actor-critic", ["Policy:", "entropy"]),
        ("perceptron", []),
    ],
)
def test_what_special_measurements_saw_is_told_where_nothing_is_sick_too(name: str, told: list[str]) -> None:
    given = case(name)
    text = diagnose(given.model, [given.batch] * 2, given.loss, seed=0).text("full")
    tail = text.partition("=" * 80)[2] or text.partition("[OK]")[2]
    rows = [line.split()[0] for line in tail.splitlines() if line.split()]
    assert [word for word in told if word in rows] == told
    assert ("attention" in rows, "recurrent" in rows, "Policy:" in rows).count(True) == bool(told)
