"""NUMERICAL at the upper end: outputs near the largest number of a format, and too large a loss scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradflow.detect.precision.underflow import scale_text
from gradflow.records import (
    ExponentHistogram,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    LayerPrecision,
    PrecisionRecord,
)
from gradflow.records.formats import NUM_BINS, number_format

_SHORT = ("float16", "float8_e5m2", "float8_e4m3fn")
_HALVINGS = 8  # of the scale that a scaler makes when it starts: from 65536 to 256


def overflowing(
    room: float = 2.0, *, times: float = 2.0**_HALVINGS
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of what reaches the upper end of a short format.

    Measured: the largest output of every layer that computes in float16 or shorter, against the largest
    number of that format; and whether gradients are finite under the loss scale in use, and under which.

    Why this is evidence: outputs are not scaled, so no GradScaler helps them: the next time they double, they
    are infinite. A loss scale that is too large costs one skipped update for each halving.

    Looks alike and is not: a mask of the largest number itself; infinite outputs that reach the loss, which
    `numerical` tells; a scale that is a few halvings too large, as every scaler's is at its start and each
    time that it has grown.

    Args:
        room: factor that must be left above the outputs.
        times: how many times too large a loss scale must be.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        known = record.precision
        if known is None or not known.steps:
            return
        found = [layer for layer in known.layers if _is_near(layer.activation, room)]
        if found:  # once: what is large stays so from layer to layer
            yield _near_issue(found, room)
        if (issue := _scale_issue(known, times)) is not None:
            yield issue

    return detector


def _is_near(seen: ExponentHistogram | None, room: float) -> bool:
    if seen is None or seen.dtype not in _SHORT or not seen.overflow(seen.dtype, scale=room, look=-1) > 0:
        return False
    known = number_format(seen.dtype)
    largest = [i for i, number in zip(seen.bins, seen.counts[-1], strict=True) if number][-1]
    return largest != NUM_BINS * known.most + known.infinite_bin - 1  # the largest number, as in masks


def _near_issue(found: list[LayerPrecision], room: float) -> Issue:
    layer = found[0]
    assert layer.activation is not None
    dtype = layer.activation.dtype
    share = layer.activation.overflow(dtype, scale=room, look=-1)
    others = f" So are those of {len(found) - 1} more layers." if len(found) > 1 else ""
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.NUMERICAL,
        severity=IssueSeverity.MEDIUM,
        description=f"Its outputs come within a factor of {room:g} of the largest number of {dtype} "
        f"({share:.2g} of them): a little more, and they are infinite.{others}",
        magnitude=layer.activation.largest,
        recommended_actions=(
            "Compute it in float32, with torch.autocast(device, enabled=False) round it, or all of the model "
            "in bfloat16.",
            "Find what makes its outputs grow: weights without decay, a residual stream without a norm, "
            "unscaled inputs. A GradScaler scales gradients and is no help here.",
        ),
        metrics={"dtype": dtype, "share": share, "num_layers": len(found)},
    )


def _scale_issue(known: PrecisionRecord, times: float) -> Issue | None:
    """Judge a loss scale under which gradients are not finite."""
    broken = [
        layer
        for layer in known.layers
        if layer.computed is not None and layer.computed.dtype in _SHORT and layer.computed.num_infinite[-1]
    ]
    if not broken or known.loss_scale <= 1:
        return None
    layer = broken[-1]
    assert layer.computed is not None
    best = known.best_scale(layer.computed.dtype)
    if not best * times <= known.loss_scale:
        return None
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.NUMERICAL,
        severity=IssueSeverity.MEDIUM,
        description=f"Under the loss scale of {scale_text(known.loss_scale)} its gradient is not finite in "
        f"{layer.computed.dtype}; it would be at {scale_text(best)}. A GradScaler skips "
        "an update for each halving.",
        magnitude=known.loss_scale / best,
        recommended_actions=(
            f"Start the scaler there: torch.amp.GradScaler(init_scale={scale_text(best)}).",
        ),
        metrics={"loss_scale": known.loss_scale, "best_scale": best},
    )
