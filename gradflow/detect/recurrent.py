"""What a plain recurrent layer keeps over a sequence, by its recurrent weights.

A fused layer (`nn.RNN`) is one call: the norm of its output gradient does not tell what is lost or blown up
inside it, over time. For the plain kind the weights do. One step multiplies the gradient by the recurrent
matrix, whose spectral radius is ‖W‖_F / √h for independent entries (the circular law), and for orthogonal
ones and multiples of the identity too; the activation's slope, at most 1, only takes from it. Gated layers
keep what their gates say, which the weights do not tell, so they are left out.
"""

from __future__ import annotations

import math

import attrs

from gradflow.detect.evidence import Flow, late

_TAKES_ONE = ("select", "squeeze", "index", "slice", "unbind")


@attrs.frozen(kw_only=True)
class Memory:
    """What a recurrent layer keeps of a gradient that enters at the end of the sequence.

    Args:
        rate: what one step keeps.
        steps: how many steps the gradient has to go back.
    """

    rate: float
    steps: int

    @property
    def kept(self) -> float:
        """The share that arrives at the first step."""
        return self.rate**self.steps


def memory(flow: Flow, node: str) -> Memory | None:
    """Return what a plain recurrent layer keeps, where the loss reads no more than its last step.

    None for other layers, and where every step is read: then each step has a gradient of its own.
    """
    layer = flow.layers[node]
    if layer.type != "RNN" or not flow.wiring.known:
        return None
    matrices = [p for p in flow.parameters_of(node) if "weight_hh" in p.name and p.shape[0] == p.shape[1]]
    readers = [flow.wiring.nodes[n] for n in flow.wiring.succs.get(node, ())]
    one = all(r.kind == "op" and any(word in r.type.lower() for word in _TAKES_ONE) for r in readers)
    sizes = [r.num_elements for r in readers if r.num_elements]
    whole = math.prod(layer.shape)
    if not matrices or not readers or not one or not sizes or whole <= max(sizes):
        return None
    rate = max(late(p.norm) / math.sqrt(p.shape[0]) for p in matrices)
    return Memory(rate=rate, steps=whole // max(sizes) - 1) if math.isfinite(rate) else None
