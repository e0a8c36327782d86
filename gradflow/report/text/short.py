"""The short text of a report: verdict, and of each cause where, what was measured and what to change.

It fits one screen. What it leaves out is in the full text, in the JSON and on the page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import attrs

from gradflow.records import Cause, FlowRecord, Issue, TrialsRecord
from gradflow.report.wording import (
    cause_evidence,
    explaining,
    healthy_layers,
    issue_title,
    layer_label,
    loss_line,
    measured_facts,
    metrics_line,
    model_line,
    severity_counts,
    trials_facts,
    trials_line,
    verdict,
)

WIDTH = 100  # letters in a line
LEAST_WIDTH = 40
MAX_LINES = 25  # of the whole text
MAX_ACTIONS = 2
MAX_NOTES = 2
MAX_EXPLAINED = 4
MAX_KEPT = 6  # lines kept for what follows a cause that is told whole
_CLIPS = (4, 2, 1)  # lines of each part of the first cause, where it has no room as a whole
_LABEL = 13  # letters of a label such as `   Measured  `
_MORE = 'Everything: report.text("full"), or the command with --verbose.'


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
    *,
    width: int = WIDTH,
) -> str:
    """Return a report in at most `MAX_LINES` lines of `width` letters.

    Args:
        record: what was measured.
        issues: in the order to be shown.
        causes: what explains them.
        lines: what the pipeline's summaries tell of the record; as many as there is room for.
        trials: what became of the model when fixes were tried.
        width: letters in a line, at least `LEAST_WIDTH`; a name that is longer stands out all the same.
    """
    page = _Page(max(width, LEAST_WIDTH))
    head, items = page.head(record, issues, causes), _items(issues, causes, trials)
    if trials is not None and not trials.trials:  # asked for, and there is no other place that tells of it
        head += page.clipped(f"  Tried: {trials_line(trials)}", "  ", most=3)
    tail = ["", *page.wrapped(_counts(record, issues), ""), *page.wrapped(_MORE, "")]
    body = page.body(items, MAX_LINES - len(head) - len(tail))
    room = MAX_LINES - len(head) - len(body) - len(tail)
    return "\n".join([*head, *body, *_cut(lines, room), *tail])


def _items(
    issues: Sequence[Issue], causes: Sequence[Cause], trials: TrialsRecord | None = None
) -> list[_Item]:
    explained = explaining(causes)
    alone = [issue for issue in issues if (issue.layer, issue.issue_type) not in explained]
    best = [next((f"[{verdict}] {text}" for verdict, text in trials_facts(c, trials)), "") for c in causes]
    told = [_Item(c.issues[0], c, tried) for c, tried in zip(causes, best, strict=True) if c.issues]
    return told + [_Item(issue) for issue in alone]


@attrs.frozen
class _Page:
    """Lines of so many letters."""

    width: int

    def head(self, record: FlowRecord, issues: Sequence[Issue], causes: Sequence[Cause]) -> list[str]:
        """Return the verdict, what was run, and the first notes."""
        facts = measured_facts(record)
        how = "; ".join(text for label, text in facts if label in ("steps", "loop"))
        notes = [text for label, text in facts if label == "note"]
        head = self.clipped(f"gradflow: {verdict(issues, causes, record)}", "  ", most=2)
        head += self.clipped(f"  {model_line(record)}; loss {loss_line(record)}; {how}", "  ", most=4)
        for note in notes[:MAX_NOTES]:
            head += self.clipped(f"  Note: {note}", "  ", most=2)
        more = len(notes) - MAX_NOTES
        return [*head, f"  ... and {more} more note(s)"] if more > 0 else head

    def body(self, items: Sequence[_Item], room: int) -> list[str]:
        """Return the items: whole while there is room, then a line or two each, then their number.

        The first has its cause, evidence and fix in any case, if need be with their ends cut off.
        """
        body: list[str] = []
        for number, item in enumerate(items, start=1):
            left = room - len(body) - (number < len(items))  # one line for the number of those left out
            kept = min(2 * (len(items) - number), MAX_KEPT)  # and some for those that follow
            grave = item.issue.severity.is_serious
            told = [MAX_ACTIONS, 1] if grave or number == 1 else []
            forms = [self.whole(number, item, most) for most in told]
            fitting = next((form for form in forms if len(form) <= left - kept), None)
            if fitting is None and number == 1:
                cut = [self.whole(number, item, 1, clip=clip) for clip in _CLIPS]
                fitting = next((form for form in (forms[-1], *cut) if len(form) <= left), cut[-1][:left])
            elif fitting is None and len(brief := self.brief(number, item)) <= left:
                fitting = brief
            if fitting is None:
                body.append(f"... and {len(items) - number + 1} more.")
                break
            body += fitting
        return body

    def whole(self, number: int, item: _Item, most: int, *, clip: int = MAX_LINES) -> list[str]:
        """Return an item with where, what was measured, `most` of what to change, and what it explains.

        No part of it has more than `clip` lines.
        """
        cause, issue = item.cause, item.issue
        parts = [("Cause", issue.description if cause is None else cause.mechanism)]
        parts.append(("Measured", cause_evidence(cause) if cause is not None else ""))
        if not parts[-1][1]:
            parts[-1] = ("Measured", metrics_line(issue))
        actions = issue.recommended_actions[:most]
        for place, action in enumerate(actions, start=1):
            number_of = f"{place}. " if len(actions) > 1 else ""
            parts.append(("Change" if place == 1 else "", number_of + action))
        parts.append(("Tried", item.tried))
        if cause is not None and (others := cause.issues[1:]):
            named = [f"{i.issue_type.value} in {layer_label(i.layer)}" for i in others[:MAX_EXPLAINED]]
            more = len(others) - len(named)
            parts.append(("Explains", ", ".join(named) + (f", and {more} more" if more else "")))
        sure = "" if cause is None else f", confidence {cause.confidence:.2f}"
        lines = ["", *self.clipped(f"{number}. {_title(item)}{sure}", "   ", most=2)]
        for label, text in parts:
            if text:
                lines += self.clipped(f"   {label:<10}{text}", " " * _LABEL, most=clip)
        return lines

    def brief(self, number: int, item: _Item) -> list[str]:
        """Return an item in one or two lines."""
        issue = item.issue
        told = issue.recommended_actions[0] if issue.recommended_actions else issue.description
        return self.clipped(f"{number}. {_title(item)}: {told}", "   ", most=2)

    def wrapped(self, text: str, indent: str) -> list[str]:
        """Return a text in as many lines as it needs."""
        return textwrap.wrap(
            text, self.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )

    def clipped(self, text: str, indent: str, *, most: int) -> list[str]:
        """Return a text in at most so many lines."""
        lines = self.wrapped(text, indent)
        if len(lines) <= most:
            return lines
        return [*lines[: most - 1], lines[most - 1][: self.width - 4].rstrip() + " ..."]


def _title(item: _Item) -> str:
    issue, at = item.issue, item.cause or item.issue
    kind = issue.layer_type if issue.layer == at.layer else ""
    return issue_title(attrs.evolve(issue, layer=at.layer, issue_type=at.issue_type, layer_type=kind))


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
