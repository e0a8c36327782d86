"""The Markdown of a report: what fits a comment on a pull request, or the summary of a run on GitHub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from gradflow.records import AnyIssueType, Cause, FlowRecord, Issue, TrialsRecord
from gradflow.report.wording import (
    cause_title,
    explaining,
    healthy_layers,
    issue_facts,
    layer_label,
    loss_line,
    measured_facts,
    model_line,
    severity_counts,
    trials_facts,
    trials_line,
    verdict,
)

MAX_LETTERS = 60_000  # GitHub takes 65 536 in a comment
MAX_EVIDENCE = 12  # lines of a cause
MAX_ACTIONS = 3
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&])")


def markdown_text(
    record: FlowRecord,
    issues: Sequence[Issue],
    causes: Sequence[Cause],
    lines: Sequence[str] = (),
    trials: TrialsRecord | None = None,
) -> str:
    """Return a report as Markdown: verdict, causes, and every issue in a part that opens.

    It has at most `MAX_LETTERS` letters; issues beyond are counted.

    Args:
        record: what was measured.
        issues: in the order to be shown.
        causes: what explains them.
        lines: what the pipeline's summaries tell of the record.
        trials: what became of the model when fixes were tried.
    """
    counts = ", ".join(f"{count} {severity.value}" for severity, count in severity_counts(issues))
    healthy = f"{len(healthy_layers(record, issues))} of {len(record.layers)} layer calls have no issue"
    answer = verdict(issues, causes, record)
    parts = [f"### gradflow: {escaped(answer)}", f"Issues: {counts or 'none'}. Healthy: {healthy}."]
    parts += [_how(record)]
    parts += [_cause(number, cause, trials) for number, cause in enumerate(causes, start=1)]
    parts += [] if trials is None else [escaped(trials_line(trials))]
    parts += [_folded("Besides", [_fence("\n".join(lines))])] if lines else []
    parts = _fitting(parts)
    left = MAX_LETTERS - sum(len(part) + 2 for part in parts)
    return "\n\n".join([*parts, *_issues(issues, explaining(causes), left)]) + "\n"


def _fitting(parts: Sequence[str]) -> list[str]:
    """Return as many parts as take half of the room; the rest is for issues."""
    room, kept = MAX_LETTERS // 2, []
    for place, part in enumerate(parts):
        if (room := room - len(part) - 2) < 0:
            return [*kept, f"... and {len(parts) - place} more part(s), see the JSON."]
        kept.append(part)
    return kept


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line.

    >>> escaped("__init__ of a|b")
    '\\\\_\\\\_init\\\\_\\\\_ of a\\\\|b'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Return a name as code, whatever letters it has."""
    text = " ".join(text.split()) or " "
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence, room = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{room}{text}{room}{fence}"


def _fence(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _folded(title: str, parts: Sequence[str]) -> str:
    inside = "\n\n".join(parts)
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>"


def _how(record: FlowRecord) -> str:
    facts = measured_facts(record)
    told = [f"{model_line(record)}; loss {loss_line(record)}"]
    told += [text for label, text in facts if label in ("steps", "loop", "run")]
    notes = [f"\n- Note: {escaped(text)}" for label, text in facts if label == "note"]
    return escaped("; ".join(told)) + ("\n" if notes else "") + "".join(notes)


def _cause(number: int, cause: Cause, trials: TrialsRecord | None) -> str:
    """Return a cause with all its evidence, what to change, what fixes did, and what it explains."""
    first = cause.issues[0] if cause.issues else None
    grave = f"[{first.severity.value}] " if first is not None else ""
    name = f"{cause.issue_type.value} in {_code(layer_label(cause.layer))}"
    lines = [
        f"**{number}. {grave}{name}**, confidence {cause.confidence:.2f}: {escaped(cause.mechanism)}",
        "",
    ]
    lines += [f"- Evidence: {escaped(text)}" for text in cause.evidence[:MAX_EVIDENCE]]
    actions = first.recommended_actions[:MAX_ACTIONS] if first is not None else ()
    lines += [f"- **Change:** {escaped(action)}" for action in actions]
    lines += [f"- Tried: {escaped(f'[{label}] {text}')}" for label, text in trials_facts(cause, trials)]
    if more := len(cause.issues) - 1:
        lines.append(f"- Explains {more} more issue(s)")
    return "\n".join(lines)


def _issues(
    issues: Sequence[Issue], found: Mapping[tuple[str, AnyIssueType], Cause], room: int
) -> Iterator[str]:
    """Yield every issue with its facts, folded away; as many as there is room for."""
    if not issues:
        return
    blocks, room = [], room - 200
    for issue in issues:
        cause = found.get((issue.layer, issue.issue_type))
        block = _issue(issue, cause)
        if (room := room - len(block) - 2) < 0:
            blocks.append(f"... and {len(issues) - len(blocks)} more, see the JSON.")
            break
        blocks.append(block)
    yield _folded(f"All {len(issues)} issue(s)", blocks)


def _issue(issue: Issue, cause: Cause | None) -> str:
    kind = f" ({escaped(issue.layer_type)})" if issue.layer_type else ""
    name = _code(layer_label(issue.layer))
    lines = [f"**[{issue.severity.value}] {issue.issue_type.value} in {name}**{kind}", ""]
    for label, text in issue_facts(issue, cause):
        lines.append(f"- {label}: {escaped(cause_title(cause) if label == 'Cause' and cause else text)}")
    return "\n".join(lines)
