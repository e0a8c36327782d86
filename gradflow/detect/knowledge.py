"""What the model knows: whether its losses are those of a model that has learned, or of one that guesses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import attrs
import numpy as np

from gradflow.detect.evidence import early, late, loss_fell
from gradflow.records import Floats, FlowRecord, Issue, IssueSeverity, IssueType, KnowledgeRecord

Detector = Callable[[FlowRecord], Iterable[Issue]]
INFORMED = 0.5  # of the loss that ignorance costs, from which a model is taken to know


def informed(record: FlowRecord) -> bool:
    """Whether the model is far better than ignorance: at most half of the loss that answers alike would cost.

    What looks like an illness in a model that guesses, a sharp attention or a closed gate, is how one looks
    that has learned. Known where loss functions of PyTorch were heard, also in a model that computes its own
    loss (see `TransformerRecord.loss_share`), or where the model came knowing.
    """
    shares = [record.transformer.loss_share, *(r.loss_share for r in record.recurrences)]
    return any(share <= INFORMED for share in shares) or came_knowing(record)


def excused(detector: Detector) -> Detector:
    """Return a detector whose issues are LOW at most in a model that knows the answers; see `informed`."""

    def sparing(record: FlowRecord) -> Iterable[Issue]:
        for issue in detector(record):
            yield lowered(issue) if informed(record) else issue

    return sparing


def sparing_learned(detector: Detector) -> Detector:
    """Return a detector whose SATURATION is LOW at most inside attention and recurrent layers that know.

    Args:
        detector: any; see `informed`.
    """

    def spared(record: FlowRecord) -> Iterable[Issue]:
        for issue in detector(record):
            sharp = issue.issue_type is IssueType.SATURATION and issue.layer in _choosing(record)
            yield lowered(issue) if sharp and informed(record) else issue

    return spared


def _choosing(record: FlowRecord) -> set[str]:
    """Return the names of attention and of recurrent layers, whose gates and weights choose."""
    attention = record.transformer.attention
    return {r.name for r in record.recurrences} | {
        n for layer in attention for n in (layer.name, layer.module)
    }


KNOWS = "The loss is at most half of what ignorance costs: a model that has learned may look like this."
CAME = "The model came to the run with what it has learned, and keeps it."
LEARNS = "The loss falls all the same, and is far below that of guesses: the steps cope with it."
WRECKED = "The model came to the run knowing, and lost it to steps that were too large: they have made it so."
AT_LEVEL = "The loss is next to nothing of what zeros cost: no more is to be learned, and by little gradient."


def lowered(issue: Issue, why: str = KNOWS) -> Issue:
    """Return an issue that is LOW at most, and says why; one that is so already, as it is."""
    if issue.severity <= IssueSeverity.LOW:
        return issue
    return attrs.evolve(issue, severity=IssueSeverity.LOW, description=f"{issue.description} {why}")


def coped_with(record: FlowRecord, issues: Iterable[Issue]) -> list[Issue]:
    """Return issues, those of MEDIUM as LOW in a run that teaches the model all the same: `learns`, at a
    quarter of the loss of guesses."""
    taught = learns(record, most=0.25)
    return [lowered(i, LEARNS) if taught and i.severity is IssueSeverity.MEDIUM else i for i in issues]


def guesses(record: FlowRecord, least: float = 0.9) -> bool:
    """Whether the last outputs fit other samples as well as their own, so that the model knows nothing yet.

    False where that is not known; see `KnowledgeRecord`.
    """
    known = record.knowledge
    if known is None:
        return False
    if known.share_left == known.share_left:
        return known.share_left >= least
    return math.isfinite(known.shuffled) and known.shuffled - known.loss <= (1 - least) * abs(known.shuffled)


def knows(record: FlowRecord, most: float = 0.25) -> bool:
    """Whether `most` of the loss of guesses is left at the end; False where that is not known."""
    return record.knowledge is not None and record.knowledge.share_left <= most


def came_knowing(record: FlowRecord, most: float = 0.25) -> bool:
    """Whether the model came to the run with what it has learned, and still has it at the end.

    Its loss is a small part of what ignorance costs, from the first steps on, and its last outputs fit their
    own samples far better than any others. False where that is not known; see `KnowledgeRecord`. Healthy
    trained models come to 0.1 and less, those that went bad have 0.3 and more left; a sick model on an easy
    task may come to 0.2 within a run, but did not begin it there.
    """
    known = record.knowledge
    if known is None or not known.share_left <= most:
        return False
    return early(record.losses) <= most * known.ignorance


def has_learned(record: FlowRecord, most: float = 0.1) -> bool:
    """Whether the run itself has taught the model what it knows: a tenth of the loss of guesses is left, and
    half of what there was at first.

    False where that is not known; see `KnowledgeRecord`.
    """
    return knows(record, most) and loss_fell(record)


def fell_by_learning(record: FlowRecord, part: float = 0.98) -> bool:
    """Whether the loss has fallen by half within the run, and to less than it costs to know nothing.

    Outputs that start far from the level of their targets let it fall by as much as one likes: until it costs
    what one answer for all does. Where that is not known, the fall is taken for what it looks like.
    """
    known = record.knowledge
    if not loss_fell(record) or known is None:
        return loss_fell(record)
    return not (guesses(record) and known.loss >= part * known.ignorance > 0)


def learns(record: FlowRecord, most: float = 0.6) -> bool:
    """Whether the run teaches the model: its loss falls by a tenth, and the last outputs fit their own
    samples, at `most` of what they cost when each is given to another one.

    False where that is not known; see `KnowledgeRecord`.
    """
    return falls(record) and knows(record, most)


def falls(record: FlowRecord) -> bool:
    """Whether the loss falls by a tenth within the run, to no less than zero."""
    return bool(0 <= late(record.losses) <= 0.9 * early(record.losses))


def differing(known: KnowledgeRecord) -> float:
    """The largest part of an output that differs between samples, of those that are not zero; NaN without
    any, and where one tells nothing of that by its make (see `KnowledgeRecord.variations`)."""
    found = [v for v, size in zip(known.variations, known.scales, strict=True) if size > 0]
    return math.nan if any(map(math.isnan, found)) else max(found, default=math.nan)


def no_better(record: FlowRecord) -> bool:
    """Whether the loss ends where it costs no less than to know nothing: what it has fallen by until then is
    what the start had cost more. False where that is not known."""
    known = record.knowledge
    return known is not None and bool(late(record.losses) >= known.ignorance > 0)


def healed(record: FlowRecord, part: float = 0.1) -> bool:
    """Whether all losses of the run's second half are a small part of the first one, and of zeros'.

    Whatever leapt before that has done no harm. A first loss that is off scale is no measure, so that what
    zeros cost counts where it is known and less.
    """
    losses = record.losses
    if not _is_measure(losses):
        return False
    return float(losses[len(losses) // 2 :].max()) <= part * min(float(losses[0]), _of_zeros(record))


def no_worse(record: FlowRecord, above: float = 1.5) -> bool:
    """Whether a run that jumps is none the worse for it: `healed`, or its loss falls and none of it comes to
    `above` times the first.

    Likelihoods of whole pictures, pairs that are ranked and sums of squares leap like that under rates as
    good as any smaller one. A run that steps throw about leaves its start far behind, or does not fall. As a
    loss that falls from far off scale may still be there, the end must be below what zeros cost.
    """
    losses = record.losses
    if healed(record):
        return True
    if not _is_measure(losses) or not falls(record):
        return False
    return float(losses.max()) <= above * float(losses[0]) and late(losses) <= _of_zeros(record)


def _is_measure(losses: Floats) -> bool:
    """Whether losses can be held against one another: enough of them, finite, and none below zero."""
    return len(losses) >= 6 and bool(np.isfinite(losses).all() and losses.min() >= 0)


def _of_zeros(record: FlowRecord) -> float:
    """What outputs of zero cost; infinite where that is not known, or nothing."""
    known = record.knowledge
    return known.silent if known is not None and known.silent > 0 else math.inf


def at_level(record: FlowRecord, most: float = 0.02) -> bool:
    """Whether the model came with outputs of the right level: its loss is next to nothing of what zeros cost.

    Where targets hardly vary, as the values of a trained agent's states, no more can be learned, and nothing
    need tell one input from another. False where that is not known; see `KnowledgeRecord`.
    """
    known = record.knowledge
    if known is None or not 0 < known.silent < math.inf:
        return False
    return max(early(record.losses), late(record.losses)) <= most * known.silent


def calm(record: FlowRecord, most: float = 0.5) -> bool:
    """Whether no loss of the run comes near what ignorance costs; False where that is not known.

    Of a model that came with outputs of the right level (see `at_level`), near a tenth of what zeros cost:
    where targets hardly vary, a mean that answers all alike costs next to nothing too. Where zeros cost
    nothing at all, as outputs are held against outputs (two views, a teacher), a tenth of their square:
    those that have nothing to do with each other cost twice that square. Of outputs that are merely added up,
    as a model gives the terms of its loss itself, nothing of that is known.
    """
    known, losses = record.knowledge, record.losses[np.isfinite(record.losses)]
    if known is None or len(losses) < len(record.losses) or not len(losses):
        return False
    if known.silent == 0 and known.scales and losses.min() >= 0:
        if all(math.isclose(guess, known.loss, rel_tol=1e-5) for guess in (known.shuffled, known.averaged)):
            return False
        return bool(losses.max() <= 0.1 * min(known.scales) ** 2)
    if at_level(record) and float(np.abs(losses).max()) <= 0.1 * known.silent:
        return True
    return bool(losses.min() >= 0) and float(losses.max()) <= most * known.ignorance
