"""When to look: often after a beginning, then every so many steps; and at once where the loss jumps."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.evidence import middle
from gradflow.records import HistoryRecord

LOOKS = 16  # the losses of so many looks say what is usual
FEW = 4  # with fewer, nothing is


def next_look(step: int, every: int, since: int = 0) -> int:
    """Return the first step after `step` that is looked at.

    Those are the multiples of `every`, and 1, 4, 16, ... steps after `since`, as long as that is less than
    `every`: what begins fast is seen early, and soon costs nothing any more.

    Args:
        step: the present one.
        every: steps from one look to the next, in the long run.
        since: the beginning of the training, or of the last trouble.

    >>> [next_look(0, 100), next_look(4, 100), next_look(64, 100), next_look(500, 100, since=500)]
    [1, 16, 100, 501]
    """
    regular = (step // every + 1) * every
    soon, after = since + 1, 1
    while soon <= step:
        after *= 4
        soon = since + after
    return min(regular, soon) if after < every else regular


def is_jump(loss: float, ceiling: float) -> bool:
    """Whether a loss is above what is usual, or not finite; nothing is while nothing is usual."""
    return ceiling < math.inf and not loss <= ceiling


def loss_ceiling(history: HistoryRecord) -> float:
    """Return the loss above which a step is looked at, whatever its number; infinite while nothing is usual.

    The median of the last looks, and eight times their spread above it (the median absolute deviation, scaled
    to a standard deviation), or the median once more where that is less. Nothing is usual any more once a
    loss is not finite, or every step after it would be looked at.
    """
    if "loss" not in history:
        return math.inf
    losses = history["loss"][-LOOKS:]
    if len(losses) and not np.isfinite(losses[-1]):
        return math.inf
    losses = losses[np.isfinite(losses)]
    if len(losses) < FEW:
        return math.inf
    usual = middle(losses)
    spread = 1.4826 * middle(np.abs(losses - usual))
    return usual + max(8 * spread, abs(usual))
