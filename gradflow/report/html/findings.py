"""What is wrong, as the page tells it: the headline, the causes, the issues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from gradflow.records import Cause, FlowRecord, Issue, IssueSeverity, TrialsRecord
from gradflow.report.html.curves import chart
from gradflow.report.html.pieces import Places, badge, facts, list_of, number, section
from gradflow.report.html.style import NAMES
from gradflow.report.wording import (
    cause_title,
    explaining,
    healthy_layers,
    layer_label,
    loss_line,
    model_line,
    serious_issues,
    severity_counts,
    trials_facts,
    trials_line,
    verdict,
)

MAX_EXPLAINED = 24
MAX_OPEN = 12  # issues that are not folded away
MAX_EVIDENCE = 100  # issues with their numbers and every action; those of more are in the JSON


def headline(record: FlowRecord, issues: Sequence[Issue], causes: Sequence[Cause], places: Places) -> str:
    """Return what is wrong, where it starts and what to do first."""
    serious = serious_issues(issues)
    worst = max((issue.severity for issue in serious), default=None)
    counts = " ".join(badge(f"{count} {s.value}", s) for s, count in severity_counts(issues))
    counts = counts or badge("HEALTHY", None)
    first = causes[0].issues[0] if causes and causes[0].issues else serious[0] if serious else None
    told = ""
    if first is not None and serious:
        mechanism = causes[0].mechanism if causes else first.description
        told = f"<p>{escape(mechanism)}</p>"
        told += f'<p class="starts">Starts in {_link(first.layer, places)}.</p>'
        if first.recommended_actions:
            told += f'<p class="fix"><b>Change first:</b> {escape(first.recommended_actions[0])}</p>'
    healthy = f"{len(healthy_layers(record, issues))} of {len(record.layers)} layer calls have no issue"
    answer = verdict(issues, causes, record)
    return (
        f'<header class="card verdict {NAMES[worst]}">'
        f'<div class="eyebrow">gradflow · {escape(model_line(record))}</div>'
        f"<h1>{escape(answer[0].upper() + answer[1:])}</h1>{told}"
        f'<p>{counts} <span class="soft">{escape(healthy)} · loss over {record.steps} steps: '
        f"{escape(loss_line(record))}</span></p></header>"
    )


def _link(layer: str, places: Places) -> str:
    """Return a layer's name as the way to its row in the table, where it has one."""
    name = f"<code>{escape(layer_label(layer))}</code>"
    return f'<a href="#layer-{places.layers[layer]}">{name}</a>' if layer in places.layers else name


def causes_section(causes: Sequence[Cause], places: Places, trials: TrialsRecord | None = None) -> str:
    """Return every cause with its evidence, and with what fixes did, where they were tried."""
    how = f'<p class="soft">{escape(trials_line(trials))}</p>' if causes and trials is not None else ""
    cards = [_cause(i, cause, places, trials) for i, cause in enumerate(causes, start=1)]
    return section("Causes", how + "".join(cards), "causes")


def _tried(cause: Cause, trials: TrialsRecord | None) -> str:
    """Return what trials say of a cause: the best remedy, both loss curves and its code, then the others."""
    told = [f"{label}: {text}" for label, text in trials_facts(cause, trials)]
    best = None if trials is None else trials.best(cause)
    if best is None:
        return list_of(told) if told else ""
    with np.errstate(all="ignore"):
        curves = [("without it", best.losses_without.mean(1)), ("with it", best.losses_with.mean(1))]
    drawn = chart("Loss over steps, mean over seeds", curves)
    others = list_of(told[1:]) if told[1:] else ""
    return (
        f'<p class="fix"><b>Tried:</b> {escape(told[0])}</p>{drawn}'
        f'<pre class="mono">{escape(best.code)}</pre>{others}'
    )


def _cause(place: int, cause: Cause, places: Places, trials: TrialsRecord | None) -> str:
    worst = max((issue.severity for issue in cause.issues), default=IssueSeverity.INFO)
    share = 0.0 if math.isnan(cause.confidence) else 100 * min(max(0.0, cause.confidence), 1.0)
    evidence = list_of(cause.evidence) if cause.evidence else ""
    explained = " ".join(
        badge(f"{i.issue_type.value} {layer_label(i.layer)}", i.severity, "badge hollow")
        for i in cause.issues[:MAX_EXPLAINED]
    )
    more = len(cause.issues) - MAX_EXPLAINED
    return (
        f'<div class="card side {NAMES[worst]}"><h3>{place}. {escape(cause.issue_type.value)} in '
        f"{_link(cause.layer, places)}</h3><p>{escape(cause.mechanism)}</p>"
        f'<p class="soft">Confidence {cause.confidence:.2f} <span class="bar">'
        f'<i style="width:{share:.0f}%"></i></span> {escape(cause.reason)}</p>'
        f"{_tried(cause, trials)}{evidence}"
        f'<p class="soft">Explains {explained}{f" and {more} more" if more > 0 else ""}</p></div>'
    )


def issues_section(issues: Sequence[Issue], places: Places, causes: Sequence[Cause] = ()) -> str:
    """Return every issue with its cause and what to change."""
    found = explaining(causes)
    cards = [_issue(i, s, places, found.get((s.layer, s.issue_type))) for i, s in enumerate(issues)]
    body = f'<div class="issues">{"".join(cards[:MAX_OPEN])}</div>'
    if (more := len(cards) - MAX_OPEN) > 0:
        rest = f'<details class="rest"><summary>{more} more</summary>{"".join(cards[MAX_OPEN:])}</details>'
        body += rest
    return section("Issues", body if cards else "", "issues")


def _issue(place: int, issue: Issue, places: Places, cause: Cause | None) -> str:
    with_evidence = place < MAX_EVIDENCE
    told = issue.recommended_actions[: None if with_evidence else 1]
    actions = f"<h4>What to change</h4>{list_of(told)}" if told else ""
    pairs = [(name, number(value)) for name, value in issue.metrics.items()] if with_evidence else []
    why = "" if cause is None else f'<p class="soft">Cause: {escape(cause_title(cause))}</p>'
    metrics = f"<details><summary>Evidence</summary>{facts(pairs)}</details>" if pairs else ""
    box = places.boxes.get(issue.layer)
    shown = "" if box is None else f'<a class="tool show" href="#issue-{place}">show in the picture</a>'
    return (
        f'<article class="card side issue {NAMES[issue.severity]}" id="issue-{place}" '
        f'data-box="{"" if box is None else box}" data-kind="{escape(issue.issue_type.value)}" '
        f'data-severity="{issue.severity.value}" data-name="{escape(layer_label(issue.layer))}">'
        f"<h3>{badge(issue.severity.value, issue.severity)} {escape(issue.issue_type.value)} in "
        f"{_link(issue.layer, places)}</h3>"
        f'<p class="soft">{escape(issue.layer_type)}, magnitude {number(float(issue.magnitude))} {shown}</p>'
        f"<p>{escape(issue.description)}</p>{why}{actions}{metrics}</article>"
    )
