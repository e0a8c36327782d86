"""Which issue can explain which: the relation behind the causes.

NOTE [Who explains whom]
A backward illness travels from its place towards the input: where the gradient is lost, blown up or cut at
one layer, every layer upstream of it shows it. A forward illness (a silent layer, a blown up signal)
travels the other way. So one issue explains another where the first *can* bring the second about
(`_CAN_EXPLAIN`), stands between it and the loss (or, forward, before it), and was there no later. Of
several that explain an issue, the gravest, and of these the one nearest the loss is its cause, for it is
the first that the gradient meets; and a cause that is itself explained hands its victims on. What nothing
explains is a cause. So is every issue of a type that is not one of the seven: of those nobody knows what they
bring about, or what brings them about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from gradflow.detect.evidence import Flow, heads
from gradflow.detect.wiring import node_name
from gradflow.records import AnyIssueType, Issue, IssueSeverity, IssueType

_T = IssueType

# What an issue of a type (first) can bring about upstream of it, downstream of it, or anywhere.
_CAN_EXPLAIN: dict[AnyIssueType, dict[str, frozenset[AnyIssueType]]] = {
    _T.DEAD: {
        "upstream": frozenset({_T.DEAD, _T.VANISHING, _T.BOTTLENECK}),
        "downstream": frozenset({_T.DEAD, _T.BOTTLENECK}),
        "same": frozenset({_T.DEAD, _T.VANISHING, _T.BOTTLENECK}),
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
HUGE = 1e15  # the square of a float32 overflows at 1e19
_OWN_DOMAIN = ("exp", "log", "sqrt", "div", "norm", "pow", "softmax", "attention", "acos", "mean", "where")


MOST_SUSPECTS = 40  # of one type: a stack of thousands of layers has thousands of like issues, and one cause


@attrs.frozen(eq=False)
class Suspect:
    """An issue, and its place on the flow."""

    index: int
    issue: Issue
    node: str
    upstream: frozenset[str] = frozenset()
    downstream: frozenset[str] = frozenset()


def roots(flow: Flow, issues: Sequence[Issue]) -> list[int]:
    """Return by index of an issue the index of the one that explains it in the end; its own if none does."""
    relation = _Relation(flow, [Suspect(i, issue, node_name(issue.layer)) for i, issue in enumerate(issues)])
    parent = [relation.parent(i) for i in range(len(issues))]
    return [_end(parent, i) for i in range(len(parent))]


def _end(parent: Sequence[int], index: int) -> int:
    seen = [index]
    while parent[seen[-1]] != seen[-1]:
        if parent[seen[-1]] in seen:
            return min(seen)
        seen.append(parent[seen[-1]])
    return seen[-1]


class _Relation:
    """Who explains whom, among the issues of one record. Only the gravest of each type are suspected."""

    def __init__(self, flow: Flow, suspects: Sequence[Suspect]) -> None:
        self.flow = flow
        self.all = suspects
        self.placed: dict[int, Suspect] = {}
        for kind in IssueType:
            alike = [s for s in suspects if s.issue.issue_type is kind]
            for s in sorted(alike, key=self._by_weight)[:MOST_SUSPECTS]:
                self.placed[s.index] = self._placed(s)
        self.ends = _ends(flow)

    def _by_weight(self, s: Suspect) -> tuple[int, bool, bool, bool, int]:
        if s.issue.issue_type is IssueType.VANISHING:  # told where it shows most
            absorbs = "absorbs" not in s.issue.metrics
            return (-s.issue.severity.rank, absorbs, *_shown(self.flow, s)[1:])
        return (-s.issue.severity.rank, False, False, False, -_order(self.flow, s))

    def _placed(self, s: Suspect) -> Suspect:
        """Return a suspect with what lies before and behind it: the layer call, or the parts of a module."""
        wires = self.flow.wiring
        calls = s.node not in wires.nodes or s.issue.metrics.get("num_calls", 1) != 1
        module = s.node.partition("@")[0]
        marks = (f"{module}@",) if s.node in wires.nodes else (f"{module}@", f"{module}.")
        nodes = [n for n in wires.nodes if n == s.node or (calls and (n == module or n.startswith(marks)))]
        up = frozenset[str]().union(*(wires.upstream(n) for n in nodes)) if nodes else frozenset[str]()
        down = frozenset[str]().union(*(wires.downstream(n) for n in nodes)) if nodes else frozenset[str]()
        return attrs.evolve(s, upstream=up, downstream=down)

    def parent(self, index: int) -> int:
        """Return the index of the issue that explains this one, or its own."""
        victim = self.placed.get(index, self.all[index])
        able = [s for i, s in self.placed.items() if i != index and self.explains(s, victim)]
        if index in self.placed:
            # One that its own victim could explain would close a circle: what is more basic decides then.
            able = [s for s in able if not self.explains(victim, s) or _prior(self.flow, s, victim)]
        return min(able, key=lambda s: _distance(self.flow, s), default=victim).index

    def explains(self, cause: Suspect, victim: Suspect) -> bool:
        """Whether an issue can have brought another about."""
        a, b = cause.issue, victim.issue
        if a.severity < IssueSeverity.MEDIUM and a.severity < b.severity:
            return False
        if _born_in_training(cause, victim):
            return True
        if _born_in_training(victim, cause) or not _mechanism_fits(self.flow, cause, victim):
            return False
        kinds = _CAN_EXPLAIN[a.issue_type]
        if a.issue_type is b.issue_type is IssueType.VANISHING:
            on_path = victim.node in cause.upstream or victim.node in cause.downstream
            return on_path or bool(self.ends.get(cause.node, 0) & self.ends.get(victim.node, 0))
        if cause.node == victim.node or _same_module(cause, victim):
            return b.issue_type in kinds["same"] and a.issue_type is not b.issue_type
        if victim.node in cause.upstream:
            return b.issue_type in kinds["upstream"]
        if victim.node in cause.downstream:
            return b.issue_type in kinds["downstream"] and _travels_forward(cause, victim)
        if a.issue_type is b.issue_type is IssueType.DEAD:
            return _behind_the_cut(self.flow, cause, victim)
        return False


def _same_module(cause: Suspect, victim: Suspect) -> bool:
    """Whether an issue of all calls of a module meets one of its calls."""
    every = cause.issue.metrics.get("num_calls", 1) != 1
    return every and cause.node.partition("@")[0] == victim.node.partition("@")[0]


def _ends(flow: Flow) -> dict[str, int]:
    """By node, which last layers its data reaches, as bits: branches that meet again share one."""
    bit = {node: 1 << i for i, node in enumerate(heads(flow))}
    found: dict[str, int] = {}
    for node in reversed(flow.wiring.order):
        found[node] = bit.get(node, 0)
        for behind in flow.wiring.succs[node]:
            found[node] |= found.get(behind, 0)
    return found


def _born_in_training(cause: Suspect, victim: Suspect) -> bool:
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
        return bool(victim.issue.metrics.get("alive_at_start"))
    return False


def _mechanism_fits(flow: Flow, cause: Suspect, victim: Suspect) -> bool:
    """Conditions that the types alone do not tell."""
    a, b = cause.issue, victim.issue
    if a.issue_type is b.issue_type is IssueType.VANISHING:
        # What absorbs explains those it starves. Where none does, every layer loses a little, and the loss is
        # told where it shows most; not at a table, which nothing flows through.
        if absorber := b.metrics.get("absorber", ""):
            return absorber == a.metrics.get("absorbs")
        return (
            "absorber" in b.metrics
            and not a.metrics.get("absorber")
            and _shown(flow, cause) < _shown(flow, victim)
        )
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


def _shown(flow: Flow, s: Suspect) -> tuple[bool, bool, bool, int]:
    """Smaller where a loss of gradient shows more: further from the loss, but in the part of the model that
    loses it, and neither at a table, which nothing flows through, nor on a side branch, which gets less than
    what it branches off from for reasons of its own."""
    elsewhere, side = (bool(s.issue.metrics.get(key)) for key in ("elsewhere", "side_branch"))
    return (flow.is_table(s.node), elsewhere, side, _order(flow, s))


def _own_domain(issue: Issue) -> bool:
    entered = [abs(issue.metrics.get(key, 0.0)) for key in ("input_min", "input_max")]
    if any(math.isfinite(value) and value > HUGE for value in entered):
        return False  # no operation takes such numbers: what made them is at fault
    op = str(issue.metrics.get("op", "")).lower()
    return any(word in op for word in _OWN_DOMAIN)


def _travels_forward(cause: Suspect, victim: Suspect) -> bool:
    if cause.issue.issue_type is IssueType.DEAD:  # a silent layer starves the weights behind it of input
        silent = cause.issue.metrics.get("role") in ("silent units", "source")
        pointed = victim.issue.metrics.get("at") == cause.issue.layer
        starved = victim.issue.metrics.get("why") in ("zero input", None)
        return pointed or (silent and (starved or bool(victim.issue.metrics.get("input_zero"))))
    return True


def _behind_the_cut(flow: Flow, cause: Suspect, victim: Suspect) -> bool:
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


def _prior(flow: Flow, cause: Suspect, victim: Suspect) -> bool:
    """Of two that could explain each other: what starts the chain. A uniform loss or growth starts nowhere,
    and is told where it shows most; else the graver, then the nearer to the loss, is the cause."""
    a, b = cause.issue, victim.issue
    if a.issue_type is b.issue_type:
        if a.issue_type is IssueType.EXPLODING:
            return _grows(flow, cause) > _grows(flow, victim)
        return (a.severity.rank, _order(flow, cause)) > (b.severity.rank, _order(flow, victim))
    return PRECEDENCE[a.issue_type] < PRECEDENCE[b.issue_type]


def _grows(flow: Flow, s: Suspect) -> tuple[int, bool, int]:
    """Larger where growth shows more: by the power of ten; like ones are told in the part of the model that
    grows most, at the layer furthest from the loss. Far targets come first: they were there before a step."""
    metrics = s.issue.metrics
    far = metrics.get("role") == "far targets"
    decade = 999 if far else math.floor(math.log10(max(metrics.get("growth", 1.0), 1.0)))
    return (decade, not metrics.get("elsewhere"), -_order(flow, s))


# Where two types could each explain the other: what is the more basic event.
PRECEDENCE: dict[AnyIssueType, int] = {
    t: i
    for i, t in enumerate(
        (_T.NUMERICAL, _T.EXPLODING, _T.DEAD, _T.SATURATION, _T.VANISHING, _T.UNSTABLE, _T.BOTTLENECK)
    )
}


def _order(flow: Flow, suspect: Suspect) -> int:
    layer = flow.layers.get(suspect.node)
    return layer.order if layer else -1


def _distance(flow: Flow, cause: Suspect) -> tuple[int, int, int]:
    """Smaller is better: graver first, then nearer the loss."""
    return (-cause.issue.severity.rank, -_order(flow, cause), cause.index)
