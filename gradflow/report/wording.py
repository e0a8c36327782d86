"""The sentences that every rendering of a report shares: the verdict, and what was measured how.

Kept apart from the renderers so that the console and the HTML page can never tell two stories.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradflow.records import (
    AnyIssueType,
    Cause,
    FlowRecord,
    GraphRecord,
    Issue,
    IssueSeverity,
    TrialRecord,
    TrialsRecord,
)


def layer_label(name: str) -> str:
    """Return how a layer is shown; the model itself, whose name is empty, is `(model)`."""
    return name or "(model)"


def shortened(name: str, limit: int) -> str:
    """Return a name of at most `limit` letters: its end, which tells more than its beginning."""
    return name if len(name) <= limit else "…" + name[-limit + 1 :]


def number(value: Any) -> str:
    """Return a number as reports show it: integers whole, floats to three digits.

    Of several, the first three are shown, and how many more there are.

    >>> number(1234), number(0.5), number(1e-9), number(float("nan"))
    ('1,234', '0.5', '1.00e-09', '–')
    >>> number(("a", "b")), number(range(9))
    ('a and b', '0, 1, 2 and 6 more')
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = [number(part) for part in value]
        if len(shown) > 4:
            shown = [*shown[:3], f"{len(shown) - 3} more"]
        return " and ".join([", ".join(shown[:-1]), *shown[-1:]]) if len(shown) > 1 else "".join(shown)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "–"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def issue_title(issue: Issue) -> str:
    """Return how grave an issue is, what it is and where: the first line of `str(issue)`."""
    kind = f" ({issue.layer_type})" if issue.layer_type else ""
    return f"[{issue.severity.value}] {issue.issue_type.value} in {layer_label(issue.layer)}{kind}"


def cause_title(cause: Cause) -> str:
    """Return what a cause is, where, and how sure."""
    return f"{cause.issue_type.value} in {layer_label(cause.layer)}, confidence {cause.confidence:.2f}"


def explaining(causes: Sequence[Cause]) -> Mapping[tuple[str, AnyIssueType], Cause]:
    """Return by layer and type of an issue the cause that explains it, the first of several."""
    return {(i.layer, i.issue_type): cause for cause in reversed(causes) for i in cause.issues}


def metrics_line(issue: Issue) -> str:
    """Return the numbers that an issue rests on, by name; what was not measured is left out."""
    told = [(name, number(value)) for name, value in issue.metrics.items()]
    return ", ".join(f"{name} {text}" for name, text in told if text not in ("–", ""))


def cause_evidence(cause: Cause) -> str:
    """Return the line of a cause's evidence that speaks of its own layer, or else its first."""
    here = [line for line in cause.evidence if line.endswith("(cause)")]
    return (here or list(cause.evidence) or [""])[0]


def issue_facts(issue: Issue, cause: Cause | None) -> list[tuple[str, str]]:
    """Return what every rendering tells of an issue besides its title, as (label, text).

    Args:
        issue: the issue.
        cause: what explains it, if anything does.
    """
    facts = [("Seen", issue.description)]
    if cause is not None:
        why = "" if cause.mechanism == issue.description else f": {cause.mechanism}"
        facts.append(("Cause", cause_title(cause) + why))
    measured = [text for text in (cause_evidence(cause) if cause else "", metrics_line(issue)) if text]
    facts += [("Evidence", "; ".join(measured))] if measured else []
    facts += [("Change", issue.recommended_actions[0])] if issue.recommended_actions else []
    return facts


def severity_counts(issues: Sequence[Issue]) -> list[tuple[IssueSeverity, int]]:
    """Return how many issues there are of each severity present, most severe first."""
    counts = collections.Counter(issue.severity for issue in issues)
    return [(severity, counts[severity]) for severity in IssueSeverity if counts[severity]]


def serious_issues(issues: Sequence[Issue]) -> tuple[Issue, ...]:
    """Return the issues that are serious: those that make a model sick."""
    return tuple(issue for issue in issues if issue.severity.is_serious)


def healthy_layers(record: FlowRecord, issues: Sequence[Issue]) -> tuple[str, ...]:
    """Return the names of the layer calls that no issue names, in the order of execution."""
    sick = {issue.layer for issue in issues}
    return tuple(layer.name for layer in record if layer.name not in sick)


