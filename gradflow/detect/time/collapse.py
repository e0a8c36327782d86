"""What falls to nothing in the course of a training: units, the variation of representations, attention."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gradflow.detect.time.series import (
    TimeDetector,
    at_last,
    forgot,
    graded,
    highest_of_each,
    highest_so_far,
    lasting,
    lowest_so_far,
    series,
    unworried,
)
from gradflow.detect.time.telling import go_back, issue_in_time, layer_of, longest
from gradflow.records import Floats, HistoryRecord, Issue, IssueSeverity, IssueType


def dying(*, most: float = 0.5, risen: float = 0.3, nearly_all: float = 0.9) -> TimeDetector:
    """Return the detector of rectifiers whose units die while a model trains.

    Measured: the share of an activation's units that fire for no sample of a batch, look by look, against
    the lowest share so far. Both of the last two looks must show it, so that one batch decides nothing.

    Why this is evidence: a unit that never fires gets no gradient, and no later step brings it back. Units
    that were silent from the beginning are a matter of initialisation (`dead`); what is told here is a loss.
    Dormant units in this sense go with the loss of plasticity (Sokar et al., 2023, arXiv:2302.12902).

    Looks alike and is not: features that become sparse as a model learns (the loss is at its best, or the
    model knows: LOW).

    Args:
        most: share of silent units from which it is told.
        risen: by how much it must have risen.
        nearly_all: share from which it is HIGH.
    """

    def detector(history: HistoryRecord) -> Iterable[Issue]:
        for name, share in history.of("never_fired").items():
            if not at_last(share >= most):
                continue
            lowest = lowest_so_far(share)
            since = lasting((share >= most) & (share - lowest >= risen))
            if since is None:
                continue
            now, before = float(share[-1]), float(lowest[-1])
            severity = IssueSeverity.HIGH if min(share[-2:]) >= nearly_all else IssueSeverity.MEDIUM
            yield issue_in_time(
                history,
                since,
                layer=layer_of(history, name),
                issue_type=IssueType.DEAD,
                severity=graded(severity, history),
                description=(
                    f"{now:.0%} of the units fire for no sample of the batch; earlier in this training "
                    f"it was {before:.0%}. A silent unit gets no gradient, and stays silent."
                ),
                magnitude=now,
                recommended_actions=(go_back(history, since), _NO_DEAD_SIDE),
                metrics={"silent_share": now, "silent_share_before": before},
            )

    return unworried(detector)


_NO_DEAD_SIDE = "Use an activation without a dead side, such as nn.LeakyReLU or nn.GELU."


def collapsing(
    *,
    least: float = 0.02,
    fallen: float = 10.0,
    steady: float = 0.2,
    shrunk: float = 100.0,
    shrunk_if_forgot: float = 5.0,
) -> TimeDetector:
    """Return the detector of representations that become alike for all inputs while a model trains.

    Measured: the variation of a layer's output over rows, ‖Y − mean row‖ / ‖Y‖, against the highest so far;
    and its root mean square, likewise: what has shrunk to nothing tells nothing either.

    Why this is evidence: what is the same for every sample tells nothing about any. It is what a collapsed
    encoder of a contrastive or self-distilled model gives (Jing et al., 2022, arXiv:2110.09348), and a
    decoder that ignores its code (Bowman et al., 2016, arXiv:1511.06349).

    Looks alike and is not: an output that is nearly constant because targets are (the loss is at its best:
    LOW); layers that start so.

    Args:
        least: variation at or below which it is told.
        fallen: factor by which it must have fallen.
        steady: variation that it must have had.
        shrunk: factor by which an output must have shrunk, beside the layer whose did least.
        shrunk_if_forgot: the same where the model has forgotten what it knew: its loss is again that of its
            outputs given to other samples. A posterior that collapses has a mean of a tenth of its noise.
    """

    def detector(history: HistoryRecord) -> Iterable[Issue]:
        variations, outputs = history.of("output_variation"), history.of("output_rms")
        low = {name: values for name, values in variations.items() if at_last(values <= least)}
        alike = {
            name: (low[name] <= least) & (low[name] * fallen <= highest) & (highest >= steady)
            for name, highest in highest_of_each(low).items()
        }
        gone = {}
        times = min(shrunk, shrunk_if_forgot)
        if any(
            at_last(values[-2:] * times <= np.fmax.reduce(values, initial=np.nan))
            for values in outputs.values()
        ):
            kept = {name: outputs[name] / highest for name, highest in highest_of_each(outputs).items()}
            most_kept = np.fmax.reduce(list(kept.values()))
            by = np.where(forgot(history), shrunk_if_forgot, shrunk)
            gone = {name: share * by <= np.fmin(most_kept, 1.0) for name, share in kept.items()}
        for holds, quantity, metric, words in (
            (alike, "output_variation", "variation", _ALIKE), (gone, "output_rms", "output_rms", _GONE),
        ):  # fmt: skip
            if (told := longest(history, holds)) is None:
                continue
            (name, *_), since, number = told
            values = history[f"{quantity}/{name}"]
            now, before = float(values[-1]), float(highest_so_far(values)[-1])
            yield issue_in_time(
                history,
                since,
                layer=name,
                issue_type=IssueType.BOTTLENECK,
                severity=graded(IssueSeverity.HIGH, history),
                description=words.format(now=now, before=before, others=_so_others(number)),
                magnitude=now,
                recommended_actions=_ALIKE_ACTIONS,
                metrics={metric: now, f"{metric}_before": before, "num_layers": number},
            )

    return unworried(detector)


_ALIKE = (
    "Its output has become nearly the same for every row: the variation over rows is {now:.2g} of its size, "
    "where it was {before:.2g}{others}."
)
_GONE = (
    "Its output has shrunk to nothing: its root mean square is {now:.2g}, where it was {before:.2g}{others}. "
    "What follows it gets the same for every sample."
)


def _so_others(number: int) -> str:
    others = number - 1
    return f"; so it is in {others} more layer{'s' * (others > 1)}" if others else ""


_ALIKE_ACTIONS = (
    "If the loss rewards agreement alone (two views, a teacher), it needs what keeps outputs apart: "
    "negatives, a stopped gradient on one side, or a penalty on variance and covariance.",
    "If a decoder can do without this layer, weaken it, or weigh what uses this layer more: warm up the KL "
    "weight of a VAE, allow free bits.",
    "Otherwise lower the learning rate: one large step can push all units to one side.",
)


def sharpening(
    *, least: float = 0.05, before: float = 0.3, logits: float = 30.0, grown: float = 5.0
) -> TimeDetector:
    """Return the detector of attention whose entropy collapses, or whose logits run away.

    Measured: a layer's entropy over its largest value, and the largest distance of a logit from the mean of
    its row, look by look.

    Why this is evidence: the Jacobian of a softmax vanishes with its entropy, so queries and keys no longer
    learn, and the sharpness (of the loss) grows: entropy collapse goes with divergence (Zhai et al., 2023,
    arXiv:2303.06296), and so do logits that grow without bound (Dehghani et al., 2023, arXiv:2302.05442;
    Wortsman et al., 2023, arXiv:2309.14322).

    Looks alike and is not: heads that become sharp because they have found what to look at: the loss goes on
    falling (LOW).

    Args:
        least: share of entropy at or below which it is told.
        before: share that it must have had.
        logits: logits from which they are told; a softmax over 30 is one to 13 digits.
        grown: factor by which they must have grown.
    """

    def detector(history: HistoryRecord) -> Iterable[Issue]:
        for name, share in history.of("attention_entropy_share").items():
            peak = series(history, f"attention_logit_peak/{name}")
            if not (at_last(share <= least) or at_last(peak >= logits)):
                continue
            highest = highest_so_far(share)
            since = lasting((share <= least) & (highest >= before))
            lowest = lowest_so_far(peak)
            ran = lasting((peak >= logits) & (peak >= grown * lowest))
            if since is None and ran is None:
                continue
            first = min(look for look in (since, ran) if look is not None)
            yield issue_in_time(
                history,
                first,
                layer=name,
                issue_type=IssueType.SATURATION,
                severity=graded(IssueSeverity.HIGH, history),
                description=_sharp(share, highest, peak, lowest),
                magnitude=float(share[-1]),
                recommended_actions=_SHARP_ACTIONS,
                metrics={"entropy_share": float(share[-1]), "logit_peak": float(peak[-1])},
            )

    return unworried(detector)


_SHARP_ACTIONS = (
    "Normalise queries and keys before their product (`q = F.rms_norm(q, q.shape[-1:])`, the same for k), "
    "which bounds the logits.",
    "Lower the learning rate or lengthen its warm-up, and clip gradients; check that the scores are divided "
    "by the square root of the head's width.",
)


def _sharp(share: Floats, highest: Floats, peak: Floats, lowest: Floats) -> str:
    told = f"The entropy of its attention is {share[-1]:.1%} of what it can be; it was {highest[-1]:.0%}."
    if peak[-1] > lowest[-1]:
        told += f" The largest logit stands {peak[-1]:.3g} from the mean of its row; it was {lowest[-1]:.3g}."
    return told
