"""Drawings of the layer graph.

Nodes stand in order of depth, data running down; edges are as wide as their flow; colour tells the gain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from gradflow.graph import Edge, LayerGraph, Node
from gradflow.report.layout import BOX_HEIGHT, Layout, graph_layout
from gradflow.report.plots.canvas import INK, SOFT, checked_axes, missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEVERED, UNKNOWN = "#b42318", "#e5e9ef"
EDGE_COLOUR = "#475569"
MIN_WIDTH, MAX_WIDTH = 0.8, 6.0  # points
MARGIN, LEGEND, BAR = 0.35, 0.95, 1.25  # inches: around, below for the legend, right for the colour bar


def draw_graph(
    graph: LayerGraph,
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
    level: str = "layers",
    max_nodes: int = 80,
) -> Figure:
    """Draw the layer graph: depth downwards, edges as wide as their flow, colour for gain.

    A node stands below all nodes it reads, at the depth of its longest way from an input. Edges that skip
    a depth run beside the boxes. Widths grow with the logarithm of the flow; the colour is the logarithm
    of the gain, centred on 1: blue absorbs the gradient, red amplifies it, grey was not measured. Severed
    edges are dashed red with the operation that cuts them; layers that no gradient reaches have a dashed
    red frame.

    Args:
        graph: what to draw: a full graph, or one of `graph.layers()` and `graph.at(...)`.
        path: where to save it, as PNG, SVG or PDF by its ending; None to save nothing.
        ax: axes to draw into; None for a figure of its own, sized so that the labels fit.
        level: `layers` contracts the operations of a full graph, but for the sums of a long residual stream,
            without which each layer would be joined to every later one; `full` draws the graph as it is.
        max_nodes: above this many nodes repeated blocks are folded until the graph fits (`graph.fold`), as
            labels are not legible in a longer drawing, at whatever `level`; the figure says so below.

    Returns:
        The figure.

    Raises:
        TypeError: if `graph` is no layer graph, or `ax` something else than the axes of one plot.
        ValueError: if `level` is another word, or no folding has few enough nodes.
        ImportError: if matplotlib is not installed.
        GraphUnavailableError: if the graph has a cycle.

    >>> graph = LayerGraph.from_flows(
    ...     {"fc1": 0.5, "fc2": 2.0, "loss": 1.0}, {("fc1", "fc2"): 0.5, ("fc2", "loss"): 2.0})
    >>> figure = draw_graph(graph)
    >>> [text.get_text() for text in figure.axes[0].texts if "fc" in text.get_text()]
    ['fc1', 'fc2']
    """
    mpl = _matplotlib()
    if ax is not None:
        checked_axes("draw_graph", ax)
    if not isinstance(graph, LayerGraph):
        raise TypeError(
            f"draw_graph: expected a LayerGraph, such as record.graph, got {type(graph).__name__}."
        )
    if level not in ("layers", "full"):
        raise ValueError(f"draw_graph: expected level 'layers' or 'full', got {level!r}.")
    asked = _contracted(graph) if level == "layers" and graph.level == "full" else graph
    shown = _fitting(asked, max_nodes)
    layout = graph_layout(shown)
    figure, axes, scale = _canvas(mpl, layout, ax)
    nodes = [shown[name] for name in shown]
    norm = _gain_norm(mpl, [node.gain for node in nodes])
    edges = [shown.edge(u, v) for u, v in shown.edges]
    widths = _widths([edge.flow for edge in edges])
    ends = Counter(edge.source for edge in edges if edge.severed)
    for edge, line in zip(edges, widths, strict=True):  # of several that are severed, labels stand apart
        _draw_edge(mpl, axes, layout, edge, line * scale, scale, 0.35 if ends[edge.source] == 1 else 0.65)
    lost = {layer.name for layer in shown.unreachable()}
    for node in nodes:
        _draw_node(mpl, axes, layout, node, norm, node.name in lost, scale)
    _draw_legend(mpl, axes, layout, edges, norm, scale, shown, _folded(asked, shown))
    if path is not None:
        figure.savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.1)
    return figure


def _matplotlib() -> Any:
    """Import matplotlib, late: the package works without it."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
        from matplotlib.path import Path as Outline
    except ImportError as error:
        raise missing("draw_graph") from error
    return SimpleNamespace(
        colormap=colormaps["RdBu_r"],
        Figure=Figure,
        FigureCanvasAgg=FigureCanvasAgg,
        ScalarMappable=ScalarMappable,
        LogNorm=LogNorm,
        Arrow=FancyArrowPatch,
        Box=FancyBboxPatch,
        Outline=Outline,
    )


