"""The flow: the gradient at every layer, from the loss back to the input, with the issues where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow.records import FlowRecord
from gradflow.report.plots.canvas import (
    COLOURS,
    SEVERITIES,
    SOFT,
    Judged,
    axes_for,
    is_judged,
    named_ticks,
    plain,
    record_of,
    said,
)  # fmt: skip
from gradflow.report.series import finite_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_flow(source: Judged | FlowRecord, *, ax: Axes | None = None) -> Axes:
    """Draw the rms of the gradient at every layer's output, from the input on the left to the loss.

    Args:
        source: a report, whose issues are then marked at their layers, or a record.
        ax: axes to draw into; None for a figure of its own.

    Returns:
        The axes, on a logarithmic axis: the median over the steps as a line, from the least to the most as a
        band, layers whose gradient is exactly zero as crosses at the foot, and of a report a ring at every
        layer that has an issue, with its type.

    Raises:
        RecordInputError: if `source` is something else.
        ImportError: if matplotlib is not installed.
    """
    record = record_of("plot_flow", source)
    ax = axes_for("plot_flow", ax, width=max(6.0, min(0.22 * len(record.layers), 14.0)), height=3.8)
    plain(ax)
    ax.set_title("Gradient at every layer", fontsize=9, loc="left")
    rows = [np.where(np.isfinite(layer.grad_rms), layer.grad_rms, np.nan) for layer in record.layers]
    middles = np.array([finite_middle(row) for row in rows])
    if not (middles > 0).any():
        return said(ax, "no gradient was measured at any layer")
    places = np.arange(len(rows))
    low = np.array([np.nanmin(row, initial=np.inf) for row in rows])
    high = np.array([np.nanmax(row, initial=-np.inf) for row in rows])
    drawn = np.where(middles > 0, middles, np.nan)
    band = (low > 0) & np.isfinite(high)
    ax.fill_between(places, low, high, where=band, color=COLOURS[0], alpha=0.15, linewidth=0)
    ax.plot(places, drawn, color=COLOURS[0], marker="o", markersize=3, label="median over the steps")
    ax.set_yscale("log")
    foot = float(np.nanmin(drawn))
    zero = places[middles == 0]
    if len(zero):
        ax.plot(zero, np.full(len(zero), foot), "x", color=SOFT, label="exactly zero")
    if is_judged(source):
        _mark(ax, source, np.where(middles > 0, middles, foot))
    named_ticks(ax, [layer.name for layer in record.layers], along="x")
    ax.set_ylabel("gradient rms", fontsize=8)
    ax.legend(fontsize=7, frameon=False)
    return ax


def _mark(ax: Axes, report: Judged, heights: np.ndarray) -> None:
    """Put a ring with the type of the gravest issue at every layer that has one."""
    place = {layer.name: i for i, layer in enumerate(report.record.layers)}
    marked: set[str] = set()
    for issue in sorted(report.issues, key=lambda issue: issue.severity, reverse=True):
        if issue.layer not in place or issue.layer in marked:
            continue
        marked.add(issue.layer)
        x, y = place[issue.layer], heights[place[issue.layer]]
        colour = SEVERITIES[issue.severity]
        ax.scatter([x], [y], s=90, facecolors="none", edgecolors=colour, linewidths=1.6, zorder=4)
        if len(marked) <= 8:
            ax.annotate(
                issue.issue_type.value, (x, y), xytext=(0, 9), textcoords="offset points", ha="center",
                fontsize=6.5, color=colour,
            )  # fmt: skip
