"""Root causes: the issues grouped by what explains them, with the evidence along the path."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import attrs

from gradflow.detect.causes.conditions import precedence, wrecked
from gradflow.detect.causes.explains import gathered, roots
from gradflow.detect.causes.rules import Rule
from gradflow.detect.evidence import late
from gradflow.detect.knowledge import WRECKED, lowered
from gradflow.detect.view import Flow, flow_of
from gradflow.detect.wiring import layer_name, node_name
from gradflow.records import (
    Cause,
    FlowRecord,
    Issue,
    IssueType,
    OwnIssueType,
    Role,
    check_issues,
    check_record,
)


def find_causes(
    record: FlowRecord, issues: Iterable[Issue], *, rules: Iterable[Rule] = ()
) -> tuple[Cause, ...]:
    """Return what explains the issues, the cause of the gravest and of most first.

    Every issue belongs to exactly one cause. See NOTE [Who explains whom] in
    `gradflow.detect.causes.explains`.

    Args:
        record: what was measured.
        issues: what `detect` saw in it, issues of types and detectors of one's own included.
        rules: what one issue can bring about, beside what `gradflow.detect.RULES` tells.

    Raises:
        RecordInputError: if either is something else.

    >>> find_causes(FlowRecord(steps=0, losses=[], layers=(), parameters=()), ())
    ()
    """
    check_record("find_causes", record)
    return explain(record, check_issues("find_causes", issues), rules=rules)[1]


def explain(
    record: FlowRecord, issues: Iterable[Issue], *, rules: Iterable[Rule] = ()
) -> tuple[tuple[Issue, ...], tuple[Cause, ...]]:
    """Return the issues, with the cause named in the description of each victim, and the causes.

    Args:
        record: what was measured.
        issues: what `detect` saw in it.
        rules: as for `find_causes`.

    Returns:
        The issues in the order given, and the causes as `find_causes` gives them; the issues in the causes
        are the amended ones.

    Raises:
        RecordInputError: if either argument is something else.
    """
    check_record("explain", record)
    given = check_issues("explain", issues)
    if not given:
        return (), ()
    flow = flow_of(record)
    given = _spared(flow, given)
    root = roots(flow, given, rules)
    amended = tuple(
        issue if root[i] == i else _amended(issue, given[root[i]]) for i, issue in enumerate(given)
    )
    trail = _Trail(flow)
    groups: dict[int, list[int]] = {}
    for i, r in enumerate(root):
        groups.setdefault(r, []).append(i)
    causes = [_cause(trail, amended, r, sorted(members)) for r, members in groups.items()]
    return amended, tuple(sorted(causes, key=_rank(flow, causes)))


# ----------------------------------------------------------------------------------- the causes


def _spared(flow: Flow, issues: Sequence[Issue]) -> tuple[Issue, ...]:
    """The issues, those as LOW that steps have made which were too large for a model that came knowing."""
    jumps = [i for i in issues if i.evidence.plays(Role.JUMPING) and i.severity.is_serious]
    return tuple(lowered(i, WRECKED) if jumps and wrecked(flow, jumps[0], i) else i for i in issues)


def _amended(issue: Issue, cause: Issue) -> Issue:
    name = cause.layer or "(model)"
    text = f"{issue.description} Explained by {cause.issue_type.value} in {name}."
    evidence = attrs.evolve(issue.evidence, explained_by=cause.layer)
    # What steps that are too large have made of a model is no graver than those steps.
    made = cause.evidence.plays(Role.JUMPING) and issue.evidence.developed
    severity = min(issue.severity, cause.severity) if made else issue.severity
    return attrs.evolve(issue, description=text, severity=severity, evidence=evidence)


def _cause(trail: _Trail, issues: Sequence[Issue], root: int, members: Sequence[int]) -> Cause:
    issue = issues[root]
    others = [issues[i] for i in members if i != root]
    confidence, reason = _confidence(trail.flow, issue, len(others))
    return Cause(
        layer=issue.layer,
        issue_type=issue.issue_type,
        mechanism=issue.description,
        issues=(issue, *others),
        confidence=confidence,
        reason=reason,
        evidence=trail.evidence(issue, others),
    )


def _confidence(flow: Flow, issue: Issue, explained: int) -> tuple[float, str]:
    """By what the verdict rests on: read off exactly, measured against others, or in the order of
    execution."""
    known = issue.evidence
    if issue.issue_type is IssueType.NUMERICAL and known.op:
        return 0.97, "the operation that made it was seen"
    if known.plays(Role.CUT, Role.UNUSED):
        sure = bool(known.op) or known.plays(Role.UNUSED)
        return (
            (0.95, "read off the wiring")
            if sure
            else (0.8, "no path in the graph; what cuts it was not seen")
        )
    if not issue.severity.is_serious:
        return 0.3, "the evidence is weak, or it may be by design"
    if isinstance(issue.issue_type, OwnIssueType) and not explained:
        return 0.5, "a type of one's own: what it can bring about, or what brings it about, is not known"
    if not flow.wiring.known:
        return 0.5, "no layer graph: the order of execution stood in for it"
    if issue.issue_type is IssueType.DEAD:
        return 0.9, "exact zeros, and what makes them, were measured"
    if issue.issue_type is IssueType.SATURATION:
        return 0.85, "the derivative was seen to be gone, element by element"
    if explained:
        return 0.8, f"it stands between the loss and {explained} other issue(s), and can bring them about"
    return 0.7, "measured against the other layers; it explains no other issue"


class _Trail:
    """The path from the loss to a cause and on to what it explains."""

    def __init__(self, flow: Flow) -> None:
        wires = flow.wiring
        self.flow = flow
        self.place = {node: i for i, node in enumerate(wires.order)}
        # By node, which of the layer calls at the loss it feeds, as bits.
        self.ends = {n: 1 << i for i, n in enumerate(wires.preds.get(wires.loss, ())) if n in flow.layers}
        self.feeds = gathered(reversed(wires.order), wires.succs, self.ends)

    def evidence(self, issue: Issue, others: Sequence[Issue], most: int = 12) -> tuple[str, ...]:
        """Return what was seen along the path, one line a layer, the nearest to the loss first."""
        flow, at = self.flow, node_name(issue.layer)
        reached = self.feeds.get(at, 0)
        nodes = {
            at,
            *(node_name(i.layer) for i in others),
            *(n for n, bit in self.ends.items() if reached & bit),
        }
        known = [n for n in nodes if n in self.place and n in flow.layers and not flow.layers[n].composite]
        on_path = sorted(known, key=lambda n: -self.place[n])
        lines = []
        for node in on_path[:most]:
            layer = flow.layers[node]
            norm, rms = late(flow.grad[node]), late(layer.output_rms)
            seen = f"gradient norm {norm:.2e}, output rms {rms:.2e} at the end"
            if not layer.reached.any():
                seen = "no path from the loss"
            mark = " (cause)" if node == at else ""
            lines.append(f"{layer_name(node) or '(model)'} ({layer.type}): {seen}{mark}")
        if len(on_path) > most:
            lines.append(f"... {len(on_path) - most} more")
        return tuple(lines)


def _rank(flow: Flow, causes: Sequence[Cause]) -> Callable[[Cause], tuple[int | str, ...]]:
    """The gravest first, and of those alike the one nearest the loss; of like parts of repeated blocks, which
    do not explain one another, the first: in the order in which they run, or in which the model holds
    them."""
    last: dict[tuple[str, str], int] = {}  # by kind of part, the place of the one nearest the loss

    def place(cause: Cause) -> int:
        layer = flow.layers.get(node_name(cause.layer))
        return layer.order if layer else 0

    def kind(cause: Cause) -> tuple[str, str]:
        return cause.issue_type.value, re.sub(r"\d+", "#", cause.layer)

    made: dict[str, int] = {}  # by module, its place among those that the model holds
    for i, parameter in enumerate(flow.record.parameters):
        module = parameter.name
        while module := module.rpartition(".")[0]:
            made.setdefault(module, i)

    for cause in causes:
        last[kind(cause)] = max(last.get(kind(cause), 0), place(cause))

    def key(cause: Cause) -> tuple[int | str, ...]:
        first = cause.issues[0]
        return (
            -first.severity.rank,
            -sum(issue.severity.rank for issue in cause.issues),
            precedence(first),
            -last[kind(cause)],
            place(cause),
            made.get(cause.layer, 0),
            cause.layer,
            cause.issue_type.value,
        )

    return key
