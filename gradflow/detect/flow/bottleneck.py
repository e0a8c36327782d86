"""BOTTLENECK: everything must pass one place that lets too little through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from gradflow.detect.actions import narrow_actions, rectified_actions
from gradflow.detect.evidence import RECTIFIERS, activations_of, heads, late, middle
from gradflow.detect.flow.ends.alike import collapsed, constant
from gradflow.detect.flow.ends.drowned import alike_outputs, drowned_inputs
from gradflow.detect.flow.ends.misgiven import blind_losses, choiceless, misgiven_losses
from gradflow.detect.flow.ends.smoothed import drowned_in_dropout, smoothed, starved_before
from gradflow.detect.flow.readings.waists import Waist, passages_of, waists_of, width_of
from gradflow.detect.flow.signal.answers import agreed_with_itself
from gradflow.detect.flow.signal.pulled import pulled_by_itself
from gradflow.detect.flow.signal.quantised import quantised_away
from gradflow.detect.flow.signal.rivals import mixed_samples, rivalling_samples
from gradflow.detect.knowledge import knows, learns
from gradflow.detect.view import Flow, flow_of
from gradflow.graph.queries.dominators import immediate_dominators
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType

_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "logical_not", "isnan"})  # what makes masks


def bottleneck(
    ratio: float = 8.0,
    *,
    rank_excess: float = 3.0,
    lost_samples: float = 0.02,
    alike: float = 1e-2,
    alike_fall: float = 30.0,
    collapse: float = 0.1,
    same: float = 1e-4,
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of places that let too little through.

    Measured, only at layers that *every* gradient passes on its way to the layers before them (dominators of
    the graph, seen from the loss):

    1. Width: the number of features per sample, against the widest layer before and behind; of what a layer
       gives, those that operations on its way to the next layer leave (a frame of many, a mean), where all of
       it goes that way. A *waist* is narrower than both by `ratio`. It throttles where what passes needs
       more: where the effective rank of the gradient that arrives behind it is larger than its width by
       `rank_excess`, or where it is a single number and more than two come out at the end.
    2. A rectifier on a waist: from the share of its units that fire, the share of samples for which none
       does, so that nothing passes in either direction; LOW where a quarter of what guesses cost is left,
       as behind a waist that only turns what goes on beside it.
    3. Over-smoothing: the part of a layer's output that differs between rows (samples, nodes, positions).
       Where rows are mixed again and again (attention, neighbour averages), they become alike, while the
       norm of the gradient stays as it was.
    4. Outputs: the part of what comes out of the model that differs between samples, and whether the loss
       holds them against targets of their own; and of what enters a dropout, behind which all differs.
    5. Rounding: a layer that is fed a constant, though what is in front of a quantiser differs.

    Why this is evidence: what all gradients pass has no detour, and a rank above the width cannot pass.

    Looks alike and is not: the code of an autoencoder, narrow by design (a model that gives back what has
    the size of its input, or a gradient that needs no more than the width: INFO, but for a single number,
    unless it gives the input back to a quarter of what guesses cost, or is on its way there); what a
    generator or an actor hands to a critic, as wide as the data (INFO too); a narrow side gate, a low-rank
    adapter, a narrow block under a skip, which are no dominators; a net that all data pass by as well, as in
    a coupling layer (INFO); a narrow *last* layer; rows alike because the gradient and the signal die out,
    which is `vanishing`'s, or because the input is a constant.

    Args:
        ratio: how much wider both sides must be. Pooling and the usual encoder steps reduce by 2 to 4.
        rank_excess: effective rank needed over width. Below 3 what does not pass in one step passes in the
            next, for its directions change.
        lost_samples: share of samples that a rectified waist stops altogether. Each of its units is off for
            half of the samples: a waist of 8 stops less than half a percent, one of 4 a sixteenth.
        alike: variation between rows below which they are alike: what is left is a percent of the signal.
        collapse: variation between samples below which two outputs that the loss compares have collapsed,
            where a constant would cost no more.
        same: variation between samples of the outputs below which a model gives the same for all of them.
        alike_fall: by how much the variation must have fallen on the way, from at least as many times
            `alike`.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        if not flow.wiring.known:  # without the graph, nothing tells a waist from a side branch
            return []
        above = immediate_dominators(flow.wiring.preds, flow.wiring.loss)
        passages = passages_of(flow, above)
        waists = waists_of(flow, passages, above, ratio, rank_excess)
        narrow = _narrow(flow, waists, rank_excess, lost_samples)
        smooth = smoothed(flow, passages, alike, alike_fall)
        starved = starved_before(flow, smooth)
        given = blind_losses(flow) or misgiven_losses(flow, IssueType.BOTTLENECK)
        given = given or choiceless(flow, IssueType.BOTTLENECK)
        given = given or rivalling_samples(flow) or mixed_samples(flow)
        pulled = collapsed(flow, collapse) or pulled_by_itself(flow) or agreed_with_itself(flow)
        found = smooth or given or pulled or constant(flow, same)
        found = found or drowned_in_dropout(flow, passages, 10 * same)
        return [
            *narrow,
            *starved,
            *(found or quantised_away(flow) or drowned_inputs(flow) or alike_outputs(flow)),
        ]

    return detector


def _narrow(flow: Flow, waists: list[Waist], rank_excess: float, lost_samples: float) -> list[Issue]:
    if not waists:
        return []
    same_size = _gives_back_its_input(flow)
    # One number is narrow by no design, unless no more comes out: it can put things in a row, and no more.
    most = max((width_of(flow, n) for n in heads(flow)), default=0)
    calls = flow.by_module(flow.layers)
    issues = []
    for waist in waists:
        by_design = same_size or _takes_data_too(flow, waist.node, calls) or _has_detour(flow, waist.node)
        told = same_size and (knows(flow.record) or learns(flow.record, most=0.4))
        single = waist.width == 1 and not waist.op and most > 2 and not told
        issue = _waist_issue(flow, waist, rank_excess, lost_samples, by_design, single)
        if issue.severity.is_serious or issue.evidence.undecided or waist.by_itself:
            issues.append(issue)
    return issues


def _waist_issue(
    flow: Flow, waist: Waist, rank_excess: float, lost_samples: float, by_design: bool, single: bool
) -> Issue:
    layer = flow.layers[waist.node]
    kept = f" (what `{waist.op.rpartition(':')[2]}` leaves of its output)" if waist.op else ""
    needed = _rank_behind(flow, waist)
    lost, fired = _stopped(flow, waist)
    needs_more = needed > rank_excess * waist.width and not by_design
    if lost >= lost_samples:
        severity = IssueSeverity.LOW if knows(flow.record) else IssueSeverity.MEDIUM
        why = (
            f"a rectifier stands on it, of whose units {fired:.0%} fire, so that for about {lost:.0%} of the "
            "samples nothing passes"
        )
        actions = rectified_actions(layer.name, waist.width)
    elif single:
        severity = IssueSeverity.MEDIUM
        why = "a single number, which can put what passes in a row and tell no more of it"
        actions = narrow_actions(layer.name, waist.width, max(needed, 2.0) if needed > 0 else 2.0)
    elif needs_more:
        severity = IssueSeverity.HIGH if needed > 2 * rank_excess * waist.width else IssueSeverity.MEDIUM
        why = f"the gradient behind it has an effective rank of {needed:.1f}"
        actions = narrow_actions(layer.name, waist.width, needed)
    else:
        severity = IssueSeverity.INFO
        why = (
            f"the gradient behind it has an effective rank of {needed:.1f}, which it can carry"
            if math.isfinite(needed)
            else "narrow by design, unless what passes needs more"
        )
        actions = ()
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=severity,
        description=f"Every gradient passes here, {waist.width} numbers per sample{kept} between "
        f"{waist.before} before and {waist.behind} behind: {why}.",
        magnitude=min(waist.before, waist.behind) / waist.width,
        recommended_actions=actions,
        metrics={
            "width": waist.width,
            "width_before": waist.before,
            "width_behind": waist.behind,
            "effective_rank_behind": needed,
            "samples_stopped": lost,
        },
        evidence=Evidence(undecided=severity is IssueSeverity.INFO and not math.isfinite(needed)),
    )


def _rank_behind(flow: Flow, waist: Waist) -> float:
    """Effective rank of the gradient at the nearest layers behind a waist that are wider than it."""
    ranks, todo, seen = [], list(flow.wiring.after(waist.node)), set[str]()
    while todo and len(seen) < 8:
        here = todo.pop(0)
        if here in seen:
            continue
        seen.add(here)
        rank = flow.wiring.nodes[here].effective_rank
        if len(rank) and np.isfinite(rank).any() and width_of(flow, here) > waist.width:
            ranks.append(middle(rank))
        else:
            todo.extend(flow.wiring.after(here))
    return max(ranks, default=math.nan)


def _takes_data_too(flow: Flow, node: str, calls: Mapping[str, Sequence[str]]) -> bool:
    """Whether what stands behind a waist is also called on something that does not come through it: a critic
    or a discriminator, which sees the data and its imitation. The data then set the width."""
    behind = _readers(flow, node)
    others = {n for b in behind for n in calls[flow.layers[b].module]}.difference(behind)
    same = set(calls[flow.layers[node].module])
    return any(not (same & flow.wiring.upstream(n)) for n in others)


def _readers(flow: Flow, node: str) -> set[str]:
    """The layers with parameters that take what a layer gives, past those without, as a tanh of an action."""
    found, seen, todo = set[str](), {node}, [node]
    while todo:
        for behind in flow.wiring.after(todo.pop()):
            if behind in seen or behind not in flow.layers:
                continue
            seen.add(behind)
            if flow.parameters_of(behind):
                found.add(behind)
            else:
                todo.append(behind)
    return found


def _has_detour(flow: Flow, node: str) -> bool:
    """Whether all data that come to a waist also reach a weight matrix behind it by a way that leaves it out,
    as in a coupling layer, which gives half of its input on as it is."""
    wires, upstream = flow.wiring, flow.wiring.upstream(node)
    inputs = [n for n in upstream if wires.nodes[n].kind == "input"]
    behind = {n for n in wires.downstream(node) if n in flow.layers and flow.has_matrix(n)}

    def passes_by(start: str) -> bool:
        seen, todo = {node, start}, [start]
        while todo:
            for after in wires.succs.get(todo.pop(), ()):
                if after in behind:
                    return True
                if after not in seen and wires.nodes[after].type not in _COMPARISONS:
                    seen.add(after)
                    todo.append(after)
        return False

    return bool(inputs) and all(passes_by(n) for n in inputs)


def _gives_back_its_input(flow: Flow) -> bool:
    """Whether some first layer takes as many features as some last layer gives: an autoencoder."""
    taken = {
        p.shape[1]
        for node in flow.layers
        if flow.has_matrix(node) and not flow.is_table(node) and flow.wiring.is_first(node)
        for p in flow.parameters_of(node)
        if len(p.shape) >= 2
    }
    given = {flow.layers[n].shape[1 if len(flow.layers[n].shape) > 3 else -1] for n in heads(flow)
             if flow.layers[n].shape}  # fmt: skip
    return bool(taken & given - {1})


def _stopped(flow: Flow, waist: Waist) -> tuple[float, float]:
    """The share of samples for which a rectifier on the waist lets nothing through, and the share that fires.

    If units fire independently, none of n fires with probability (1 - share) ** n.
    """
    for activation in activations_of(flow, waist.node):
        if activation.kind == "rectifier" and activation.op in RECTIFIERS:
            fired, units = late(activation.fired_share), activation.num_units or waist.width
            # If nothing fires at all, it is dead; one over fewer units leaves a way beside it.
            if fired > 0 and units >= _channels(flow.layers[waist.node].shape):
                return (1.0 - fired) ** max(units, 1), fired
    return 0.0, math.nan


def _channels(shape: Sequence[int]) -> int:
    """The number of units of an output: axis 1 behind a convolution, else the last."""
    return shape[1 if len(shape) > 3 else -1] if len(shape) > 1 else 1
