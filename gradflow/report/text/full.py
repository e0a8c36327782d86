"""The full text: the summary of issues that analyzers print, and everything that a report tells in words."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.records import Cause, FlowRecord, Issue, ReservoirDynamics, TrialsRecord
from gradflow.report.text.attention import attention_text
from gradflow.report.text.policy import policy_text
from gradflow.report.text.recurrent import dynamics_text
from gradflow.report.wording import (
    cause_title,
    explaining,
    healthy_layers,
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

RULE = "=" * 80
MAX_EXPLAINED = 6


def summary_text(issues: Sequence[Issue], *, limit: int | None = None, causes: Sequence[Cause] = ()) -> str:
    """Return the summary of some issues: counts by severity, then each issue.

    Args:
        issues: in the order to be shown.
        limit: how many to show whole; None shows all.
        causes: what explains them; where there are any, each issue tells its own, and what it rests on.

    >>> print(summary_text(()))
    [OK] No gradient issues found.
    """
    if not issues:
        return "[OK] No gradient issues found."
    lines = [f"[WARNING] Found {len(issues)} gradient issue(s):"]
    lines += [f"{severity.value}: {count} issue(s)" for severity, count in severity_counts(issues)]
    lines += ["", "Details:", RULE]
    found = explaining(causes)
    for issue in issues[:limit]:
        lines += ["", str(issue)]
        if (cause := found.get((issue.layer, issue.issue_type))) is not None:
            lines.append(f"  Cause: {cause_title(cause)}")
        if causes and (measured := metrics_line(issue)):
            lines.append(f"  Evidence: {measured}")
    if limit is not None and len(issues) > limit:
        lines += ["", f"... and {len(issues) - limit} more."]
    return "\n".join(lines)


def full_text(
    record: FlowRecord,
    issues: Sequence[Issue],
    causes: Sequence[Cause],
    lines: Sequence[str] = (),
    trials: TrialsRecord | None = None,
) -> str:
    """Return all: verdict, what was measured how, causes, issues, more lines, healthy count.

    Args:
        record: what was measured.
        issues: in the order to be shown.
        causes: what explains them.
        lines: what the pipeline's summaries tell of the record.
        trials: what became of the model when fixes were tried.
    """
    text = [f"gradflow: {verdict(issues, causes, record)}"]
    facts = [("model", model_line(record)), *measured_facts(record), ("loss", loss_line(record))]
    facts += [] if trials is None else [("trials", trials_line(trials))]
    text += [f"  {label:<9}{fact}" for label, fact in facts]
    for number, cause in enumerate(causes, start=1):
        text += ["", *_cause_lines(number, cause, trials)]
    healthy = len(healthy_layers(record, issues))
    text += ["", summary_text(issues, causes=causes)]
    text += ["", *lines] if lines else []
    for special in _special(record):
        text += ["", special]
    text += ["", f"Healthy: {healthy} of {len(record.layers)} layer calls have no issue."]
    return "\n".join(text)


def _special(record: FlowRecord) -> list[str]:
    """Return what attention, recurrent layers and policies showed, also where nothing of it is sick."""
    told = [attention_text(record.transformer.stats)] if record.transformer.attention else []
    told += [dynamics_text(ReservoirDynamics.of(record.recurrences))] if record.recurrences else []
    return told + ([policy_text(record.policy.statistics())] if record.policy is not None else [])


def _cause_lines(number: int, cause: Cause, trials: TrialsRecord | None) -> list[str]:
    head = f"Cause {number}: {cause.issue_type.value} in {layer_label(cause.layer)}"
    lines = [f"{head} (confidence {cause.confidence:.2f})", f"  {cause.mechanism}"]
    if cause.reason:
        lines.append(f"  Confidence: {cause.reason}")
    if tried := trials_facts(cause, trials):
        lines.append("  Tried:")
        lines.extend(f"    - [{label}] {text}" for label, text in tried)
    if cause.evidence:
        lines.append("  Evidence:")
        lines.extend(f"    - {line}" for line in cause.evidence)
    named = [f"{i.issue_type.value} in {layer_label(i.layer)}" for i in cause.issues[:MAX_EXPLAINED]]
    if more := len(cause.issues) - len(named):
        named.append(f"and {more} more")
    if named:
        lines.append(f"  Explains: {', '.join(named)}")
    return lines
