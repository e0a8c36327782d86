"""Norm layers that do not give what a norm layer is for: an epsilon, a gain or a bias that is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from gradflow.detect.evidence import late, swallowing_norms
from gradflow.records import (
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    LayerRecord,
    NormRecord,
    ParameterRecord,
)


def swallowed_norms(
    times: float = 30.0, *, epsilon: float = 0.01, severe: float = 1000.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of norm layers whose epsilon swallows what enters.

    Measured: the variance of what enters a norm layer (the mean square, for an RMS norm), the median over
    what it normalises, and the epsilon that it adds.

    Why this is evidence: a norm layer divides by √(variance + ε). With an ε of `times` the variance its
    output has 1/√times of the scale that its gain promises, and follows the scale of its input, which it is
    there to take away.

    Looks alike and is not: inputs that are small beside an ε of usual size, such as those of the first norm
    layer behind a small embedding, or of exact zeros, and those of narrow convolutions with an ε of 1e-3, as
    MobileNet has: it is a guard, and the input is what is small.

    Args:
        times: how many times the variance it must be.
        epsilon: below which an ε is a guard, and not at fault.
        severe: how many times makes it HIGH.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for norm in swallowing_norms(record, times, epsilon):
            yield _issue(norm, late(norm.variance), severe)

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


def misscaled_norms(
    small: float = 0.1, *, large: float = 4.0, bias: float = 8.0, alike: float = 0.25
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of norm layers that start with another scale than one, or drown in their bias.

    Measured: the gains of every norm layer in the first step; the root mean square of its bias over that of
    its gain, at the first step and the last; and how much of its output differs between rows.

    Why this is evidence: a norm layer gives its gain times numbers of unit variance. Gains that are all one
    number were set, not learned; what is set far from one scales all that follows, in every block anew. A
    bias that dwarfs the gain makes all rows alike.

    Looks alike and is not: learned gains, which differ; zeros, which block by design and are another
    detector's matter; gains that are stored less one; a bias that dwarfs the gain of a few channels, as in
    trained batch norms.

    Args:
        small: gain from which down it is VANISHING.
        large: gain from which up it is EXPLODING.
        bias: times the gain from which the bias drowns it, if
        alike: no more than this share of its output differs between rows: BOTTLENECK.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        sizes = {p.name: p for p in record.parameters}
        calls: dict[str, list[LayerRecord]] = {}
        for layer in record.layers:
            calls.setdefault(layer.module, []).append(layer)
        for norm in record.parts.norms:
            gain = norm.smallest_gain
            if gain == norm.largest_gain and (0 < gain <= small or gain >= large):
                yield _gain_issue(norm, gain)
            own = (sizes.get(f"{norm.name}.{part}".lstrip(".")) for part in ("weight", "bias"))
            ratio = _drowned(*own)
            outputs = [late(x.output_variation) for x in calls.get(norm.name, ())] if ratio >= bias else []
            if outputs and max(outputs) <= alike:
                yield _bias_issue(norm, ratio, max(outputs))

    return detector


def _drowned(gain: ParameterRecord | None, bias: ParameterRecord | None) -> float:
    """Return how many times as large as the gain the bias is, the less of the first step and the last."""
    if gain is None or bias is None or not len(gain.norm) or not len(bias.norm):
        return math.nan
    return min(float(bias.norm[at]) / max(float(gain.norm[at]), 1e-30) for at in (0, -1))


def _gain_issue(norm: NormRecord, gain: float) -> Issue:
    return Issue(
        layer=norm.name,
        layer_type=norm.type,
        issue_type=IssueType.EXPLODING if gain > 1 else IssueType.VANISHING,
        severity=IssueSeverity.MEDIUM,
        description=f"All of its gains start at {gain:.3g}, where a norm layer starts at 1: what follows "
        f"gets {gain:.3g} times the scale that it is initialised for.",
        magnitude=gain,
        recommended_actions=(
            f"Start the gains of {norm.name} at 1 (nn.init.ones_), or at 0 where it ends a residual branch.",
        ),
        metrics={"gain": gain},
    )


def _bias_issue(norm: NormRecord, ratio: float, differs: float) -> Issue:
    return Issue(
        layer=norm.name,
        layer_type=norm.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.MEDIUM,
        description=f"Its bias is {ratio:.2g} times its gain, so nearly all of its output is the same for "
        f"every row: only {differs:.2g} of it differs.",
        magnitude=ratio,
        recommended_actions=(f"Start the bias of {norm.name} at zero (nn.init.zeros_).",),
        metrics={"ratio": ratio, "differs": differs},
    )
