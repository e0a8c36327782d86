"""Curves: over steps, through time, and of a fix against no fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradflow.detect.evidence import total_gradient
from gradflow.errors import RecordInputError, UnknownLayerError
from gradflow.records import Floats, FlowRecord, TrialRecord
from gradflow.report.plots.canvas import (
    COLOURS,
    LINE,
    STYLES,
    Judged,
    axes_for,
    literal,
    plain,
    record_of,
    said,
    whole_steps,
)
from gradflow.report.series import action_curves, finite, time_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_loss(source: Judged | FlowRecord, *, ax: Axes | None = None) -> Axes:
    """Draw the loss of every step.

    Args:
        source: a report or its record.
        ax: axes to draw into; None for a figure of its own.

    Returns:
        The axes, with one line: loss by step.

    Raises:
        RecordInputError: if `source` is something else.
        ImportError: if matplotlib is not installed.

    >>> record = FlowRecord(steps=3, losses=[2.0, 1.5, 1.0], layers=(), parameters=())
    >>> [float(loss) for loss in plot_loss(record).lines[0].get_ydata()]
    [2.0, 1.5, 1.0]
    """
    record = record_of("plot_loss", source)
    ax = axes_for("plot_loss", ax)
    return _lines(ax, [("loss", record.losses)], title="Loss", across="step")


def plot_gradient_norm(source: Judged | FlowRecord, *, ax: Axes | None = None) -> Axes:
    """Draw the norm of the gradient of all parameters together, by step, on a logarithmic axis.

    Args:
        source: a report or its record.
        ax: axes to draw into; None for a figure of its own.

    Returns:
        The axes, with one line: norm by step, in units of loss per unit of parameter.

    Raises:
        RecordInputError: if `source` is something else.
        ImportError: if matplotlib is not installed.
    """
    record = record_of("plot_gradient_norm", source)
    ax = axes_for("plot_gradient_norm", ax)
    norms = total_gradient(record) if record.parameters else np.empty(0)
    return _lines(
        ax, [("gradient norm", norms)], title="Gradient norm of all parameters", across="step", log=True
    )


def plot_through_time(
    source: Judged | FlowRecord, layer: str | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draw the gradient of a recurrent layer through time: how far back from the end it reaches.

    Args:
        source: a report or its record; the recurrent pipeline, or the automatic one, measures this.
        layer: name of the recurrent layer; None for the first.
        ax: axes to draw into; None for a figure of its own.

    Returns:
        The axes, with two lines a level: the gradient of the whole loss, and of what the loss reads at the
        last step alone, by step of the sequence, on a logarithmic axis.

    Raises:
        RecordInputError: if `source` is something else.
        UnknownLayerError: if there is no recurrent layer of that name.
        ImportError: if matplotlib is not installed.
    """
    record = record_of("plot_through_time", source)
    names = [found.name for found in record.recurrences]
    if layer is not None and layer not in names:
        raise UnknownLayerError.at(layer, names)
    ax = axes_for("plot_through_time", ax)
    if not names:
        return said(ax, "No recurrent layer was measured; pipeline=gf.pipelines.recurrent() does")
    found = record.recurrences[0 if layer is None else names.index(layer)]
    title = f"Gradient through time: {found.name or '(model)'} ({found.type})"
    return _lines(ax, time_curves(found), title=title, across="step of the sequence", log=True)


def plot_actions(source: Judged | FlowRecord, number: int = 0, *, ax: Axes | None = None) -> Axes:
    """Draw how sure a policy is of its actions, over the measured steps.

    Args:
        source: a report or its record; the pipeline for policies, or the automatic one, measures this.
        number: which of the policy's distributions, from 0.
        ax: axes to draw into; None for a figure of its own.

    Returns:
        The axes: of alternatives the entropy as a share of its maximum, the largest probability and the share
        of samples that are as good as decided; of continuous actions their standard deviations.

    Raises:
        RecordInputError: if `source` is something else, or there is no such distribution.
        ImportError: if matplotlib is not installed.
    """
    record = record_of("plot_actions", source)
    found = record.policy.distributions if record.policy is not None else ()
    if found and not 0 <= number < len(found):
        raise RecordInputError(
            f"plot_actions: expected the number of one of {len(found)} distributions, from 0, got {number!r}."
        )
    ax = axes_for("plot_actions", ax)
    if not found:
        return said(ax, "No policy was measured; pipeline=gf.pipelines.policy() does")
    actions = found[number]
    title = f"Actions: {', '.join(actions.heads) or 'policy'} ({actions.family})"
    return _lines(ax, action_curves(actions), title=title, across="look")


def plot_trial(trial: TrialRecord, *, ax: Axes | None = None) -> Axes:
    """Draw the loss with a remedy and without it: the mean over seeds, and from the lowest to the highest.

    Args:
        trial: one of `trials.trials`, or `trials.best(cause)`.
        ax: axes to draw into; None for a figure of its own.

    Returns:
        The axes, with two lines and two bands.

    Raises:
        RecordInputError: if it is something else.
        ImportError: if matplotlib is not installed.
    """
    if not isinstance(trial, TrialRecord):
        raise RecordInputError(
            f"plot_trial: expected a TrialRecord, got {type(trial).__name__}: trials.best(cause) is one."
        )
    ax = axes_for("plot_trial", ax)
    if not trial.steps:
        return said(ax, f"{trial.remedy}: {trial.why}")
    arms = (("without", trial.losses_without), (trial.remedy, trial.losses_with))
    _lines(
        ax,
        [(name, losses.mean(axis=1)) for name, losses in arms],
        title=f"{trial.verdict.value}: {trial.issue_type.value} in {trial.layer or '(model)'}",
        across="step",
    )
    for (_, losses), colour in zip(arms, COLOURS, strict=False):
        steps = np.arange(len(losses))
        ax.fill_between(steps, losses.min(axis=1), losses.max(axis=1), color=colour, alpha=0.15, linewidth=0)
    ax.set_ylabel("loss", fontsize=8)
    return ax


def _lines(
    ax: Axes, series: Sequence[tuple[str, Floats]], *, title: str, across: str, log: bool = False
) -> Axes:
    """Draw named lines; zeros are gaps on a logarithmic axis, as NaN and infinities are on any."""
    plain(ax)
    ax.set_title(literal(title), fontsize=9, loc="left")
    ax.set_xlabel(across, fontsize=8)
    drawn = 0
    for i, (name, values) in enumerate(series):
        known = np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan)
        few = "o" if len(finite(known)) == 1 else ""
        colour = LINE if len(series) == 1 else COLOURS[i % len(COLOURS)]
        style = STYLES[i // len(COLOURS) % len(STYLES)] if len(series) > 4 else STYLES[i % len(STYLES)]
        ax.plot(np.arange(len(known)), known, label=literal(name), color=colour, linestyle=style, marker=few)
        drawn += len(finite(known))
    if not drawn:
        return said(ax, "nothing finite was measured")
    if log:
        ax.set_yscale("log")
        ax.tick_params(which="both", labelsize=7)
    if len(series) == 1:
        ax.set_ylabel(literal(series[0][0]), fontsize=8)
    else:
        ax.legend(fontsize=7, frameon=False)
    whole_steps(ax)
    return ax
