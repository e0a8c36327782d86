"""Rows of a last layer that a choice leaves out: classes that these data do not hold."""

from __future__ import annotations

from gradflow.detect.view import Flow
from gradflow.records import ReachRecord

OTHER_CLASSES = (
    "the loss takes a softmax over the other {left} alone, so these are no choice here. "
    "That is as it should be where they are classes that these data do not hold, as those of earlier tasks"
)
OTHER_ACTIONS = (
    "Nothing is to be done for classes of other tasks. If they are to stay what they are, see that no "
    "weight decay shrinks them.",
    "If they stand for something else (a box, a variance), the loss lacks the term that reads them.",
)


def left_of_classes(flow: Flow, part: ReachRecord, takes: frozenset[str]) -> int:
    """Return how many rows of a last layer a softmax chooses among, where the part holds those taken off
    before it; 0 where that is not what the part is.

    All that is computed of what is left goes through a softmax before it comes to the loss, and no layer with
    weights stands behind. One row that is left is no choice, and one that is picked out by its number loses
    the axis: a softmax behind that is over something else.

    Args:
        flow: the record along its wiring.
        part: rows that are cut off.
        takes: operations that take a part of what they get.
    """
    calls = [n for n, layer in flow.layers.items() if layer.module == part.layer]
    left = part.shape[0] - part.num_slices if part.axis == 0 else 0
    if left < 2 or not calls or part.op not in takes - {"select", "unbind"}:
        return 0
    return left if all(_is_chosen_among(flow, node, left) for node in calls) else 0


def _is_chosen_among(flow: Flow, node: str, left: int) -> bool:
    """Whether each way from a layer call to the loss goes through a softmax over so many alternatives."""
    wires, todo, seen, chosen = flow.wiring, [node], set[str](), False
    if any(n in flow.layers and flow.parameters_of(n) for n in wires.downstream(node)):
        return False
    while todo:
        for behind in wires.succs.get(todo.pop(), ()):
            known = wires.nodes[behind]
            if known.kind == "loss":
                return False
            if "softmax" in known.type.lower():
                chosen = True
                if known.shape and left not in known.shape[1:]:
                    return False
            elif behind not in seen:
                seen.add(behind)
                todo.append(behind)
    return chosen
