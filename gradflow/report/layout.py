"""Where the boxes and lines of a drawn layer graph stand; plain arithmetic, in inches.

x runs right, y runs up, and depth 0 is at y = 0: deeper nodes have smaller y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from gradflow.graph import LayerGraph, Node
from gradflow.report.wording import shortened

BOX_HEIGHT = 0.44
ROW = 0.86  # from one depth to the next
GAP = 0.3  # between boxes of one depth
LANE = 0.2  # between skip connections beside the boxes
CORNER = 0.16
LETTER, SMALL = 0.094, 0.07  # width of a letter of a label and of a note
MAX_LETTERS = 34

Point = tuple[float, float]
_MOVE, _LINE, _CURVE = 1, 2, 3  # matplotlib's codes for a path's segments


@attrs.frozen
class Lane:
    """How an edge runs beside the boxes.

    Args:
        x: where its long part stands.
        drop: how far below its source it turns aside, if it leaves from below.
        below: whether it leaves from below, as another box of the row is in the way.
        above: whether it enters from above, for the same reason.
    """

    x: float
    drop: float
    below: bool
    above: bool


@attrs.frozen(eq=False, kw_only=True)
class Layout:
    """Places of all boxes and lines.

    Args:
        places: (x, y) of the centre of every node's box.
        widths: width of every node's box.
        labels: the first line in every box: the name, shortened if long.
        notes: the second line: type and gain.
        lanes: for every edge that runs beside the boxes how it does.
        left: smallest x of anything drawn.
        width: extent in x.
        height: extent in y; the lowest thing stands at −height.
    """

    places: dict[str, Point]
    widths: dict[str, float]
    labels: dict[str, str]
    notes: dict[str, str]
    lanes: dict[tuple[str, str], Lane]
    left: float
    width: float
    height: float

    def box(self, name: str) -> tuple[float, float, float]:
        """Return the centre and the width of a node's box."""
        return (*self.places[name], self.widths[name])

    def route(self, source: str, target: str) -> tuple[list[Point], list[int]]:
        """Return the points and matplotlib path codes of an edge's line, from box to box.

        A line in a lane leaves its box sideways, or, with another box in the way, from below; and enters
        likewise. Corners are round.
        """
        (x0, y0), (x1, y1) = self.places[source], self.places[target]
        lane = self.lanes.get((source, target))
        if lane is None:
            return [(x0, y0 - BOX_HEIGHT / 2), (x1, y1 + BOX_HEIGHT / 2)], [_MOVE, _LINE]
        side = 1.0 if lane.x > max(x0, x1) else -1.0
        if lane.below:
            start, y0 = (x0 + 0.15 * side, y0 - BOX_HEIGHT / 2), y0 - BOX_HEIGHT / 2 - lane.drop
            corners = [start, (start[0], y0)]
        else:
            y0 -= 0.1  # what leaves a box leaves below what enters it
            corners = [(x0 + side * self.widths[source] / 2, y0)]
        if lane.above:
            end, y1 = (x1 + 0.15 * side, y1 + BOX_HEIGHT / 2), y1 + BOX_HEIGHT / 2 + 0.12 + lane.drop / 2
            last = [(end[0], y1), end]
        else:
            y1 += 0.1
            last = [(x1 + side * self.widths[target] / 2, y1)]
        return _rounded([*corners, (lane.x, y0), (lane.x, y1), *last])

    def label_place(self, source: str, target: str, share: float) -> Point:
        """Return where an edge's own label stands, `share` of the way from source to target."""
        (x0, y0), (x1, y1) = self.places[source], self.places[target]
        y0, y1 = y0 - BOX_HEIGHT / 2, y1 + BOX_HEIGHT / 2
        lane = self.lanes.get((source, target))
        return (lane.x if lane else x0 + share * (x1 - x0)), y0 + share * (y1 - y0)


def _rounded(corners: Sequence[Point]) -> tuple[list[Point], list[int]]:
    """Return a line over these corners as matplotlib path points and codes, its corners round."""
    points, codes = [corners[0]], [_MOVE]
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        ends = []
        for other in (before, after):
            reach = math.dist(corner, other)
            part = min(CORNER, reach / 2) / reach if reach else 0.0
            ends.append(tuple(c + part * (o - c) for c, o in zip(corner, other, strict=True)))
        points += [ends[0], corner, ends[1]]
        codes += [_LINE, _CURVE, _CURVE]
    return [*points, corners[-1]], [*codes, _LINE]


def graph_layout(graph: LayerGraph) -> Layout:
    """Return the places of a graph's nodes and edges.

    A node's depth is the length of its longest way from a node without inputs. Nodes of one depth stand
    side by side, each below what it reads; an edge whose straight line would cross a box runs in a lane
    beside all boxes; lines in one lane do not overlap.

    Raises:
        GraphUnavailableError: if the graph has a cycle.

    >>> graph = LayerGraph.from_flows(
    ...     {"a": 2.0, "b": 1.0, "loss": 1.0}, {("a", "b"): 1.0, ("a", "loss"): 1.0, ("b", "loss"): 1.0})
    >>> layout = graph_layout(graph)
    >>> layout.places["b"][1] < layout.places["a"][1], list(layout.lanes)     # a -> loss passes b
    (True, [('a', 'loss')])
    """
    depths = _depths(graph)
    labels = {name: shortened(name, MAX_LETTERS) for name in graph}
    notes = {name: _note(graph[name]) for name in graph}
    widths = {n: 0.2 + max(LETTER * len(labels[n]), SMALL * len(notes[n]), 0.5) for n in graph}
    places = _places(graph, depths, widths)
    lanes = _lanes(graph, depths, places, widths)
    edges = [places[n][0] + sign * widths[n] / 2 for n in graph for sign in (-1, 1)]
    edges += [lane.x for lane in lanes.values()]
    left, right = (min(edges), max(edges)) if edges else (0.0, 1.0)
    deepest = max(depths.values(), default=0)
    return Layout(
        places=places,
        widths=widths,
        labels=labels,
        notes=notes,
        lanes=lanes,
        left=left,
        width=right - left,
        height=deepest * ROW + BOX_HEIGHT / 2,
    )


