"""What special measurements saw, as pictures: attention by head, gradient through time, actions."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gradflow.records import AttentionRecord, FlowRecord
from gradflow.report.html.curves import chart
from gradflow.report.html.pieces import number, section
from gradflow.report.series import HEAD_NUMBERS, HeadNumber, action_curves, time_curves
from gradflow.report.wording import shortened

MAX_RECURRENT = 8  # recurrent layers drawn
CELL, NAME = 22, 150


def special_section(record: FlowRecord) -> str:
    """Return what attention, recurrent layers and policies showed, also where nothing of it is sick."""
    return (
        section("Attention by layer and head", _attention(record.transformer.attention), "attention")
        + section("Gradient through time", _recurrent(record), "recurrent")
        + section("Actions of the policy", _policy(record), "policy")
    )


def _attention(layers: Sequence[AttentionRecord]) -> str:
    if not layers:
        return ""
    grids = [_heads(told, layers) for told in HEAD_NUMBERS.values()]
    return f'<div class="card figures">{"".join(grids)}</div>'


def _heads(told: HeadNumber, layers: Sequence[AttentionRecord]) -> str:
    """Return a grid of layers × heads of a number in [0, 1]: the darker, the larger."""
    title, values = told.title, told.grid(layers)
    largest = max((v for row in values for v in row if v == v), default=0.0) if told.relative else 1.0
    most = max((len(row) for row in values), default=0)
    if not most or largest <= 0:
        return ""
    side = min(CELL, max(6, 320 // most))
    rows = []
    for y, (layer, row) in enumerate(zip(layers, values, strict=True)):
        cells = "".join(
            f'<rect x="{NAME + x * side}" y="{y * CELL}" width="{side - 1}" height="{CELL - 1}" rx="2" '
            f'class="cell" {_opacity(v / largest)}>'
            f"<title>{escape(layer.name)}, head {x}: {number(v)}</title></rect>"
            for x, v in enumerate(row)
        )
        name = escape(shortened(layer.name or "(model)", 22))
        rows.append(f'<text class="end" x="{NAME - 6}" y="{y * CELL + 15}">{name}</text>{cells}')
    width, height = NAME + side * most, CELL * len(layers)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" class="chart" style="max-width:{width}px" role="img" '
        f'aria-label="{escape(title)}">{"".join(rows)}</svg>'
        f'<div class="legend"><span>heads to the right</span><span>0<i class="fade"></i>'
        f"{number(float(largest))}</span></div></figure>"
    )


def _opacity(share: float) -> str:
    return (
        'fill-opacity="0" stroke-dasharray="2"'
        if share != share
        else f'fill-opacity="{max(share, 0.04):.2f}"'
    )


def _recurrent(record: FlowRecord) -> str:
    figures = []
    for layer in record.recurrences[:MAX_RECURRENT]:
        series = time_curves(layer)
        if series:
            figures.append(chart(f"{layer.name or '(model)'} ({layer.type})", series[:4], log=True))
    more = len(record.recurrences) - MAX_RECURRENT
    rest = f'<p class="soft">{more} more recurrent layers are in the record.</p>' if more > 0 else ""
    return f'<div class="card figures">{"".join(figures)}</div>{rest}' if figures else ""


def _policy(record: FlowRecord) -> str:
    if record.policy is None:
        return ""
    figures = []
    for actions in record.policy.distributions:
        heads = ", ".join(actions.heads) or "actions"
        figures.append(chart(f"{heads} ({actions.family})", action_curves(actions), axis="look"))
    return f'<div class="card figures">{"".join(figures)}</div>' if figures else ""
