"""Scores that are squashed before the loss squashes them."""

from __future__ import annotations

import math

from gradflow.detect.evidence import heads
from gradflow.detect.flow.signal.rivals import ROUTES
from gradflow.detect.view import Flow
from gradflow.records import Issue, IssueSeverity, IssueType, KnowledgeRecord, LayerRecord

_ODDS = ("sigmoid", "hardsigmoid", "softmax")
_WIDTHS = {"sigmoid": 1.0, "hardsigmoid": 1.0, "tanh": 2.0, "hardtanh": 2.0, "softsign": 2.0}


def bounded_scores(flow: Flow, left: float = 0.15) -> list[Issue]:
    """The last layer of a model whose scores a bounded activation takes before the softmax of a likelihood.

    Scores of k classes that lie no further apart than w leave ln(1 + (k − 1) e⁻ʷ) of the loss, whatever the
    weights are: half of the loss of guesses for a hundred classes behind a tanh. Alike and not: bounded
    scores that are multiplied by a temperature before the softmax.

    Args:
        flow: the record along its wiring.
        left: of what guesses cost, ln k, the least that must be left.
    """
    found = []
    for node in heads(flow):
        layer, ops = flow.layers[node], flow.wiring.ops_after(node)
        end, classes = _bounded_scores(flow, node), layer.shape[-1] if len(layer.shape) > 1 else 0
        if not end or classes < 2 or not any("nll_loss" in op for op in ops):
            continue
        floor, guess = math.log1p((classes - 1) * math.exp(-_WIDTHS[end])), math.log(classes)
        if floor < left * guess:
            continue
        found.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.SATURATION,
                severity=IssueSeverity.HIGH if floor >= 2 * left * guess else IssueSeverity.MEDIUM,
                description=f"A {end} takes its scores before the softmax does: they lie no further apart "
                f"than {_WIDTHS[end]:.0f}, and of {classes} classes none gets a probability that costs less "
                f"than {floor:.3g}, where guesses cost {guess:.3g}. On the way there, the {end} shuts.",
                magnitude=floor / guess,
                recommended_actions=(
                    f"Leave out the {end} behind {layer.name}: a softmax takes scores as they are.",
                    "Or multiply what it gives by a temperature, ten or so, if scores are to be bounded.",
                ),
                metrics={"floor": floor, "ignorance": guess, "op": end},
            )
        )
    return found


def _bounded_scores(flow: Flow, node: str) -> str:
    """The bounded function whose result, without anything between, is what a softmax takes; else nothing."""
    wires = flow.wiring

    for end in wires.succs.get(node, ()):
        kind, behind = wires.kind_of(end), map(wires.kind_of, wires.succs.get(end, ()))
        if kind in _WIDTHS and any(then in ("softmax", "log_softmax", "logsoftmax") for then in behind):
            return kind
    return ""


def squashed_odds(flow: Flow) -> list[Issue]:
    """The layer whose output a sigmoid takes before the binary cross entropy that has one of its own.

    Measured: all that this is given lies between 0 and 1, and it comes of a sigmoid or a softmax, by ways
    that pick and arrange numbers and change none: of a part of the outputs, as of one of several heads, too.

    Args:
        flow: the record along its wiring.
    """
    known, wires = flow.record.knowledge, flow.wiring
    if known is None or "odds as scores" not in known.misgiven:
        return []
    for name in (n for n in wires.order if wires.kind_of(n) in _ODDS):
        todo, met = [name], {name}
        while todo:
            for behind in wires.succs.get(todo.pop(), ()):
                kind = wires.kind_of(behind)
                if kind == "binary_cross_entropy_with_logits" and (layer := flow.layer_at(name)) is not None:
                    return [_odds_issue(layer, wires.kind_of(name), known)]
                if kind in ROUTES and behind not in met:
                    met.add(behind)
                    todo.append(behind)
    return []


def _odds_issue(layer: LayerRecord, op: str, known: KnowledgeRecord) -> Issue:
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.SATURATION,
        severity=IssueSeverity.MEDIUM,
        description=f"A {op} makes probabilities of what {layer.name or 'the model'} gives, and a binary "
        "cross entropy that takes scores makes probabilities of these once more: they lie between 0.5 and "
        f"0.73, so no is never an answer. The loss is {known.loss:.3g}; zeros cost {known.silent:.3g}.",
        magnitude=1.0,
        recommended_actions=(
            f"Leave out the {op} at the end of the model: binary_cross_entropy_with_logits takes scores as "
            "they are. Or use binary_cross_entropy, which takes probabilities.",
        ),
        metrics={"misgiven": "odds as scores", "loss": known.loss, "op": op},
    )
