"""What the picture of a model shows: its folded blocks in the order they run, and what flows between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from gradflow.errors import GraphUnavailableError
from gradflow.graph import LayerGraph
from gradflow.graph.coarse import folding
from gradflow.records import FlowRecord, LayerRecord
from gradflow.report.html.pieces import middle

MAX_BOXES = 32
MAX_LANES = 9


@attrs.frozen
class Box:
    """A box of the picture: a block, a layer, an operation where branches meet, an input or the loss.

    Args:
        name: what it is called.
        kind: `block`, `layer`, `op`, `input` or `loss`.
        type: class name of a layer, or of what a block holds.
        members: the layer calls in it, in the order they run.
        norm: norm of its output's gradient.
        gain: norm of the gradient that it hands back over that.
    """

    name: str
    kind: str
    type: str
    members: tuple[LayerRecord, ...]
    norm: float
    gain: float


@attrs.frozen
class Line:
    """A line from box `source` to box `target`, by their places; in lane 0 it is straight."""

    source: int
    target: int
    flow: float
    severed: bool
    reason: str
    lane: int = 0


@attrs.frozen
class Picture:
    """The boxes from input to loss, the lines between them, and whether flows were measured on every edge."""

    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    measured: bool


def picture(record: FlowRecord, *, most: int = MAX_BOXES) -> Picture:
    """Return the picture of a run's model; where no graph was taken, its layer calls one after another.

    Args:
        record: the run.
        most: how many boxes of layers there are at most.
    """
    runs = runs_of(record.layers, most)
    try:
        graph = _graph(record, runs)
    except GraphUnavailableError:
        return _chain(runs)
    named = {name: calls for name, calls in runs.items() if len(calls) > 1}
    calls = {layer.name or "(model)": layer for layer in record.layers}
    boxes, numbers = [], graph.node_values()
    for node in numbers:
        members = named.get(node["name"].removesuffix(" (block)"), ())
        if not members and node["kind"] == "layer" and node["name"] in calls:
            members = (calls[node["name"]],)
        norm = node["grad_norm"] if graph.measured else _norm(members)
        kind = "block" if len(members) > 1 else node["kind"]
        boxes.append(Box(node["name"], kind, _type(members) or node["type"], members, norm, node["gain"]))
    place = {box.name: i for i, box in enumerate(boxes)}
    lines = [
        Line(place[e["source"]], place[e["target"]], e["flow"], e["severed"], e["reason"])
        for e in graph.edge_values()
    ]
    if not graph.measured:
        boxes, lines = _estimated(boxes, lines)
    return Picture(tuple(boxes), tuple(laned(lines)), graph.measured)


def runs_of(layers: Sequence[LayerRecord], most: int) -> dict[str, tuple[LayerRecord, ...]]:
    """Return the layer calls by the box that they are in, at most `most` of them, in the order they run."""
    by_name = {layer.name: layer for layer in layers}
    runs = folding.runs_of({layer.name: layer.module for layer in layers}, most)
    return {title: tuple(by_name[name] for name in names) for title, names in runs.items()}


def _graph(record: FlowRecord, runs: Mapping[str, Sequence[LayerRecord]]) -> LayerGraph:
    named = {title: [call.name or "(model)" for call in calls] for title, calls in runs.items()}
    return folding.grouped_by_runs(record.graph, named, max_edges=4 * len(runs) + 60)


def _chain(runs: Mapping[str, tuple[LayerRecord, ...]]) -> Picture:
    boxes = [
        Box(name or "(model)", "block" if len(c) > 1 else "layer", _type(c), c, _norm(c), math.nan)
        for name, c in runs.items()
    ]
    lines = [Line(i, i + 1, math.nan, False, "") for i in range(len(boxes) - 1)]
    boxes, lines = _estimated(boxes, lines)
    return Picture(tuple(boxes), tuple(lines), False)


def _estimated(boxes: Sequence[Box], lines: Sequence[Line]) -> tuple[list[Box], list[Line]]:
    """Return boxes and lines with the gradient at the outputs of boxes, where edges were not measured."""
    before: dict[int, list[float]] = {}
    for line in lines:
        if math.isfinite(boxes[line.source].norm) and not line.severed:
            before.setdefault(line.target, []).append(boxes[line.source].norm)
    gains = [
        max(before[i]) / box.norm if i in before and box.norm > 0 else math.nan for i, box in enumerate(boxes)
    ]
    return (
        [attrs.evolve(box, gain=gain) for box, gain in zip(boxes, gains, strict=True)],
        [attrs.evolve(line, flow=0.0 if line.severed else boxes[line.source].norm) for line in lines],
    )


def _norm(members: Sequence[LayerRecord]) -> float:
    known = [norm for layer in members if not math.isnan(norm := middle(layer.grad_norm))]
    return known[-1] if known else math.nan


def _type(members: Sequence[LayerRecord]) -> str:
    types = dict.fromkeys(layer.type for layer in members)
    return ", ".join(list(types)[:3]) + (", …" if len(types) > 3 else "")


def laned(lines: Sequence[Line]) -> list[Line]:
    """Return lines that pass a box in lanes beside the boxes: none overlaps another while there are lanes."""
    taken: list[list[tuple[int, int]]] = []
    placed = {}
    for number, line in sorted(enumerate(lines), key=lambda p: abs(p[1].target - p[1].source)):
        low, high = sorted((line.source, line.target))
        if line.target - line.source == 1:
            continue
        free = (lane for lane, spans in enumerate(taken) if all(high <= a or b <= low for a, b in spans))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((low, high))
        placed[number] = min(lane + 1, MAX_LANES)
    return [attrs.evolve(line, lane=placed.get(i, 0)) for i, line in enumerate(lines)]


def flow_widths(lines: Sequence[Line]) -> list[float]:
    """Return how wide each line is drawn, logarithmic in its flow: 1.5 to 11; 0 for one that carries nothing.

    >>> line = Line(0, 1, 1.0, False, "")
    >>> flow_widths([line, attrs.evolve(line, flow=100.0), attrs.evolve(line, severed=True)])
    [1.5, 11.0, 0.0]
    """
    logs = [math.log10(e.flow) if 0 < e.flow < math.inf and not e.severed else math.nan for e in lines]
    known = [value for value in logs if math.isfinite(value)]
    low, span = (min(known), max(max(known) - min(known), 1.0)) if known else (0.0, 1.0)
    return [
        0.0 if e.severed or e.flow == 0 else 1.5 if math.isnan(v) else 1.5 + 9.5 * (v - low) / span
        for e, v in zip(lines, np.array(logs).tolist(), strict=True)
    ]
