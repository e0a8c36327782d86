"""What grows or falls off without end in the course of a training: the loss, gradients, weights."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gradflow.detect.time.series import (
    TimeDetector,
    at_last,
    graded,
    highest_of_each,
    lasting,
    lowest_so_far,
    series,
    smooth,
    unworried,
)
from gradflow.detect.time.telling import go_back, issue_in_time, layer_of, longest
from gradflow.records import Bools, Floats, HistoryRecord, Issue, IssueSeverity, IssueType


def diverging(
    *, lost: float = 0.5, risen: float = 1.5, guesses: float = 0.8, far_above: float = 9.0
) -> TimeDetector:
    """Return the detector of a training that loses what it has learned.

    Measured: the loss of a look against the lowest so far and against the first; and, where it is known,
    what is left of the loss of guesses (`KnowledgeRecord.share_left`), which a hard batch does not
    change.

    Why this is evidence: gradient descent gives back half of what it has won, twice in a row, only if its
    steps are too large for where it is.

    Looks alike and is not: one hard batch (both of the last two looks must show it); the losses of an
    agent, which rise as its returns do (not told where a policy was seen, nor where the share of the loss
    of guesses says that the model knows as before); those of a player whose opponent gets better, as in a
    GAN (where that share is not known, the loss must be far above its start, and the gradient have
    grown); a loss that was never lower than at the start.

    Args:
        lost: part of the way from the first loss to the lowest that must be lost again.
        risen: factor over the lowest by which the loss must have risen.
        guesses: share of the loss of guesses from which a model knows nothing any more.
        far_above: where that is not known, how far above its start the loss must be, in sizes of its start or
            of what was won.
    """

    def detector(history: HistoryRecord) -> Iterable[Issue]:
        if "loss" not in history or len(history) < 4 or history.of("policy_entropy"):
            return
        losses = history["loss"]
        first, lowest = float(losses[0]), lowest_so_far(losses)
        if not np.isfinite(first) or not np.isfinite(lowest[-1]):
            return
        up = (losses - lowest >= lost * np.maximum(first - lowest, 0.0)) & (lowest < first)
        up &= losses >= np.where(lowest > 0, risen * lowest, lowest + (risen - 1) * np.abs(lowest))
        if not at_last(up):
            return
        left = series(history, "loss_share_left")
        far = first + far_above * np.maximum(first - lowest, abs(first))
        up &= (left >= guesses) | ((losses >= far) & _steep(history))
        since = lasting(up)
        if since is None or first - lowest[-1] <= 0.05 * abs(first):
            return
        where, by = _largest_update(history, since)
        yield issue_in_time(
            history,
            since,
            layer=layer_of(history, where),
            issue_type=IssueType.UNSTABLE,
            severity=IssueSeverity.HIGH,
            description=(
                f"The training diverges: the loss is {losses[-1]:.4g}, where it had come down from "
                f"{first:.4g} to {lowest[-1]:.4g}."
                + (f" The steps moved `{where}` most for its size, by {by:.2g} of it." if by > 0 else "")
            ),
            magnitude=float(losses[-1] / lowest[-1]) if lowest[-1] > 0 else float(losses[-1] - lowest[-1]),
            recommended_actions=(
                go_back(history, since),
                "Let the learning rate decay, or use a third of it throughout.",
            ),
            metrics={"loss": float(losses[-1]), "lowest_loss": float(lowest[-1]), "first_loss": first},
        )

    return unworried(detector)


def _steep(history: HistoryRecord, risen: float = 3.0) -> Bools:
    """Return at which looks the gradient is `risen` times its lowest: steps that diverge are large ones."""
    if "gradient_norm" not in history:
        return np.ones(len(history), dtype=bool)
    norms = history["gradient_norm"]
    return norms >= risen * lowest_so_far(norms)


def _largest_update(history: HistoryRecord, since: int) -> tuple[str, float]:
    """Return the parameter that steps moved most for its size when the trouble began, and by how much."""
    ratios = {}
    for name, ratio in history.of("update_ratio").items():
        around = ratio[max(since - 1, 0) : since + 2]
        around = around[np.isfinite(around)]
        if len(around) and name.rpartition(".")[2] != "bias":
            ratios[name] = float(around.max())
    if not ratios:
        return "", 0.0
    where = max(ratios, key=lambda name: ratios[name])
    return where, ratios[where]


def starving(*, fallen: float = 1e3, least: float = 1e-4) -> TimeDetector:
    """Return the detector of layers whose part of the gradient falls away in the course of a training.

    Measured: a layer's `gradient_rms` over the largest of all layers at the same look, against the highest
    that this share has been. Told once, at the layer nearest the loss of those whose fall began first.

    Why this is evidence: shares of the gradient shift by factors of ten while a model learns; a layer that
    falls by three orders against the others has been cut off by what happened behind it.

    Looks alike and is not: a model that knows, whose gradient is noise (LOW).

    Args:
        fallen: factor by which the share must have fallen.
        least: share at or below which it is told.
    """

    def detector(history: HistoryRecord) -> Iterable[Issue]:
        gradients = history.of("gradient_rms")
        if not gradients:
            return
        largest = np.fmax.reduce(list(gradients.values()))
        shares = {name: values / largest for name, values in gradients.items()}
        highest = highest_of_each({n: share for n, share in shares.items() if at_last(share <= least)})
        fell = {
            name: (shares[name] <= least) & (shares[name] * fallen <= high) for name, high in highest.items()
        }
        if (told := longest(history, fell)) is None:
            return
        (*_, name), since, number = told
        now, before = float(shares[name][-1]), float(highest[name][-1])
        yield issue_in_time(
            history,
            since,
            layer=name,
            issue_type=IssueType.VANISHING,
            severity=graded(IssueSeverity.HIGH, history),
            description=(
                f"The gradient at its output has fallen to {now:.2g} of that at the layer with most, from "
                f"{before:.2g} earlier in this training; so it has at {number - 1} other layers."
            ),
            magnitude=now,
            recommended_actions=(_LOOK_BEHIND, go_back(history, since)),
            metrics={"share": now, "share_before": before, "num_layers": number},
        )

    return unworried(detector)


_LOOK_BEHIND = (
    "Look at what stands between this layer and the loss: units that saturate or die, or a weight that has "
    "shrunk; `gradflow.diagnose` on the present model tells which."
)


def growing(*, grown: float = 10.0, still: float = 1.2, beside: float = 3.0) -> TimeDetector:
    """Return the detector of weights that grow and do not stop.

    Measured: the root mean square of a parameter, against what it was when the training had begun (the median
    of the looks in its first quarter), against the growth of the other parameters, and over the last quarter.

    Why this is evidence: weights grow slowly once learning slows down; those that grow by an order while the
    rest do not take over what follows them: logits run away, activations leave the range of their format.

    Looks alike and is not: weights that start at zero (they are weighed from when they have left it, and told
    only if they become larger than their like); a model that goes well (LOW).

    Args:
        grown: factor by which a parameter must have grown.
        still: factor by which it must have grown over the last quarter of the looks.
        beside: factor by which it must have outgrown the median parameter.
    """

    def detector(history: HistoryRecord) -> Iterable[Issue]:
        weights = {
            name: values
            for name, values in history.of("weight_rms").items()
            if np.isfinite(values).sum() >= 8 and _has_a_scale(history, name)
        }
        if len(weights) < 2 or not any(_may_have_grown(values, grown) for values in weights.values()):
            return
        growth = {name: _growth(values) for name, values in weights.items()}
        usual = float(np.median([values[-1] for values in growth.values()]))
        found = {}
        for name, values in growth.items():
            quarter = max(len(values) // 4, 1)
            on = values[-1] >= still * values[-1 - quarter]
            since = lasting((values >= grown) & (values >= beside * usual))
            if since is not None and on and weights[name][-1] >= _typical(weights, name):
                found[name] = since, float(values[-1])
        if not found:
            return
        name = max(found, key=lambda name: found[name][1])
        since, times = found[name]
        yield issue_in_time(
            history,
            since,
            layer=layer_of(history, name),
            issue_type=IssueType.EXPLODING,
            severity=graded(IssueSeverity.MEDIUM, history),
            description=(
                f"The weights of `{name}` are {times:.3g} times what they were when the training had begun, "
                f"and go on growing; the median parameter is {usual:.3g} times."
            ),
            magnitude=times,
            recommended_actions=(
                f"Give `{layer_of(history, name) or name}` weight decay (torch.optim.AdamW), or put a norm "
                "layer behind it, which makes its scale irrelevant.",
                "Lower the learning rate.",
            ),
            metrics={"growth": times, "median_growth": usual},
        )

    return unworried(detector)


def _has_a_scale(history: HistoryRecord, name: str) -> bool:
    """Whether a parameter starts at a scale of its own: biases start at zero, and gains of norms are free."""
    kind = history.types.get(layer_of(history, name), "").lower()
    return name.rpartition(".")[2] != "bias" and "norm" not in kind


def _may_have_grown(values: Floats, grown: float) -> bool:
    """Return whether `_growth` may end at `grown` or above: False where no number allows of it."""
    early = values[: max(len(values) // 4, 3) + 1]
    least = early[early > 0].min(initial=np.inf) / 2  # a running median may lie half-way between 0 and it
    return bool(np.fmax.reduce(values[-3:], initial=np.nan) >= grown * least)


def _growth(values: Floats) -> Floats:
    """Return a parameter's rms over what it was early on: the median of what is not zero in a quarter."""
    known = smooth(values)
    early = known[: max(len(known) // 4, 3)]
    early = early[np.isfinite(early) & (early > 0)]
    return known / float(np.median(early)) if len(early) else np.full(len(values), np.nan)


def _typical(weights: dict[str, Floats], name: str) -> float:
    """Return the median rms of the other parameters of the same name (weights, biases), now."""
    kind = name.rpartition(".")[2]
    others = [v[-1] for n, v in weights.items() if n != name and n.rpartition(".")[2] == kind]
    return float(np.median(others)) if others else 0.0
