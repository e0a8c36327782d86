"""Root causes: which issue explains which, read off the flow from the loss back.

NOTE [Who explains whom]
A backward illness travels from its place towards the input: where the gradient is lost, blown up or cut at
one layer, every layer upstream of it shows it. A forward illness (a silent layer, a blown up signal)
travels the other way. So one issue explains another where the first *can* bring the second about
(`_CAN_EXPLAIN`), stands between it and the loss (or, forward, before it), and was there no later. Of
several that explain an issue, the one nearest the loss is its cause, for it is the first that the gradient
meets; and a cause that is itself explained hands its victims on. What nothing explains is a cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from gradflow.detect.evidence import Flow, flow_of, late
from gradflow.detect.wiring import LOSS, layer_name, node_name
from gradflow.records import Cause, FlowRecord, Issue, IssueSeverity, IssueType

_T = IssueType

# What an issue of a type (first) can bring about upstream of it, downstream of it, or anywhere.
_CAN_EXPLAIN: dict[IssueType, dict[str, frozenset[IssueType]]] = {
    _T.DEAD: {
        "upstream": frozenset({_T.DEAD, _T.VANISHING, _T.BOTTLENECK}),
        "downstream": frozenset({_T.DEAD, _T.BOTTLENECK}),
        "same": frozenset({_T.DEAD, _T.VANISHING, _T.BOTTLENECK, _T.SATURATION}),
    },
    _T.VANISHING: {
        "upstream": frozenset({_T.VANISHING, _T.BOTTLENECK, _T.DEAD}),
        "downstream": frozenset({_T.VANISHING, _T.BOTTLENECK, _T.DEAD}),
        "same": frozenset({_T.VANISHING, _T.BOTTLENECK, _T.DEAD}),
    },
    _T.SATURATION: {
        "upstream": frozenset({_T.VANISHING, _T.DEAD, _T.SATURATION, _T.UNSTABLE}),
        "downstream": frozenset({_T.SATURATION, _T.BOTTLENECK}),
        "same": frozenset({_T.VANISHING, _T.DEAD, _T.SATURATION, _T.UNSTABLE}),
    },
    _T.EXPLODING: {
        "upstream": frozenset({_T.EXPLODING, _T.UNSTABLE, _T.NUMERICAL}),
        "downstream": frozenset({_T.EXPLODING, _T.SATURATION, _T.NUMERICAL, _T.UNSTABLE, _T.DEAD}),
        "same": frozenset({_T.EXPLODING, _T.UNSTABLE, _T.SATURATION, _T.NUMERICAL}),
    },
    _T.BOTTLENECK: {
        "upstream": frozenset({_T.VANISHING, _T.BOTTLENECK}),
        "downstream": frozenset({_T.BOTTLENECK}),
        "same": frozenset({_T.BOTTLENECK}),
    },
    _T.NUMERICAL: {
        "upstream": frozenset({_T.NUMERICAL, _T.EXPLODING, _T.UNSTABLE}),
        "downstream": frozenset({_T.NUMERICAL, _T.EXPLODING, _T.UNSTABLE}),
        "same": frozenset({_T.NUMERICAL, _T.EXPLODING, _T.UNSTABLE}),
    },
    _T.UNSTABLE: {"upstream": frozenset({_T.VANISHING}), "downstream": frozenset(), "same": frozenset()},
}

# Operations that leave the range of floats for reasons of their own; in others, such as a product or a
# sum, it is what enters that has become too large.
_OWN_DOMAIN = ("exp", "log", "sqrt", "div", "norm", "pow", "softmax", "attention", "acos", "mean", "where")


@attrs.frozen(eq=False)
class _Suspect:
    """An issue, and its place on the flow."""

    index: int
    issue: Issue
    node: str
    upstream: frozenset[str]
    downstream: frozenset[str]


def find_causes(record: FlowRecord, issues: Iterable[Issue]) -> tuple[Cause, ...]:
    """Return what explains the issues, the cause of the gravest and of most first.

    Every issue belongs to exactly one cause. See NOTE [Who explains whom].

    Args:
        record: what was measured.
        issues: what `detect` saw in it.

    >>> find_causes(FlowRecord(steps=0, losses=[], layers=(), parameters=()), ())
    ()
    """
    return explain(record, issues)[1]


def explain(record: FlowRecord, issues: Iterable[Issue]) -> tuple[tuple[Issue, ...], tuple[Cause, ...]]:
    """Return the issues, victims told so in their description, and the causes.

    Args:
        record: what was measured.
        issues: what `detect` saw in it.

    Returns:
        The issues in the order given, and the causes as `find_causes` gives them; the issues in the causes
        are the amended ones.
    """
    given = tuple(issues)
    if not given:
        return (), ()
    flow = flow_of(record)
    suspects = [_suspect(flow, i, issue) for i, issue in enumerate(given)]
    root = _roots(flow, suspects)
    amended = tuple(
        issue if root[i] == i else _amended(issue, given[root[i]]) for i, issue in enumerate(given)
    )
    groups: dict[int, list[int]] = {}
    for i, r in enumerate(root):
        groups.setdefault(r, []).append(i)
    causes = [_cause(flow, suspects, amended, r, sorted(members)) for r, members in groups.items()]
    return amended, tuple(sorted(causes, key=_rank(flow)))


def _suspect(flow: Flow, index: int, issue: Issue) -> _Suspect:
    node = node_name(issue.layer)
    nodes = [n for n in flow.wiring.nodes if n == node or n.startswith((node + "@", node + "."))]
    if node in flow.wiring.nodes:  # the layer call; else a module whose parts are in the graph
        calls = [n for n in nodes if n == node or n.startswith(node + "@")]
        nodes = calls if issue.metrics.get("num_calls", 1) != 1 else [node]
    up = frozenset[str]().union(*(flow.wiring.upstream(n) for n in nodes)) if nodes else frozenset()
    down = frozenset[str]().union(*(flow.wiring.downstream(n) for n in nodes)) if nodes else frozenset()
    return _Suspect(index, issue, node, frozenset(up), frozenset(down))


# -------------------------------------------------------------------------------- who explains whom


def _roots(flow: Flow, suspects: Sequence[_Suspect]) -> list[int]:
    """By index of an issue, the index of the issue that explains it in the end; its own if none does."""
    parent = []
    for victim in suspects:
        able = [s for s in suspects if s is not victim and _explains(flow, s, victim)]
        # A cause that can be explained by its own victim would close a circle: the order decides then.
        able = [s for s in able if not _explains(flow, victim, s) or _prior(flow, s, victim)]
        chosen = min(able, key=lambda s: _distance(flow, s, victim), default=None)
        parent.append(chosen.index if chosen else victim.index)
    return [_end(parent, i) for i in range(len(parent))]


def _end(parent: Sequence[int], index: int) -> int:
    seen = [index]
    while parent[seen[-1]] != seen[-1]:
        if parent[seen[-1]] in seen:
            return min(seen)
        seen.append(parent[seen[-1]])
    return seen[-1]


def _explains(flow: Flow, cause: _Suspect, victim: _Suspect) -> bool:
    a, b = cause.issue, victim.issue
    if a.severity < IssueSeverity.MEDIUM and a.severity < b.severity:
        return False
    if _born_in_training(flow, cause, victim):
        return True
    if _born_in_training(flow, victim, cause):
        return False
    kinds = _CAN_EXPLAIN[a.issue_type]
    if not _mechanism_fits(flow, cause, victim):
        return False
    if a.issue_type is b.issue_type is IssueType.VANISHING:
        return _one_flow(flow, cause, victim)
    if cause.node == victim.node:
        return b.issue_type in kinds["same"] and a.issue_type is not b.issue_type
    if victim.node in cause.upstream:
        return b.issue_type in kinds["upstream"]
    if victim.node in cause.downstream:
        return b.issue_type in kinds["downstream"] and _travels_forward(cause, victim)
    if a.issue_type is b.issue_type is IssueType.DEAD:
        return _behind_the_cut(flow, cause, victim)
    return False


def _one_flow(flow: Flow, a: _Suspect, b: _Suspect) -> bool:
    """Whether two layers lie on one path, or on branches that meet again before the loss."""
    if b.node in a.upstream or b.node in a.downstream:
        return True
    return any(n in flow.layers and flow.parameters_of(n) for n in a.downstream & b.downstream)


def _born_in_training(flow: Flow, cause: _Suspect, victim: _Suspect) -> bool:
    """Whether steps that were too large have brought the victim about: it was not there before the jump."""
    metrics = cause.issue.metrics
    if cause.issue.issue_type is not IssueType.UNSTABLE or not metrics.get("optimizer"):
        return False
    if metrics.get("role") != "jumps" or victim.issue.issue_type is IssueType.UNSTABLE:
        return False
    first = victim.issue.metrics.get("first_steps")
    if victim.issue.issue_type is IssueType.NUMERICAL:
        return victim.issue.metrics.get("step", 0) > 0 and not _own_domain(victim.issue)
    if victim.issue.issue_type is IssueType.SATURATION and isinstance(first, float):
        return victim.issue.magnitude > first + 0.2
    if victim.issue.issue_type is IssueType.EXPLODING:
        at_start = victim.issue.metrics.get("growth_at_start")
        return isinstance(at_start, float) and at_start < victim.issue.metrics.get("total_growth", 0.0) / 10
    if victim.issue.issue_type is IssueType.DEAD:
        fired = victim.issue.metrics.get("fired_at_start")
        return isinstance(fired, float) and fired > 0
    return False


def _mechanism_fits(flow: Flow, cause: _Suspect, victim: _Suspect) -> bool:
    """Conditions that the types alone do not tell."""
    a, b = cause.issue, victim.issue
    if a.issue_type is b.issue_type is IssueType.VANISHING:
        # What absorbs explains those it starves. Where none does, every layer loses a little, and the loss is
        # told where it shows most; not at a table, which nothing flows through.
        if absorber := b.metrics.get("absorber", ""):
            return absorber == a.metrics.get("absorbs")
        return "absorber" in b.metrics and not a.metrics.get("absorber") and _shows_more(flow, cause, victim)
    if a.issue_type is IssueType.VANISHING and b.issue_type is IssueType.DEAD:
        # Too small a signal leaves it to the biases which units fire.
        return b.metrics.get("role") == "silent units" and b.metrics.get("never_fired", 1.0) < 1.0
    if a.issue_type is IssueType.EXPLODING and b.issue_type is IssueType.NUMERICAL:
        return not _own_domain(b)
    if a.issue_type is IssueType.NUMERICAL and b.issue_type is not IssueType.NUMERICAL:
        return _own_domain(a) or a.metrics.get("phase") in ("input", "parameter")
    if a.issue_type is IssueType.DEAD and a.metrics.get("role") == "zero":
        # A zero that another layer makes is no cause, unless it is that very place.
        return b.issue_type is IssueType.DEAD and b.metrics.get("at") == a.layer
    if a.issue_type is IssueType.DEAD and a.metrics.get("role") == "silent units":
        # Where all units of a module are silent, it is what feeds it that is at fault.
        return b.metrics.get("role") != "source" and _strong(a)
    if a.issue_type is b.issue_type is IssueType.DEAD and b.metrics.get("role") == "silent units":
        return a.metrics.get("role") == "source"
    if a.issue_type is IssueType.DEAD and a.metrics.get("input_zero") and victim.node in cause.upstream:
        return False  # it is silent because nothing enters it: what is before it is at fault
    if a.issue_type is IssueType.DEAD and b.issue_type is not IssueType.DEAD:
        return _strong(a)
    return True


def _strong(issue: Issue) -> bool:
    return issue.severity >= IssueSeverity.HIGH


def _shows_more(flow: Flow, a: _Suspect, b: _Suspect) -> bool:
    """Whether a loss of gradient shows more at `a`: further from the loss, but neither at a table nor on a side
    branch, which gets less than what it branches off from for reasons of its own."""

    def key(s: _Suspect) -> tuple[bool, bool, int]:
        return (flow.is_table(s.node), bool(s.issue.metrics.get("side_branch")), _order(flow, s))

    return key(a) < key(b)


def _own_domain(issue: Issue) -> bool:
    op = str(issue.metrics.get("op", "")).lower()
    return any(word in op for word in _OWN_DOMAIN)


def _travels_forward(cause: _Suspect, victim: _Suspect) -> bool:
    if cause.issue.issue_type is IssueType.DEAD:  # a silent layer starves the weights behind it of input
        silent = cause.issue.metrics.get("role") in ("silent units", "source")
        pointed = victim.issue.metrics.get("at") == cause.issue.layer
        starved = victim.issue.metrics.get("why") in ("zero input", None)
        return pointed or (silent and (starved or bool(victim.issue.metrics.get("input_zero"))))
    return True


def _behind_the_cut(flow: Flow, cause: _Suspect, victim: _Suspect) -> bool:
    """Whether the victim runs before the cut, where the graph cannot tell: both are unreachable."""
    cut = cause.issue.metrics.get("role") == victim.issue.metrics.get("role") == "cut off"
    if not cut:
        return False
    if victim.node in flow.wiring.fed_by(cause.node):
        # With an operation of its own that cuts it, mending the other one would not mend the victim.
        return victim.issue.metrics.get("op") in ("", cause.issue.metrics.get("op"))
    a, b = flow.layers.get(cause.node), flow.layers.get(victim.node)
    same_part = _shared_depth(cause.issue.layer, victim.issue.layer) > 0 or not flow.wiring.known
    return bool(a and b and same_part and a.order > b.order and not victim.issue.metrics.get("op"))


def _shared_depth(a: str, b: str) -> int:
    depth = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        depth += 1
    return depth


def _prior(flow: Flow, cause: _Suspect, victim: _Suspect) -> bool:
    """Of two that could explain each other: what starts the chain. A uniform loss or growth starts nowhere, and
    is told where it shows most; else the graver, then the nearer to the loss, is the cause."""
    a, b = cause.issue, victim.issue
    if a.issue_type is b.issue_type:
        if a.issue_type is IssueType.EXPLODING:
            return (a.metrics.get("growth", 0.0), cause.node) > (b.metrics.get("growth", 0.0), victim.node)
        return (a.severity.rank, _order(flow, cause)) > (b.severity.rank, _order(flow, victim))
    return _RANK[a.issue_type] < _RANK[b.issue_type]


# Where two types could each explain the other: what is the more basic event.
_RANK = {
    t: i
    for i, t in enumerate(
        (_T.NUMERICAL, _T.EXPLODING, _T.DEAD, _T.SATURATION, _T.VANISHING, _T.UNSTABLE, _T.BOTTLENECK)
    )
}


def _order(flow: Flow, suspect: _Suspect) -> int:
    layer = flow.layers.get(suspect.node)
    return layer.order if layer else -1


def _distance(flow: Flow, cause: _Suspect, victim: _Suspect) -> tuple[int, int, int]:
    """Smaller is better: graver first, then nearer the loss."""
    return (-cause.issue.severity.rank, -_order(flow, cause), cause.index)


# ----------------------------------------------------------------------------------- the causes


def _amended(issue: Issue, cause: Issue) -> Issue:
    name = cause.layer or "(model)"
    text = f"{issue.description} Explained by {cause.issue_type.value} in {name}."
    return attrs.evolve(issue, description=text, metrics={**issue.metrics, "explained_by": cause.layer})


def _cause(
    flow: Flow, suspects: Sequence[_Suspect], issues: Sequence[Issue], root: int, members: Sequence[int]
) -> Cause:
    issue = issues[root]
    others = [issues[i] for i in members if i != root]
    confidence, reason = _confidence(flow, issue, len(others))
    return Cause(
        layer=issue.layer,
        issue_type=issue.issue_type,
        mechanism=issue.description,
        issues=(issue, *others),
        confidence=confidence,
        reason=reason,
        evidence=_evidence(flow, suspects[root], others),
    )


def _confidence(flow: Flow, issue: Issue, explained: int) -> tuple[float, str]:
    """By what the verdict rests on: read off exactly, measured against others, or in the order of execution."""
    metrics = issue.metrics
    if issue.issue_type is IssueType.NUMERICAL and metrics.get("op"):
        return 0.97, "the operation that made it was seen"
    if metrics.get("role") in ("cut off", "never called"):
        sure = bool(metrics.get("op")) or metrics.get("role") == "never called"
        return (0.95, "read off the wiring") if sure else (0.8, "no path in the graph; what cuts it was not seen")
    if issue.severity < IssueSeverity.MEDIUM:
        return 0.3, "the evidence is weak, or it may be by design"
    if not flow.wiring.known:
        return 0.5, "no layer graph: the order of execution stood in for it"
    if issue.issue_type is IssueType.DEAD:
        return 0.9, "exact zeros, and what makes them, were measured"
    if issue.issue_type is IssueType.SATURATION:
        return 0.85, "the derivative was seen to be gone, element by element"
    if explained:
        return 0.8, f"it stands between the loss and {explained} other issue(s), and can bring them about"
    return 0.7, "measured against the other layers; it explains no other issue"


def _evidence(flow: Flow, suspect: _Suspect, others: Sequence[Issue], most: int = 12) -> tuple[str, ...]:
    """The path from the loss to the cause and on to what it explains, one line a layer."""
    places = {suspect.node, *(node_name(i.layer) for i in others)}
    on_path = [
        node
        for node in reversed(flow.wiring.order)
        if node in flow.layers
        and not flow.layers[node].composite
        and (node in places or node in suspect.downstream and LOSS in flow.wiring.succs[node])
    ]
    lines = []
    for node in on_path[:most]:
        layer = flow.layers[node]
        norm, rms = late(flow.grad[node]), late(layer.output_rms)
        if layer.reached.any():
            seen = f"gradient norm {norm:.2e}, output rms {rms:.2e}"
        else:
            seen = "no path from the loss"
        mark = " (cause)" if node == suspect.node else ""
        lines.append(f"{layer_name(node) or '(model)'} ({layer.type}): {seen}{mark}")
    if len(on_path) > most:
        lines.append(f"... {len(on_path) - most} more")
    return tuple(lines)


def _rank(flow: Flow):
    def key(cause: Cause) -> tuple[int, int, int, int, str]:
        first = cause.issues[0]
        layer = flow.layers.get(node_name(cause.layer))
        return (
            -first.severity.rank,
            -sum(issue.severity.rank for issue in cause.issues),
            _RANK[cause.issue_type],
            -(layer.order if layer else 0),
            cause.layer,
        )

    return key
