"""A model that no longer learns: it has grown stiff, told by several signs at once, or stands still."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from gradflow.detect.time.series import TimeDetector, at_last, goes_well, lasting, series, smooth, unworried
from gradflow.detect.time.telling import issue_in_time
from gradflow.records import Bools, Floats, HistoryRecord, Issue, IssueSeverity, IssueType


def stiffening(
    *, silent: float = 0.2, weights: float = 2.0, gradient: float = 10.0, signs: int = 3, looks: int = 12
) -> TimeDetector:
    """Return the detector of lost plasticity: a model that still gets new data and no longer adapts.

    Measured, against the first quarter of the looks: units that fire for no sample have become more (by
    `silent` on average), the weights have grown (by `weights`), the gradient has fallen (by `gradient`), and
    the loss is above its level then. At least `signs` of the four, the loss among them.

    Why this is evidence: each sign alone is what converging looks like; together with a loss that is worse
    than it was they are what networks show that have lost the ability to learn (Lyle et al., 2023,
    arXiv:2303.01486; Dohare et al., 2024, doi:10.1038/s41586-024-07711-7).

    Args:
        silent: rise of the mean share of silent units.
        weights: growth of the weights' norm.
        gradient: fall of the gradient's norm.
        signs: how many signs are needed.
        looks: how many looks there must be.
    """

    def detector(history: HistoryRecord) -> Iterable[Issue]:
        if len(history) < looks or "loss" not in history or goes_well(history):
            return
        worse = _against_start(history["loss"]) > 1.0
        if not at_last(worse):
            return
        shares = list(history.of("never_fired").values())
        mean = _mean(shares) if shares else np.full(len(history), np.nan)
        others = [
            mean - _start(mean) >= silent,
            _against_start(series(history, "weight_norm")) >= weights,
            _against_start(series(history, "gradient_norm")) <= 1.0 / gradient,
        ]
        since = lasting(worse & (worse.astype(int) + np.sum(others, axis=0) >= signs))
        if since is None:
            return
        told = [text for seen, text in zip(others, _SIGNS, strict=True) if seen[-1]]
        yield issue_in_time(
            history,
            since,
            layer="",
            issue_type=IssueType.DEAD,
            severity=IssueSeverity.MEDIUM,
            description=(
                f"The model has lost plasticity: its loss is above what it was early in the training, while "
                f"{' and '.join(told)}."
            ),
            magnitude=float(_against_start(history["loss"])[-1]),
            recommended_actions=(
                "Draw dormant units anew from time to time (ReDo, continual backprop), or pull weights "
                "towards their initial values (L2 towards the initialisation).",
                "Put nn.LayerNorm behind the layers, and use an activation without a dead side.",
            ),
        )

    return unworried(detector)


_SIGNS = ("more of its units are silent", "its weights have grown", "its gradient has fallen away")


def resting(*, looks: int = 4, steps: int = 50) -> TimeDetector:
    """Return the detector of a training in which no weight changes.

    Measured: the sum of some thousands of entries of every parameter, at the last looks, to the last bit.

    Why this is evidence: any step of an optimizer changes some of them. A rate of zero, an optimizer on other
    parameters, a `step` that is never called, or updates that rounding swallows leave all as they are.

    Looks alike and is not: steps that only add up gradients between two updates (the looks must lie further
    apart than that), or that a scaler skips while it seeks its scale.

    Args:
        looks: in how many looks in a row nothing has changed.
        steps: how many steps they must span.
    """

    def detector(history: HistoryRecord) -> Iterable[Issue]:
        if len(history) < looks or "weight_checksum" not in history:
            return
        span = int(history.steps[-1] - history.steps[-looks])
        last = history["weight_checksum"][-looks:]
        if span < steps or not (last == last[0]).all():
            return
        yield issue_in_time(
            history,
            len(history) - looks,
            layer="",
            issue_type=IssueType.VANISHING,
            severity=IssueSeverity.HIGH,
            description=f"No weight has changed over the last {span} steps.",
            magnitude=0.0,
            recommended_actions=(
                "See that the loop calls `optimizer.step()`, on an optimizer that was made of this very "
                "model's parameters: `torch.optim.Adam(model.parameters())`.",
                "Print the learning rate, `optimizer.param_groups[0]['lr']`: a schedule may have brought it "
                "to zero.",
            ),
            metrics={"steps": span},
        )

    return unworried(detector)


def _mean(shares: Sequence[Floats]) -> Floats:
    """Return the mean of several series at each look, over those that are known there."""
    values = np.stack(shares)
    known = ~np.isnan(values)
    return np.where(known, values, 0.0).sum(0) / known.sum(0)


def _start(values: Floats) -> float:
    early = smooth(values)[: max(len(values) // 4, 1)]
    early = early[np.isfinite(early)]
    return float(np.median(early)) if len(early) else np.nan


def _against_start(values: Floats) -> Floats | Bools:
    """Return a series over its level in the first quarter; NaN where that is not above zero."""
    start = _start(values)
    return smooth(values) / start if start > 0 else np.full(len(values), np.nan)
