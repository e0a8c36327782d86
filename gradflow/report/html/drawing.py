"""The picture of a model as SVG: boxes from input to loss, the gradient's flow as the width of lines.

Without the script it stands as it is; with it, boxes open, and one can move and enlarge it. The script lays
boxes out again by the same numbers (`report.js`, `layout`), so these two must agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from gradflow.records import IssueSeverity, LayerRecord
from gradflow.report import svg
from gradflow.report.html.folding import Box, Line, Picture, flow_widths
from gradflow.report.html.pieces import Places, number
from gradflow.report.html.style import NAMES
from gradflow.report.wording import layer_label, shortened

WIDTH, HEIGHT, GAP, ROW = 300, 42, 18, 20  # of a box; between boxes; a row in an open box
LEFT, TOP, LANE = 8, 10, 11
MAX_TYPE = 30  # letters
CLOSED = ' aria-expanded="false"'
DECADES = 2.0  # of gain, from grey to the full colour


def picture_section(picture: Picture, places: Places) -> str:
    """Return the picture with its buttons and its legend; nothing for a model without layers."""
    if not picture.boxes:
        return ""
    lanes = max((line.lane for line in picture.lines), default=0)
    width = LEFT + WIDTH + 24 + LANE * lanes
    height = TOP + len(picture.boxes) * (HEIGHT + GAP)
    widths = flow_widths(picture.lines)
    heard = {line.source for line, width in zip(picture.lines, widths, strict=True) if width}
    learn = {i for i, box in enumerate(picture.boxes) if any(call.parameters for call in box.members)}
    lines = "".join(
        _line(line, width, cut=line.source in learn - heard)
        for line, width in zip(picture.lines, widths, strict=True)
    )
    boxes = "".join(_box(i, box, places) for i, box in enumerate(picture.boxes))
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    buttons = "".join(
        f'<button type="button" data-do="{do}" title="{title}" aria-label="{title}">{face}</button>'
        for do, title, face in (
            ("in", "enlarge", "+"), ("out", "reduce", "−"), ("fit", "show from the top", "⤒"),
            ("open", "open or close all blocks", "⇕"),
        )
    )  # fmt: skip
    what = "measured on every edge" if picture.measured else "norm of the gradient at the output of each box"
    return (
        f'<div class="card picture"><div class="buttons tool">{buttons}</div><div class="stage">'
        f'<svg class="blocks" {size} role="group" aria-label="blocks from input to loss">'
        f"{lines}{boxes}</svg></div>"
        f'<div class="legend"><span><i class="flow"></i>width: gradient that flows back, {what}</span>'
        '<span>a block keeps 1% of it<i class="scale"></i>multiplies it by 100</span>'
        '<span class="cutline">dashed: a gradient is cut; dotted: none is needed</span></div></div>'
    )


def _top(place: int) -> int:
    return TOP + place * (HEIGHT + GAP)


def _line(line: Line, width: float, *, cut: bool) -> str:
    """Return a line; the script sets its way again where boxes open.

    One that carries nothing is `cut` where its source could learn and hears nothing from elsewhere; indices,
    masks and tables of positions need no gradient, and such lines are only hinted at.
    """
    start, end = _top(line.source) + HEIGHT, _top(line.target)
    kind = "edge" if width else "edge cut" if cut else "edge idle"
    flow = "carries nothing" if not width else f"gradient {number(line.flow)}"
    tip = f"{flow}{f' ({line.reason})' if line.reason else ''}"
    return (
        f'<path class="{kind}" data-u="{line.source}" data-v="{line.target}" data-lane="{line.lane}" '
        f'd="{_way(start, end, line.lane)}" stroke-width="{width or 1.5:.1f}">'
        f"<title>{escape(tip)}</title></path>"
    )


def _way(start: float, end: float, lane: int) -> str:
    if not lane:
        return f"M{LEFT + WIDTH // 2} {start}V{end}"
    side, x = LEFT + WIDTH, LEFT + WIDTH + 10 + LANE * lane
    start, end = start - 8, end + 8
    return f"M{side} {start}C{x} {start} {x} {start} {x} {(start + end) / 2:g}S{x} {end} {side} {end}"


def _box(place: int, box: Box, places: Places) -> str:
    calls = [call.name for call in box.members]
    issues = [number for name in dict.fromkeys([*calls, box.name]) for number in places.issues.get(name, ())]
    worst = max((places.worst[c] for c in [*calls, box.name] if c in places.worst), default=None)
    opens = box.kind == "block"
    told = f"{len(calls)}: {box.type}" if opens else box.type if box.type != box.name else box.kind
    told = told if len(told) <= MAX_TYPE else told[: MAX_TYPE - 1] + "…"
    gain = f"gain {number(box.gain)}" if math.isfinite(box.gain) else ""
    colour = svg.heat(math.log10(box.gain) * 6 / DECADES) if box.gain > 0 else "var(--soft)"
    tip = f"{box.name}: {told}; output gradient {number(box.norm)}{f', {gain}' if gain else ''}"
    rows = "".join(_row(i, call, places) for i, call in enumerate(box.members)) if opens else ""
    inner = f'<g class="inner">{rows}</g>' if opens else ""
    heads = f'<text class="name" x="14" y="18">{escape(shortened(box.name, 32))}</text>'
    heads += f'<text class="soft" x="14" y="34">{escape(told)}</text>'
    heads += f'<text class="gain" x="{WIDTH - 10}" y="34">{gain}</text>'
    return (
        f'<g class="box {box.kind}" id="box-{place}" tabindex="0" role="button" '
        f'data-name="{escape(" ".join([box.name, *calls]))}" data-type="{escape(box.type)}" '
        f'data-issues="{" ".join(map(str, issues))}" data-rows="{len(box.members) if opens else 0}" '
        f'transform="translate({LEFT} {_top(place)})"{CLOSED if opens else ""}>'
        f"<title>{escape(tip)}</title>"
        f'<rect class="frame" width="{WIDTH}" height="{HEIGHT}" rx="7"/>'
        f'<rect x="1" y="5" width="5" height="{HEIGHT - 10}" rx="2.5" fill="{colour}"/>'
        f"{heads}{_mark(worst, len(issues))}"
        f"{inner}</g>"
    )


def _row(place: int, call: LayerRecord, places: Places) -> str:
    y = HEIGHT + 12 + ROW * place
    worst = places.worst.get(call.name)
    mark = f'<circle class="{NAMES[worst]}" cx="20" cy="{y - 4}" r="4"/>' if worst else ""
    return (
        f'<g class="row" data-layer="{places.layers[call.name]}">{mark}'
        f'<text class="name" x="30" y="{y}">{escape(shortened(layer_label(call.name), 26))}</text>'
        f'<text class="soft end" x="{WIDTH - 10}" y="{y}">{escape(shortened(call.type, 12))}</text></g>'
    )


def _mark(worst: IssueSeverity | None, count: int) -> str:
    """Return a badge with the first letter of the gravest severity, and how many issues there are."""
    if worst is None:
        return ""
    text = f"{worst.value} {count}" if count > 1 else worst.value
    wide = 10 + 6.6 * len(text)
    size = f'x="{WIDTH - wide - 8:.0f}" y="6" width="{wide:.0f}" height="15" rx="7.5"'
    return (
        f'<rect class="{NAMES[worst]}" {size}/>'
        f'<text class="mark" x="{WIDTH - wide / 2 - 8:.0f}" y="17">{text}</text>'
    )


def boxes_of_layers(boxes: Sequence[Box]) -> dict[str, int]:
    """Return the place of its box by name of a layer call, and of a box by its own name."""
    found = {call.name: i for i, box in enumerate(boxes) for call in box.members}
    return found | {box.name: i for i, box in enumerate(boxes)}
