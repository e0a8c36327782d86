"""Recurrent layers of which the step is read that has seen nothing yet."""

from __future__ import annotations

from gradflow.detect.actions import Actions
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import ReachRecord

_RECURRENT = "weight_hh"  # how PyTorch's fused layers name what takes the state from step to step


def reads_first_step(flow: Flow, part: ReachRecord) -> tuple[str, Actions] | None:
    """Return why no gradient reached the recurrent weights of a layer, and what to do: of several steps the
    first one is read, which has seen but its own input; None where it is something else.

    Alike and not: sequences of one step; a layer of both directions, of which the other one hears all that
    comes behind; a state from before that is handed in, through which those weights are reached.

    Args:
        flow: the record along its wiring.
        part: what was not reached.
    """
    account, own = flow.record.reach, part.parameter.rpartition(".")[2]
    if account is None or part.share < 1 or not own.startswith(_RECURRENT):
        return None
    node = node_name(part.layer)
    of_layer = {p.name for p in flow.parameters_of(node) if f".{_RECURRENT}" in f".{p.name}"}
    lost = {p.parameter for p in account.unreached if p.share == 1}
    behind = flow.wiring.succs.get(node, ())
    taken = {flow.wiring.nodes[n].taken for n in behind}
    if not of_layer or not of_layer <= lost or len(taken) != 1:
        return None
    axis, index, size = (*taken.pop(), 0, 0, 0)[:3]
    if index != 0 or size < 2:
        return None
    return (
        f"of {size} steps {behind[0]} reads the first one, which has seen its own input and no other, so the "
        "layer never recurs",
        (
            "Read the last step: output[:, -1] where the batch comes first, output[-1] where the steps do, "
            "or the state that the layer returns; of padded sequences the one at their length.",
            f"Look at axis {axis} of what is read: it is taken for that of the steps or of the batch, and is "
            "the other.",
        ),
    )
