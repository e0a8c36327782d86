"""Illnesses of the distributions that a policy draws its actions from: what `policy_heads()` has measured.

All detectors here return nothing for a record without `policy`. What training does to a policy at its best
looks like an illness in places, so thresholds come from runs of PPO and A2C on CartPole and Acrobot, with a
trunk that policy and value share: `benchmarks/policy_runs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from gradflow.detect.evidence import late
from gradflow.detect.policy.actions import narrow_actions, sure_actions, twice_actions, wide_actions
from gradflow.detect.policy.evidence import Detector, has_imitated, is_by_state, policy_issue
from gradflow.records import ActionDistribution, Floats, FlowRecord, Issue, IssueSeverity, IssueType


def collapsed_policy(
    share: float = 0.05, *, severe_share: float = 0.01, fallen_from: float = 0.3, by_state: float = 1.0
) -> Detector:
    """Return the detector of policies that have stopped exploring.

    Measured: the entropy of every discrete action distribution over its largest possible value, the logarithm
    of the number of allowed alternatives, as a mean over samples, at the first and at the last measured step.

    Why this is evidence: a policy learns by comparing what its actions bring. Where one action is all but
    certain, the others are not tried any more, and the gradient of a softmax goes with p (1 - p).

    Looks alike and is not: masks that leave one alternative (those samples do not count); a policy without a
    value that has learned a teacher's actions, by a cross-entropy that has fallen by half: LOW; one that was
    sure before the run began and takes other actions in other states, by the entropy of its mean over the
    states: LOW, for it has learned to tell them apart. One that takes the same action everywhere has not, or
    has finished learning where one action is always right: the description says so. That the loss of a
    policy gradient has fallen says nothing: with positive returns it does so by itself.

    Args:
        share: entropy as a share of its maximum from which the verdict is MEDIUM. Between two actions 0.05 is
            a probability of 0.994. PPO and A2C that learn CartPole end above 0.75 after a hundred thousand
            steps, PPO that solves Acrobot at 0.3 to 0.4; A2C that collapses there ends at 0.04, and never
            reaches the goal (`benchmarks/policy_runs.py`).
        severe_share: from which it is HIGH: a probability of 0.999 of two.
        fallen_from: share at the start from which on a fall below `share` within one run, some hundred steps
            at most, is HIGH: healthy policies take thousands.
        by_state: entropy share of the mean over states from which a policy that was sure before the run
            has learned: LOW. At 1 never. A fresh policy with large logits
            looks the same, so only `gradflow.automatic`, which nobody has asked, has 0.3.
    """

    def detector(record: FlowRecord) -> Iterator[Issue]:
        for d in _choices(record):
            first, last = _ends(d.entropy_share)
            fell = first >= fallen_from
            if not last <= share:
                continue
            severe = fell or last <= severe_share
            severity = IssueSeverity.HIGH if severe else IssueSeverity.MEDIUM
            taught = fell and has_imitated(record, d)
            calm = taught or (not fell and is_by_state(d, by_state))
            was = f" It was {first:.2f} at the start." if fell else _sure_before(d, by_state)
            yield policy_issue(
                record,
                d.heads,
                IssueType.SATURATION,
                _capped(severity, d, calm),
                f"Its actions have {last:.2g} of the largest entropy possible ({_last(d.entropy):.2g} nats), "
                f"and one has a probability of {_last(d.max_prob):.3f} on average.{was}{_calm(taught)}",
                last,
                sure_actions(record, fell=fell),
                {"entropy_share": last, "entropy": _last(d.entropy), "first_share": first},
            )

    return detector


def deterministic_policy(share: float = 0.5, *, severe_share: float = 0.9, by_state: float = 1.0) -> Detector:
    """Return the detector of policies that are deterministic in most states, too soon.

    Measured: the share of samples in which one action has a probability above 0.99, at the first and at the
    last measured step.

    Why this is evidence: in such a sample the policy does not explore, and its softmax passes next to no
    gradient. The mean entropy may hide it, if the other samples are near uniform: unnormalised observations,
    for instance, make a fresh policy sure wherever they are large.

    Looks alike and is not: masks that leave one alternative; a policy that has learned a teacher's
    actions within the run, or takes other actions in other states, as `collapsed_policy` tells (LOW).

    Args:
        share: share of samples from which the verdict is MEDIUM. Runs that learn reach 0.07 on CartPole and
            0.33 on Acrobot at most, one that collapses 1.0 (`benchmarks/policy_runs.py`).
        severe_share: from which it is HIGH.
        by_state: as for `collapsed_policy`.
    """

    def detector(record: FlowRecord) -> Iterator[Issue]:
        for d in _choices(record):
            first, last = _ends(d.deterministic_share)
            if not last >= share:
                continue
            fell = first < share and last > first + 0.1  # less is a matter of which states a batch has
            severity = IssueSeverity.HIGH if last >= severe_share else IssueSeverity.MEDIUM
            taught = fell and has_imitated(record, d)
            calm = taught or (not fell and is_by_state(d, by_state))
            was = f" They were {first:.0%} at the start." if fell else _sure_before(d, by_state)
            yield policy_issue(
                record,
                d.heads,
                IssueType.SATURATION,
                _capped(severity, d, calm),
                f"One action has a probability above 0.99 in {last:.0%} of the samples.{was}{_calm(taught)}",
                last,
                sure_actions(record, fell=fell),
                {"deterministic_share": last, "first_deterministic_share": first},
            )

    return detector


def misscaled_deviation(smallest: float = 1e-3, largest: float = 20.0) -> Detector:
    """Return the detector of continuous policies whose standard deviation is out of range.

    Measured: the standard deviation of each part of a continuous action, before squashing, as a mean over
    samples; and the root mean square of the mean action; medians over the last third of the measured steps.

    Why this is evidence: the gradient of log p goes with 1/std, so a deviation of a thousandth makes it a
    thousand times larger and exploration that much smaller. One of twenty times the actions drowns them: with
    actions within [-1, 1], 96 percent of the samples are clipped to a bound.

    Looks alike and is not: small actions (in metres, say) with a deviation of their own size; a deviation of
    one around means of a hundredth, which is how policies start.

    Args:
        smallest: standard deviation, in units of the mean actions but at least of one, below which it is
            HIGH, if it is below a tenth of the mean actions too, or the actions are bounded by construction.
        largest: in the same units, above which it is MEDIUM, and HIGH above ten times as much.
    """

    def detector(record: FlowRecord) -> Iterator[Issue]:
        for d in () if record.policy is None else record.policy.distributions:
            if d.discrete:
                continue
            low, high, mean = late(d.deviation.std_min), late(d.deviation.std_max), late(d.deviation.mean_rms)
            unit = max(1.0, mean) if math.isfinite(mean) else 1.0
            if low < smallest * unit and (d.bounded or low < 0.1 * mean):
                severity, found = IssueSeverity.HIGH, low
                kind, actions, words = IssueType.SATURATION, narrow_actions(d), "hardly explores"
            elif high > largest * unit:
                found = high
                severity = IssueSeverity.HIGH if high > 10 * largest * unit else IssueSeverity.MEDIUM
                kind, actions, words = IssueType.EXPLODING, wide_actions(d), "drowns its actions in noise"
            else:
                continue
            named = f" ({', '.join(d.parameters)})" if d.parameters else ""
            yield policy_issue(
                record,
                _spread_heads(d.heads),
                kind,
                severity,
                f"It {words}: a standard deviation{named} is {found:.2g}, where the mean actions have rms "
                f"{mean:.2g}.",
                found,
                actions,
                {"std_min": low, "std_max": high, "mean_rms": mean},
            )

    return detector


def renormalised_policy() -> Detector:
    """Return the detector of probabilities that are taken for logits.

    Measured: whether what a softmax, `Categorical(logits=...)` or `cross_entropy` was given are
    probabilities: rows of numbers in [0, 1] that add up to one.

    Why this is evidence: logits take any value, and do not add up to one in every row by chance. A softmax of
    probabilities is near uniform whatever the network says: of n actions none can have a probability above e
    / (e + n - 1), 0.73 of two, and the gradient passes two softmaxes.

    Looks alike and is not: log-probabilities as logits, which a softmax leaves as they are."""

    def detector(record: FlowRecord) -> Iterator[Issue]:
        for d in () if record.policy is None else record.policy.distributions:
            if d.normalised_twice:
                most = math.e / (math.e + d.num_actions - 1)
                yield policy_issue(
                    record,
                    d.heads,
                    IssueType.BOTTLENECK,
                    IssueSeverity.MEDIUM,
                    "Its probabilities are taken for logits and normalised again: no action can have a "
                    f"probability above {most:.2g}.",
                    most,
                    twice_actions(),
                    {"largest_possible": most},
                )

    return detector


# ------------------------------------------------------------------------------------ shared parts


def _choices(record: FlowRecord) -> Iterator[ActionDistribution]:
    for d in () if record.policy is None else record.policy.distributions:
        if d.discrete and np.isfinite(d.entropy_share).any():
            yield d


def _ends(values: Floats) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known[0]), float(known[-1])) if len(known) else (math.nan, math.nan)


def _last(values: Floats) -> float:
    return _ends(values)[1]


def _calm(taught: bool) -> str:
    return " Its cross-entropy has fallen by more than half: it has learned its teacher's." if taught else ""


def _capped(severity: IssueSeverity, d: ActionDistribution, calm: bool) -> IssueSeverity:
    return min(severity, IssueSeverity.LOW) if calm or d.assumed else severity


def _sure_before(d: ActionDistribution, by_state: float) -> str:
    if is_by_state(d, by_state):
        return " It was so from the first step on, and the states decide which: it has learned, most likely."
    return " It was so from the first step on; a policy that has finished learning may be."


def _spread_heads(heads: Sequence[str]) -> Sequence[str]:
    named = [h for h in heads if any(w in h.rpartition(".")[2].lower() for w in ("std", "sigma", "scale"))]
    return named or heads
