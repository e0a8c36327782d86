"""What cannot be seen inside a fused recurrent layer, by its weights: its memory, and the state of its gates.

A fused layer (`nn.RNN`) is one call: the norm of its output gradient does not tell what is lost or blown up
inside it, over time. For the plain kind the weights do. One step multiplies the gradient by the recurrent
matrix, whose spectral radius is ‖W‖_F / √h for independent entries (the circular law), and for orthogonal
ones and multiples of the identity too; the activation's slope, at most 1, only takes from it. Gated layers
keep what their gates say, which the weights do not tell, so they are left out.

What enters the gates (or the tanh) is W_ih x + W_hh h + b, and |h| < 1; so where the input is large, its rms
times that of the rows of W_ih is the rms of what enters.
"""

from __future__ import annotations

import math

import attrs

from gradflow.detect.evidence import Flow, late, middle

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
        return math.exp(min(self.steps * math.log(self.rate), 600.0)) if self.rate > 0 else 0.0


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


@attrs.frozen(kw_only=True)
class Drive:
    """What enters the gates of a recurrent layer.

    Args:
        entering: rms of the layer's input.
        rms: rms of what enters the gates.
        saturated: share of gates beyond 6, where a sigmoid's derivative is below 1 percent of its largest
            value, were what enters them normal.
    """

    entering: float
    rms: float
    saturated: float


def gate_drive(flow: Flow, node: str) -> Drive | None:
    """Return what enters the gates of a fused recurrent layer; None for other layers."""
    layer = flow.layers[node]
    matrices = [p for p in flow.parameters_of(node) if "weight_ih" in p.name and len(p.shape) == 2]
    if layer.type not in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell") or not matrices:
        return None
    first = min(matrices, key=lambda p: p.name)  # of the first layer of a stack
    entering = middle(layer.input_rms)
    # What training itself has blown up is another illness; so the smaller of the weights at start and end.
    rms = entering * min(float(first.norm[0]), late(first.norm)) / math.sqrt(first.shape[0])
    unbounded = layer.type == "RNN" and middle(layer.output_rms) > 1  # a rectifier stands for the tanh
    if not math.isfinite(rms) or rms <= 0 or unbounded:
        return None
    return Drive(entering=entering, rms=rms, saturated=math.erfc(6.0 / rms / math.sqrt(2.0)))
