"""What drowns: a term of a loss beside another one, and what differs between outputs beside what does not."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.evidence import heads, late
from gradflow.detect.knowledge import knows
from gradflow.detect.updates.readings import is_unmoved, response
from gradflow.detect.view import Flow
from gradflow.detect.wiring import layer_name
from gradflow.records import Floats, Issue, IssueSeverity, IssueType

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
