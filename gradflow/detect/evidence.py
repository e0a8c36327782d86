"""What the detectors share: what part of the gradient arrives at a layer, and what should arrive.

NOTE [What should arrive]
A gradient norm means nothing by itself: multiply the loss by ten, and all are ten times larger. So a layer
is weighed against the layers between it and the loss. Walking the graph back from the loss, every node
keeps the norm that should arrive there if each node on the way did what its kind does, starting from the
norm measured at the layers nearest the loss. Where paths meet, the best one counts. The ratio of the
measured norm to that expectation, the *share*, is then independent of the scale of the loss, the size of
the batch and the width.

What a kind of layer does to the gradient (norms, not root mean squares: with weights drawn by fan-in the
norm is what a layer keeps, whatever its width):

* a layer with a weight matrix keeps the rms of its rows, ‖W‖_F / sqrt(rows), over sqrt(2) for a rectifier
  behind it: exactly what a matrix of independent entries does to a gradient on average. But at least 0.4,
  for small weights are no excuse, and that is what PyTorch's default initialisation keeps (variance
  1/(3 fan_in), hence 1/sqrt(3)): a deep stack of it is not blamed for what it is known to do, unless nothing
  at all is left (see `vanishing`); and at most 1, for large ones promise nothing. Recurrent layers, whose
  matrices hold several gates, keep 0.4.
* pooling, averaging or slicing n elements to m keeps sqrt(m / n).
* a softmax over k alternatives keeps 1 / k.
* everything else keeps 1: norms, rectifiers, sums, and sigmoids too, for what a stack of those loses is the
  illness itself.

For growth the expectation is generous in the other direction: a matrix keeps 1 (before a bounded activation
the rms of its rows, if that is more: the saturation that large weights cause there takes what they amplify,
and `saturation` reports it), a norm layer multiplies by its output's rms over its input's (it must: it undoes
the scale of what is upstream), a broadcast or a sum over k elements multiplies by sqrt(k) (a concatenation
does not), and a node with more than four consumers by half their number.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np

from gradflow.detect.view import Flow, flow_of, read_once
from gradflow.detect.wiring import layer_name
from gradflow.records import ActivationRecord, Floats, FlowRecord, NormRecord

KEPT_BY_MATRIX = 0.4
ROUNDING = (
    1e-3  # of the largest gradient of a step: float32 rounds at 1e-7, and a norm multiplies that by up to 300
)
JOINS = ("cat", "stack", "pad")
RECTIFIERS = frozenset({"relu", "relu6", "threshold", "relu_", "clamp", "clamp_min", "clip"})

Keep = Callable[[str, str], float]


@attrs.frozen(kw_only=True, eq=False)
class Shares:
    """What arrives at each layer, against what should; see NOTE [What should arrive].

    Args:
        share: by node of a measured layer call, measured over expected norm, shape (steps,).
        via: by node, the neighbour downstream that the expectation came through.
        ahead: by node, the next measured layer call on that way; "" where none follows.
        flow: what it was computed from.
    """

    share: Mapping[str, Floats]
    via: Mapping[str, str]
    ahead: Mapping[str, str]
    flow: Flow

    def at_first(self) -> Shares:
        """Return the shares of the first step alone."""
        return attrs.evolve(self, share={node: values[:1] for node, values in self.share.items()})

    def path(self, node: str) -> list[str]:
        """Return the measured layer calls from `node` to the loss along the path that should carry most.

        A sum on the path stands for the layer that ends in it: both have the same gradient, so a residual
        stream, which is a path of sums, is seen block by block.
        """
        found = [node]
        while following := self.ahead.get(found[-1], ""):
            found.append(following)
        return found


def shares(flow: Flow, keep: Keep, *, from_peak: bool = False) -> Shares:
    """Return the share of the expected gradient that arrives at each layer call.

    Args:
        flow: the record along its wiring.
        keep: what a node keeps of the norm on its way to a neighbour upstream, by (node, neighbour).
        from_peak: start the expectation anew wherever the measured norm is above it. Expectations are modest,
            so along a deep stack they fall far below what is there, and a later loss would hide in the gap.
    """
    order, succs = flow.wiring.order, flow.wiring.succs
    expected: dict[str, Floats] = {}
    lower_bound: dict[str, Floats] = {}
    via: dict[str, str] = {}
    for node in reversed(order):
        # Multiplying one by one, in one place, keeps this linear in the number of edges.
        offers = [(expected[s] * keep(s, node), s) for s in succs[node] if s in expected]
        if offers:
            best = [offer for offer, _ in offers]
            expected[node] = np.fmax.reduce(best) if len(best) > 1 else best[0]
            lower_bound[node] = expected[node]
            if from_peak and node in flow.grad and not flow.layers[node].composite:
                expected[node] = np.fmax(expected[node], flow.grad[node])
            via[node] = _largest(offers)
        elif node in flow.grad and np.any(flow.grad[node] > 0) and not _gives_several(flow, node):
            expected[node] = flow.grad[node]
    share = {}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for node, norm in flow.grad.items():
            if node in expected and not flow.layers[node].composite:
                ratio = norm / lower_bound.get(node, expected[node])
                share[node] = np.where(np.isfinite(ratio), ratio, np.nan)
    return Shares(share=share, via=via, ahead=_ahead(flow, share, via), flow=flow)


def _gives_several(flow: Flow, node: str) -> bool:
    """Whether a module that holds others hands several tensors to the loss: the gradient of all of them
    together, a parameter among them that is given out as it is, is not what comes to any one."""
    return flow.layers[node].composite and len(flow.wiring.preds[node]) > 1


def _largest(offers: Sequence[tuple[Floats, str]]) -> str:
    """Return the neighbour that offers most in the middle of the run."""
    if len(offers) == 1:
        return offers[0][1]
    found = [(middle(offer), node) for offer, node in offers]
    return max((value if value == value else -math.inf, node) for value, node in found)[1]


def _ahead(flow: Flow, share: Mapping[str, Floats], via: Mapping[str, str]) -> dict[str, str]:
    """Return by measured layer call the next one on the way to the loss; "" where none follows."""
    here: dict[str, str] = {}  # the measured call that a node is or stands for, else the next one
    ahead: dict[str, str] = {}
    for node in reversed(flow.wiring.order):
        behind = via.get(node, "")
        following = here.get(behind, "")
        seen = node if node in share else flow.summed.get(node, "")
        here[node] = seen if seen in share else following
        if node in share:
            # The sum that a layer ends in stands for that layer: what comes next is what follows the sum.
            ahead[node] = following if following != node else here.get(via.get(behind, ""), "")
    return ahead


def kept_at_least(flow: Flow, *, by_matrix: float | None = None) -> Keep:
    """Return what each node should keep at least: the expectation for losses.

    Args:
        flow: the record along its wiring.
        by_matrix: what every layer with a weight matrix should keep; None for what its own weights promise.
    """
    nodes = flow.wiring.nodes
    promised = {
        n: _promised(flow, n) if by_matrix is None else by_matrix for n in nodes if flow.has_matrix(n)
    }

    def keep(node: str, upstream: str) -> float:
        if node in promised:
            return promised[node]
        here, there = nodes[node], nodes[upstream]
        if "softmax" in here.type.lower() and here.shape:
            return 1.0 / max(here.shape[-1], 1)
        if 0 < here.num_elements < there.num_elements:
            return math.sqrt(here.num_elements / there.num_elements)
        return 1.0

    return keep


def _promised(flow: Flow, node: str) -> float:
    plain = flow.layers[node].type.lower().startswith(("linear", "conv1d", "conv2d", "conv3d"))
    gain = row_gain(flow, node) / math.sqrt(2.0) if plain else math.nan
    return min(max(gain, KEPT_BY_MATRIX), 1.0) if math.isfinite(gain) else KEPT_BY_MATRIX


def kept_at_most(flow: Flow) -> Keep:
    """Return what each node may hand back at most: the expectation for growth."""
    nodes, succs = flow.wiring.nodes, flow.wiring.succs
    rescaled = {node: rescaling(flow, node) for node in nodes if flow.is_norm(node)}
    bounded = {a.layer if a.functional else a.name for a in flow.record.activations if a.kind != "rectifier"}

    def feeds_bounded(node: str) -> bool:
        return any(layer_name(n) in bounded for n in (node, *succs[node]))

    def keep(node: str, upstream: str) -> float:
        consumers = len(succs[upstream])
        fan_out = consumers / 2 if consumers > 4 else 1.0
        if node in rescaled:
            return fan_out * rescaled[node]
        if flow.has_matrix(node):
            gain = row_gain(flow, node) if feeds_bounded(node) else 1.0
            return fan_out * max(gain if math.isfinite(gain) else 1.0, 1.0)
        here, there = nodes[node].num_elements, nodes[upstream].num_elements
        if not (here and there):
            return fan_out
        joins = any(word in nodes[node].type.lower() for word in JOINS)
        if (here > there and not joins) or "sum" in nodes[node].type.lower():
            return fan_out * math.sqrt(max(here, there) / min(here, there))
        return fan_out

    return keep


def rescaling(flow: Flow, node: str) -> float:
    """Return rms of output over rms of input of a layer call, at least 1; 1 if unknown."""
    layer = flow.layers[node]
    ratio = late(layer.output_rms) / (late(layer.input_rms) or math.nan)
    return max(ratio, 1.0) if math.isfinite(ratio) else 1.0


def row_gain(flow: Flow, node: str, at: Callable[[Floats], float] | None = None) -> float:
    """Return ‖W‖_F / √rows of a layer's largest weight matrix: the rms of an output per rms of an input.

    1/√3 at PyTorch's default initialisation, √2 at He's, whatever the width. NaN without a matrix, or where
    the matrix is computed from other parameters (weight norm and the like), whose size is not its own.

    Args:
        flow: the record along its wiring.
        node: the layer call.
        at: when, `late` (the default) or `early`.
    """
    matrices = [p for p in flow.parameters_of(node) if len(p.shape) >= 2 and len(p.norm)]
    if not matrices or any("parametrizations." in p.name for p in matrices):
        return math.nan
    largest = max(matrices, key=lambda p: (p.num_elements, p.name))
    return (at or late)(largest.norm) / math.sqrt(max(largest.shape[0], 1))


def is_normed(flow: Flow, node: str) -> bool:
    """Whether a norm holds the size of a layer's weight, whatever steps make of what it is computed from: a
    spectral one, of either kind of PyTorch. A weight with a length of its own grows by that."""
    names = [p.name for p in flow.parameters_of(node) if len(p.shape) >= 2]
    ends = ("parametrizations.weight.original", "weight_orig")
    return bool(names) and all(name.endswith(ends) for name in names)


def activations_of(flow: Flow, node: str) -> tuple[ActivationRecord, ...]:
    """Return the activations that a layer call feeds, functions and modules alike."""
    if not flow.functions and not flow.modules:
        return ()
    behind = (layer_name(n) for n in flow.wiring.after(node)) if flow.modules else ()
    modules = [a for name in dict.fromkeys(behind) for a in flow.modules.get(name, ())]
    return (*flow.functions.get(layer_name(node), ()), *modules)


def at_look(values: Floats, at: int) -> float:
    """Return the number of one look, counted as in a list; NaN where there was none."""
    return float(values[at]) if len(values) else math.nan


def late(values: Floats) -> float:
    """Return the median over the last third of the known values: what the run came to. NaN if none."""
    known = _known(values)
    if len(known) < 2:  # as at every look of a training
        return known[0] if known else math.nan
    return _median(known[-math.ceil(len(known) / 3) :])


def early(values: Floats) -> float:
    """Return the median over the first third of the known values. NaN if none."""
    known = _known(values)
    if len(known) < 2:
        return known[0] if known else math.nan
    return _median(known[: math.ceil(len(known) / 3)])


def middle(values: Floats) -> float:
    """Return the median over the known values. NaN if none."""
    known = _known(values)
    if len(known) < 2:
        return known[0] if known else math.nan
    return _median(known)


def beginnings(values: Floats) -> list[float]:
    """Return the median of the first value, of the first two, and so on to that of all; all are finite.

    >>> beginnings(np.array([3.0, 1.0, 2.0]))
    [3.0, 2.0, 2.0]
    """
    ranked: list[float] = []
    found = []
    for value in values.tolist():
        bisect.insort(ranked, value)
        found.append(_median_of_ranked(ranked))
    return found


def _known(values: Floats) -> list[float]:
    """The finite ones of some values: they are few, and lists of few are faster than arrays."""
    return [value for value in values.tolist() if math.isfinite(value)]


def _median(known: Sequence[float]) -> float:
    """The median of finite values, of which there is one at least."""
    return _median_of_ranked(sorted(known))


def _median_of_ranked(ranked: Sequence[float]) -> float:
    half = len(ranked) // 2
    return float(ranked[half] if len(ranked) % 2 else (ranked[half - 1] + ranked[half]) / 2)


def loss_fell(record: FlowRecord) -> bool:
    """Whether the loss has fallen by half within the run, from its first third to its last."""
    return 0 <= late(record.losses) <= 0.5 * early(record.losses)


def typical_zero(values: Floats, scale: Floats, *, at_end: bool, muted: bool = False) -> bool:
    """Whether norms are zero wherever they are known: throughout, or over the last third of them.

    Zero in most steps, that is, and nothing but rounding in the others: what a subtraction of equal numbers
    leaves in some steps, against `scale`, the largest gradient of each step. Where it is known to be zero by
    mathematics (`muted`), rounding may be all there is.
    """
    known = np.isfinite(values)
    found, largest = values[known], scale[known]
    if not muted and not np.any(found == 0):
        return False
    if at_end and len(found):
        last = max(1, math.ceil(len(found) / 3))
        found, largest = found[-last:], largest[-last:]
    exact = muted or (len(found) > 0 and _median(found.tolist()) == 0)
    return len(found) > 0 and exact and bool(np.all(found <= ROUNDING * largest))


def largest_gradient(flow: Flow) -> Floats:
    """Return the largest norm of an output gradient at each step, shape (steps,); 0 where there is none."""
    norms = list(flow.grad.values())
    return np.nan_to_num(np.stack(norms)).max(axis=0) if norms else np.zeros(flow.record.steps)


@read_once
def last_layers(flow: Flow) -> tuple[str, ...]:
    """Return the last layer call with parameters, its own or tied, on each way to the loss, in the order of
    execution."""
    found: dict[str, None] = {}
    todo, seen = list(flow.wiring.preds.get(flow.wiring.loss, ())), set[str]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if _has_weights(flow, node):
            found[node] = None
        else:
            todo.extend(flow.wiring.preds.get(node, ()))
    return tuple(sorted(found, key=lambda node: flow.layers[node].order))


def _has_weights(flow: Flow, node: str) -> bool:
    """Whether a node is a layer call that computes with parameters, its own or another layer's."""
    if node not in flow.layers or flow.layers[node].composite:
        return False
    return bool(flow.parameters_of(node)) or flow.is_tied(node)


@read_once
def heads(flow: Flow) -> tuple[str, ...]:
    """Return those of the last layer calls that a gradient reaches."""
    return tuple(node for node in last_layers(flow) if np.any(flow.grad[node] > 0))


def swallowing_norms(record: FlowRecord, times: float = 30.0, epsilon: float = 0.01) -> list[NormRecord]:
    """Return the norm layers whose epsilon is so many times the variance that enters, and no mere guard."""
    return [
        norm
        for norm in record.parts.norms
        if norm.epsilon >= epsilon and late(norm.variance) > 0 and norm.epsilon >= times * late(norm.variance)
    ]


def total_gradient(record: FlowRecord) -> Floats:
    """Return the norm of the gradient of all parameters together, shape (steps,)."""
    return _total_gradient(flow_of(record))


@read_once
def _total_gradient(flow: Flow) -> Floats:
    record = flow.record
    if not record.parameters:
        return np.full(record.steps, np.nan)
    norms = np.stack(
        [p.grad_norm for p in record.parameters if p.trainable] or [np.full(record.steps, np.nan)]
    )
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sqrt(np.nansum(np.square(norms), axis=0))
    return np.where(np.isfinite(norms).any(axis=0), total, np.nan)
