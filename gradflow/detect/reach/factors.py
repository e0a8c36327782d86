"""Zeros that a model makes itself and multiplies with: what makes them, and whether a step can end that."""

from __future__ import annotations

from gradflow.detect.evidence import late
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import ReachRecord

OWN = frozenset(("relu", "threshold", "hardtanh", "clamp_min"))  # rectifiers, of which `dead` tells


_PRODUCTS = ("mm", "linear", "rnn", "lstm", "gru")  # of matrices, and kernels that make several
_AGAIN = 3  # calls in a step, from which a layer is used again and again: two may be two views


def is_state(part: ReachRecord) -> bool:
    """Whether a parameter is a matrix that a product takes with a constant: a first state of zeros is one."""
    return part.source == "constant" and any(word in part.op for word in _PRODUCTS)


def forgetful(flow: Flow, part: ReachRecord) -> tuple[str, str] | None:
    """Return why, and the cure, where all calls of a layer in a step begin with a state of zeros.

    Of a matrix that takes a state to one of its size, or to so many gates, in a layer that is called again
    and again on a whole batch. Of one call, or of two on two views, it is the first step that is seen; calls
    on a single row each may be one for each sample.
    """
    rows, *columns = part.shape
    if not is_state(part) or flow.record.steps < 2 or len(columns) != 1 or rows % columns[0]:
        return None
    first = flow.layers.get(node_name(part.layer))
    if first is None or len(first.shape) < 2 or first.shape[0] < 2:
        return None
    calls = sum(layer.module == first.module for layer in flow.layers.values())
    if calls < _AGAIN:
        return None
    return (
        f"each of the {calls} calls of {part.layer} in a step begins with a state of zeros, and what it "
        "leaves is not handed to the next, so nothing is remembered",
        "hand each call the state that the one before it has returned: h = cell(x, h), or out, state = "
        "rnn(x, state)",
    )


def is_silent_operation(flow: Flow, part: ReachRecord) -> bool:
    """Whether what is zero is made of the model's own numbers by an operation that is no rectifier: spikes,
    gates, masks. Of rectifiers, and of modules that give zeros, `dead` tells."""
    node = flow.wiring.nodes.get(part.whose)
    is_op = node is not None and node.kind == "op" and node.type not in OWN
    return part.source == "model" and is_op


def is_locked(flow: Flow, part: ReachRecord) -> bool:
    """Whether the factor is made inside of the module that multiplies with it, which gives numbers other than
    zero: a guard (`torch.where` at zero), or a function whose slope is zero where the parameter starts. As
    that does not move, no step ends it."""
    maker = flow.layers.get(node_name(part.whose))
    silent = maker is None or not late(maker.output_rms) > 0
    return part.source == "model" and part.at == part.whose and not silent and not part.moved
