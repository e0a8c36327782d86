"""What notebooks show: short, escaped, and the same facts as everywhere."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import attrs
import pytest

from gradflow.graph import LayerGraph
from gradflow.report import Report
from gradflow.report.notebook import MAX_ROWS, notebook_html
from tests.samples import chain_record, make_issue, sick_chain


def text_of(html: str) -> str:
    """Return the text of a piece of HTML; raises if it is not well-formed."""
    return " ".join("".join(ElementTree.fromstring(html).itertext()).split())


def test_a_report_tells_verdict_cause_and_fix() -> None:
    record, issues, causes = sick_chain()
    text = text_of(Report(record=record, issues=issues, causes=causes)._repr_html_())
    assert text.startswith("VANISHING in fc1, which explains 1 of 2 other issues")
    for fact in (
        "1 CRITICAL 1 HIGH 1 LOW",
        causes[0].mechanism,
        "Change: Use ReLU",
        "2 of 5 layer calls healthy",
    ):
        assert fact in text
    assert text_of(Report(record=record)._repr_html_()).startswith("No illness found")


def test_an_issue_tells_all_that_its_text_does() -> None:
    issue = make_issue("fc1")
    text = text_of(issue._repr_html_())
    assert text == f"CRITICAL VANISHING in fc1 (Linear){issue.description}{issue.recommended_actions[0]}"


def test_a_record_has_a_line_a_layer_and_runs_of_them_where_they_are_many() -> None:
    few = chain_record(3)._repr_html_()
    assert [name in text_of(few) for name in ("fc1", "fc2", "fc3")] == [True] * 3
    assert few.count("<tr>") == 4
    many = chain_record(500, 2, decay=0.9)._repr_html_()
    assert many.count("<tr>") <= MAX_ROWS + 1
    assert len(many) < 20_000


def test_a_graph_tells_its_size_and_first_nodes() -> None:
    flows = {f"fc{i}": 1.0 for i in range(20)} | {"loss": 1.0}
    names = list(flows)
    graph = LayerGraph.from_flows(flows, dict.fromkeys(zip(names, names[1:], strict=False), 1.0))
    text = text_of(graph._repr_html_())
    assert "20 layer, 1 loss; 20 edges, 0 severed" in text
    assert f"… {21 - MAX_ROWS} more" in text


def test_names_are_escaped() -> None:
    bad = "<script>x</script>"
    record = chain_record(1)
    record = attrs.evolve(record, layers=[attrs.evolve(record.layers[0], name=bad, type=bad)])
    issue = make_issue(bad, layer_type=bad, description=bad, recommended_actions=(bad,))
    graph = LayerGraph.from_flows({bad: 1.0, "loss": 1.0}, {(bad, "loss"): 1.0})
    for shown in (record, issue, Report(record=record, issues=[issue]), graph):
        html = shown._repr_html_()
        assert "<script" not in html
        assert bad in text_of(html)


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match="expected one of Report, FlowRecord, LayerGraph, Issue, got 3"):
        notebook_html(3)
