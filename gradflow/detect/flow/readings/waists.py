"""Where a model is narrow: the layers that every gradient passes, and those of them that are waists."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np

from gradflow.detect.view import Flow


@attrs.frozen(kw_only=True)
class Waist:
    """A layer narrower than both sides: features per sample here, before, and behind; the operation behind
    it that leaves no more, "" if the layer itself gives no more; whether it is one without that operation."""

    node: str
    width: int
    before: int
    behind: int
    op: str = ""
    by_itself: bool = True


def passages_of(flow: Flow, above: Mapping[str, str]) -> list[str]:
    """Return the layer calls that every gradient passes which reaches any layer before them, in order; and a
    first layer that is the only one that the data enter.

    In the tree of dominators, seen from the loss, a node is a passage if all nodes before it lie below it:
    if it stands at or above their lowest common ancestor, which is built up along the order of the graph.

    Args:
        flow: the record along its wiring.
        above: immediate dominators of the graph, seen from the loss.
    """
    wires = flow.wiring
    depth = {wires.loss: 0}
    for node in reversed(wires.order):
        if node in above and above[node] in depth:
            depth[node] = depth[above[node]] + 1

    def meet(a: str, b: str) -> str:
        while a != b:
            if depth[a] < depth[b]:
                a, b = b, a
            a = above[a]
        return a

    entries = [n for n in wires.order if n in flow.layers and n in depth and wires.is_first(n)]
    only_entry = entries if len({flow.layers[n].module for n in entries}) == 1 else []
    common: dict[str, str] = {}  # of all nodes before a node
    feeds: dict[str, bool] = {}  # whether any layer before a node is to be trained
    found = []
    for node in wires.order:
        preds = [p for p in wires.preds[node] if p in depth and wires.nodes[p].kind != "input"]
        feeds[node] = any(feeds[p] or (p in flow.layers and bool(flow.trainable(p))) for p in preds)
        for p in (*preds, *(common[p] for p in preds if p in common)):
            common[node] = meet(common[node], p) if node in common else p
        layer = flow.layers.get(node)
        if layer is None or layer.composite or node not in depth:
            continue
        if node not in common:
            if node in only_entry:
                found.append(node)
        elif feeds[node] and depth[common[node]] > depth[node] and meet(common[node], node) == node:
            found.append(node)
    return found


def width_of(flow: Flow, node: str) -> int:
    """Return the number of features per sample that a node gives."""
    shape = flow.wiring.nodes[node].shape or (flow.layers[node].shape if node in flow.layers else ())
    return int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 0


def _pairs_samples(flow: Flow, node: str) -> bool:
    """Whether what a module gives holds a number for every pair of samples (a kernel, similarities): as wide
    as the batch, whatever is told of a sample. So is what no layer gives."""
    if node not in flow.layers:
        return True
    shape = flow.layers[node].shape
    return len(shape) == 2 and shape[0] == shape[1] and not flow.has_matrix(node)


def _taken(flow: Flow, node: str) -> int:
    """The number of features that a plain layer takes."""
    matrices = [p for p in flow.parameters_of(node) if len(p.shape) == 2]
    return matrices[0].shape[1] if matrices and not flow.is_table(node) else 0


def _left(flow: Flow, node: str, above: Mapping[str, str]) -> tuple[str, int]:
    """The operation behind a layer that leaves least of what it gives, of those that all of it passes before
    the next layer, and how many numbers per sample that are; "" and the layer's own where none leaves less.

    Elements are counted, for operations may put samples and positions into one axis.
    """
    given, wires = flow.wiring.nodes[node].shape, flow.wiring
    number = int(np.prod(given, dtype=np.int64)) if given else 0
    least, fewest, at = "", number, above.get(node, wires.loss)
    while at not in flow.layers and at != wires.loss:
        elements = int(np.prod(wires.nodes[at].shape, dtype=np.int64)) if wires.nodes[at].shape else 0
        if number and 0 < elements < fewest:
            least, fewest = at, elements
        at = above.get(at, wires.loss)
    if not least or at == wires.loss:  # what the loss itself makes of it is no passage
        return "", width_of(flow, node)
    samples = min(given[0], wires.nodes[least].shape[0])  # one of the two may begin with time
    return least, max(round(fewest / samples), 1)


def _most_needed(flow: Flow, node: str) -> int:
    """The largest effective rank that a gradient behind a layer call can have, by the shapes there."""
    behind = (flow.layers[n].shape for n in flow.wiring.downstream(node) if n in flow.layers)
    return max((size for shape in behind for size in shape[1:]), default=0)


def waists_of(
    flow: Flow, passages: list[str], above: Mapping[str, str], ratio: float, rank_excess: float
) -> list[Waist]:
    """Return the passages that are narrower than what is before and behind them.

    Args:
        flow: the record along its wiring.
        passages: the layer calls that every gradient passes.
        above: immediate dominators of the graph, seen from the loss.
        ratio: how much wider both sides are.
        rank_excess: what an operation leaves counts as narrow where so many times as much may be needed.
    """
    wires = flow.wiring
    own = {node: 0 if _pairs_samples(flow, node) else width_of(flow, node) for node in wires.order}
    taken = {node: _taken(flow, node) for node in passages}  # what a first layer takes is what is before it
    before, behind = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
    for node in wires.order:
        before[node] = max((max(before[p], own[p]) for p in wires.preds[node]), default=0)
        if not before[node]:
            before[node] = taken.get(node, 0)
    for node in reversed(wires.order):
        behind[node] = max((max(behind[s], own[s]) for s in wires.succs[node]), default=0)
    found = []
    for node in passages:
        if own[node] and flow.has_matrix(node):
            op, left = _left(flow, node, above)
            if op and rank_excess * left >= _most_needed(flow, node):
                op, left = "", own[node]
            by_itself = min(before[node], behind[node]) >= ratio * own[node]
            wide, after = max(before[node], own[node]) if op else before[node], behind[node]
            if min(wide, after) >= ratio * left:
                waist = Waist(node=node, width=left, before=wide, behind=after, op=op, by_itself=by_itself)
                found.append(waist)
    return found
