"""Samples that compete with one another under a softmax, and samples that are mixed up."""

from __future__ import annotations

import math

from gradflow.detect.evidence import loss_fell
from gradflow.detect.knowledge import differing, guesses, knows
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import Issue, IssueSeverity, IssueType, LayerRecord, NodeRecord, SamplesRecord

# Operations that pick or arrange numbers, and change none.
ROUTES = frozenset(
    {
        *("slice", "select", "index", "index_select", "gather", "split", "unbind", "cat", "stack", "view"),
        *("reshape", "unsafe_view", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "clone"),
        *("to_copy", "alias"),
    }
)


def rivalling_samples(flow: Flow) -> list[Issue]:
    """The layer whose scores a softmax takes along the samples of the batch, and nothing sums these over.

    Measured: the axis of every softmax. One over rows is meant to weigh rows that are added up: members of a
    set, nodes of a graph, instances of a bag. Where each row goes on by itself up to the outputs, samples
    that have nothing to do with each other share what each should have for itself: a class, an action, a step
    to look at.

    Alike and not: rows that are pooled with such weights; a matrix of likenesses, along both of whose axes
    the loss asks; sequences with the steps in front, whose outputs have other rows.

    Args:
        flow: the record along its wiring.
    """
    known, wires = flow.record.knowledge, flow.wiring
    if known is None or not wires.known or knows(flow.record):
        return []
    rows = {shape[0] for shape in known.shapes if len(shape) > 0 and shape[0] > 3}
    for name in wires.order:
        node = wires.nodes[name]
        width = math.prod(node.shape[1:])
        if node.along != 0 or not rows & {*node.shape[:1]} or width in (1, node.shape[0]):
            continue
        sources = set(wires.preds[name])
        both = any(n.along > 0 and sources & {*wires.preds[k], k} for k, n in wires.nodes.items())
        layer = flow.layer_at(name)
        if both or layer is None or _joins_rows(flow, name):
            continue
        return [_rivals(layer, node)]
    return []


def _joins_rows(flow: Flow, name: str) -> bool:
    """Whether anything behind a node has other rows than it, but by picking or arranging numbers."""
    wires, rows = flow.wiring, flow.wiring.nodes[name].shape[0]
    for behind in wires.downstream(name):
        node = wires.nodes[behind]
        if node.shape and node.shape[0] != rows and wires.kind_of(behind) not in ROUTES:
            return True
    return False


def _rivals(layer: LayerRecord, node: NodeRecord) -> Issue:
    rows, rest = node.shape[0], node.shape[1:]
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.MEDIUM,
        description=f"A softmax of shape {node.shape} runs along the first axis, over the {rows} rows of the "
        "batch, and nothing adds these up behind it: what belongs to one sample hangs on which others are in "
        f"the batch, and the {math.prod(rest)} numbers of a sample do not add up to one.",
        magnitude=1.0,
        recommended_actions=(
            "Take it over the last axis, or whichever holds the alternatives of one sample: softmax(dim=-1). "
            "nn.Softmax() without dim takes the first axis of what has three.",
        ),
        metrics={"misgiven": "softmax over samples", "rows": rows},
    )


# Operations that take rows to other rows because that is what they are for.
_MIXING = frozenset(
    {
        *("mm", "matmul", "spmm", "sparse_mm", "sparse_addmm", "einsum", "index", "index_select", "gather"),
        *("scatter", "scatter_add", "index_add", "index_put", "flip", "roll", "sort", "take", "cumsum"),
        *("scatter_reduce", "segment_reduce", "cdist", "repeat_interleave"),
    }
)


def mixed_samples(flow: Flow, same: float = 1e-3) -> list[Issue]:
    """The layer behind which numbers of one sample come to stand in the rows of others.

    Measured: where the gradient from a row of the outputs arrives, at what layers with as many rows give. No
    more of it is at the row itself than chance leaves, and some is at rows before and behind; no operation
    on the way is there to take rows to other rows, and the model guesses.

    Alike and not: batch statistics, sums over neighbours, attention over rows, which leave more where it
    belongs; rows that are picked, rolled or put in another order on purpose; steps in front, of which each
    hears those before it; one answer for all, which `alike.constant` tells.

    Args:
        flow: the record along its wiring.
        same: part of the outputs that differs between samples, up to which it is one answer for all.
    """
    record, wires = flow.record, flow.wiring
    if not wires.known or not guesses(record) or loss_fell(record):
        return []
    if record.knowledge is None or differing(record.knowledge) <= same:
        return []
    found = []
    for sample in record.parts.samples:
        behind = wires.downstream(node_name(sample.layer))
        types = {wires.kind_of(n) for n in behind if wires.nodes[n].kind == "op"}
        if sample.both_sides and not types & _MIXING:
            found.append(_mixed(flow, sample))
    return found


def _mixed(flow: Flow, sample: SamplesRecord) -> Issue:
    before = flow.wiring.before(node_name(sample.clean)) if sample.clean else ()
    nearest = [flow.layers[n] for n in before if n in flow.layers]
    layer = max(nearest, key=lambda one: one.order, default=flow.layers[node_name(sample.mixed)])
    behind = f" Behind {sample.clean} it is where it belongs." if sample.clean else ""
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description=f"What it gives ends up in the rows of other samples: of the gradient from one row "
        f"of the outputs, {sample.own:.2g} arrives at the same row of {sample.mixed}, where chance would "
        f"leave {1 / sample.rows:.2g}, and the rest at others.{behind} So outputs are held against the "
        "targets of samples that they know nothing of, and the model guesses.",
        magnitude=1.0 - sample.own,
        recommended_actions=(
            f"Look for a view or reshape between {layer.name or 'it'} and the loss whose axes stand in "
            "another order than it reads them: it keeps the order of the numbers. Swap axes with permute or "
            "transpose first: h.transpose(0, 1).reshape(len(x), -1), not h.view(len(x), -1).",
            "Check: change one sample of a batch, and no output of another may change (in eval mode).",
        ),
        metrics={"own": sample.own, "rows": sample.rows},
    )
