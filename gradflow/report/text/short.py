"""The short text of a report: verdict, and of each cause where, what was measured and what to change.

It fits one screen. What it leaves out is in the full text, in the JSON and on the page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import attrs

from gradflow.records import Cause, FlowRecord, Issue, TrialsRecord
from gradflow.report.wording import (
    healthy_layers,
    layer_label,
    loss_line,
    measured_facts,
    model_line,
    severity_counts,
    trials_facts,
    verdict,
)

WIDTH = 100  # letters in a line
MAX_LINES = 25  # of the whole text
MAX_ACTIONS = 2
MAX_NOTES = 2
MAX_EXPLAINED = 4
MAX_KEPT = 6  # lines kept for what follows a cause that is told whole
_INDENT = " " * 13  # below a label such as `   Measured  `
_MORE = 'Everything: report.text("full"), or gradflow diagnose --verbose.'


@attrs.frozen
class _Item:
    """What the text tells of at one place: a cause with its first issue, or an issue without a cause."""

    issue: Issue
    cause: Cause | None = None
    tried: str = ""  # what the best fix did


def short_text(
    record: FlowRecord,
    issues: Sequence[Issue],
    causes: Sequence[Cause],
    lines: Sequence[str] = (),
    trials: TrialsRecord | None = None,
) -> str:
    """Return a report in at most `MAX_LINES` lines of `WIDTH` letters.

    Args:
        record: what was measured.
        issues: in the order to be shown.
        causes: what explains them.
        lines: what the pipeline's summaries tell of the record; as many as there is room for.
        trials: what became of the model when fixes were tried.
    """
    head, items = _head(record, issues, causes), _items(issues, causes, trials)
    tail = ["", _counts(record, issues), _MORE]
    body = _body(items, MAX_LINES - len(head) - len(tail))
    room = MAX_LINES - len(head) - len(body) - len(tail)
    return "\n".join([*head, *body, *_cut(lines, room), *tail])


def _head(record: FlowRecord, issues: Sequence[Issue], causes: Sequence[Cause]) -> list[str]:
    facts = measured_facts(record)
    how = "; ".join(text for label, text in facts if label in ("steps", "loop"))
    notes = [text for label, text in facts if label == "note"]
    head = [f"gradflow: {verdict(issues, causes, record)}"]
    head += _wrapped(f"  {model_line(record)}; loss {loss_line(record)}; {how}", "  ")
    for note in notes[:MAX_NOTES]:
        head += _clipped(f"  Note: {note}", "  ", most=2)
    more = len(notes) - MAX_NOTES
    return [*head, f"  ... and {more} more note(s)"] if more > 0 else head


def _items(
    issues: Sequence[Issue], causes: Sequence[Cause], trials: TrialsRecord | None = None
) -> list[_Item]:
    explained = {(i.layer, i.issue_type) for cause in causes for i in cause.issues}
    alone = [issue for issue in issues if (issue.layer, issue.issue_type) not in explained]
    best = [next((f"[{verdict}] {text}" for verdict, text in trials_facts(c, trials)), "") for c in causes]
    told = [_Item(c.issues[0], c, tried) for c, tried in zip(causes, best, strict=True) if c.issues]
    return told + [_Item(issue) for issue in alone]


def _body(items: Sequence[_Item], room: int) -> list[str]:
    """Return the items: whole while there is room, then a line or two each, then their number."""
    body: list[str] = []
    for number, item in enumerate(items, start=1):
        left = room - len(body) - (number < len(items))  # one line is kept for the number of those left out
        kept = min(2 * (len(items) - number), MAX_KEPT)  # and some for those that follow
        grave = item.issue.severity.is_serious
        forms = [_whole(number, item, most) for most in (MAX_ACTIONS, 1)] if grave or number == 1 else []
        fitting = next((form for form in forms if len(form) <= left - kept), None)
        if fitting is None and number == 1:
            fitting = forms[-1][:left]
        elif fitting is None and len(brief := _brief(number, item)) <= left:
            fitting = brief
        if fitting is None:
            body.append(f"... and {len(items) - number + 1} more.")
            break
        body += fitting
    return body


def _whole(number: int, item: _Item, most: int) -> list[str]:
    """Return an item with where, what was measured, `most` of what to change, and what it explains."""
    cause, issue = item.cause, item.issue
    sure = "" if cause is None else f", confidence {cause.confidence:.2f}"
    lines = ["", f"{number}. {_title(item)}{sure}"]
    lines += _labelled("Cause", issue.description if cause is None else cause.mechanism)
    if cause is not None and cause.evidence:
        here = [line for line in cause.evidence if line.endswith("(cause)")]
        lines += _labelled("Measured", (here or list(cause.evidence))[0])
    actions = issue.recommended_actions[:most]
    for place, action in enumerate(actions, start=1):
        number_of = f"{place}. " if len(actions) > 1 else ""
        lines += _labelled("Change" if place == 1 else "", number_of + action)
    if item.tried:
        lines += _labelled("Tried", item.tried)
    if cause is not None and (others := cause.issues[1:]):
        named = [f"{i.issue_type.value} in {layer_label(i.layer)}" for i in others[:MAX_EXPLAINED]]
        more = len(others) - len(named)
        lines += _labelled("Explains", ", ".join(named) + (f", and {more} more" if more else ""))
    return lines


def _brief(number: int, item: _Item) -> list[str]:
    issue = item.issue
    told = issue.recommended_actions[0] if issue.recommended_actions else issue.description
    return _clipped(f"{number}. {_title(item)}: {told}", "   ", most=2)


def _title(item: _Item) -> str:
    issue, at = item.issue, item.cause or item.issue
    kind = f" ({issue.layer_type})" if issue.layer == at.layer and issue.layer_type else ""
    return f"[{issue.severity.value}] {at.issue_type.value} in {layer_label(at.layer)}{kind}"


def _labelled(label: str, text: str) -> list[str]:
    return _wrapped(f"   {label:<10}{text}", _INDENT)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _clipped(text: str, indent: str, *, most: int) -> list[str]:
    lines = _wrapped(text, indent)
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], lines[most - 1][: WIDTH - 4].rstrip() + " ..."]


def _cut(lines: Sequence[str], room: int) -> list[str]:
    """Return what the summaries tell, with an empty line in front, in at most `room` lines."""
    if not lines or room < 3:
        return []
    if len(lines) < room:
        return ["", *lines]
    return ["", *lines[: room - 2], f"... {len(lines) - room + 2} more line(s)"]


def _counts(record: FlowRecord, issues: Sequence[Issue]) -> str:
    counts = ", ".join(f"{count} {severity.value}" for severity, count in severity_counts(issues))
    healthy = len(healthy_layers(record, issues))
    return (
        f"Issues: {counts or 'none'}. Healthy: {healthy} of {len(record.layers)} layer calls have no issue."
    )
