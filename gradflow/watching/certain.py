"""What is certain of a training: which issues last, since when, and what came first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from gradflow.detect import Detector
from gradflow.diagnosis import report_of
from gradflow.records import EventRecord, Issue
from gradflow.report import Report
from gradflow.watching.look import Look
from gradflow.watching.state import Certain, Key, ObserverState, key_of

_MISSED = 2  # looks in a row that no longer show an issue: it is over


def told(
    state: ObserverState,
    look: Look,
    found: Iterable[Issue],
    step: int,
    detectors: Sequence[Detector],
    lines: Sequence[str],
    *,
    since: int | None = None,
) -> tuple[ObserverState, Report]:
    """Return the state with what is certain after a look, and the report that tells it.

    Args:
        state: after the look was taken down.
        look: what it showed by itself. Of its grave issues those are told that were told before or are
            found; those that are not grave are told as they are.
        found: issues that are certain now.
        step: of the training.
        detectors: of the pipeline, for what explains the issues.
        lines: to be told as well.
        since: the step of the look that first showed what was found; by default what each issue says of
            itself under `since_step`, or this step.
    """
    new = {key_of(issue): issue for issue in found}
    shown = {key_of(issue): issue for issue in look.issues} | new
    certain = {key: _followed(known, shown.get(key)) for key, known in state.certain.items()}
    for key, issue in new.items():
        if key not in certain and issue.severity.is_serious:
            certain[key] = Certain(issue=issue, event=_event(state, issue, step, since))
    over = {key: known for key, known in certain.items() if known.missed >= _MISSED}
    certain = {key: known for key, known in certain.items() if key not in over}
    ended = [attrs.evolve(known.event, until=step) for known in over.values()]
    history = state.history.with_events(*ended, *(known.event for known in certain.values()))
    state = attrs.evolve(state, history=history, certain=certain)
    mild = [issue for key, issue in shown.items() if not issue.severity.is_serious and key not in certain]
    issues = [*(known.issue for known in certain.values()), *mild]
    waiting = [issue for key, issue in shown.items() if issue.severity.is_serious and key not in certain]
    report = report_of(look.record, issues, detectors, lines=[*_told(certain, waiting, step), *lines])
    return state, report


def _followed(known: Certain, now: Issue | None) -> Certain:
    """Return a lasting issue after one look more."""
    if now is None:
        return attrs.evolve(known, missed=known.missed + 1)
    severity = max(known.event.severity, now.severity)
    return Certain(issue=now, event=attrs.evolve(known.event, severity=severity))


def _event(state: ObserverState, issue: Issue, step: int, since: int | None) -> EventRecord:
    """Return when an issue began; one that lasts since before a restart of the training goes on."""
    lasting = (e for e in state.history.events if e.until is None and e.key == key_of(issue))
    if (known := next(lasting, None)) is not None:
        return known
    first = issue.metrics.get("since_step", step) if since is None else since
    return EventRecord(
        layer=issue.layer,
        issue_type=issue.issue_type,
        severity=issue.severity,
        since=int(first),
        told=step,
        description=issue.description,
    )


def _told(certain: dict[Key, Certain], waiting: Sequence[Issue], step: int) -> list[str]:
    """Return lines that tell of the time: when each issue began, and what came first."""
    events = sorted((known.event for known in certain.values()), key=lambda event: event.since)
    lines = [f"Training step {step}."]
    for event in events:
        name = event.layer or "(model)"
        lines.append(f"{event.issue_type.value} in {name}: since step {event.since}.")
    if len(events) > 1 and events[0].since < events[-1].since:
        first = [e for e in events if e.since == events[0].since]
        names = ", ".join(f"{e.issue_type.value} in {e.layer or '(model)'}" for e in first)
        lines.append(f"What came first: {names}, at step {first[0].since}.")
    if waiting:
        names = ", ".join(f"{i.issue_type.value} in {i.layer or '(model)'}" for i in waiting[:3])
        more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        lines.append(f"Seen in this batch, not certain yet: {names}{more}.")
    return lines