def _canvas(mpl: Any, layout: Layout, ax: Axes | None) -> tuple[Figure, Any, float]:
    """Return the figure, the axes ready to draw in inches, and by how much text has to shrink."""
    width, height = layout.width + 2 * MARGIN + BAR, layout.height + 2 * MARGIN + LEGEND
    figure: Any
    axes: Any = ax
    scale = 1.0
    if ax is None:
        figure = mpl.Figure(figsize=(max(width, 5.0), max(height, 3.0)), dpi=120)
        mpl.FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    else:
        figure = axes.figure
        while getattr(figure, "figure", figure) is not figure:  # out of subfigures
            figure = figure.figure
        room = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        scale = min(1.0, room.width / width, room.height / height)
    axes.set_xlim(layout.left - MARGIN, layout.left + layout.width + MARGIN + BAR)
    axes.set_ylim(-layout.height - MARGIN - LEGEND, MARGIN)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return figure, axes, scale


def _contracted(graph: LayerGraph) -> LayerGraph:
    """Return the graph of layers; residual sums stay in it where edges would else outnumber nodes by far."""
    layers = sum(node.kind == "layer" for node in graph.record.nodes)
    return graph.layers(max_edges=3 * layers + 20)


def _fitting(graph: LayerGraph, max_nodes: int) -> LayerGraph:
    """Return the graph, with its repeated blocks folded so far that it has at most `max_nodes` nodes."""
    if len(graph) <= max_nodes:
        return graph
    for most in range(max_nodes, 0, -max(1, max_nodes // 16)):
        folded = graph.fold(most=most)
        if len(folded) <= max_nodes and folded.table.topo is not None:
            return folded
    raise ValueError(
        f"draw_graph: the graph has {len(graph)} nodes, and folded into few blocks still more than "
        f"max_nodes={max_nodes}. Draw a part of it, such as graph.subgraph('encoder.3'), or raise max_nodes."
    )


def _folded(asked: LayerGraph, shown: LayerGraph) -> str:
    """Return what the figure says where it shows less than was asked for."""
    if shown is asked:
        return ""
    blocks = sum(node.kind == "block" for node in shown.record.nodes)
    return (
        f"{len(asked)} nodes ({asked.level}) were asked for and are folded to {len(shown)}, {blocks} of them "
        f"modules: max_nodes={len(asked)} draws all"
    )


def _gain_norm(mpl: Any, gains: Sequence[float]) -> Any:
    """Return a logarithmic scale for gains, symmetric about 1, from a factor of 2 to a factor of 1000."""
    known = [abs(math.log(gain)) for gain in gains if math.isfinite(gain) and gain > 0]
    top = math.exp(min(max([math.log(2), *known]), math.log(1e3)))
    return mpl.LogNorm(1 / top, top, clip=True)


def _widths(flows: Sequence[float]) -> list[float]:
    """Return line widths in points that grow with the logarithm of the flow."""
    known = [math.log(flow) for flow in flows if math.isfinite(flow) and flow > 0]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    span = max(high - low, math.log(10))  # within a factor of ten all lines are wide

    def width(flow: float) -> float:
        if not (math.isfinite(flow) and flow > 0):
            return MIN_WIDTH if known else 1.5
        return MAX_WIDTH - (MAX_WIDTH - MIN_WIDTH) * (high - math.log(flow)) / span

    return [width(flow) for flow in flows]


def _draw_edge(
    mpl: Any, ax: Axes, layout: Layout, edge: Edge, width: float, scale: float, share: float
) -> None:
    points, codes = layout.route(edge.source, edge.target)
    style: dict[str, Any] = {"color": EDGE_COLOUR, "zorder": 1}
    if edge.severed:
        width, style = 1.6 * scale, {"color": SEVERED, "linestyle": (0, (4, 2.5)), "zorder": 2}
    ax.add_patch(
        mpl.Arrow(
            path=mpl.Outline(points, codes),
            arrowstyle="-|>,head_length=0.5,head_width=0.28",
            mutation_scale=(5 + 1.6 * width) * scale,
            linewidth=width,
            capstyle="butt",
            joinstyle="miter",
            **style,
        )
    )
    if edge.severed:
        x, y = layout.label_place(edge.source, edge.target, share)
        ax.text(
            x, y, edge.reason or "exactly zero", color=SEVERED, fontsize=7.5 * scale, ha="center",
            va="center", parse_math=False, zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip


def _draw_node(mpl: Any, ax: Axes, layout: Layout, node: Node, norm: Any, lost: bool, scale: float) -> None:
    x, y, width = layout.box(node.name)
    known = math.isfinite(node.gain)
    colour: Any = mpl.colormap(norm(max(node.gain, 1e-300))) if known else UNKNOWN
    red, green, blue = colour[:3] if known else (1.0, 1.0, 1.0)
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
    ax.add_patch(
        mpl.Box(
            (x - width / 2, y - BOX_HEIGHT / 2),
            width,
            BOX_HEIGHT,
            boxstyle=f"round,pad=0,rounding_size={0.06 if node.kind != 'op' else 0.2}",
            facecolor=colour,
            edgecolor=SEVERED if lost else INK,
            linewidth=(1.8 if lost else 0.8) * scale,
            linestyle=(0, (4, 2)) if lost else "-",
            zorder=3,
        )
    )
    ink = "white" if dark else INK
    ax.text(x, y + 0.085, layout.labels[node.name], ha="center", va="center", color=ink,
            fontsize=9 * scale, fontweight="bold", parse_math=False, zorder=4)  # fmt: skip
    ax.text(x, y - 0.105, layout.notes[node.name], ha="center", va="center", color=ink,
            fontsize=7.5 * scale, parse_math=False, zorder=4)  # fmt: skip


def _draw_bar(mpl: Any, ax: Axes, layout: Layout, norm: Any, scale: float) -> None:
    right = layout.left + layout.width + MARGIN
    height = min(layout.height, 3.0)
    inner = ax.inset_axes((right, -height, 0.16, height), transform=ax.transData)
    bar = ax.figure.colorbar(mpl.ScalarMappable(norm, mpl.colormap), cax=inner)
    top = norm.vmax
    ticks = [1 / top, top**-0.5, 1.0, top**0.5, top]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7.5 * scale, length=2)
    bar.set_label("gain (1: gradient unchanged)", fontsize=8 * scale)


def _draw_legend(
    mpl: Any,
    ax: Axes,
    layout: Layout,
    edges: Sequence[Edge],
    norm: Any,
    scale: float,
    graph: LayerGraph,
    folded: str,
) -> None:
    """Draw the colour bar on the right, and below the graph what widths and dashes mean."""
    if graph.measured:
        _draw_bar(mpl, ax, layout, norm, scale)
    x, y = layout.left, -layout.height - 0.42
    flows = sorted(edge.flow for edge in edges if math.isfinite(edge.flow) and edge.flow > 0)
    if flows:
        picked = list(dict.fromkeys((flows[0], flows[len(flows) // 2], flows[-1])))
        widths = _widths(flows)
        ax.text(x, y, "flow", fontsize=8 * scale, color=INK, va="center")
        for i, flow in enumerate(picked):
            start = x + 0.5 + 1.05 * i
            width = widths[flows.index(flow)] * scale
            ax.plot([start, start + 0.3], [y, y], color=EDGE_COLOUR, linewidth=width, solid_capstyle="butt")
            ax.text(start + 0.38, y, f"{flow:.2g}", fontsize=8 * scale, color=INK, va="center")
        y -= 0.28
    if any(edge.severed for edge in edges):
        ax.plot([x, x + 0.4], [y, y], color=SEVERED, linewidth=1.6 * scale, linestyle=(0, (4, 2.5)))
        ax.text(x + 0.5, y, "severed: carries no gradient", fontsize=8 * scale, color=INK, va="center")
        y -= 0.28
    steps = len(graph.record.steps)
    told = f"{graph.level}; " + (f"mean over {steps} step{'s' * (steps != 1)}" if steps else "topology only")
    told += "; data runs down, the gradient up"
    ax.text(x, y, told, fontsize=7.5 * scale, color=SOFT, va="center")
    if folded:
        ax.text(x, y - 0.2, folded, fontsize=7.5 * scale, color=SEVERED, va="center")
