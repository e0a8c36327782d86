"""What drowns: a term of a loss beside another one, and what differs between outputs beside what does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradflow.detect.evidence import early, heads, late
from gradflow.detect.knowledge import guesses, knows
from gradflow.detect.updates.readings import is_unmoved, response
from gradflow.detect.view import Flow
from gradflow.detect.wiring import layer_name
from gradflow.records import Floats, FlowRecord, Issue, IssueSeverity, IssueType

_MOST = 8  # terms: those that are drowned most


def drowned_terms(flow: Flow, times: float = 1e4) -> list[Issue]:
    """Heads of a loss of several terms, whose own term moves shared weights next to nothing beside another.

    Measured: the gradient at two heads that lead to terms of their own, which meet as numbers and not before,
    and train the same weights further up. By three measures, as their outputs may differ in number and size:
    the norm, what equal changes of all outputs do to the loss, and what changes as large as they are do. All
    three differ by `times`, at the start of the run and over it. Alike and not: auxiliary terms of a small
    weight, some hundred times weaker; experts and branches, whose outputs are added up before the loss is
    taken; a task that is solved.

    Args:
        flow: the record along its wiring.
        times: by how much each measure must differ. Heads of healthy models differ by less than a hundred.
    """
    if knows(flow.record):
        return []
    measures = {node: _measures(flow, node) for node in heads(flow)}
    strong = max(measures, key=lambda n: (float(np.nan_to_num(measures[n][0])), n), default="")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = {n: float((measures[strong] / measures[n]).min()) for n in measures if n != strong}
    weak = sorted((n for n, ratio in ratios.items() if times <= ratio < math.inf), key=lambda n: -ratios[n])
    joined = _joined(flow, strong) if weak else set[str]()
    apart = [n for n in weak if n not in joined][:_MOST]
    return [_issue(flow, n, strong, ratios[n]) for n in apart if _trained(flow, n) & _trained(flow, strong)]


def alike_outputs(flow: Flow, apart: float = 0.03) -> list[Issue]:
    """The last layer of a model that guesses, whose outputs differ so little that no usual step is heard.

    Measured: the part of the outputs that differs between samples, and the response of a loss that compares
    them; see `is_unmoved`.

    Args:
        flow: the record along its wiring.
        apart: part of the outputs that must differ.
    """
    known, ends = flow.record.knowledge, heads(flow)
    differs = math.nan if known is None else max(known.variations, default=math.nan)
    if not ends or not 0 < differs < apart or not is_unmoved(flow.record, apart=0.0):
        return []
    layer, heard = flow.layers[ends[-1]], late(response(flow.record))
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.BOTTLENECK,
            severity=IssueSeverity.LOW,
            description=f"Its outputs are nearly the same for all samples: {differs:.1e} of them differs. "
            "The loss, which goes by what differs, hardly hears the steps, and stands still: it changes by "
            f"{heard:.1e} of itself as all weights move by their own size, where 0.7 and more is usual.",
            magnitude=differs,
            recommended_actions=(
                f"Look for what all samples have in common in {layer.name}: a bias much larger than the "
                "rest, inputs far from zero. Start the bias at zero, and standardise what enters.",
                "Or put a norm over the batch before the loss, which takes away what is common.",
            ),
            metrics={"variation": differs, "response": heard},
        )
    ]


def drowned_inputs(flow: Flow, times: float = 40.0) -> list[Issue]:
    """The first layer of a model that guesses, whose output is drowned by what is the same for all samples.

    Measured: the size of what the layer gives, beside that of its sum with something that no input reaches: a
    table of positions, a constant. All inputs come in by this layer, and all that is behind it takes the sum.
    A norm behind it, or weights, make the sum of a usual size again, and of that the inputs are a fortieth,
    as is what each step tells their layer. Alike and not: words that start a tenth or a thirtieth as large as
    their positions, and grow; a branch that starts small beside the inputs themselves; a model that learns.

    Args:
        flow: the record along its wiring.
        times: as large as the layer's own output the sum must be, from the first steps to the last.
    """
    wires, record = flow.wiring, flow.record
    if not wires.known or not (guesses(record) or _alike(record)):
        return []
    found = []
    for node, layer in flow.layers.items():
        behind = wires.succs.get(node, ())
        if layer.composite or not wires.is_first(node) or len(behind) != 1 or not wires.preds[node]:
            continue
        total = wires.nodes[behind[0]]
        added = [n for n in wires.sources.get(behind[0], ()) if n != node]  # a parameter is no node
        if total.kind != "op" or total.type.lower() not in ("add", "add_"):
            continue
        if any(wires.nodes[n].kind == "input" for n in _sources(flow, added)):
            continue
        takes = [flow.layers[n].input_rms for n in wires.succs.get(behind[0], ()) if n in flow.layers]
        times_own = [entering / layer.output_rms for entering in takes]
        sizes = [min(early(each), late(each)) for each in times_own]
        if sizes and min(sizes) >= times and not _another_way(flow, node):
            found.append(_drowned_input(flow, node, min(sizes)))
    return found


def _alike(record: FlowRecord, apart: float = 0.02) -> bool:
    """Whether outputs are nearly the same for all samples."""
    known = record.knowledge
    return known is not None and max(known.variations, default=math.nan) < apart


def _sources(flow: Flow, nodes: Sequence[str]) -> set[str]:
    """Return nodes with all whose data reaches them."""
    return {m for n in nodes for m in (n, *flow.wiring.fed_by(n))}


def _another_way(flow: Flow, node: str) -> bool:
    """Whether another layer takes what the model is given too, so that not all comes in by this one."""
    wires, own = flow.wiring, set(flow.wiring.preds[node])
    first = (n for n in flow.layers if n != node and not flow.layers[n].composite and wires.is_first(n))
    return any(own & set(wires.preds[n]) for n in first)


def _drowned_input(flow: Flow, node: str, times: float) -> Issue:
    layer = flow.layers[node]
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description=f"All inputs come in by this layer, and what is added to its output, the same for every "
        f"sample, drowns it: the sum is {times:.3g} times as large (its own rms is "
        f"{late(layer.output_rms):.3g}). What differs between samples is {1 / times:.1e} of what follows, "
        "and the model guesses.",
        magnitude=times,
        recommended_actions=(
            f"Bring both to one scale: start what is added (positions) at 0.02, or multiply the output of "
            f"{layer.name} by the root of its width, as transformers with fixed sinusoids do.",
            "Or put a norm behind each of the two, before they are added.",
        ),
        metrics={"drowned": times, "output_rms": late(layer.output_rms)},
    )


def _measures(flow: Flow, node: str) -> Floats:
    """Return the three measures of a head, in the first step with a gradient and over the run."""
    layer, grad = flow.layers[node], flow.grad[node]
    number = np.maximum(layer.num_elements, 1)
    every = np.stack([grad, grad * np.sqrt(number), grad * layer.output_rms * np.sqrt(number)])
    known = every[:, np.isfinite(every).all(axis=0)]
    if not known.shape[1]:
        return np.full(6, np.nan)
    return np.concatenate([known[:, 0], np.median(known, axis=1)])


def _joined(flow: Flow, head: str) -> set[str]:
    """Return the nodes that lead to a head, or to what it leads to, but for single numbers."""
    wires = flow.wiring
    seen = {head, *(n for n in wires.downstream(head) if wires.nodes[n].shape)}
    todo = list(seen)
    while todo:
        for node in wires.preds.get(todo.pop(), ()):
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


def _trained(flow: Flow, head: str) -> set[str]:
    """Return the modules with something to be trained that lead to a head, itself included."""
    before = (head, *flow.wiring.upstream(head))
    return {flow.layers[n].module for n in before if n in flow.layers and flow.trainable(n)}


def _issue(flow: Flow, node: str, strong: str, ratio: float) -> Issue:
    layer, other = flow.layers[node], layer_name(strong)
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.VANISHING,
        severity=IssueSeverity.MEDIUM,
        description=f"Its term of the loss is drowned: the gradient that it gets is {1 / ratio:.1e} of that "
        f"of {other}, with which it shares weights, or less, so that these are trained for that term alone.",
        magnitude=1 / ratio,
        recommended_actions=(
            f"Weigh the terms so that their gradients are alike where they meet: this one about {ratio:.1g} "
            "times as much, or the other as much less.",
            f"Look for a scale in the term of {other}: large targets, a sum where a mean is meant.",
        ),
        metrics={"dominance": ratio, "rival": other},
    )