def verdict(issues: Sequence[Issue], causes: Sequence[Cause], record: FlowRecord | None = None) -> str:
    """Return the answer in one line: the first cause, or the gravest issue, or that all is well."""
    serious = serious_issues(issues)
    if record is not None and record.failed:
        return "nothing could be measured"
    if not serious:
        remarks = f", {len(issues)} remark(s) of LOW or INFO" if issues else ""
        return f"no illness found{remarks}"
    if causes:
        first = causes[0]
        return f"{first.issue_type.value} in {layer_label(first.layer)}{_share(first, len(issues) - 1)}"
    return f"{serious[0].issue_type.value} in {layer_label(serious[0].layer)}"


def _share(cause: Cause, others: int) -> str:
    """Return how many of the issues beside its own a cause explains."""
    explained = len(cause.issues) - 1
    if not others:
        return ""
    if not explained:
        return f", and {others} more issue{'s' if others > 1 else ''}"
    if explained < others:
        return f", which explains {explained} of {others} other issues"
    return f", which explains the other {f'{others} issues' if others > 1 else 'issue'}"


def model_line(record: FlowRecord) -> str:
    """Return the model's name and size."""
    provenance = record.provenance
    return (
        f"{provenance.model or 'model'}: {len(record.layers)} layer calls, "
        f"{provenance.num_parameters:,} parameters"
    )


def loss_line(record: FlowRecord) -> str:
    """Return the first and the last loss, and in how many steps it was not finite."""
    if not record.steps:
        return "none"
    line = f"{record.losses[0]:.4g} -> {record.losses[-1]:.4g}"
    broken = int(np.sum(~np.isfinite(record.losses)))
    return f"{line} (not finite in {broken} of {record.steps} steps)" if broken else line


def measured_facts(record: FlowRecord) -> list[tuple[str, str]]:
    """Return what was measured and how, as (label, text); notes on how far to trust it come last."""
    provenance = record.provenance
    steps = f"{record.steps} steps"
    if record.steps < provenance.requested_steps:
        steps += f" (of {provenance.requested_steps} asked for: the batches ended)"
    if provenance.optimizer:
        rates = ", ".join(f"{rate:.4g}" for rate in provenance.learning_rates)
        how = f"a copy of the parameters stepped by a copy of {provenance.optimizer} (lr {rates})"
        how += "" if provenance.clip is None else f", gradients clipped to norm {provenance.clip:g}"
    else:
        how = "parameters held fixed (no optimizer given: what its steps do is not judged)"
    seed = "no seed" if provenance.seed is None else f"seed {provenance.seed}"
    dtypes = ", ".join(provenance.dtypes) or "no dtype"
    reason = f": {provenance.transform_reason}" if provenance.transform_reason else ""
    return [
        ("steps", f"{steps}, {how}"),
        *((("loop", provenance.loop),) if provenance.loop else ()),
        ("run", f"{provenance.mode} mode, {provenance.device}, {dtypes}, {seed}"),
        ("reverse", f"{provenance.transform}{reason}; detail: {provenance.detail}"),
        ("graph", _graph_line(record.graph_record)),
        *(("special", found) for found in provenance.chosen),
        *(("note", note) for note in provenance.notes),
    ]


def _graph_line(graph: GraphRecord | None) -> str:
    if graph is None:
        return "not taken"
    size = f"{len(graph.nodes)} nodes, {len(graph.edges)} edges"
    if not graph.measured:
        return f"topology only, {size}"
    return f"flow on every edge in {len(graph.steps)} steps, {size}"


def trial_line(trial: TrialRecord) -> str:
    """Return in one line what a remedy did."""
    return f"{trial.remedy}: {trial.why}"


def trials_facts(cause: Cause, trials: TrialsRecord | None) -> list[tuple[str, str]]:
    """Return what trials say of a cause, as (label, text): the best remedy, then those that did less."""
    if trials is None:
        return []
    found = trials.of(cause)
    return [(trial.verdict.value, trial_line(trial)) for trial in found]


def trials_line(trials: TrialsRecord) -> str:
    """Return how many fixes were tried, and how."""
    notes = "".join(f" {note}" for note in trials.notes)
    return (
        f"{len(trials.trials)} fix(es) tried on copies, {trials.steps} steps of {trials.optimizer}, up to "
        f"{trials.seeds} seed(s), on {trials.num_batches} batches.{notes}"
    )
