"""What trials say of a remedy: how much lower the loss came out, whether the issue is gone, what is new.

NOTE [How much lower]
Losses of two arms are compared by what they came to, u without the remedy and w with it: means over the last
fifth of the steps, which see the same batches. A difference means nothing by itself, so it is held against
all that happened, from the lowest to the highest of u, w and the loss s at which the lower of both began:

    gain = (u − w) / (max(u, w, s) − min(u, w, s) + noise)

where noise is eight standard errors of the mean difference over the last batches, or four standard deviations
of the loss between them, in the arm where it differs less, whichever is smaller. If both arms learn,
it is the share of the fall that is missing without the remedy; if the loss rises without it, the share of the
rise that is undone; 1 where one learns and the other does not. Near the end of a fall that hardly tells two
arms apart, so of losses that are positive throughout half their difference over the larger one counts, where
that is more: a quarter for a loss that is halved,

    gain = (u − w) / (2 max(u, w) + noise).

Multiplying the loss changes nothing. A run that does not stay finite counts as infinitely bad: a gain of 1 or
-1. A gain is *clear* from a quarter on, if it is at least twice its standard error over seeds; from a tenth
on where the issue is gone as well, since two signs agree: from a fifth on for what makes most networks learn
faster, sick or not (`Remedy.general`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np

from gradflow.records import (
    FINAL_SHARE,
    AnyIssueType,
    Cause,
    Floats,
    Issue,
    IssueType,
    TrialVerdict,
    final_losses,
)

_ANYWHERE = (IssueType.NUMERICAL, IssueType.UNSTABLE)  # which layer shows them first is an accident
CLEAR = 0.25  # of all that happened; a remedy that does less is not worth its lines
CLEAR_IF_GONE = 0.1
CLEAR_IF_GENERAL = 0.2  # likewise, for a norm, a skip connection, a better start


@attrs.frozen(eq=False)
class Outcome:
    """What one run came to.

    Args:
        losses: shape (steps,).
        issues: those of severity MEDIUM and above that the detectors saw in it; None where it was not
            measured.
        seconds: that it took.
    """

    losses: Floats
    issues: tuple[Issue, ...] | None
    seconds: float


@attrs.frozen(kw_only=True)
class Effect:
    """What a remedy did, over seeds, and what that amounts to.

    Args:
        verdict: what it does.
        why: what that rests on.
        present, gone, gain, gain_spread, new_issues: as in `TrialRecord`.
    """

    verdict: TrialVerdict
    why: str
    present: float
    gone: float
    gain: float
    gain_spread: float
    new_issues: tuple[str, ...]


def effect(
    without: Sequence[Outcome], treated: Sequence[Outcome], cause: Cause, *, general: bool = False
) -> Effect:
    """Return what a remedy did for a cause.

    Args:
        without: a run for every seed.
        treated: the same with the remedy; of the first seeds, one at least.
        cause: for which it was tried.
        general: as of the remedy.
    """
    pairs = list(zip(without, treated, strict=False))
    gains = np.array([gain(a.losses, b.losses) for a, b in pairs])
    spread = float(np.std(gains, ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else 0.0
    seen = [(a.issues, b.issues) for a, b in pairs if a.issues is not None and b.issues is not None]
    present = float(np.mean([bool(_left(before, cause)) for before, _ in seen]))
    gone = float(np.mean([not _left(after, cause) for _, after in seen]))
    new = _new(seen, cause)
    mean = float(np.mean(gains))
    verdict = _verdict(mean, spread, gone, new, CLEAR_IF_GENERAL if general else CLEAR_IF_GONE)
    return Effect(
        verdict=verdict,
        why=_why(pairs, present, gone, new),
        present=present,
        gone=gone,
        gain=mean,
        gain_spread=spread,
        new_issues=new,
    )


def gain(without: Floats, treated: Floats) -> float:
    """Return how much lower the loss came out with a remedy, in [-1, 1]; see NOTE [How much lower].

    Args:
        without: the loss of each step without it, shape (steps,).
        treated: the same with it.

    >>> falls, stays = np.linspace(2.0, 0.0, 51), np.full(51, 2.0)
    >>> round(gain(stays, falls), 2), round(gain(falls, stays), 2), gain(stays, stays)
    (1.0, -1.0, 0.0)
    """
    broken = [not np.isfinite(losses).all() for losses in (without, treated)]
    if any(broken):
        return float(broken[0]) - float(broken[1])
    u, w = (float(final_losses(losses[:, None])[0]) for losses in (without, treated))
    every = [u, w, min(float(without[0]), float(treated[0]))]
    noise = _noise(without, treated)
    span = max(every) - min(every) + noise
    of_all = (u - w) / span if span > 0 else 0.0
    of_loss = (u - w) / (2 * max(u, w) + noise) if min(every) > 0 else 0.0
    return max(of_all, of_loss, key=abs)


def _noise(without: Floats, treated: Floats) -> float:
    """Return what counts as no difference; see NOTE [How much lower]."""
    number = max(1, round(FINAL_SHARE * len(without)))
    a, b = without[-number:], treated[-number:]
    error = float(np.std(a - b)) / math.sqrt(number)
    return min(8 * error, 4 * float(np.std(a)), 4 * float(np.std(b)))


def is_clear(mean: float, spread: float, *, least: float = CLEAR) -> bool:
    """Whether a gain, or a loss of it, is large enough and larger than its spread over seeds."""
    return abs(mean) >= least and abs(mean) >= 2 * spread


def _verdict(mean: float, spread: float, gone: float, new: Sequence[str], if_gone: float) -> TrialVerdict:
    if not is_clear(mean, spread, least=if_gone if gone == 1.0 and mean > 0 else CLEAR):
        return TrialVerdict.NO_EFFECT
    if mean < 0:
        return TrialVerdict.HARMS
    if gone == 0.0:  # whatever lowers the loss leaves the cause as it is, and says nothing of it
        return TrialVerdict.NO_EFFECT
    return TrialVerdict.CURES if gone == 1.0 and not new else TrialVerdict.HELPS


def _under(layer: str, place: str) -> bool:
    """Whether a layer is the one of that place, a part of what took its place, or another call of it."""
    return layer == place or layer.startswith((f"{place}.", f"{place}@", f"{place}:")) or place == ""


def _left(issues: Sequence[Issue], cause: Cause) -> list[Issue]:
    """Return the issues that show a cause to be still there: of its type, at layers that it explains."""
    if cause.issue_type in _ANYWHERE:
        return [issue for issue in issues if issue.issue_type == cause.issue_type]
    places = {cause.layer, *(issue.layer for issue in cause.issues if issue.issue_type == cause.issue_type)}
    places = {place.split("@")[0] for place in places}
    return [
        issue
        for issue in issues
        if issue.issue_type == cause.issue_type and any(_under(issue.layer, place) for place in places)
    ]


def _new(pairs: Sequence[tuple[Sequence[Issue], Sequence[Issue]]], cause: Cause) -> tuple[str, ...]:
    """Return the kinds of issue that most runs with the remedy have, and none without it."""
    known: set[AnyIssueType] = {issue.issue_type for issue in cause.issues}
    known |= {issue.issue_type for before, _ in pairs for issue in before}
    counts: dict[AnyIssueType, int] = {}
    places: dict[AnyIssueType, str] = {}
    for _, after in pairs:
        for kind in {issue.issue_type for issue in after} - known:
            counts[kind] = counts.get(kind, 0) + 1
            places.setdefault(kind, next(i.layer for i in after if i.issue_type == kind))
    return tuple(
        f"{kind.value} in {places[kind] or '(model)'}"
        for kind, count in sorted(counts.items(), key=lambda item: item[0].value)
        if 2 * count > len(pairs)
    )


def _why(pairs: Sequence[tuple[Outcome, Outcome]], present: float, gone: float, new: Sequence[str]) -> str:
    u, w = (
        float(np.median([final_losses(run.losses[:, None])[0] for run in arm]))
        for arm in zip(*pairs, strict=True)
    )
    steps, seeds = len(pairs[0][0].losses), len(pairs)
    told = f"loss after {steps} steps {_number(w)} instead of {_number(u)} ({seeds} seed{'s' * (seeds > 1)})"
    if gone == 1.0:
        issue = "the issue is gone" if present else "the issue is gone by then, without it too"
    else:
        issue = f"the issue is gone with {gone:.0%} of the seeds" if gone else "the issue is still there"
    return "; ".join([told, issue, *(f"new: {kind}" for kind in new)])


def _number(loss: float) -> str:
    return "not finite" if math.isnan(loss) else f"{loss:.3g}"
