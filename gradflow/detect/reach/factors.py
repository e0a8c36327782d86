"""Zeros that a model makes itself and multiplies with: what makes them, and whether a step can end that."""

from __future__ import annotations

from gradflow.detect.evidence import late
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import ReachRecord

OWN = frozenset(("relu", "threshold", "hardtanh", "clamp_min"))  # rectifiers, of which `dead` tells


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
