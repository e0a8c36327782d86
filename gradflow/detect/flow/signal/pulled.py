"""Embeddings that a model's own loss pulls together, where nothing but themselves is held against them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradflow.detect.evidence import early, heads, late
from gradflow.detect.flow.readings.rows import become_alike, come_nearer
from gradflow.detect.view import Flow
from gradflow.records import Issue, IssueSeverity, IssueType

_MET = 0.05  # of the first loss
_TIMES = 2.0  # by which what differs between samples has become less


def pulled_by_itself(flow: Flow) -> list[Issue]:
    """Embeddings that become alike for all samples in a model that computes its loss of them alone.

    Of such a loss no guess can be asked, as the model gives nothing else. What it is made of is known: the
    graph tells whether anything that enters the model, data or labels, comes to it past the layers. Where
    nothing does, and both sides of what it compares have a gradient (an embedding and what a predictor makes
    of it, two calls of one encoder, two encoders), it is met at best by one embedding for all. That this is
    where the run goes, and not to embeddings that differ and agree, tells the course: the loss falls to a
    twentieth, and what differs between samples to half, step by step.

    Alike and not: a stopped gradient on one side; a target, a picture to give back, labels; terms, negatives
    or norms over the samples that keep these apart, as then they stay so. Of distances, not of directions, a
    mean that grows makes nothing alike: what differs must itself have become less.

    Args:
        flow: the record along its wiring.
    """
    record, losses = flow.record, flow.record.losses
    if record.knowledge is not None or not record.provenance.optimizer or not flow.wiring.known:
        return []
    if len(losses) < 6 or not np.isfinite(losses).all() or losses.min() < 0:
        return []
    if not late(losses) <= _MET * losses[0] or is_told_more(flow):
        return []
    found = [node for node in _compared(flow) if _is_pulled(flow, node)]
    return [_issue(flow, min(found, key=lambda n: flow.layers[n].order))] if found else []


def _compared(flow: Flow) -> Iterator[str]:
    """Yield the layer calls that hand embeddings to the loss which holds them against those of another call,
    with a gradient on both sides."""
    ends = [n for n in heads(flow) if len(flow.layers[n].shape) > 1 and flow.layers[n].shape[-1] > 1]
    behind = {node: flow.wiring.downstream(node) | {node} for node in ends}
    for node in ends:
        if any(_meet(flow, (node, behind[node]), (other, behind[other])) for other in ends if other != node):
            yield node


def _meet(flow: Flow, a: tuple[str, frozenset[str]], b: tuple[str, frozenset[str]]) -> bool:
    """Whether an operation takes what comes of two layer calls by ways of their own, while it has the size of
    an embedding still, or half of it, as where a batch holds two views; and not a number for each sample, of
    which losses are added up. Each comes with all that it feeds, itself among it."""
    wires, least = flow.wiring, min(_size(flow, node) for node, _ in (a, b)) / 2
    (_, one), (_, two) = a, b
    for op in one & two:
        takes = {p for p in wires.preds[op] if wires.nodes[p].num_elements >= least}
        if op not in flow.layers and takes & one and takes & two and takes & (one ^ two):
            return True
    return False


def _size(flow: Flow, node: str) -> int:
    return max(int(flow.layers[node].num_elements.max()), 1)


def is_told_more(flow: Flow) -> bool:
    """Whether anything that enters the model comes to its loss past the layers that the loss is made of."""
    wires = flow.wiring
    behind = {n for head in heads(flow) for n in wires.downstream(head) if n not in flow.layers}
    return any(wires.nodes[source].kind == "input" for node in behind for source in wires.sources[node])


def _is_pulled(flow: Flow, node: str) -> bool:
    return become_alike(flow, [node], _TIMES) and come_nearer(flow, node, _TIMES)


def _issue(flow: Flow, node: str) -> Issue:
    layer, losses = flow.layers[node], flow.record.losses
    seen = layer.output_variation[np.isfinite(layer.output_variation)]
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.MEDIUM,
        description=f"What it gives becomes the same for all samples: {seen[-1]:.0%} of its size differs "
        f"between them, {seen[0]:.0%} did at first, less and less from look to look. The loss is made of "
        "nothing but what layers give, with a gradient on both sides of what it compares, so that one output "
        f"for all meets it best; it has fallen from {early(losses[:1]):.3g} to {late(losses):.3g}.",
        magnitude=float(seen[-1]),
        recommended_actions=(
            "Stop the gradient on the side that makes the target (target.detach(), a slow teacher), and give "
            "the other side a predictor of its own.",
            "Or add a term that keeps samples apart: variance and covariance (VICReg), negatives (InfoNCE).",
        ),
        metrics={"variation": float(seen[-1]), "variation_at_first": float(seen[0])},
    )