def _note(node: Node) -> str:
    kind = node.type if node.type and node.type != node.name else node.kind
    return f"{kind}, gain {node.gain:.2g}" if math.isfinite(node.gain) else kind


def _depths(graph: LayerGraph) -> dict[str, int]:
    """Return every node's depth; inputs and other sources stand just above what first reads them."""
    table = graph.table
    order = table.order("draw_graph")
    depth = [0] * len(order)
    for node in order:
        ins = [depth[int(table.source[e])] + 1 for e in table.in_edges[node]]
        depth[node] = max(ins, default=0)
    for node in order:
        if not table.in_edges[node] and table.out_edges[node]:
            depth[node] = min(depth[int(table.target[e])] for e in table.out_edges[node]) - 1
    return {table.name(node): value for node, value in enumerate(depth)}


def _places(graph: LayerGraph, depths: dict[str, int], widths: dict[str, float]) -> dict[str, Point]:
    """Place the nodes of every depth side by side, ordered by where the nodes that they read stand."""
    rows: dict[int, list[str]] = {}
    for name in graph:
        rows.setdefault(depths[name], []).append(name)
    reads: dict[str, list[str]] = {name: [] for name in graph}
    for u, v in graph.edges:
        reads[v].append(u)
    places: dict[str, Point] = {}
    for depth in sorted(rows):
        wished = {n: _mean([places[u][0] for u in reads[n] if u in places]) for n in rows[depth]}
        row = sorted(rows[depth], key=lambda n: wished[n])
        x = -(sum(widths[n] for n in row) + GAP * (len(row) - 1)) / 2
        for name in row:
            places[name] = (x + widths[name] / 2, -depth * ROW)
            x += widths[name] + GAP
    return places


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _lanes(
    graph: LayerGraph, depths: dict[str, int], places: dict[str, Point], widths: dict[str, float]
) -> dict[tuple[str, str], Lane]:
    """Give every edge that would cross a box a lane: short spans inside, alternating to the nearer side."""
    rows: dict[int, list[str]] = {}
    for name, depth in depths.items():
        rows.setdefault(depth, []).append(name)
    skips = [
        (u, v)
        for u, v in graph.edges
        if depths[v] - depths[u] > 1 and _crosses(rows, depths, places, widths, u, v)
    ]
    skips.sort(key=lambda e: (depths[e[1]] - depths[e[0]], depths[e[0]]))
    taken: dict[int, list[list[tuple[int, int]]]] = {-1: [], 1: []}
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for u, v in skips:
        side = 1 if places[u][0] + places[v][0] > 0.1 else -1
        span, lanes = (depths[u], depths[v]), taken[side]
        lane = next((i for i, spans in enumerate(lanes) if _is_free(spans, span)), len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append(span)
        found[u, v] = (side, lane)
    outer = {
        side: max((side * places[n][0] + widths[n] / 2 for n in places), default=0.0) for side in (-1, 1)
    }

    def blocked(name: str, side: int) -> bool:
        return any(side * (places[other][0] - places[name][0]) > 0 for other in rows[depths[name]])

    return {
        (u, v): Lane(
            x=side * (outer[side] + LANE * (lane + 1)),
            drop=0.05 + 0.03 * (lane % 4),
            below=blocked(u, side),
            above=blocked(v, side),
        )
        for (u, v), (side, lane) in found.items()
    }


def _is_free(spans: Sequence[tuple[int, int]], span: tuple[int, int]) -> bool:
    return all(span[1] <= low or high <= span[0] for low, high in spans)


def _crosses(
    rows: dict[int, list[str]],
    depths: dict[str, int],
    places: dict[str, Point],
    widths: dict[str, float],
    u: str,
    v: str,
) -> bool:
    """Return whether a straight line from u to v would touch a box on its way."""
    (x0, y0), (x1, y1) = places[u], places[v]
    y0, y1 = y0 - BOX_HEIGHT / 2, y1 + BOX_HEIGHT / 2
    for depth in range(depths[u] + 1, depths[v]):
        shares = [(y0 - (-depth * ROW + edge)) / (y0 - y1) for edge in (BOX_HEIGHT / 2, -BOX_HEIGHT / 2)]
        ends = [x0 + share * (x1 - x0) for share in shares]
        for name in rows.get(depth, ()):
            low, high = places[name][0] - widths[name] / 2 - 0.08, places[name][0] + widths[name] / 2 + 0.08
            if min(ends) < high and max(ends) > low:
                return True
    return False
