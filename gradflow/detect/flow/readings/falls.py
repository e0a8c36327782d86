"""Where on its way back from the loss a gradient falls, and whether one place accounts for most of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs

from gradflow.detect.evidence import Shares, activations_of, late
from gradflow.detect.view import Flow

LOCAL = 1e-2  # what a layer must fall short of its kind to be named: out of any usual initialisation's range

_SHAPES = ("view", "reshape", "expand", "transpose", "permute", "squeeze", "clone", "split", "select")


@attrs.frozen(kw_only=True)
class Fall:
    """The one place on a path where the gradient falls most; none if `node` is empty.

    Args:
        node: the layer on the loss's side of it.
        before: the layer on the other side.
        kept: what passes, against the layer's kind.
        to_blame: whether it is the layer itself: none of the layers right before it gets its due. If one
            does, the operations on the way to the others are to blame.
        part: the part of the model in which the gradient falls most: a prefix of names.
    """

    node: str = ""
    before: str = ""
    kept: float = 1.0
    to_blame: bool = False
    part: str = ""


def falls_of(
    against: Shares,
    seen: Mapping[str, float],
    worst_first: Sequence[str],
    gone: Mapping[str, str],
    local_share: float,
) -> dict[str, tuple[Fall, bool]]:
    """By starved layer, the fall on its path, and whether the layer is ahead of it, seen from the loss.

    What is said of the worst one holds for the others on its path: a layer near the loss, whose path is
    short, would else be blamed for the largest of few small falls. Each path is followed up to where it joins
    one that was followed before, so this takes one pass.

    Args:
        against: what arrives at each layer call, against what should.
        seen: by layer call, what the run came to of it.
        worst_first: the starved layers.
        gone: those to which nothing comes because the gradient has become too small for its format.
        local_share: part of the whole fall, in logarithms, that one place must account for.
    """
    drops = _drops(against, seen, gone)
    found: dict[str, tuple[Fall, bool]] = {}
    for start in worst_first:
        path: list[str] = []
        here = start
        while here and here not in found:
            path.append(here)
            here = against.ahead.get(here, "")
        if not path:
            continue
        held = [n for n in path if n not in gone]  # how small it would be further on, nobody can know
        part = found[here][0].part if here else _part(against.flow, held, [_bounded(seen[n]) for n in held])
        fall = _sole_fall(against.flow, drops.get(start), seen, local_share, part)
        ahead = bool(fall.node)
        for node in path:
            ahead = ahead and node != fall.node
            found[node] = (fall, ahead)
    return found


@attrs.frozen(kw_only=True)
class _Drop:
    """The largest drop between two neighbours on the path from a layer to the loss.

    Args:
        kept: what is left, as a ratio; 1 where there are no two.
        node: the layer on the loss's side of it.
        before: the layer on the other side.
        start: what arrives at the first layer of the path to which something comes.
        first: that layer.
    """

    kept: float
    node: str
    before: str
    start: float
    first: str


def _drops(against: Shares, seen: Mapping[str, float], gone: Mapping[str, str]) -> dict[str, _Drop]:
    found: dict[str, _Drop] = {}
    for node in reversed(against.flow.wiring.order):
        if node not in seen:
            continue
        behind = found.get(against.ahead.get(node, ""))
        if node in gone:
            if behind:
                found[node] = behind
            continue
        value = _bounded(seen[node])
        own = value / behind.start if behind else 1.0
        if behind and own > behind.kept:
            found[node] = attrs.evolve(behind, start=value, first=node)
        else:
            found[node] = _Drop(
                kept=own, node=behind.first if behind else "", before=node, start=value, first=node
            )
    return found


def _sole_fall(
    flow: Flow, drop: _Drop | None, seen: Mapping[str, float], local_share: float, part: str
) -> Fall:
    if drop is None or drop.kept > LOCAL or math.log(drop.kept) > local_share * math.log(drop.start):
        return Fall(part=part)
    node, before = drop.node, drop.before
    if not flow.has_matrix(node) and not flow.is_norm(node) and not _saturates(flow, before):
        return Fall(node=node, before=before, kept=drop.kept, part=part)
    handed = max((known(seen.get(n, 0.0)) for n in flow.wiring.before(node)), default=0.0)
    little = max(handed, _bounded(seen[before])) <= 10 * LOCAL * _bounded(seen[node])
    return Fall(node=node, before=before, kept=drop.kept, to_blame=little, part=part)


def _bounded(value: float) -> float:
    return min(max(known(value), 1e-300), 1.0)


def _part(flow: Flow, path: Sequence[str], values: Sequence[float]) -> str:
    """The part of the model, by the first component in which names differ, that loses most on a path."""
    names = [flow.layers[node].module.split(".") for node in path]
    level = 0
    while all(len(n) > level + 1 for n in names) and len({n[level] for n in names}) == 1:
        level += 1
    lost: dict[str, float] = {}
    for i in range(len(path) - 1):
        part = ".".join(names[i + 1][: level + 1]) if len(names[i + 1]) > level + 1 else ""
        lost[part] = lost.get(part, 0.0) + math.log(values[i + 1] / values[i])
    return max(lost, key=lambda part: (lost[part], part), default="")


def _saturates(flow: Flow, node: str) -> bool:
    return any(late(a.saturated_share) > 0.5 for a in activations_of(flow, node))


def best_upstream(flow: Flow, against: Shares) -> dict[str, float]:
    """By node, the largest share among the layer calls further upstream."""
    best: dict[str, float] = {}
    own = {node: late(values) for node, values in against.share.items()}
    for node in flow.wiring.order:
        before = [max(best.get(p, 0.0), known(own.get(p, 0.0))) for p in flow.wiring.preds[node]]
        best[node] = max(before, default=0.0)
    return best


def lossy_operation(flow: Flow, before: str, absorber: str) -> tuple[str, str]:
    """What loses the gradient between two layers whose weights do not, and the layer at fault: a saturated
    activation, else the operations that the first one's output goes through, else the second one itself."""
    for activation in activations_of(flow, before):
        if late(activation.saturated_share) > 0.5:
            return activation.op, before if activation.functional else absorber
    ops = [op for op in flow.wiring.ops_after(before) if not any(word in op for word in _SHAPES)]
    if ops and flow.has_matrix(absorber):
        return ", ".join(dict.fromkeys(ops)), before
    return "", absorber


def known(value: float) -> float:
    """Return a value, or 0 where it is not finite."""
    return value if math.isfinite(value) else 0.0
