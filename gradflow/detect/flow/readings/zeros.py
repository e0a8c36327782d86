"""Why a gradient is exactly zero, and the layer that makes it so: in one pass from the loss back."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from gradflow.detect.evidence import activations_of, largest_gradient, late, typical_zero
from gradflow.detect.view import Flow, read_once
from gradflow.records import ActivationRecord, Floats

DECAYED = (
    1e-9  # of the largest gradient: below, it has been lost on a long way, whatever the loss is scaled by
)


@attrs.frozen(kw_only=True)
class Zeros:
    """What is known of exact zeros among the gradients of one record.

    Args:
        scale: the largest gradient of each step, shape (steps,).
        muted: nodes whose every way to the loss goes through a norm over one feature, which gives its bias
            whatever comes in, with the layer before it.
        why: by layer call whose output gradient is exactly zero, the reason, and the layer call that makes it
            so.
    """

    scale: Floats
    muted: Mapping[str, str]
    why: Mapping[str, tuple[str, str]]

    def blocked_by(self, flow: Flow, node: str) -> tuple[str, str]:
        """Return why the gradients of a layer's parameters are zero, and the layer call that makes it so."""
        if node in self.muted:
            return "one feature", self.muted[node]
        if node in self.why:
            return self.why[node]
        source = next((u for u in flow.wiring.before(node) if _silent(flow, u)), "")
        entering = late(flow.layers[node].input_rms)
        if not source and entering > 0 and _at_the_end(flow, node, self.scale, times=min(entering, 1.0)):
            return "underflow", node
        return "zero input", source

    def underflown(self) -> dict[str, str]:
        """Return the layer calls to which nothing comes because the gradient has become too small for its
        format on the way, each with the last one to which something came."""
        return {node: at for node, (why, at) in self.why.items() if why == "underflow"}


@read_once
def zeros_of(flow: Flow) -> Zeros:
    """Return what is known of exact zeros.

    Each layer call whose gradient is zero is followed downstream to the first place that gets some. What is
    found for one holds for those upstream of it, so this takes one pass.
    """
    scale = largest_gradient(flow)
    zero = {node for node, grad in flow.grad.items() if typical_zero(grad, scale, at_end=True)}
    found: dict[str, tuple[str, str]] = {}
    for node in (*reversed(flow.wiring.order), *(n for n in zero if n not in flow.wiring.nodes)):
        if node in zero:
            found[node] = _reason(flow, node, zero, scale, found)
    return Zeros(scale=scale, muted=_muted(flow), why=found)


def _reason(
    flow: Flow, node: str, zero: set[str], scale: Floats, found: Mapping[str, tuple[str, str]]
) -> tuple[str, str]:
    for activation in activations_of(flow, node):
        if activation.kind == "softmax" and activation.width == 1:
            return "one alternative", node
        if _is_dead(activation) or (activation.kind == "rectifier" and late(activation.fired_share) == 0):
            return "rectifier", node
    behind = [n for n in flow.wiring.after(node) if n in flow.grad]
    if not behind:
        return "loss", node
    # Where several layers take its output, all of them give zero; the one that gets some tells why.
    live = next((n for n in behind if n not in zero), "")
    if not live:
        return found.get(behind[0], ("loss", behind[0]))
    if any(len(p.norm) and late(p.norm) == 0 for p in flow.parameters_of(live)):
        return "zero weight", live
    return ("underflow" if _at_the_end(flow, live, scale) else "operation"), live


def _at_the_end(flow: Flow, node: str, scale: Floats, *, times: float = 1.0) -> bool:
    """Whether a gradient has decayed to where its format ends: what is a little smaller is zero.

    float32 and bfloat16 hold nothing below 1e-45, and the square of nothing below 1e-22, from which a norm
    may have been taken; float64 the same of 1e-324.
    """
    dtypes = {p.dtype for p in flow.record.parameters}
    smallest = 1e-150 if dtypes == {"float64"} else 1e-18
    norm = late(flow.grad[node])
    return norm * times <= smallest and norm <= DECAYED * late(scale)


def _muted(flow: Flow) -> dict[str, str]:
    wires = flow.wiring
    constant = {
        n
        for n in flow.norms
        if flow.layers[n].type == "LayerNorm"
        and flow.layers[n].shape[-1:] == (1,)
        and all(p.num_elements == 1 for p in flow.parameters_of(n))
    }
    found: dict[str, str] = {}
    for node in reversed(wires.order) if constant else ():
        behind = wires.succs[node]
        if behind and all(s in constant or s in found for s in behind):
            found[node] = next((found[s] for s in behind if s in found), node)
    # Where that is an operation, the layer nearest to the loss whose output feeds it stands for it.
    layers = {place: node for node, place in reversed(found.items()) if node in flow.layers}
    return {node: layers.get(place, place) for node, place in found.items()}


def _silent(flow: Flow, node: str) -> bool:
    return node in flow.layers and late(flow.layers[node].output_rms) == 0


def _is_dead(activation: ActivationRecord) -> bool:
    return activation.kind == "rectifier" and activation.never_fired == 1.0
