"""Outputs that are all alike: zero for every sample, or the same for all of them."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.actions import Actions
from gradflow.detect.evidence import (
    early,
    heads,
    kept_at_least,
    last_layers,
    late,
    loss_fell,
    shares,
)
from gradflow.detect.flow.readings.rows import become_alike, come_nearer
from gradflow.detect.knowledge import differing, guesses
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import (
    Evidence,
    Issue,
    IssueSeverity,
    IssueType,
    KnowledgeRecord,
    Role,
)

_AGREEMENT = "nothing but one another"  # what outputs are held against


def silenced(flow: Flow) -> list[Issue]:
    """Heads of a model whose outputs are exactly zero for all samples, and which get no gradient any more.

    The last activation is off everywhere, and the loss costs what zeros cost.
    """
    known = flow.record.knowledge
    if known is None or not known.scales or max(known.scales) > 0 or not guesses(flow.record):
        return []
    if not flow.record.provenance.optimizer:  # a start from zero ends with the first step
        return []
    found = []
    for module, node in {flow.layers[n].module: n for n in reversed(last_layers(flow))}.items():
        layer = flow.layers[node]
        wanted = [p for p in flow.trainable(node) if p.reached.any()]
        if not wanted or late(layer.output_rms) == 0:
            continue
        zero = [np.nan_to_num(p.grad_norm) == 0 for p in wanted]
        if not all(z[-1] and z.mean() >= 0.8 for z in zero):  # a rare sample may still pass
            continue
        ops = ", ".join(dict.fromkeys(flow.wiring.ops_after(node)))
        found.append(
            Issue(
                layer=module,
                layer_type=layer.type,
                issue_type=IssueType.DEAD,
                severity=IssueSeverity.HIGH,
                description="What comes out of the model is exactly zero for every sample, though its own "
                f"output has rms {late(layer.output_rms):.3g}: what follows it ({ops or 'an activation'}) is "
                f"off, so no gradient comes back, and the loss is the {known.silent:.3g} that zeros cost.",
                magnitude=float(sum(p.num_elements for p in wanted)),
                recommended_actions=(
                    f"Let what follows {module or 'the model'} pass something below zero as well (softplus, "
                    "a leaky rectifier), or start its bias above zero.",
                    "Weigh less what drives the outputs to zero: a penalty on their size, weight decay.",
                ),
                metrics={"why": "silent output", "silent_loss": known.silent},
                evidence=Evidence(roles=Role.BLOCKING, developed=bool(np.any(wanted[0].grad_norm > 0))),
            )
        )
    return found


def collapsed(flow: Flow, alike: float) -> list[Issue]:
    """Two outputs that are compared with each other and are the same for all samples: a collapsed embedding.

    Where a model makes its own targets (two views, a teacher), giving the same for every input meets the loss
    and teaches nothing: the loss of a constant output is no larger than that of the model. Seen in the
    outputs of the last step, and in the first step's layers already; where the variation rises within the
    run, to more than a tenth of that limit, the model is about to learn. A model that gives one number for
    two embeddings compares these.

    Args:
        flow: the record along its wiring.
        alike: largest part of the outputs that differs between samples.
    """
    known = flow.record.knowledge
    if known is None or not math.isfinite(known.loss):  # no output costs less than another
        return []
    if not known.averaged <= known.loss + 1e-3 * abs(known.loss):
        return []
    drawn = False
    rows = [(s, v) for s, v in zip(known.shapes, known.variations, strict=True) if len(s) > 1 and s[-1] > 1]
    same = [v for s, v in rows if sum(s == other for other, _ in rows) >= 2 and not known.raised]
    if len(known.shapes) == 1 and _compares_samples(known):
        same = [*known.variations] * 2
    elif drawn := _stays_at_margin(flow, known):
        same = [*known.variations] * 2
        alike = 1.2 * max(same)
    elif not rows and (pulled := _pulled_together(flow, known)):
        same, alike = pulled, 1.2 * max(pulled)
    elif not same and _AGREEMENT in known.misgiven:
        same = [*known.variations] * 2
        if _is_drawn_together(flow, known):
            alike = max(alike, 1.2 * max(same))
    elif _in_one_direction(known):
        alike = 1.2 * max(same, default=0.0)
    elif guesses(flow.record) and _agree(known):
        alike *= 2  # what differs between samples is of no use to the loss
    elif same and _is_collapsing(flow, known):
        alike = 1.2 * max(same)
    if len(same) < 2 or not max(same) < alike:
        return []
    ends = sorted(heads(flow), key=lambda node: flow.layers[node].order)
    last = next((n for n in ends if flow.layers[n].module == flow.layers[ends[-1]].module), "")
    lost = _first_alike(flow, alike) or ((last, 1.0) if last else None)
    if lost is None:
        return []
    if _is_shut(flow, lost[0]):
        return []
    layer, before = flow.layers[lost[0]], lost[1]
    now, first = late(layer.output_variation), early(layer.output_variation)
    if now > 1.5 * first and now > 0.1 * alike:
        return []
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.BOTTLENECK,
            severity=IssueSeverity.HIGH,
            description=f"Its output is almost the same for every sample: {now:.1%} of its size differs "
            f"between them, against {before:.0%} of what enters; in the first steps it was {first:.1%}. Of "
            f"the outputs that the loss compares, {max(same):.1%} differs. One and the same output for all "
            f"samples costs {known.averaged:.3g}, the model's own {known.loss:.3g}: the loss asks for no "
            "more, or is stuck at its margin.",
            magnitude=now,
            recommended_actions=_margin_actions() if drawn else _alike_actions(layer.name),
            metrics={"variation": now, "variation_before": before, "constant_loss": known.averaged},
        )
    ]


def constant(flow: Flow, same: float) -> list[Issue]:
    """The layer from which on a model gives the same for every sample, although what enters it differs.

    What picks, masks or normalises in front of it gives the same whatever comes in: one code of a codebook
    for all, an average over the samples. Left to others where the gradient is starved, units are silent or
    saturated, or weights are still zero: there the same comes of another illness, or of a start by design. A
    ratio of probabilities to themselves is one for every sample, by its make (see `KnowledgeRecord`).

    Args:
        flow: the record along its wiring.
        same: largest part of the outputs that differs between samples. Rounding leaves 1e-7; the outputs of
            healthy models have 4e-3 and more, fresh deep ones included.
    """
    known = flow.record.knowledge
    if known is None or known.num_samples < 4 or not math.isclose(known.averaged, known.loss, rel_tol=1e-3):
        return []
    varied = differing(known)
    if not varied <= same:
        return []
    lost = _first_alike(flow, 10 * same)
    if lost is None:
        return _same_inputs(flow, known, 10 * same)
    if _is_another_illness(flow, lost[0]):
        return []
    layer, before = flow.layers[lost[0]], lost[1]
    now = late(layer.output_variation)
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.BOTTLENECK,
            severity=IssueSeverity.HIGH,
            description=f"The model gives the same for every sample: only {varied:.1e} of its outputs "
            f"differs between them. What tells them apart is lost in front of this layer: {now:.1e} of its "
            f"output differs, of what comes before up to {before:.0%}. The loss is what a constant costs, "
            f"{known.averaged:.3g}.",
            magnitude=varied,
            recommended_actions=_constant_actions(flow, lost[0]),
            metrics={"variation": now, "variation_before": before, "constant_loss": known.averaged},
        )
    ]


def _same_inputs(flow: Flow, known: KnowledgeRecord, alike: float) -> list[Issue]:
    """The first layer of a model that is given the same sample again and again: black images, one token.

    From the first layers on, which have weights, nothing differs between rows, in no step of the run; and
    one answer for all is not what is asked for, as the loss does not fall with it.
    """
    first = [node for node in flow.layers if flow.wiring.is_first(node)]
    for node in flow.layers:
        seen = flow.layers[node].output_variation
        if not np.isfinite(seen).any() or np.nanmax(seen) > alike:
            return []
    weighed = [p for n in first for p in flow.parameters_of(n) if len(p.shape) > 1]
    if not first or not all(flow.has_matrix(n) or flow.is_table(n) for n in first):
        return []
    if any(late(p.norm) == 0 for p in weighed) or loss_fell(flow.record):
        return []
    layer = flow.layers[first[0]]
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.BOTTLENECK,
            severity=IssueSeverity.MEDIUM,
            description="What enters is the same for every sample of a batch: nothing differs between rows "
            "from its own output on, in any step, so the model can give one answer for all, which costs "
            f"{known.averaged:.3g}.",
            magnitude=late(layer.output_variation),
            recommended_actions=(
                "Print two samples of a batch as the model gets them: images that are all black (divided by "
                "255 twice, cast to integers), texts that are all padding or unknown tokens, an index that "
                "does not move.",
            ),
            metrics={"variation": late(layer.output_variation), "constant_loss": known.averaged},
        )
    ]


def _is_another_illness(flow: Flow, node: str) -> bool:
    """Whether the same is given for all samples for a reason that another detector tells, or at the start."""
    upstream = {node, *flow.wiring.upstream(node)}
    for above in (n for n in upstream if n in flow.layers):
        weights = [p for p in flow.trainable(above) if len(p.shape) > 1]
        if any(late(p.norm) == 0 for p in weights):
            return True
        if weights and not any(np.any(p.grad_norm > 0) for p in weights):
            return True
    for by_matrix, least in ((None, 1e-3), (1.0, 1e-6)):  # as `vanishing` weighs it: by kind, and absolutely
        kept = shares(flow, kept_at_least(flow, by_matrix=by_matrix)).share
        if any(late(kept[n]) < least for n in upstream if n in kept):
            return True
    shut = (late(a.saturated_share) >= 0.5 or a.never_fired >= 0.9 for a in flow.record.activations)
    return any(shut)


def _is_shut(flow: Flow, node: str) -> bool:
    """Whether a module is itself a bounded activation at the same of its ends for every sample, which says
    why what it gives is alike."""
    of = (a for a in flow.record.activations if not a.functional and node_name(a.layer) == node)
    return any(a.kind == "bounded" and a.always_saturated >= 0.9 for a in of)


def _compares_samples(known: KnowledgeRecord) -> bool:
    """Whether the loss asks of outputs only how samples differ: all constants cost the same, zeros too."""
    return math.isclose(known.averaged, known.silent, rel_tol=1e-5) and math.isclose(
        known.loss, known.averaged, rel_tol=1e-2
    )


def _stays_at_margin(flow: Flow, known: KnowledgeRecord) -> bool:
    """Whether embeddings of which the loss asks only how they differ are drawn together, and what differs
    between them is of no use.

    No loss of the run comes below what one output for all costs (the margin); nor would these outputs, drawn
    nearer to one another by any factor: the farthest that should be near is farther than the nearest that
    should be far. So the way down is to make all alike, and they have become so, to half of what differed and
    less than ever, whatever large first steps had thrown apart. Likenesses that are merely too sharp cost
    less once they are smaller.
    """
    if not known.drawn >= known.averaged * (1 - 1e-6) or known.num_samples < 4:
        return False
    losses = flow.record.losses
    return bool((losses >= known.averaged).all()) and become_alike(flow, heads(flow), 2.0, steady=False)


def _in_one_direction(known: KnowledgeRecord) -> bool:
    """Whether a loss that looks at directions alone is met, by outputs that all have one.

    Those of other samples meet it at next to nothing of what zeros cost, and one output for all of them would
    meet it ten times better than each sample's own. Two things that have nothing to do with each other are at
    right angles, and cost what zeros do: in healthy embeddings, others cost half of that and more.
    """
    met = 0 <= known.loss <= known.shuffled <= 0.02 * known.silent
    return met and known.share_left >= 0.1 and known.averaged <= 0.1 * known.loss


def _is_drawn_together(flow: Flow, known: KnowledgeRecord) -> bool:
    """Whether a loss of embeddings that it holds against one another alone is on its way to be met, at a
    fifth of what it was, as they become alike, to half.

    Where zeros cost more than any other answer for all, it looks at directions; else what differs must itself
    have become less, and not merely beside a mean that grows. As any answer for all meets such a loss, that
    is all that it teaches; a batch that has no pairs to be kept apart by chance draws nothing together.
    """
    ends, losses = heads(flow), flow.record.losses
    if not 0 <= late(losses) <= 0.2 * losses[0] or not become_alike(flow, ends, 2.0):
        return False
    directions = known.silent > known.loss + abs(known.averaged)
    return directions or all(come_nearer(flow, node, 2.0) for node in ends)


def _is_collapsing(flow: Flow, known: KnowledgeRecord) -> bool:
    """Whether outputs that the loss compares are on their way to one and the same, which costs next to
    nothing beside what they cost: the part that differs has fallen to a third in the run, step by step, or to
    half while the loss was met, to a twentieth of what it was."""
    met = 0 <= late(flow.record.losses) <= 0.05 * flow.record.losses[0]
    if not 0 <= known.averaged <= (0.2 if met else 0.05) * known.loss or known.num_samples < 4:
        return False
    return become_alike(flow, heads(flow), 2.0 if met else 3.0)


def _pulled_together(flow: Flow, known: KnowledgeRecord) -> list[float]:
    """What differs between samples of embeddings that the run has pulled together, one value to a call; empty
    where it has not.

    A model that gives one number for a pair, its likeness, compares two calls of one layer. Where the loss is
    met, to a twentieth of what it was, by numbers that fit any other pair as well, all pairs are asked to be
    alike; and where the embeddings themselves become so, to half of what differed and ever less, that is all
    the run teaches. With pairs to be kept apart, others cost more than a sample's own.
    """
    losses = flow.record.losses
    if not guesses(flow.record) or not 0 <= late(losses) <= 0.05 * losses[0]:
        return []
    ends = heads(flow)
    calls = [n for n in ends if len(flow.layers[n].shape) > 1 and flow.layers[n].shape[-1] > 1]
    if len(calls) < 2 or len(calls) < len(ends) or len({flow.layers[n].module for n in calls}) > 1:
        return []
    if not become_alike(flow, calls, 2.0):
        return []
    return [late(flow.layers[n].output_variation) for n in calls]


def _agree(known: KnowledgeRecord) -> bool:
    """Whether the outputs are as good as a constant, or differ by little of their size from one another."""
    near = 0 <= known.loss <= 0.05 * min(known.scales) ** 2
    return near or math.isclose(known.loss, known.averaged, rel_tol=1e-2)


def _first_alike(flow: Flow, alike: float) -> tuple[str, float] | None:
    """The first layer whose rows are alike, and the largest variation upstream, three times it or more."""
    most: dict[str, float] = {}
    found: dict[str, float] = {}
    for node in flow.wiring.order:
        preds = flow.wiring.preds[node]
        most[node] = max((most[p] for p in preds), default=0.0)
        layer = flow.layers.get(node)
        here = late(layer.output_variation) if layer is not None else math.nan
        if not math.isfinite(here):
            continue
        if here < alike and most[node] > 3 * alike and layer is not None and not layer.composite:
            found[node] = most[node]
        most[node] = max(most[node], here)
    first = min(found, key=lambda node: flow.layers[node].order, default="")
    return (first, found[first]) if found else None


def _constant_actions(flow: Flow, node: str) -> Actions:
    """For a model that gives the same for every sample."""
    layer = flow.layers[node].name or "the model"
    feeders = [flow.layers[n].name for n in flow.wiring.before(node) if n in flow.layers]
    between = f"between {feeders[0]} and {layer}" if feeders and feeders[0] else f"in front of {layer}"
    return (
        f"Print what stands {between} for two samples: an index that is the same for all (the nearest code "
        "of a codebook), a norm or a mean over the samples, or a mask that hides the input gives the same "
        "whatever comes in.",
        "If it is a codebook: start its codes at the scale of what the encoder gives (at its outputs for "
        "random samples), and start codes anew that are never picked.",
    )


def _margin_actions() -> Actions:
    """For embeddings that a loss of distances draws together, and which stay at its margin."""
    return (
        "Take all triplets (the mean over those that are not met), or semi-hard ones, in the place of the "
        "hardest of each anchor, at least until the loss has come below its margin.",
        "Lower the learning rate, by ten for a start, and warm it up: the hardest pairs of an "
        "untrained embedding are noise, which large steps follow.",
        "Put more samples of each class into a batch, or a smooth loss over all pairs (InfoNCE, SupCon).",
    )


def _alike_actions(layer: str) -> Actions:
    """For two outputs that are compared with each other and are the same for all samples."""
    return (
        "Stop the gradient on the side that makes the target (target.detach(), a slow teacher), and give the "
        "other side a predictor of its own.",
        "Or add a term that keeps samples apart: variance and covariance (VICReg), or negatives (InfoNCE).",
        f"Start {layer} anew: an embedding that has collapsed does not come back by itself.",
    )
