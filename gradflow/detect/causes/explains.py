"""Which issue explains which: the table of rules applied to the issues of one record.

NOTE [Who explains whom]
One issue explains another where a rule says that it *can* bring the other about from where it stands
(`RULES`): at the same layer, downstream of it, upstream of it, or on another branch. A weak issue explains
none that is graver. Of several that explain an issue, the gravest, and of these the one nearest the loss is
its cause, for it is the first that the gradient meets; and a cause that is itself explained hands its victims
on. What nothing explains is a cause. So is every issue of a type that is not one of the seven, unless its
evidence or a rule of one's own tells more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import attrs

from gradflow.detect.causes.conditions import is_lent, order, precedence, shown, still_heard
from gradflow.detect.causes.rules import RULES, Rule, Where
from gradflow.detect.evidence import heads
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import Issue, IssueType, Role

MOST_SUSPECTS = 40  # of one type: a stack of thousands of layers has thousands of like issues, and one cause


@attrs.frozen(eq=False)
class Suspect:
    """An issue, its place among the issues, and the node of its layer."""

    index: int
    issue: Issue
    node: str


def roots(flow: Flow, issues: Sequence[Issue], rules: Iterable[Rule] = ()) -> list[int]:
    """Return by index of an issue the index of the one that explains it in the end; its own if none does."""
    suspects = [Suspect(i, issue, node_name(issue.layer)) for i, issue in enumerate(issues)]
    relation = _Relation(flow, suspects, (*RULES, *rules))
    parent = [relation.parent(suspect) for suspect in suspects]
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

    def __init__(self, flow: Flow, issues: Sequence[Suspect], rules: Sequence[Rule]) -> None:
        self.flow = flow
        found: list[Suspect] = []
        for kind in dict.fromkeys(s.issue.issue_type for s in issues):
            alike = [s for s in issues if s.issue.issue_type == kind]
            found.extend(sorted(alike, key=self._weight)[:MOST_SUSPECTS])
        # Graver first, then nearer the loss.
        self.suspects = sorted(found, key=lambda s: (-s.issue.severity.rank, -order(flow, s.issue), s.index))
        self.suspected = {s.index for s in found}
        # By type of cause and victim the rules that speak of them; by type of victim the suspects.
        causes = {s.issue.issue_type for s in found}
        victims = {s.issue.issue_type for s in issues}
        self.rules = {
            (a, b): [r for r in rules if (not r.cause or a in r.cause) and (not r.victim or b in r.victim)]
            for a in causes
            for b in victims
        }
        self.able = {b: [s for s in self.suspects if self.rules[s.issue.issue_type, b]] for b in victims}
        self.places = _Places(flow, self.suspects)

    def _weight(self, s: Suspect) -> tuple[int | bool, ...]:
        rank, known = -s.issue.severity.rank, s.issue.evidence
        if s.issue.issue_type is IssueType.VANISHING:  # told where it shows most
            return (rank, not known.plays(Role.ABSORBING), *shown(self.flow, s.issue)[1:])
        if s.issue.issue_type is IssueType.EXPLODING:
            decade, here, place = _grows(self.flow, s.issue)
            return (rank, -decade, not here, -place)
        # What is zero because of others explains little, what makes zeros of what enters it most.
        makes_zeros = known.plays(Role.BLOCKING) and not known.no_input
        return (rank, known.plays(Role.BLOCKED), not makes_zeros, -order(self.flow, s.issue))

    def parent(self, victim: Suspect) -> int:
        """Return the index of the issue that explains this one, or its own."""
        for s in self.able[victim.issue.issue_type]:
            if s.index != victim.index and self.explains(s, victim):
                # One that its own victim could explain would close a circle: what is more basic decides then.
                circle = victim.index in self.suspected and self.explains(victim, s)
                if not circle or _prior(self.flow, s.issue, victim.issue):
                    return s.index
        return victim.index

    def explains(self, cause: Suspect, victim: Suspect) -> bool:
        """Whether an issue can have brought another about."""
        a, b = cause.issue, victim.issue
        if not a.severity.is_serious and a.severity < b.severity:
            return False
        rules = self.rules[a.issue_type, b.issue_type]
        where = self.places.of(cause, victim) if rules else "apart"
        return any(rule.holds(self.flow, a, b, where) for rule in rules)


class _Places:
    """Where a layer stands, seen from each suspect: one pass over the graph in either direction, in which
    every suspect is a bit."""

    def __init__(self, flow: Flow, suspects: Sequence[Suspect]) -> None:
        wires = flow.wiring
        self.flow = flow
        self.bit = {s.index: 1 << i for i, s in enumerate(suspects)}
        marked: dict[str, int] = {}
        for s in suspects:
            for node in _nodes(flow, s):
                marked[node] = marked.get(node, 0) | self.bit[s.index]
        # By node, the suspects that it feeds, and those that feed it.
        self.feeds = gathered(reversed(wires.order), wires.succs, marked)
        self.fed_by = gathered(wires.order, wires.preds, marked)
        last = {node: 1 << i for i, node in enumerate(heads(flow))}
        ends = gathered(reversed(wires.order), wires.succs, last)
        self.ends = {node: bits | last.get(node, 0) for node, bits in ends.items()}

    def of(self, cause: Suspect, victim: Suspect) -> Where:
        """Return where a victim stands, seen from a suspect."""
        bit = self.bit[cause.index]
        if cause.node == victim.node or _same_module(cause, victim):
            return "same"
        parts = [victim.node] if victim.node in self.feeds else _nodes(self.flow, victim)
        parts = [] if cause.node in parts else parts  # a layer is neither before nor behind a part of it
        if any(self.feeds.get(node, 0) & bit for node in parts):
            return "upstream"
        if any(self.fed_by.get(node, 0) & bit for node in parts):
            return "downstream"
        return "beside" if self.ends.get(cause.node, 0) & self.ends.get(victim.node, 0) else "apart"


def gathered(
    nodes: Iterable[str], step: Mapping[str, tuple[str, ...]], marked: Mapping[str, int]
) -> dict[str, int]:
    """Return by node the bits of all nodes that `step` leads to, in one pass along the order of the graph."""
    found: dict[str, int] = {}
    for node in nodes:
        bits = 0
        for other in step[node]:
            bits |= found.get(other, 0) | marked.get(other, 0)
        found[node] = bits
    return found


def _nodes(flow: Flow, s: Suspect) -> list[str]:
    """Return the nodes that an issue is about: the layer call, or all calls or parts of its module."""
    known = flow.wiring.nodes
    if s.node in known and s.issue.evidence.num_calls == 1:
        return [s.node]
    module = s.node.partition("@")[0]
    marks = (f"{module}@",) if s.node in known else (f"{module}@", f"{module}.")
    return [n for n in known if n in (s.node, module) or n.startswith(marks)]


def _same_module(cause: Suspect, victim: Suspect) -> bool:
    """Whether an issue of all calls of a module meets one of its calls."""
    every = cause.issue.evidence.num_calls != 1
    return every and cause.node.partition("@")[0] == victim.node.partition("@")[0]


def _prior(flow: Flow, a: Issue, b: Issue) -> bool:
    """Whether of two that could explain each other the first is what starts the chain. A uniform loss or
    growth starts nowhere, and is told where it shows most; else the graver, then the nearer to the loss, but
    for a probability that the loss hears all the same."""
    if a.issue_type == b.issue_type:
        if a.issue_type is IssueType.EXPLODING:
            return _grows(flow, a) > _grows(flow, b)
        made = [i.issue_type is IssueType.BOTTLENECK and i.evidence.origin == i.layer for i in (a, b)]
        if made[0] is not made[1]:  # what a layer is made with is alike behind it too, and not the reverse
            return made[0]
        if a.severity == b.severity and all("saturated_share" in i.metrics for i in (a, b)):
            heard = [still_heard(flow, i) for i in (a, b)]
            if heard[0] is not heard[1]:
                return heard[1]
        return (a.severity.rank, order(flow, a)) > (b.severity.rank, order(flow, b))
    if is_lent(a) is not is_lent(b):
        return is_lent(a)
    return precedence(a) < precedence(b)


def _grows(flow: Flow, issue: Issue) -> tuple[int, bool, int]:
    """Larger where growth shows more: by the power of ten; like ones are told in the part of the model that
    grows most, at the layer furthest from the loss. Far targets come first: they were there before a step."""
    known = issue.evidence
    growth = max(known.growth, 1.0) if math.isfinite(known.growth) else 1.0
    decade = 999 if known.plays(Role.OFF_SCALE) else math.floor(math.log10(growth))
    return (decade, not known.elsewhere, -order(flow, issue))
