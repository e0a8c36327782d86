"""All of a report at a glance: what was measured of it, panel by panel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradflow.errors import RecordInputError
from gradflow.report.plots.canvas import Judged, is_judged, literal, new_figure
from gradflow.report.plots.curves import (
    plot_actions,
    plot_gradient_norm,
    plot_loss,
    plot_through_time,
    plot_trial,
)  # fmt: skip
from gradflow.report.plots.flow import plot_flow
from gradflow.report.plots.grids import plot_attention, plot_grid
from gradflow.report.wording import layer_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Callable[..., "Axes"]


def plot_report(report: Judged, path: str | Path | None = None) -> Figure:
    """Draw a report at a glance: flow with issues, heat map, loss, gradient norm, and what else was measured.

    Args:
        report: what `gradflow.diagnose` returned, with trials or without.
        path: where to save it, as PNG, SVG or PDF by its ending; None to save nothing.

    Returns:
        The figure; `figure.axes` are its panels, to be restyled, each with its title.

    Raises:
        RecordInputError: if `report` is no report.
        ImportError: if matplotlib is not installed.
    """
    if not is_judged(report):
        raise RecordInputError(f"plot_report: expected a Report, got {type(report).__name__}.")
    panels = _panels(report)
    rows = 1 + -(-len(panels) // 2)
    figure = new_figure("plot_report", 11.0, 3.6 + 3.1 * (rows - 1))
    grid: Any = figure.add_gridspec(rows, 2)
    plot_flow(report, ax=figure.add_subplot(grid[0, :]))
    for i, (draw, source) in enumerate(panels):
        draw(source, ax=figure.add_subplot(grid[1 + i // 2, i % 2]))
    figure.suptitle(literal(_headline(report)), fontsize=11, x=0.01, ha="left")
    if path is not None:
        figure.savefig(path, facecolor="white")
    return figure


def _panels(report: Judged) -> list[tuple[Panel, Any]]:
    """Return what is drawn below the flow, and of what."""
    record = report.record
    panels: list[tuple[Panel, Any]] = [(plot_grid, record), (plot_loss, record)]
    if record.parameters:
        panels.append((plot_gradient_norm, record))
    if record.updates is not None and record.updates.parameters:
        panels.append((lambda source, ax: plot_grid(source, "updates", ax=ax), record))
    if record.transformer.attention:
        panels.append((plot_attention, record))
    if record.recurrences:
        panels.append((plot_through_time, record))
    if record.policy is not None and record.policy.distributions:
        panels.append((plot_actions, record))
    if report.trials is not None:
        best = (report.trials.best(cause) for cause in report.causes[:2])
        panels += [(plot_trial, trial) for trial in best if trial is not None]
    return panels


def _headline(report: Judged) -> str:
    if not report.causes:
        return "Issues without a common cause" if report.issues else "No illness found"
    cause = report.causes[0]
    return f"{cause.issue_type.value} in {layer_label(cause.layer)}"
