"""UNSTABLE: learning rates that fall to nothing within the run, as a factor is applied again and again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import attrs

from gradflow.detect.actions import Actions
from gradflow.detect.knowledge import has_learned
from gradflow.detect.updates.readings import held, layer_of
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType

_LEAST = 10  # updates from which a course is one
_TIMES = 4  # that it is stepped down by one factor, from which that goes on and on


@attrs.frozen(kw_only=True)
class _Fall:
    """How the rate of one group falls: between which rates, within how many updates, in which part of them it
    is next to nothing, and by what factor at a step; or, where it stays for some steps, in how many falls."""

    group: int
    first: float
    last: float
    updates: int
    reached: int
    factor: float
    times: int = 0


def fading_rates(part: float = 0.01, early: float = 0.5) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of learning rates that come to nothing while the run is still going.

    Measured: the rate of every parameter group at each update.

    Why this is evidence: a schedule that is as long as its training gets to a hundredth of its rate when that
    ends: a half wave of a cosine in the last 6 percent of the steps, a straight line in the last one percent.
    One that is there before half of the steps are made, and goes on falling as fast, multiplies what it has
    multiplied before: a factor of a layer that was meant to be set once, or of an epoch that is applied to
    every batch. One that is made for epochs and counts batches stays for some steps, falls, and stays again,
    by the same factor each time.

    Looks alike and is not: a warm-up (it rises); a cosine, a straight line, an exponential that ends at a
    hundredth; steps down by ten, two or three times; a group whose rate is set to nothing in one step, or
    stays where it is afterwards (it is frozen); a run that has come to what it can learn by then, where all
    groups fall alike (LOW).

    Args:
        part: of its largest rate, below which a group's is next to nothing.
        early: the part of the updates before which it must be so.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        if record.updates is None:
            return []
        used = {u.group for u, _ in held(record)}
        series = {i: rates for i, rates in enumerate(record.updates.group_rates) if i in used}
        falls = [fall for i, rates in series.items() if (fall := _fall(i, rates, part, early)) is not None]
        if not falls:
            return []
        done = len(falls) == len(series) and has_learned(record)
        return [_issue(record, falls, len(series), IssueSeverity.LOW if done else IssueSeverity.HIGH)]

    return detector


def _fall(group: int, rates: Sequence[float], part: float, early: float) -> _Fall | None:
    """Return how the rates of a group come to nothing early, still falling; None where they do not."""
    known = [rate for rate in rates if math.isfinite(rate)]
    if len(known) < _LEAST or not max(known) > 0:
        return None
    top = max(range(len(known)), key=known.__getitem__)
    low = next((i for i in range(top, len(known)) if known[i] <= part * known[top]), len(known))
    rest, middle = known[top:], len(known) // 2
    falling = all(b < a for a, b in itertools.pairwise(rest) if a > 0)
    steps = () if falling else _steps_down(rest)
    if low > early * len(known) or not (falling or steps) or not known[-1] <= part * known[middle]:
        return None
    if not known[middle] > 0:  # as good as set to nothing
        return None
    factor = steps[0] if steps else (known[low] / known[top]) ** (1 / max(low - top, 1))
    return _Fall(
        group=group,
        first=known[top],
        last=known[-1],
        updates=len(known),
        reached=low,
        factor=factor,
        times=len(steps),
    )


def _steps_down(rates: Sequence[float]) -> Sequence[float]:
    """Return the factors by which rates fall, where these are the same and many, and they stay in between;
    nothing where they rise, are set to nothing, or fall by one factor and another."""
    factors = [b / a if a > 0 else math.inf for a, b in itertools.pairwise(rates) if a != b]
    alike = len(factors) >= _TIMES and min(factors) > 0 and max(factors) <= 1.01 * min(factors) < 1
    return factors if alike else ()


def _issue(record: FlowRecord, falls: Sequence[_Fall], groups: int, severity: IssueSeverity) -> Issue:
    worst = min(falls, key=lambda fall: fall.last / fall.first)
    fading = {fall.group for fall in falls}
    names = [(u.name, p.num_elements) for u, p in held(record) if u.group in fading]
    number, total = sum(size for _, size in names), sum(p.num_elements for _, p in held(record))
    first = next(u.name for u, _ in held(record) if u.group == worst.group)
    layer, kind = layer_of(record, first)
    of_groups = f" of {len(falls)} of the {groups} parameter groups" if groups > 1 else ""
    how = f"{worst.times} times by a factor" if worst.times else "by a factor"
    each = "" if worst.times else " at each step"
    calm = " The model has learned by then what it can." if severity is IssueSeverity.LOW else ""
    return Issue(
        layer=layer,
        layer_type=kind,
        issue_type=IssueType.UNSTABLE,
        severity=severity,
        description=f"The learning rate{of_groups} falls to nothing while the run goes on: that of {first} "
        f"from {worst.first:.3g} to {worst.last:.3g} in {worst.updates} updates, {how} of "
        f"{worst.factor:.3g}{each}, so that after {worst.reached} of them {number:,} of {total:,} "
        f"numbers hardly move any more.{calm}",
        magnitude=worst.first / worst.last if worst.last > 0 else math.inf,
        recommended_actions=_actions(worst.times > 0),
        metrics={
            "factor": worst.factor,
            "first_rate": worst.first,
            "last_rate": worst.last,
            "groups": len(falls),
            "elements": number,
        },
    )


def _actions(stepped: bool) -> Actions:
    """For rates that come to nothing, all the way or in steps."""
    actions = (
        "Look for a factor that multiplies group['lr'] at every step: set it once, when the optimizer is "
        "made, or compute each rate from the first one (group['initial_lr']).",
        "If it is a schedule made for epochs, step it once an epoch, or give it a factor of that many "
        "batches: gamma ** (1 / batches).",
    )
    return actions[::-1] if stepped else actions
