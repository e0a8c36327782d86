"""Whether a verdict needs full detail: what `diagnose` asks after the cheap measurements."""

from __future__ import annotations

from collections.abc import Iterable

from gradflow.records import FlowRecord, Issue


def needs_depth(record: FlowRecord, issues: Iterable[Issue]) -> bool:
    """Return whether the flow on every edge and the rank of the gradients would change a verdict.

    True where the graph was taken without flows and an issue is undecided (a waist whose width may or may not
    be enough). A healthy model without a waist pays for no more than the cheap measurements.

    >>> needs_depth(FlowRecord(steps=0, losses=[], layers=(), parameters=()), ())
    False
    """
    if record.graph_record is None or record.graph_record.measured:
        return False
    return any(issue.evidence.undecided for issue in issues)
