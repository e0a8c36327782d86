"""Answers to a target that follows the model itself, which come to the same for every sample."""

from __future__ import annotations

import numpy as np

from gradflow.detect.evidence import early, heads, late
from gradflow.detect.flow.signal.pulled import is_told_more
from gradflow.detect.knowledge import guesses
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import AnswersRecord, Issue, IssueSeverity, IssueType, ParameterRecord

_MET = 0.1  # of the first loss
_SURE = 0.9  # mean probability of one alternative over all samples, from which all get it
_EVEN = 0.6  # the same at first, up to which they do not


def agreed_with_itself(flow: Flow) -> list[Issue]:
    """Heads whose softmax says the same of every sample, in a model that follows itself by a moving average.

    Measured: the mean over the samples of what a softmax of a head's outputs gives, and of that the largest,
    in the first step and the last; the loss; and weights that no optimizer moves, and that move all the same:
    a teacher that is a moving average of its student.

    Why this is evidence: student and teacher agree at best in an answer that needs no picture, so a loss that
    is met while all samples get one alternative for certain teaches nothing (Caron et al., 2021,
    arXiv:2104.14294, figure 7). Of labels that differ, one answer for all meets none.

    Alike and not: labels, of which nearly all are of one class; a teacher that stands still, which may be
    right; a softmax over likenesses to other samples, of which the first is a sample's own; a loss that still
    costs something.

    Args:
        flow: the record along its wiring.
    """
    losses = flow.record.losses
    if not flow.record.provenance.optimizer or len(losses) < 6 or not np.isfinite(losses).all():
        return []
    if not 0 <= late(losses) <= _MET * losses[0] or not any(map(_follows, flow.record.parameters)):
        return []
    if is_told_more(flow) or not (flow.record.knowledge is None or guesses(flow.record)):
        return []
    return [_issue(flow, found) for found in flow.record.parts.answers if _is_one(flow, found)][:1]


def _follows(parameter: ParameterRecord) -> bool:
    """Whether no optimizer moves a weight, and it moves in most steps of the run all the same."""
    if (parameter.trainable and parameter.optimized) or len(parameter.norm) < 6:
        return False
    moved = np.diff(parameter.norm) != 0
    return bool(moved.mean() > 0.5)


def _is_one(flow: Flow, found: AnswersRecord) -> bool:
    """Whether a head gives its scores to the softmax as they are, but for a scale, and all get one answer."""
    node = node_name(found.layer)
    if node not in heads(flow) or flow.layers[node].shape[-1:] != (found.num_alternatives,):
        return False
    known = found.largest[np.isfinite(found.largest)]
    return len(known) > 1 and bool(known[-1] >= _SURE and known[0] <= _EVEN)


def _issue(flow: Flow, found: AnswersRecord) -> Issue:
    layer, losses = flow.layers[node_name(found.layer)], flow.record.losses
    first, now = float(found.largest[0]), float(found.largest[-1])
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description=f"A softmax of its output gives all samples the same of {found.num_alternatives} "
        f"alternatives: its probability is {now:.1%} on average, where it was {first:.1%} in the first step. "
        "What that is held against follows the model itself (weights that no optimizer moves, a moving "
        f"average), and one answer for all meets it best: the loss falls from {early(losses[:1]):.3g} to "
        f"{late(losses):.3g}.",
        magnitude=now,
        recommended_actions=(
            "Centre what the teacher says before its softmax (subtract a running mean over the samples), or "
            "share its answers out evenly over the alternatives (Sinkhorn-Knopp, or an entropy term on their "
            "mean).",
            "Let the teacher follow more slowly (a momentum of 0.996 and more), and start anew: answers that "
            "have collapsed do not come back by themselves.",
        ),
        metrics={"largest": now, "largest_at_first": first},
    )
