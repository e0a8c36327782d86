"""What all plots share: matplotlib imported late, axes to draw into, colours, and labels that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from gradflow.errors import RecordInputError
from gradflow.records import FlowRecord, IssueSeverity
from gradflow.report.wording import layer_label, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradflow.report.report import Report as Judged  # a hint alone: reports are drawn by what is here
else:
    Judged = Any

INK, SOFT, LINE = "#1f2937", "#64748b", "#1d4ed8"
COLOURS = ("#1d4ed8", "#c2560a", "#15803d", "#7e22ce")  # blue, orange, green, purple
STYLES = ("-", "--", "-.", ":")  # told apart without colour too
SEVERITIES = {
    IssueSeverity.CRITICAL: "#9f1239",
    IssueSeverity.HIGH: "#c2410c",
    IssueSeverity.MEDIUM: "#b45309",
    IssueSeverity.LOW: "#475569",
    IssueSeverity.INFO: "#94a3b8",
}
LABELS_PER_INCH = 6.5  # names in 7 points along an axis; of more, some are left out
MAX_LETTERS = 28


def is_judged(source: Any) -> TypeGuard[Judged]:
    """Answer whether it is a report: a record with its verdicts."""
    return isinstance(getattr(source, "record", None), FlowRecord) and hasattr(source, "causes")


def missing(call: str) -> ImportError:
    """Return the error of a call that needs matplotlib where it is not installed."""
    return ImportError(
        f"{call} needs matplotlib, which is not installed. It is an extra of gradflow: "
        'pip install "gradient-flow[plot]".'
    )


def new_figure(call: str, width: float, height: float) -> Figure:
    """Return an empty figure that no window shows.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing(call) from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def axes_for(call: str, ax: Axes | None, *, width: float = 6.0, height: float = 3.4) -> Axes:
    """Return the axes to draw into: those that are given, or those of a new figure."""
    return new_figure(call, width, height).add_subplot() if ax is None else checked_axes(call, ax)


def checked_axes(call: str, ax: Axes) -> Axes:
    """Return the axes that are given.

    Raises:
        TypeError: if they are something else, such as the array of several that `plt.subplots(1, 2)` returns.
    """
    if getattr(ax, "name", None) != "rectilinear":
        got = f"axes of the projection {ax.name!r}" if hasattr(ax, "name") else type(ax).__name__
        raise TypeError(
            f"{call}: expected ax to be the axes of one plot with x and y, got {got}. Of several, as "
            "plt.subplots(1, 2) returns them, pass one: ax=axes[0]."
        )
    return ax


def record_of(call: str, source: Any) -> FlowRecord:
    """Return the record of a report, or the record itself.

    Raises:
        RecordInputError: if it is something else.
    """
    record = source.record if is_judged(source) else source
    if not isinstance(record, FlowRecord):
        raise RecordInputError(
            f"{call}: expected a Report or a FlowRecord, as gradflow.diagnose and gradflow.analyze return "
            f"them, got {type(source).__name__}."
        )
    return record


def named_ticks(ax: Axes, names: Sequence[str], *, along: Literal["x", "y"]) -> None:
    """Put names along an axis, at 0, 1, 2, ...; of many only some, so that none lies over another."""
    extent = ax.get_window_extent()
    root: Any = ax.get_figure(root=True)
    room = (extent.width if along == "x" else extent.height) / root.dpi * LABELS_PER_INCH
    every = max(1, -(-len(names) // max(1, int(room))))
    axis = ax.xaxis if along == "x" else ax.yaxis
    places = list(range(0, len(names), every))
    shown = [shortened(layer_label(names[i]), MAX_LETTERS) for i in places]
    axis.set_ticks(places, [literal(name) for name in shown], fontsize=7)
    if along == "x":
        for label in axis.get_ticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")


def literal(text: str) -> str:
    """Return a text so that matplotlib shows it as it is: two dollars are no mathematics."""
    return text.replace("$", r"\$")


def plain(ax: Axes) -> None:
    """Take away what draws the eye from the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#e2e8f0", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)


def whole_steps(ax: Axes) -> None:
    """Put marks at whole numbers alone along x."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def said(ax: Axes, text: str) -> Axes:
    """Say in empty axes why nothing is drawn there."""
    ax.text(
        0.5,
        0.5,
        literal(text),
        transform=ax.transAxes,
        ha="center",
        va="center",
        color=SOFT,
        fontsize=9,
        wrap=True,
    )
    ax.set_xticks([])
    ax.set_yticks([])
    return ax
