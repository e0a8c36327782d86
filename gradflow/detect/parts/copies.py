"""Parts that are copies of one another, side by side, and that no step tells apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gradflow.detect.parts.peers import type_of
from gradflow.detect.view import Flow, flow_of
from gradflow.records import Floats, FlowRecord, Issue, IssueSeverity, IssueType, ParameterRecord

_EXACT = 1e-7  # what rounding leaves of a norm between two equal parameters
_Signature = tuple[tuple[str, tuple[int, ...]], ...]


def copied_parts(
    alike: float = 1e-4, *, apart: float = 1e-3, severe: int = 3
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of parts that start as copies of one another and stay copies.

    Measured: the norms of all parameters, and of their gradients, of modules that hold the same parameters:
    equal at the start, with equal gradients there, and both still equal at the end of the run.

    Why this is evidence: norms of matrices that were drawn apart agree to a few digits at most, those of
    their gradients not even that. What has the same weights and gets the same gradient takes the same step,
    so heads, experts or members of an ensemble that were copied from one are worth one for ever.

    Looks alike and is not: copies that are stacked, as layers of an encoder are, or that are given different
    inputs, targets, masks or weights: their gradients differ, and the first step ends it; copies that are
    not trained (targets, teachers), or by another loss; one module used twice; parts that start at zero,
    and those that no gradient reaches.

    Args:
        alike: distance of the norms of two gradients over the larger, below which they are the same.
        apart: the same for the weights at the end: copies that have parted by more are none any longer.
        severe: number of parts that are copies of one another, from which it is HIGH.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        for group in _outermost(_copies(record, alike, apart)):
            beside = _side_by_side(flow, group)
            if len(beside) > 1:
                yield _issue(record, beside, severe)

    return detector


def _copies(record: FlowRecord, alike: float, apart: float) -> list[list[str]]:
    """The groups of modules that are copies of one another and stay so, each in order."""
    held: dict[str, list[ParameterRecord]] = {}
    for parameter in record.parameters:
        parts = parameter.name.split(".")
        for depth in range(1, len(parts)):
            held.setdefault(".".join(parts[:depth]), []).append(parameter)
    like: dict[_Signature, list[str]] = {}
    for name, parameters in held.items():
        if _counts(parameters):
            signature = tuple((p.name[len(name) :], p.shape) for p in parameters)
            like.setdefault(signature, []).append(name)
    found = []
    for names in like.values():
        while names:
            first, *others = names
            same = [n for n in others if _stay_equal(held[first], held[n], alike, apart)]
            if same:
                found.append([first, *same])
            names = [n for n in others if n not in same]
    return found


def _counts(parameters: Sequence[ParameterRecord]) -> bool:
    """Whether a module is trained, and has a matrix that is not zero and gets a gradient."""
    trained = all(p.trainable and p.optimized and len(p.norm) for p in parameters)
    return trained and any(len(p.shape) > 1 and p.norm[0] > 0 and p.grad_norm[0] > 0 for p in parameters)


def _stay_equal(
    one: Sequence[ParameterRecord], other: Sequence[ParameterRecord], alike: float, apart: float
) -> bool:
    return all(
        _near(p.norm[:1], q.norm[:1], _EXACT)
        and _near(p.norm, q.norm, apart)
        and _near(p.grad_norm[:1], q.grad_norm[:1], alike)
        for p, q in zip(one, other, strict=True)
    )


def _side_by_side(flow: Flow, group: Sequence[str]) -> list[str]:
    """Leave out modules of a group that another one of it feeds."""
    member = {name: name for name in group}
    own: dict[str, str] = {}  # by node, the module of the group that it is in
    for node, layer in flow.layers.items():
        parts = layer.module.split(".")
        inside = (member.get(".".join(parts[:depth])) for depth in range(1, len(parts) + 1))
        own[node] = next(filter(None, inside), "")
    fed: set[str] = set()
    before: dict[str, tuple[str, ...]] = {}  # by node, two of those up to it: enough to find another one
    for node in flow.wiring.order:
        found = dict.fromkeys(name for p in flow.wiring.preds[node] for name in before[p])
        here = own.get(node, "")
        if here and any(name != here for name in found):
            fed.add(here)
        before[node] = tuple(found | ({here: None} if here else {}))[:2]
    return [name for name in group if name not in fed]


def _near(a: Floats, b: Floats, within: float) -> bool:
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    return bool(np.all(np.abs(a - b) <= within * np.maximum(np.abs(a), np.abs(b))))


def _outermost(groups: Sequence[list[str]]) -> list[list[str]]:
    """Leave out parts of copies, which are copies of one another too."""
    every = {name for group in groups for name in group}

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:depth]) in every for depth in range(1, len(parts)))

    return [group for group in groups if not all(inside(name) for name in group)]


def _issue(record: FlowRecord, group: Sequence[str], severe: int) -> Issue:
    first, second = group[:2]
    others = f" (as are {', '.join(group[2:6])}{', ...' if len(group) > 6 else ''})" if len(group) > 2 else ""
    return Issue(
        layer=second,
        layer_type=type_of(record, second) or "Module",
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH if len(group) >= severe else IssueSeverity.MEDIUM,
        description=f"It is a copy of {first}{others}: all of their weights and gradients are of the same "
        f"size in every step, so they take the same steps and stay copies. All {len(group)} are worth one.",
        magnitude=1.0 / len(group),
        recommended_actions=(
            f"Build {second} anew instead of copying {first} (copy.deepcopy, or one state_dict for all), or "
            "call reset_parameters() on each.",
            "If they must start equal, give them different inputs: data, dropout or masks of their own.",
        ),
        metrics={"copies": tuple(group), "num_copies": len(group)},
    )
