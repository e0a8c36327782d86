"""Grids: layers × steps, and layers × heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradflow.records import Floats, FlowRecord
from gradflow.report.plots.canvas import Judged, axes_for, named_ticks, record_of, said, whole_steps
from gradflow.report.series import GRIDS, HEAD_NUMBERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MISSING = "#d1d5db"


def plot_grid(source: Judged | FlowRecord, number: str = "gradient", *, ax: Axes | None = None) -> Axes:
    """Draw a heat map of layers × steps: layers downwards from the input to the loss, steps to the right.

    Args:
        source: a report or its record.
        number: `gradient`, the rms of every layer's output gradient; `share`, what arrives of what should;
            `activity`, the share of elements of activations that fire or are not saturated; `updates`, the
            size of every parameter's update over its own, where an optimizer stepped.
        ax: axes to draw into; None for a figure of its own.

    Returns:
        The axes, with one image. Of ratios it holds powers of ten, blue for little and red for much; what was
        not measured is grey.

    Raises:
        ValueError: if `number` is another word.
        RecordInputError: if `source` is something else.
        ImportError: if matplotlib is not installed.
    """
    if number not in GRIDS:
        raise ValueError(f"plot_grid: expected number to be one of {', '.join(GRIDS)}, got {number!r}.")
    grid = GRIDS[number](record_of("plot_grid", source))
    ax = axes_for("plot_grid", ax, height=min(2.0 + 0.16 * len(grid.rows), 9.0))
    values = _table([row for _, row in grid.rows])
    if not np.isfinite(values).any():
        return said(ax, f"{grid.title}: not measured")
    if grid.scale == "ratio":
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(values)
        low, high = grid.usual - grid.reach, grid.usual + grid.reach
        _image(ax, values, low, high, "RdBu_r", label="power of ten")
    else:
        _image(ax, values, 0.0, 1.0, "viridis", label="share")
    ax.set_title(grid.title, fontsize=9, loc="left")
    ax.set_xlabel("measured step", fontsize=8)
    whole_steps(ax)
    named_ticks(ax, [name for name, _ in grid.rows], along="y")
    return ax


def plot_attention(source: Judged | FlowRecord, number: str = "entropy", *, ax: Axes | None = None) -> Axes:
    """Draw what every attention head does, layers downwards and heads to the right; medians over the steps.

    Args:
        source: a report or its record; the pipeline for transformers, or the automatic one, measures this.
        number: `entropy` as a share of its maximum, `first` for the weight on the first key, or `gradient`
            at the head as a share of the largest.
        ax: axes to draw into; None for a figure of its own.

    Returns:
        The axes, with one image of numbers in [0, 1].

    Raises:
        ValueError: if `number` is another word.
        RecordInputError: if `source` is something else.
        ImportError: if matplotlib is not installed.
    """
    if number not in HEAD_NUMBERS:
        raise ValueError(
            f"plot_attention: expected number to be one of {', '.join(HEAD_NUMBERS)}, got {number!r}."
        )
    layers = record_of("plot_attention", source).transformer.attention
    ax = axes_for("plot_attention", ax, height=min(1.6 + 0.22 * len(layers), 9.0))
    if not layers:
        return said(ax, "No attention was measured; pipeline=gf.pipelines.transformer() does")
    told = HEAD_NUMBERS[number]
    values = _table([np.array(row) for row in told.grid(layers)])
    if told.relative and np.nanmax(values, initial=0.0) > 0:
        values = values / np.nanmax(values)
    _image(ax, values, 0.0, 1.0, "viridis", label="share")
    ax.set_title(told.title, fontsize=9, loc="left")
    ax.set_xlabel("head", fontsize=8)
    whole_steps(ax)
    named_ticks(ax, [layer.name for layer in layers], along="y")
    return ax


def _table(rows: Sequence[Floats]) -> Floats:
    """Return rows as one array; NaN where one is shorter than the longest."""
    table = np.full((len(rows), max((len(row) for row in rows), default=0)), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def _image(ax: Axes, values: Floats, low: float, high: float, colours: str, *, label: str) -> None:
    from matplotlib import colormaps

    colormap: Any = colormaps[colours].with_extremes(bad=_MISSING)
    shown = np.clip(values, low, high)  # zeros and infinities have the colour of the ends
    image = ax.imshow(shown, aspect="auto", cmap=colormap, vmin=low, vmax=high, interpolation="nearest")
    ax.tick_params(axis="x", labelsize=8)
    bar = ax.get_figure(root=True).colorbar(image, ax=ax, pad=0.01)  # type: ignore[union-attr]
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=7)
