"""Readings of series over the looks of a training: what they were, what they are, since when; and whether the
training goes well all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from gradflow.records import Bools, Floats, HistoryRecord, Issue, IssueSeverity

TimeDetector = Callable[[HistoryRecord], Iterable[Issue]]
"""What judges a training seen over time: a pure function from its history to issues."""
KNOWS = 0.1  # of the loss of guesses: what is left where a model knows


def unworried(detector: TimeDetector) -> TimeDetector:
    """Return a detector that lets numbers be infinite: a comparison with what comes of them is False."""

    def quiet(history: HistoryRecord) -> Iterable[Issue]:
        with np.errstate(all="ignore"):
            return list(detector(history))

    return quiet


def series(history: HistoryRecord, name: str) -> Floats:
    """Return a series by its name; NaN at every look where there is none of that name."""
    return history[name] if name in history else np.full(len(history), np.nan)


def smooth(values: Floats) -> Floats:
    """Return running medians of three: each entry with its neighbours; the ends as the median of two.

    One look that is off, by a hard batch, changes nothing.

    Args:
        values: one series, or several of shape (series, looks).

    >>> smooth(np.array([1.0, 9.0, 1.0, 1.0])).tolist()
    [5.0, 1.0, 1.0, 1.0]
    """
    windows = np.full((3, *values.shape), np.nan)
    windows[0, ..., 1:], windows[1], windows[2, ..., :-1] = values[..., :-1], values, values[..., 1:]
    ranked, known = np.sort(windows, 0), 3 - np.isnan(windows).sum(0)  # what is not known comes last
    low, high = np.take_along_axis(ranked, np.stack([(known - 1) // 2, known // 2]), 0)
    return (low + high) / 2


def lasting(beyond: Bools) -> int | None:
    """Return the first look since which a condition has held, if it held at the last two looks; else None.

    >>> lasting(np.array([True, False, True, True])), lasting(np.array([False, True]))
    (2, None)
    """
    if len(beyond) < 2 or not at_last(beyond):
        return None
    fails = np.flatnonzero(~beyond)
    return int(fails[-1]) + 1 if len(fails) else 0


def at_last(beyond: Bools) -> bool:
    """Return whether a condition holds at the last two looks, as one that is `lasting` does.

    At each look of a training that goes well it tells, of few numbers, that nothing else need be asked.
    """
    return bool(beyond[-2:].all())


def highest_so_far(values: Floats) -> Floats:
    """Return at each look the highest smoothed value of those before it; NaN at the first.

    Args:
        values: one series, or several of shape (series, looks).
    """
    found = np.full(values.shape, np.nan)
    found[..., 1:] = np.fmax.accumulate(smooth(values), -1)[..., :-1]
    return found


def highest_of_each(several: Mapping[str, Floats]) -> dict[str, Floats]:
    """Return `highest_so_far` of several series by name."""
    return dict(zip(several, highest_so_far(np.stack([*several.values()])), strict=True)) if several else {}


def lowest_so_far(values: Floats) -> Floats:
    """Return at each look the lowest smoothed value of those before it; NaN at the first."""
    return -highest_so_far(-values)


def goes_well(history: HistoryRecord) -> bool:
    """Whether a training goes well by its loss, now: it knows, or is at its best so far.

    The loss of the last two looks is at most a tenth of what guesses cost, or their mean is no more than 2
    percent above the lowest mean of two looks before.
    """
    left = series(history, "loss_share_left")
    left = left[~np.isnan(left)][-2:]
    if len(left) and float(left.mean()) <= KNOWS:
        return True
    losses = series(history, "loss")
    if len(losses) < 3 or not np.isfinite(losses[-2:]).all():
        return False
    pairs = (losses[1:] + losses[:-1]) / 2
    before = pairs[:-1][np.isfinite(pairs[:-1])]
    if not len(before):
        return False
    best = float(before.min())
    return float(pairs[-1]) <= best + 0.02 * abs(best)


def forgot(history: HistoryRecord, knew: float = 0.5, guesses: float = 0.9) -> Bools:
    """Return at which looks a model guesses that knew before: what is left of the loss of guesses was at most
    `knew`, and is `guesses` or more."""
    left = series(history, "loss_share_left")
    return (left >= guesses) & (lowest_so_far(left) <= knew)


def graded(severity: IssueSeverity, history: HistoryRecord) -> IssueSeverity:
    """Return a severity, LOW where the training goes well all the same."""
    return IssueSeverity.LOW if goes_well(history) else severity
