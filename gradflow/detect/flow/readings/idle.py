"""First layers of a stack that get so little of the gradient that steps of plain descent hardly move them."""

from __future__ import annotations

import itertools
import math

from gradflow.detect.actions import vanishing_actions
from gradflow.detect.evidence import Shares, early, late
from gradflow.detect.knowledge import differing, guesses
from gradflow.detect.updates.readings import held, is_adaptive, is_rising, stands_still, typical
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, Role

_STARVED = 1e-3  # of the gradient at the loss
_IDLE = 5e-5  # update over weight, at which it takes twenty thousand steps for weights to become others
_MOVING = 1e-3  # the same of the layer that moves most: a usual one, so that the rate is not at fault
_ALIKE = 1e-2  # of the outputs: where no more differs, they tell no samples apart
_APART = 0.1  # of what the first layer gives


def idle(flow: Flow, plain: Shares) -> list[Issue]:
    """The first layer of a stack that loses signal and gradient step by step, where steps do not move it.

    Measured: the part of the gradient at the loss that arrives; the update of its weights over their size,
    beside the largest of all matrices; the part that differs between samples of what it gives, and of the
    outputs.

    Why this is evidence: a step of plain descent is as small as the gradient is. Where the last layers move
    by a usual part of their size and the first by next to nothing of that, the former are left to guess with
    what is the same for all samples, and nothing that happens in some thousands of steps changes what they
    are given. (Of plain stacks at PyTorch's usual start, those whose first weights move by less learn nothing
    within 1400 steps, most within 2500; those that move by twice as much do within a thousand.)

    Alike and not: an optimizer whose steps have a size of their own; a small rate, which all layers have; a
    warm-up; outputs that begin to differ; a layer that alone absorbs the gradient, which is told by itself.

    Args:
        flow: the record along its wiring.
        plain: what arrives of the gradient at the loss.
    """
    record, known = flow.record, flow.record.knowledge
    if known is None or not record.provenance.optimizer or is_adaptive(record) or is_rising(record):
        return []
    alike = differing(known) <= _ALIKE and math.isclose(known.averaged, known.loss, rel_tol=1e-2)
    if not alike or not guesses(record):
        return []
    if not (stands_still(record) or late(record.losses) >= 0.98 * known.ignorance > 0):
        return []
    moved = {p.name: typical(u.ratio) for u, p in held(record) if len(p.shape) >= 2}
    most = max((ratio for ratio in moved.values() if math.isfinite(ratio)), default=0.0)
    slow = [n for n in plain.share if _is_slow(flow, plain, n, moved)]
    if not most >= _MOVING or not slow:
        return []
    node = min(slow, key=lambda n: flow.layers[n].order)
    return [
        _issue(flow, plain, node, (max(moved[p.name] for p in flow.trainable(node) if p.name in moved), most))
    ]


def _is_slow(flow: Flow, plain: Shares, node: str, moved: dict[str, float]) -> bool:
    """Whether a layer tells samples apart, gets next to nothing, as many layers keep too little, and does not
    move."""
    layer, here = flow.layers[node], [p.name for p in flow.trainable(node) if p.name in moved]
    if (
        not here
        or not flow.has_matrix(node)
        or flow.is_table(node)
        or not early(layer.output_variation) >= _APART
    ):
        return False
    if not (0 < late(plain.share[node]) < _STARVED and early(plain.share[node]) < _STARVED):
        return False
    arriving = [late(plain.share[n]) for n in plain.path(node)]
    steps = [math.log(b / a) for a, b in itertools.pairwise(arriving) if a > 0 and b > 0]
    gradual = bool(steps) and max(steps) <= 0.5 * sum(steps)
    return gradual and max(moved[name] for name in here) <= _IDLE


def _issue(flow: Flow, plain: Shares, node: str, moved: tuple[float, float]) -> Issue:
    layer, known = flow.layers[node], flow.record.knowledge
    assert known is not None
    arriving, own, most = late(plain.share[node]), *moved
    layers = max(len(plain.path(node)) - 1, 1)
    per_layer = arriving ** (1 / layers)
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.VANISHING,
        severity=IssueSeverity.MEDIUM,
        description=f"Only {arriving:.2e} of the gradient that enters the model at the loss arrives here: "
        f"each of the {layers} layers on its way keeps about {per_layer:.2g} of it (1 is healthy). A step "
        f"moves its weights by {own:.1e} of their size, where others move by {most:.1e}: it takes some "
        f"{1 / own:,.0f} of them to make it another. Of what it gives {early(layer.output_variation):.0%} "
        f"differs between samples, of the outputs {differing(known):.1e}, and the loss stays at what one "
        f"answer for all costs, {known.averaged:.3g}.",
        magnitude=arriving,
        recommended_actions=vanishing_actions(flow, node, absorber="", per_layer=per_layer),
        metrics={
            "arriving": arriving,
            "kept_per_layer": per_layer,
            "update_ratio": own,
            "largest_ratio": most,
        },
        evidence=Evidence(roles=Role.STARVED),
    )
