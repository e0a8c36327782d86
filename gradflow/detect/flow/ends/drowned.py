"""What drowns: a term of a loss beside another one, and what differs between outputs beside what does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradflow.detect.evidence import early, heads, late
from gradflow.detect.flow.ends.loud import over_silence
from gradflow.detect.knowledge import came_knowing, guesses
from gradflow.detect.updates.readings import is_unmoved, response
from gradflow.detect.view import Flow, read_once
from gradflow.detect.wiring import layer_name
from gradflow.records import Evidence, Floats, FlowRecord, Issue, IssueSeverity, IssueType, Role

_MOST = 8  # terms: those that are drowned most


def drowned_terms(flow: Flow, times: float = 1e4) -> list[Issue]:
    """Heads of a loss of several terms, whose own term moves shared weights next to nothing beside another.

    Measured: the gradient at two heads that lead to terms of their own, which meet as numbers and not before,
    and train the same weights further up. By three measures, as their outputs may differ in number and size:
    the norm, what equal changes of all outputs do to the loss, and what changes as large as they are do. All
    three differ by `times`, at the start of the run and over it. Where the loud term is made of derivatives
    of the model, as the residual of a differential equation is, that term is told, as EXPLODING: its unit is
    that of its largest coefficient. Alike and not: auxiliary terms of a small
    weight, some hundred times weaker; experts and branches, whose outputs are added up before the loss is
    taken; a task that was solved when the model came. What a run learns may be the loud term alone.

    Args:
        flow: the record along its wiring.
        times: by how much each measure must differ. Heads of healthy models differ by less than a hundred.
    """
    if came_knowing(flow.record):
        return []
    found = {node: measures(flow, node) for node in heads(flow)}
    strong = max(found, key=lambda n: (float(np.nan_to_num(found[n][0])), n), default="")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = {n: float((found[strong] / found[n]).min()) for n in found if n != strong}
    weak = sorted((n for n, ratio in ratios.items() if times <= ratio < math.inf), key=lambda n: -ratios[n])
    joined = _joined(flow, strong) if weak else set[str]()
    apart = [n for n in weak if n not in joined][:_MOST]
    drowned = [n for n in apart if _trained(flow, n) & _trained(flow, strong)]
    if drowned and any(_is_backward(flow, n) for n in joined):
        ratio = ratios[drowned[0]]
        told = f"its gradient is {ratio:.2g} times as large or more, by the size of the outputs too"
        return [_residual_issue(flow, strong, drowned[0], ratio, told)]
    return [_issue(flow, n, strong, ratios[n]) for n in drowned]


def swamping_residuals(flow: Flow, loud: Sequence[Issue], times: float = 10.0) -> list[Issue]:
    """What is told of outputs that are too loud, where they are made of derivatives of the model.

    What comes out is the residual of a differential equation then: no signal that has grown on its way, and
    zeros cost next to nothing as they are what solves it. Told is where the residual leaves next to nothing
    to the conditions at the border, or to the data: by the gradient at each layer that both go through, in
    every step. Alike and not: a residual in the unit of the other term; one without any other term.

    Args:
        flow: the record along its wiring.
        loud: what is told of the outputs.
        times: how much more gradient the passes must get that derivatives are taken of. Healthy ones get up
            to twice as much in some step.
    """
    derived = derived_layers(flow) if loud else set[str]()
    if not derived:
        return list(loud)
    ratios = []
    trained = (n for n, layer in flow.layers.items() if not layer.composite and flow.trainable(n))
    for nodes in flow.by_module(trained).values():
        strong, weak = [n for n in nodes if n in derived], [n for n in nodes if n not in derived]
        if strong and weak:
            most = (np.fmax.reduce([flow.grad[n] for n in each]) for each in (strong, weak))
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios.append((float(np.nanmin(np.divide(*most))), strong[0], weak[0]))
    ratio, strong, weak = min(ratios, default=(math.nan, "", ""))
    told = f"at each layer that both go through, its gradient is {ratio:.2g} times as large or more"
    return [_residual_issue(flow, strong, weak, ratio, told)] if times <= ratio < math.inf else []


@read_once
def derived_layers(flow: Flow) -> set[str]:
    """Return the layer calls that derivatives are taken of, on the way to the loss, in one pass."""
    wires, found = flow.wiring, set[str]()
    for node in reversed(wires.order):
        if any(n in found or _is_backward(flow, n) for n in wires.succs[node]):
            found.add(node)
    return found & flow.layers.keys()


def _is_backward(flow: Flow, node: str) -> bool:
    """Whether a node is the slope of an operation, as a derivative of the model is made of."""
    return flow.wiring.nodes[node].type.endswith("_backward")


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


def loud_additions(flow: Flow, above: float, times: float = 2.0) -> list[Issue]:
    """New parts of a frozen model, which start so loud beside what they are added to that it is ruined.

    Measured: in the first step, the output of each layer to be trained that is added to what frozen layers
    give, beside that; frozen layers read the sum, and expect what they were trained on. And the first loss,
    which is far above what zeros cost. Alike and not: parts that start at zero or small, as adapters do; loud
    ones whose first loss says that they do no harm, or whose harm the run undoes, so that its loss ends far
    below what ignorance costs (LOW); a new head, behind which nothing frozen reads; a model
    that is trained as a whole, whose readers learn to live with what they get.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be.
        times: as large as what it is added to the loudest part must be.
    """
    over, wires, known = over_silence(flow), flow.wiring, flow.record.knowledge
    if known is None or not wires.known or not above <= over < math.inf:
        return []
    beside: dict[str, float] = {}
    for node, layer in flow.layers.items():
        total = next(iter(wires.succs.get(node, ())), "")
        if layer.composite or not flow.trainable(node) or len(wires.succs[node]) != 1:
            continue
        frozen = _frozen_beside(flow, node) if wires.nodes[total].type.lower() in _SUMS else 0.0
        if frozen > 0 and any(_is_frozen(flow, n) for n in wires.downstream(node)):
            beside[node] = float(layer.output_rms[0]) / frozen
    loudest = max(beside.values(), default=0.0)
    undone = late(flow.record.losses) <= 0.5 * known.ignorance
    severity = IssueSeverity.HIGH if over >= 2 * above else IssueSeverity.MEDIUM
    told = [n for n in beside if loudest >= times and beside[n] >= 1][:_MOST]
    return [_addition(flow, n, beside[n], over, IssueSeverity.LOW if undone else severity) for n in told]


_SUMS = ("add", "add_")


def _is_frozen(flow: Flow, node: str) -> bool:
    """Whether a layer call has parameters, and none of them is to be trained."""
    if node not in flow.layers or flow.layers[node].composite:
        return False
    return bool(flow.parameters_of(node)) and not flow.trainable(node)


def _frozen_beside(flow: Flow, node: str) -> float:
    """Return the rms in the first step of what frozen layers give to the sum that a layer is added to, or to
    the sums before it; 0 if none does.

    What no gradient comes back to is no node of the graph: then it is the last frozen layer that gave as much
    before, whose numbers no weight to be trained has touched.
    """
    wires, shape = flow.wiring, flow.layers[node].shape
    todo, seen, found = [wires.succs[node][0]], set[str](), list[str]()
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if wires.nodes[at].kind == "op" and wires.nodes[at].type.lower() in _SUMS:
            todo += wires.preds[at]
        elif _is_frozen(flow, at):
            found.append(at)
    if not found:
        first = min((flow.layers[n].order for n in flow.layers if flow.trainable(n)), default=0)
        apart = (n for n in flow.layers if _is_frozen(flow, n) and flow.layers[n].order < first)
        alike = [n for n in apart if flow.layers[n].shape == shape and not np.any(flow.grad[n] > 0)]
        found = sorted(alike, key=lambda n: flow.layers[n].order)[-1:]
    return max((float(flow.layers[n].output_rms[0]) for n in found), default=0.0)


def _addition(flow: Flow, node: str, times: float, over: float, severity: IssueSeverity) -> Issue:
    layer = flow.layers[node]
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.EXPLODING,
        severity=severity,
        description=f"In the first step its output has rms {layer.output_rms[0]:.3g}, {times:.3g} times that "
        "of what frozen layers give, to which it is added; frozen layers behind read the sum, and are not "
        f"trained for it. The first loss is {over:.3g} times what it costs to know nothing: what the model "
        "knew is drowned before the first step.",
        magnitude=times,
        recommended_actions=(
            f"Let the new part start as nothing: nn.init.zeros_({layer.name}.weight), bias zero, or "
            "weights of deviation 0.01, so that the first outputs are those of the frozen model.",
            "Or multiply what it adds by a gate that starts at zero.",
        ),
        metrics={"beside": times, "over_silence": over, "output_rms": float(layer.output_rms[0])},
        evidence=Evidence(growth=times),
    )


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


def measures(flow: Flow, node: str) -> Floats:
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


def _residual_issue(flow: Flow, strong: str, weak: str, ratio: float, how: str) -> Issue:
    """Tell of a term made of derivatives of the model, whose gradient leaves next to nothing to another."""
    layer, other = flow.layers[strong], layer_name(weak)
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.EXPLODING,
        severity=IssueSeverity.HIGH,
        description=f"The term of the loss that is made of its derivatives swamps that of {other}: {how}, "
        "and the weights that both share are trained for it alone. Where zero solves the equation, zero is "
        "what is learnt.",
        magnitude=ratio,
        recommended_actions=(
            "Bring both terms to one unit: divide the residual of the equation by its largest coefficient "
            "(a stiffness, a frequency squared) before it is squared, or make time and place dimensionless.",
            "Then weigh the terms so that their gradients are alike where they meet: this one is "
            f"{ratio:.1g} times too large now.",
        ),
        metrics={"dominance": ratio, "rival": other},
        evidence=Evidence(roles=Role.OFF_SCALE),
    )
