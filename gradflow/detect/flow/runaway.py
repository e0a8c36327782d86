"""Losses that leave where they began: below zero without end, or upwards, step by step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import attrs
import numpy as np

from gradflow.detect.actions import unstable_actions
from gradflow.detect.evidence import early, heads, late, middle, total_gradient
from gradflow.detect.flow.ends.loud import off_scale_of
from gradflow.detect.knowledge import calm, knows
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Floats, Issue, IssueSeverity, IssueType, KnowledgeRecord, Role


def paid_for_errors(flow: Flow, climb: float) -> list[Issue]:
    """A run whose loss falls below zero without end, as it is the lower the more wrong its outputs are."""
    record, known, gradient = flow.record, flow.record.knowledge, total_gradient(flow.record)
    losses = record.losses
    if known is None or not record.provenance.optimizer or not np.isfinite(losses).all() or len(losses) < 5:
        return []
    end = late(losses)
    falls = end < 0 and -end >= climb * abs(losses[0]) and late(gradient) >= climb / 2 * gradient[0]
    if not (falls and known.louder <= _FASTER * known.loss):
        return _endless(flow, known, climb)
    told = (
        f"The loss falls below zero without end, from {losses[0]:.3g} to {end:.3g}, and four times the "
        f"outputs would bring it to {known.louder:.3g}: it is the lower the more wrong they are, and the "
        "faster the further it has come."
    )
    ratio = abs(end) / max(abs(float(losses[0])), 1e-300)
    issue = of_the_run(flow, len(losses) - 1, IssueSeverity.HIGH, told, ratio, louder=known.louder)
    return [attrs.evolve(issue, recommended_actions=_SIGNS)]


def _endless(flow: Flow, known: KnowledgeRecord, climb: float, grown: float = 5.0) -> list[Issue]:
    """A run whose loss falls below zero in proportion to its outputs, no slower at its end, while they grow.

    Or along a parameter of the head that gets one and the same gradient in every step, wherever it has come
    to: the loss is a straight line in it, which has no end.

    A value that is to be made large, and that may make itself so: a head that is trained itself, whose
    outputs have become several times as large as they were. Two calls of one head that get the same gradient
    pull against each other: such a critic tells real from made, and may, as long as something holds it to a
    slope (see `_lets_go`).
    """
    losses, gradient = flow.record.losses, total_gradient(flow.record)
    third = len(losses) // 3
    fall = losses[0] - losses[-1]
    noise = float(np.median(np.abs(np.diff(losses, 2))))
    straight = _straight(flow)
    least = 0.0 if straight else 3 * abs(float(losses[0]))
    if not (losses[-1] < 0 and third >= 2 and fall >= max(climb * noise, least)):
        return []
    at_first, at_last = ((losses[a] - losses[b]) / third for a, b in ((0, third), (-1 - third, -1)))
    if not (at_last >= 0.8 * abs(at_first) and known.louder <= 2 * known.loss):
        return []
    if not late(gradient) >= 0.5 * gradient[0] > 0:
        return []
    grow = [n for n in heads(flow) if flow.trainable(n) and _times(flow.layers[n].output_rms) >= grown]
    grow = grow or straight
    if not grow or (_against_each_other(flow, grow) and not _lets_go(flow, grow, at_last / at_first)):
        return []
    layer = flow.layers[grow[0]]
    told = (
        f"The loss falls below zero without end, from {losses[0]:.3g} over {losses[-1 - third]:.3g} to "
        f"{losses[-1]:.3g}, as its outputs grow, from rms {layer.output_rms[0]:.3g} to "
        f"{layer.output_rms[-1]:.3g}: nothing in it holds them."
    )
    ratio = float(abs(losses[-1]) / max(abs(losses[0]), 1e-300))
    issue = of_the_run(flow, len(losses) - 1, IssueSeverity.HIGH, told, ratio, louder=known.louder)
    against = _against_each_other(flow, grow)
    return [attrs.evolve(issue, recommended_actions=_HOLD_SLOPE if against else _HOLD)]


def _straight(flow: Flow) -> list[str]:
    """Return the heads with a parameter whose gradient is the same in every step, while steps move it."""
    found = []
    for node in heads(flow):
        for parameter in flow.trainable(node):
            size = parameter.grad_norm
            same = len(size) >= 5 and np.isfinite(size).all() and np.ptp(size) <= 1e-5 * size.max()
            if same and size.max() > 0 and np.ptp(parameter.norm) > 0:
                found.append(node)
                break
    return found


def blown_up(flow: Flow, jumping: Iterable[Issue], grown: float = 100.0) -> list[Issue]:
    """Heads whose own gradient has grown by so many times in a run that jumps or runs away: explained by it.

    Args:
        flow: the record along its wiring.
        jumping: the verdicts on the run.
        grown: how many times its first one the gradient of a head ends at, or comes to before it overflows.
    """
    record = flow.record
    if not record.provenance.optimizer or not any(issue.severity.is_serious for issue in jumping):
        return []
    over = not np.isfinite(record.losses).all()
    found = []
    for node in heads(flow):
        norms = flow.grad[node][np.isfinite(flow.grad[node])]
        if len(norms) < 2 or not norms[0] > 0 or not flow.trainable(node):
            continue
        if not off_scale_of(flow, node)[0] <= 1e4:  # not heard at first: a start from nothing
            continue
        ends = float(norms.max()) if over else late(norms)
        if not ends >= grown * norms[0]:
            continue
        layer = flow.layers[node]
        found.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.EXPLODING,
                severity=IssueSeverity.MEDIUM,
                description=f"The gradient that the loss hands to it grows {ends / norms[0]:.3g} times "
                f"within the run, from {norms[0]:.3g} to {ends:.3g}{', and overflows' if over else ''}.",
                magnitude=ends / float(norms[0]),
                recommended_actions=unstable_actions(flow, node, ends / float(norms[0])),
                metrics={"growth": ends / float(norms[0])},
                evidence=Evidence(developed=True, growth=ends / float(norms[0])),
            )
        )
    return found


def _times(values: Floats) -> float:
    """How many times as large the last known value is as the first."""
    known = values[np.isfinite(values)]
    return float(known[-1] / known[0]) if len(known) > 1 and known[0] > 0 else math.nan


def _against_each_other(flow: Flow, nodes: list[str]) -> bool:
    """Whether one of some layer calls gets the same gradient, in size, as another call of its module."""
    for node in nodes:
        calls = (n for n in flow.layers if flow.layers[n].module == flow.layers[node].module and n != node)
        if any(np.allclose(flow.grad[n], flow.grad[node], rtol=1e-2, atol=0) for n in calls):
            return True
    return False


def _lets_go(flow: Flow, nodes: list[str], faster: float, grown: float = 20.0, climb: float = 10.0) -> bool:
    """Whether nothing holds a critic to a slope: its outputs, its gradient and its weights all grow, and its
    loss falls faster and faster, by five times as much in the last third of the run as in the first.

    A penalty on its slope is in the loss, and larger outputs cost more then; clipping keeps its weights, and
    a spectral norm what they amplify.

    Args:
        flow: the record along its wiring.
        nodes: the calls of its head.
        faster: how many times as fast the loss falls at the end as at the start.
        grown: how many times as large its outputs must have become.
        climb: the same of its gradient.
    """
    gradient, record = total_gradient(flow.record), flow.record
    trained = [p.norm for p in record.parameters if p.trainable and p.optimized and len(p.norm)]
    size = np.sqrt(np.sum(np.square(trained), axis=0))
    times = max(_times(flow.layers[node].output_rms) for node in nodes)
    return bool(
        faster >= climb / 2
        and times >= grown
        and late(gradient) >= climb * gradient[0]
        and size[-1] > 1.1 * size[0]
    )


def drifting(flow: Flow, risen: float = 1.5, apart: float = 3.5, gradient_risen: float = 1.2) -> list[Issue]:
    """A run whose loss rises, step by step, beyond what its batches differ by, and its gradient with it.

    Where it neither leaps nor leaves: targets that a model makes itself and that run away from it, a weight
    that grows as it sinks. The logarithms of the first third are held against those of the last, as two
    samples whose means differ by so many standard errors.

    Alike and not: a model that knows, as its loss is far below what its targets would cost others. Where it
    makes its targets itself, as a critic does, and its outputs have become many times as large while the loss
    rose, they say nothing of that: they have grown as far.

    Args:
        flow: the record along its wiring.
        risen: by how much the last third is above the first, and above the first loss.
        apart: by how many standard errors. By chance, losses that do not rise come to 2.5.
        gradient_risen: by how much the gradient must rise, over the first one and that of the first third.
    """
    record, losses, gradient = flow.record, flow.record.losses, total_gradient(flow.record)
    third = len(losses) // 3
    if not record.provenance.optimizer or third < 3 or not np.isfinite(losses).all() or losses.min() <= 0:
        return []
    first, last = np.log(losses[:third]), np.log(losses[-third:])
    error = math.sqrt((float(first.var()) + float(last.var())) / third)
    rise = float(last.mean() - first.mean())
    if not rise >= max(math.log(risen), apart * error) or late(losses) < risen * losses[0]:
        return []
    if not late(gradient) >= gradient_risen * max(float(gradient[0]), early(gradient)):
        return []
    if (calm(record) or knows(record, most=0.5)) and not follows_itself(flow):
        return []
    told = (
        f"The loss rises step by step: its last third is {math.exp(rise):.3g} times as high as its first, "
        f"{rise / max(error, 1e-12):.2g} standard errors beyond what batches differ by, and the gradient "
        "rises with it. What it is to follow moves away from it, or the steps of the optimizer are too large."
    )
    issue = of_the_run(flow, len(losses) - 1, IssueSeverity.MEDIUM, told, math.exp(rise))
    return [attrs.evolve(issue, metrics={**issue.metrics, "series": "loss"})]


def follows_itself(flow: Flow, times: float = 10.0) -> bool:
    """Whether the outputs of a head that is trained have become so many times as large within the run, and
    are held against more of their kind: its module is called again, or a copy without gradient follows."""
    grown = [n for n in heads(flow) if flow.trainable(n) and _times(flow.layers[n].output_rms) >= times]
    still = [p for p in flow.record.parameters if not (p.trainable and p.optimized) and len(p.norm)]
    moving = {p.shape for p in still if np.ptp(p.norm) > 0}
    again = Counter(layer.module for layer in flow.layers.values())
    return any(
        again[flow.layers[n].module] > 1 or all(p.shape in moving for p in flow.trainable(n)) for n in grown
    )


_FASTER = 8.0  # four times the outputs make 4 of a loss that falls with them, 16 of one with their square
_SIGNS = (
    "Look for a sign in the loss: a square or a distance with a negative factor, divided by a mean that may "
    "be negative (take .abs(), and a bound from below), or subtracted where it is to be added.",
    "A term that may fall without end needs a bound: a margin, a clamp, or a weight that keeps it small.",
)
_HOLD = (
    "Look for what may make its own value large: a loss that is minus the output of a critic must not reach "
    "the critic's parameters (detach, requires_grad_(False), an optimizer for each).",
    "Or bound it: a margin, a clamp, a penalty on the size of the outputs.",
)
_HOLD_SLOPE = (
    "Hold the critic to a slope: a penalty on the gradient by its inputs, a spectral norm, or a clamp of its "
    "weights after each step.",
    "Or take a loss that is content with a margin: the hinge, or a cross entropy of real and made.",
)


def of_the_run(
    flow: Flow, step: int, severity: IssueSeverity, told: str, ratio: float, **metrics: float
) -> Issue:
    """Return a verdict on a run as a whole, at the layer whose gradient is most out of its ordinary then."""
    record, node = flow.record, layer_of_jump(flow, step)
    layer = flow.layers[node] if node else None
    return Issue(
        layer=layer.name if layer else "",
        layer_type=layer.type if layer else record.provenance.model or "model",
        issue_type=IssueType.UNSTABLE,
        severity=severity,
        description=told,
        magnitude=ratio,
        recommended_actions=unstable_actions(flow, node, ratio),
        metrics={"ratio": ratio, "step": step, "optimizer": record.provenance.optimizer, **metrics},
        evidence=Evidence(roles=Role.JUMPING),
    )


def layer_of_jump(flow: Flow, step: int) -> str:
    """The layer whose gradient jumps most at that step; where several do alike, the one nearest the loss."""
    ratios = {}
    for node, layer in flow.layers.items():
        norms = [p.grad_norm for p in flow.trainable(node)]
        if norms and not layer.composite:
            total = np.sqrt(np.nansum(np.square(norms), axis=0))
            usual = middle(total)
            ratios[node] = total[step] / usual if usual > 0 and np.isfinite(total[step]) else 0.0
    if not ratios:
        return ""
    most = max(ratios.values())
    return max((n for n in ratios if ratios[n] >= most / 3), key=lambda n: flow.layers[n].order)
