"""The memory of a recurrent layer, and the state of its gates: by its weights, or as it was measured.

A fused layer (`nn.RNN`) is one call: the norm of its output gradient does not tell what is lost or blown up
inside it, over time. For the plain kind the weights do. One step multiplies the gradient by the recurrent
matrix, whose spectral radius is ‖W‖_F / √h for independent entries (the circular law), and for orthogonal
ones and multiples of the identity too; the activation's slope, at most 1, only takes from it. Gated layers
keep what their gates say, which the weights do not tell, so they are left out. Where `recurrence()` has
measured the layer, its numbers stand in for those of the weights.

What enters the gates (or the tanh) is W_ih x + W_hh h + b, and |h| < 1; so where the input is large, its rms
times that of the rows of W_ih is the rms of what enters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs
import numpy as np

from gradflow.detect.evidence import late, loss_fell, middle
from gradflow.detect.view import Flow
from gradflow.detect.wiring import layer_name
from gradflow.records import Floats, RecurrenceRecord, RecurrentLevelRecord

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
    measured = next((r for r in flow.record.recurrences if r.name == layer_name(node)), None)
    if layer.type == "RNN" and measured is not None:
        return _measured_memory(measured, fell=loss_fell(flow.record))
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
    steps = whole // max(sizes)
    # Where it is known which step is read, what is behind that one (padding) need not be remembered.
    read = [r.taken[1] if len(r.taken) == 3 and r.taken[2] == steps else steps - 1 for r in readers]
    return Memory(rate=rate, steps=max(read)) if math.isfinite(rate) else None


def _measured_memory(record: RecurrenceRecord, *, fell: bool) -> Memory | None:
    """Return what was measured of the level that keeps most; None where most steps are read.

    What the run came to counts; but where less than all is kept, and the loss has not fallen, also what it
    began with: that a gradient gets through in the end says little where nothing has come of it.
    """
    if late(record.read_share) > 0.5:
        return None
    end = _best(late_profile(level.readout_profile) for level in record.levels)
    start = _best(late_profile(level.readout_profile[:1]) for level in record.levels)
    if end is None or start is None or fell or end.kept > 1.0:
        return end
    return min(end, start, key=lambda found: found.kept)


def _best(profiles: Iterable[Floats]) -> Memory | None:
    """Return the memory of the profile that keeps most, None where there is none."""
    best = None
    for profile in profiles:
        if len(profile) > 1 and profile[-1] > 0:
            steps = len(profile) - 1
            kept = max(float(profile[0] / profile[-1]), 1e-300)
            found = Memory(rate=kept ** (1 / steps), steps=steps)
            best = found if best is None or found.kept > best.kept else best
    return best


def late_profile(profiles: Floats) -> Floats:
    """Return the profile that a run came to: the median over the last third of the measured steps, (steps,).

    Steps that none of these has are left out.
    """
    if profiles.ndim != 2 or not profiles.size:
        return np.empty(0)
    rows = profiles[-max(1, math.ceil(len(profiles) / 3)) :]
    rows = rows[:, np.isfinite(rows).any(axis=0)]
    return np.nanmedian(rows, axis=0) if rows.size else np.empty(0)


def growth_of(level: RecurrentLevelRecord) -> Floats:
    """Return the largest entry of the readout profile over its last, (measured steps,); NaN if that is 0."""
    profiles = level.readout_profile
    if profiles.ndim != 2 or not profiles.size:
        return np.empty(0)
    last = np.where(profiles[:, -1] > 0, profiles[:, -1], np.nan)
    with np.errstate(over="ignore"):
        return np.minimum(np.nan_to_num(profiles).max(axis=1) / last, 1e300)


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
