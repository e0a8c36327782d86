"""NUMERICAL, of a GradScaler: one that skips for ever, is at its floor, or skips too often."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType, ScalerRecord


def stuck_scaler(in_a_row: int = 20, *, often: float = 0.1) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of a GradScaler that no longer lets updates through.

    Measured: the scaler's loss scale after each of the last updates, and which of them it skipped.

    Why this is evidence: a scaler skips an update when a gradient is not finite, and halves its scale. From
    65536 it comes down to 1 in 16 of them. If it goes on, it is not the scale that makes the gradient so: a
    NaN is one under any scale.

    Looks alike and is not: the skips with which a scaler finds its scale at the start, and the one each time
    it has doubled, every `growth_interval` updates.

    Args:
        in_a_row: skipped updates at the end of the record from which on it skips for ever.
        often: share of skipped updates from which on it skips too often, those at the start left out.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        known = record.precision
        if known is not None and known.scaler is not None:
            yield from scaler_issues(known.scaler, in_a_row=in_a_row, often=often)

    return detector


def scaler_issues(scaler: ScalerRecord, *, in_a_row: int = 20, often: float = 0.1) -> tuple[Issue, ...]:
    """Return what is wrong with a GradScaler, at most one issue; see `stuck_scaler`.

    Args:
        scaler: its state over some updates.
        in_a_row: see `stuck_scaler`.
        often: see `stuck_scaler`.

    >>> stuck = ScalerRecord(steps=range(30), scale=2.0 ** -np.arange(30), skipped=[True] * 30)
    >>> [issue.severity.value for issue in scaler_issues(stuck)]
    ['CRITICAL']
    """
    skipped = scaler.skipped
    if not len(skipped):
        return ()
    last = int(np.argmax(~skipped[::-1])) if not skipped.all() else len(skipped)
    scale, first = float(scaler.scale[-1]), int(np.argmax(~skipped))
    if last >= in_a_row:
        return (_forever(last, scale),)
    if scale < 1 and skipped.any():
        return (_at_floor(scale),)
    settled = skipped[first:]
    if len(settled) >= in_a_row and float(settled.mean()) >= often:
        return (_often(float(settled.mean()), scale, scaler.growth_interval),)
    return ()


def _forever(number: int, scale: float) -> Issue:
    return _issue(
        IssueSeverity.CRITICAL,
        f"The GradScaler has skipped the last {number} updates, down to a scale of {scale:g}: no weight has "
        "changed since. A gradient that is not finite under any scale is not the scale's doing.",
        float(number),
        (
            "Find the NaN: diagnose this batch without the scaler, which names the operation that makes it.",
            "If a forward value overflows in float16, compute in bfloat16, or that part in float32.",
        ),
    )


def _at_floor(scale: float) -> Issue:
    return _issue(
        IssueSeverity.HIGH,
        f"The GradScaler has come down to a scale of {scale:g}: gradients overflow float16 without any "
        "scale, and the small ones are lost.",
        scale,
        (
            "Take the loss's mean instead of its sum, or clip what makes it so large.",
            "Or compute in bfloat16, which needs no scale.",
        ),
    )


def _often(share: float, scale: float, interval: int) -> Issue:
    return _issue(
        IssueSeverity.MEDIUM,
        f"The GradScaler skips {100 * share:.2g} % of the updates, at a scale of {scale:g}: it should be one "
        f"in {interval}.",
        share,
        (
            "Some batches overflow and others do not: clip the gradient (after scaler.unscale_), or find the "
            "samples with the large loss.",
            f"Raise its growth_interval above {interval}.",
        ),
    )


def _issue(severity: IssueSeverity, description: str, magnitude: float, actions: tuple[str, ...]) -> Issue:
    return Issue(
        layer="",
        layer_type="GradScaler",
        issue_type=IssueType.NUMERICAL,
        severity=severity,
        description=description,
        magnitude=magnitude,
        recommended_actions=actions,
    )
