"""What notebooks show of a report, a record, a graph and an issue: short, with the look of the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from gradflow.graph import LayerGraph
from gradflow.records import FlowRecord, Issue, IssueSeverity
from gradflow.report import svg
from gradflow.report.html.folding import MAX_BOXES, runs_of
from gradflow.report.html.pieces import middle, number
from gradflow.report.report import Report
from gradflow.report.wording import (
    healthy_layers,
    layer_label,
    loss_line,
    model_line,
    serious_issues,
    severity_counts,
    verdict,
)

MAX_ROWS = 12
# A notebook's own colours stay; those of severities are dark and light enough for either ground.
COLOURS = {
    IssueSeverity.CRITICAL: "#d43d3d", IssueSeverity.HIGH: "#c8620f", IssueSeverity.MEDIUM: "#a57c00",
    IssueSeverity.LOW: "#5b84b8", IssueSeverity.INFO: "#7a8699",
}  # fmt: skip
HEALTHY = "#2f8f68"


def notebook_html(value: Any) -> str:
    """Return a `Report`, `FlowRecord`, `LayerGraph` or `Issue` as a piece of HTML that stands alone.

    Raises:
        TypeError: for anything else.

    >>> record = FlowRecord(steps=1, losses=[0.5], layers=(), parameters=())
    >>> "No illness found" in notebook_html(Report(record=record))
    True
    """
    for kind, tell in _TELLERS.items():
        if isinstance(value, kind):
            return tell(value)
    raise TypeError(
        f"notebook_html: expected one of {', '.join(k.__name__ for k in _TELLERS)}, got {value!r}."
    )


def _card(colour: str, head: str, body: str) -> str:
    return (
        f'<div style="border:1px solid #8884;border-left:5px solid {colour};border-radius:8px;'
        f'padding:8px 14px;max-width:760px;font:13px/1.5 system-ui,sans-serif">'
        f'<div style="font-weight:650;font-size:15px;overflow-wrap:anywhere">{head}</div>{body}</div>'
    )


def _badge(text: str, colour: str) -> str:
    look = f"background:{colour};color:#fff;border-radius:99px;padding:1px 8px;font-size:11px;font-weight:650"
    return f'<span style="{look}">{escape(text)}</span>'


def _line(text: str) -> str:
    return f'<div style="opacity:0.75">{escape(text)}</div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts."""
    top = "".join(f'<th style="text-align:left">{escape(head)}</th>' for head in heads)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _report(report: Report) -> str:
    serious = serious_issues(report.issues)
    colour = COLOURS[max(issue.severity for issue in serious)] if serious else HEALTHY
    answer = verdict(report.issues, report.causes)
    counts = " ".join(_badge(f"{n} {s.value}", COLOURS[s]) for s, n in severity_counts(report.issues))
    healthy = (
        f"{len(healthy_layers(report.record, report.issues))} of {len(report.record)} layer calls healthy"
    )
    body = _line(f"{model_line(report.record)}; loss {loss_line(report.record)}; {healthy}")
    body += f"<div>{counts}</div>" if counts else ""
    firsts = [(c.mechanism, c.issues[0]) for c in report.causes if c.issues]
    firsts = firsts or [(issue.description, issue) for issue in serious[:1]]
    for told, issue in firsts[:3]:
        fix = issue.recommended_actions[0] if issue.recommended_actions else ""
        body += f"<p>{_head(issue)}: {escape(told)}{f'<br/><b>Change:</b> {escape(fix)}' if fix else ''}</p>"
    return _card(colour, escape(answer[0].upper() + answer[1:]), body)


def _head(issue: Issue) -> str:
    badge = _badge(issue.severity.value, COLOURS[issue.severity])
    name = escape(layer_label(issue.layer))
    return (
        f"{badge} <b>{escape(issue.issue_type.value)}</b> in <code>{name}</code> ({escape(issue.layer_type)})"
    )


def _issue(issue: Issue) -> str:
    actions = "".join(f"<li>{escape(action)}</li>" for action in issue.recommended_actions)
    body = f"<p>{escape(issue.description)}</p>{f'<ul>{actions}</ul>' if actions else ''}"
    return _card(COLOURS[issue.severity], _head(issue), body)


def _record(record: FlowRecord) -> str:
    runs = runs_of(record.layers, min(MAX_BOXES, MAX_ROWS))
    domain = svg.log_domain([layer.grad_rms for layer in record.layers])
    rows = []
    for name, calls in runs.items():
        last = calls[-1]
        types = ", ".join(dict.fromkeys(call.type for call in calls))
        line = svg.sparkline(last.grad_rms, domain, colour=COLOURS[IssueSeverity.LOW], width=110, height=22)
        told = types if len(calls) == 1 else f"{len(calls)} calls: {types[:40]}"
        rows.append(
            [f"<code>{escape(layer_label(name))}</code>", escape(told), line, number(middle(last.grad_rms))]
        )
    body = _line(f"{record.steps} steps, loss {loss_line(record)}")
    return _card(HEALTHY, escape(model_line(record)), body + _table(["", "", "gradient rms", "median"], rows))


def _graph(graph: LayerGraph) -> str:
    kinds: dict[str, int] = {}
    for node in graph.record.nodes:
        kinds[node.kind] = kinds.get(node.kind, 0) + 1
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    body = _line(f"{told}; {len(graph.record.edges)} edges, {len(graph.severed)} severed")
    names = [node.name for node in graph.record.nodes[:MAX_ROWS]]
    more = len(graph) - len(names)
    way = " → ".join(f"<code>{escape(name)}</code>" for name in names) + (
        f" … {more} more" if more > 0 else ""
    )
    return _card(HEALTHY, escape(f"LayerGraph ({graph.level})"), f"{body}<div>{way}</div>")


_TELLERS: Mapping[type, Any] = {Report: _report, FlowRecord: _record, LayerGraph: _graph, Issue: _issue}
