"""What to change where a part is not called, or its output goes on without its gradient."""

from __future__ import annotations

import re

from gradflow.detect.actions import Actions
from gradflow.detect.view import Flow
from gradflow.detect.wiring import layer_name


def never_called_actions(layer: str, named: bool) -> Actions:
    """For a module that no step runs, whether or not the code that ran names it."""
    read = (
        f"If the code reads a weight of {layer} for itself, as a fused loss does, then what is wrapped round "
        f"it never runs: call {layer}, or hand on the whole weight (base + scale · B·A of an adapter)."
    )
    forgotten = (
        f"Call {layer} in forward(), or delete it; check for a name that is overwritten or a branch never "
        f"taken."
    )
    chosen = "If it is an expert or a head: check that the router or the batches ever choose it."
    return (read, forgotten, chosen) if named else (forgotten, chosen)


def copied_actions(layer: str) -> Actions:
    """For a module that no step runs, while a copy of it does."""
    return (
        f"Run {layer} itself. A copy (copy.deepcopy, a new module with load_state_dict, a replica) has "
        "parameters of its own: what is done to them, and the gradient that they get, never comes back.",
        f"Where its weights must differ for a moment (an inner step, an ensemble): "
        f"torch.func.functional_call({layer}, weights, inputs), with weights that are functions of its "
        "own parameters: w - rate * grad, and not w.data -= rate * grad.",
    )


_COMPARED = (
    "A comparison gives zeros and ones, which have no derivative: compute the loss on what is compared (the "
    "scores, the probabilities), and keep the threshold for the metrics."
)
_LEFT = (
    "Stay with tensors from the model to the loss: {op} gives values without a graph. Keep it for what is "
    "printed or logged."
)
_CAST = "Whole numbers have no derivative: keep what leads to the loss in floating point."
_CUTS = {
    "argmax": "argmax has no derivative: pass the probabilities on (a weighted sum of the choices), or use "
    "torch.nn.functional.gumbel_softmax, or a straight-through estimate.",
    "detach": "Remove detach() from the path, or compute the loss on the tensor before it.",
    "sign": "sign has a derivative of zero: use a straight-through estimate, x + (x.sign() - x).detach(), "
    "or tanh.",
    "round": "round has a derivative of zero: use a straight-through estimate, x + (x.round() - x).detach().",
    "no_grad": "Move it out of torch.no_grad() (a context, or a decorator on the function that calls it).",
    "data": ".data cuts the gradient: use the tensor itself.",
    "checkpoint": "Use checkpoint(..., use_reentrant=False), or let its input require a gradient.",
    "tensor": "torch.tensor(x) copies the values and starts a new graph, which requires_grad=True does not "
    "join to the old one: use the tensor itself, or torch.stack for several.",
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), _COMPARED),
    **{op: _LEFT.format(op=f".{op}()") for op in ("item", "tolist", "numpy")},
    **dict.fromkeys(("long", "int", "bool", "to", "type"), _CAST),
}
_TOLD = ("no_grad", "checkpoint", "item", "tolist", "numpy")  # in a sentence of the wiring


def cut_actions(flow: Flow, node: str, why: str) -> Actions:
    """For a layer whose output goes on without its gradient.

    Args:
        flow: the record along its wiring.
        node: the layer call.
        why: the operation that cuts it off, or what the wiring says of it.
    """
    before = re.search(r": (\w+) before ", why)
    told = before[1] if before else next((word for word in _TOLD if word in why), why)
    if told in _CUTS:
        return (_CUTS[told], "If it is not meant to train, say so: requires_grad_(False).")
    name = layer_name(node) or "the model"
    return (
        f"Follow the output of {name} to the loss: it may go through an integer cast, .item(), NumPy or a "
        f"new "
        "tensor, or the loss may be computed on another tensor.",
        "If it runs under reentrant checkpointing with inputs that need no gradient: use_reentrant=False.",
        "If it is not meant to train, say so: requires_grad_(False).",
    )
