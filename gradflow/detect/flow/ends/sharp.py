"""The softmax of the loss itself at its ends: scores that are sure of wrong answers from the start."""

from __future__ import annotations

import math

from gradflow.detect.actions import Actions
from gradflow.detect.evidence import heads, late, row_gain
from gradflow.detect.flow.ends.loud import is_shifted, over_silence, takes_scores
from gradflow.detect.view import Flow
from gradflow.records import Issue, IssueSeverity, IssueType


def sharp_scores(flow: Flow, above: float, still: float = 1.0) -> list[Issue]:
    """Heads whose scores put the loss's own softmax or sigmoid at its ends, at the start and at the end.

    A cross entropy of so many times what zeros cost takes scores that are sure, and of the wrong class; where
    they are, their slope is gone in all but the direction that is wrong. The scores need not be what a layer
    gives: a similarity over a temperature, squared distances. For those of a layer itself, see `loud_heads`.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be.
        still: how many times it the last must be, where no layer gives the scores: no better than zeros.
    """
    known, over = flow.record.knowledge, over_silence(flow)
    if known is None or not 0.6 * above <= over < math.inf or not takes_scores(flow):
        return []
    end = late(flow.record.losses) / known.silent
    found = []
    for node in heads(flow):
        layer = flow.layers[node]
        if not (flow.trainable(node) or flow.is_tied(node)):
            continue
        given = bool(layer.output_rms[0] >= 3.0)
        own = row_gain(flow, node, at=lambda norms: float(norms[0])) >= 3.0  # not what enters it is at fault
        if not own if given else not (over >= above and end >= still and _makes_scores(flow, node)):
            continue
        found.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.SATURATION,
                severity=IssueSeverity.MEDIUM if given else IssueSeverity.HIGH,
                description="The softmax or sigmoid of the loss is at its ends: the first loss is "
                f"{over:.3g} times what it costs to know nothing, the last {end:.3g} times, so the scores "
                "made of its output are sure of wrong answers, and hand back no more than which ones.",
                magnitude=over,
                recommended_actions=(
                    "Divide the scores by a larger temperature (0.05 to 0.1 for similarities of unit "
                    "vectors), or by the root of the number of features that a product sums over.",
                    f"Or start {layer.name} at a smaller scale, so that the first scores have rms 1.",
                ),
                metrics={"over_silence": over, "late_over_silence": end, "silent_loss": known.silent},
            )
        )
    return found


def _makes_scores(flow: Flow, node: str) -> bool:
    """Whether scores are made by a product, square or quotient between a layer and the softmax or sigmoid:
    small outputs that are the scores put neither at its ends, whatever the loss costs beside zeros."""
    wires, behind = flow.wiring, flow.wiring.downstream(node)
    ops = [wires.nodes[n].type.lower() for n in wires.order if n in behind]
    ends = (i for i, op in enumerate(ops) if "softmax" in op or "nll_loss" in op or "entropy" in op)
    made = ops[: next(ends, len(ops))]
    return any(word in op for op in made for word in ("mul", "mm", "einsum", "div", "pow", "square", "dist"))


def shifted_scores(flow: Flow, above: float = 3.0) -> list[Issue]:
    """Heads whose scores put the loss's softmax or sigmoid at its ends by a constant, for all samples alike.

    A softmax does not see what it adds to all scores alike. Where some classes are left out of that, as a new
    word is whose row starts at zero beside old ones that lie far below, it gives them everything, or nothing,
    whatever the sample: one answer for all, and nearly always a wrong one. A sigmoid sees any constant; one
    that stands for how rare a yes is costs less than zeros do.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be, as for `loud.loud_heads`.
    """
    known, over = flow.record.knowledge, over_silence(flow)
    if known is None or not above <= over < math.inf:
        return []
    end = late(flow.record.losses) / known.silent
    severity = IssueSeverity.HIGH if over >= 2 * above else IssueSeverity.MEDIUM
    found = []
    for node in heads(flow):
        layer = flow.layers[node]
        size = float(layer.output_rms[0])
        trained = flow.trainable(node) or flow.is_tied(node)
        odds = any("binary_cross_entropy" in op.lower() for op in flow.wiring.ops_after(node))
        classes = "nll_loss" in flow.wiring.ops_after(node)
        if not (classes or odds) or not trained or not size >= 3.0 or not is_shifted(flow, node):
            continue
        undone = known.share_left <= 0.25 and (end <= 1 or odds)
        name, part = layer.name or "the model", float(layer.output_variation[0])
        found.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.SATURATION,
                severity=IssueSeverity.LOW if undone else severity,
                description=f"The {'softmax' if classes else 'sigmoid'} of the loss is at its ends, and for "
                "all samples alike: the first "
                f"loss is {over:.3g} times what it costs to know nothing ({flow.record.losses[0]:.3g}; zeros "
                f"cost {known.silent:.3g}), the last {end:.3g} times. Of its scores, which have rms "
                f"{size:.3g}, {part:.2g} differs between samples: " + (_CLASSES if classes else _ODDS),
                magnitude=over,
                recommended_actions=_level_actions(name) if classes else _odds_actions(name),
                metrics={
                    "over_silence": over,
                    "late_over_silence": end,
                    "silent_loss": known.silent,
                    "output_rms": size,
                    "output_variation": part,
                },
            )
        )
    return found


_CLASSES = (
    "a constant puts some classes far above the others, and they get all the probability whatever the "
    "sample is."
)
_ODDS = "a constant makes all answers yes, or all of them no, whatever the sample is."


def _level_actions(name: str) -> Actions:
    """For classes of which some start far above others."""
    return (
        f"Bring the classes to one level: start rows of {name} that were added (weight and bias) at the mean "
        "of the old ones, or all of them near zero.",
        f"Compare the mean score of each class over a batch: {name}(x).mean(0).",
    )


def _odds_actions(name: str) -> Actions:
    """For probabilities that start next to 0 or 1 for all samples."""
    return (
        f"Start the bias of {name} at the log odds of the targets, log(p / (1 - p)) where a part p of them "
        "is one, or at zero.",
        f"See what the first scores are: {name}(x).mean().",
    )
