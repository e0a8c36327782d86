"""Norm layers that do not normalise, since what they add to the variance is more than the variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from gradflow.detect.evidence import late
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType, NormRecord


def swallowed_norms(
    times: float = 30.0, *, epsilon: float = 1e-3, severe: float = 1000.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of norm layers whose epsilon swallows what enters.

    Measured: the variance of what enters a norm layer (the mean square, for an RMS norm), the median over
    what it normalises, and the epsilon that it adds.

    Why this is evidence: a norm layer divides by √(variance + ε). With an ε of `times` the variance its
    output has 1/√times of the scale that its gain promises, and follows the scale of its input, which it is
    there to take away.

    Looks alike and is not: inputs that are small beside an ε of usual size, such as those of the first norm
    layer behind a small embedding, or of exact zeros: at 1e-5, an ε is a guard, and the input is what is
    small.

    Args:
        times: how many times the variance it must be.
        epsilon: below which an ε is a guard, and not at fault.
        severe: how many times makes it HIGH.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for norm in record.parts.norms:
            variance = late(norm.variance)
            if norm.epsilon >= epsilon and variance > 0 and norm.epsilon >= times * variance:
                yield _issue(norm, variance, severe)

    return detector


def _issue(norm: NormRecord, variance: float, severe: float) -> Issue:
    ratio = norm.epsilon / variance
    return Issue(
        layer=norm.name,
        layer_type=norm.type,
        issue_type=IssueType.VANISHING,
        severity=IssueSeverity.HIGH if ratio >= severe else IssueSeverity.MEDIUM,
        description=f"It does not normalise: it adds an epsilon of {norm.epsilon:.3g} to a variance of "
        f"{variance:.2g}, so its output has {1 / math.sqrt(1 + ratio):.2g} of the scale that its gain gives.",
        magnitude=ratio,
        recommended_actions=(
            f"Give {norm.name} an epsilon of 1e-5: {norm.epsilon:.3g} is more than what it guards. The first "
            "number behind the features of a norm layer is its epsilon: was another argument meant?",
        ),
        metrics={"epsilon": norm.epsilon, "variance": variance, "ratio": ratio},
    )
