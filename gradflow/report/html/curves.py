"""Curves over steps, and the heat map of layers × steps."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from gradflow.detect.evidence import total_gradient
from gradflow.records import Floats, FlowRecord
from gradflow.report.html.pieces import number, section
from gradflow.report.series import GRIDS, Grid
from gradflow.report.svg import Domain, polyline, thinned

MAX_STEPS = 200
WIDTH, HEIGHT, FOOT = 340, 120, 18


def chart(title: str, series: Sequence[tuple[str, Floats]], *, log: bool = False, axis: str = "step") -> str:
    """Return lines over steps with their first and last numbers; where nothing is finite, a word for it.

    Args:
        title: what is drawn.
        series: (name, values), up to four are told apart by colour and dash.
        log: whether the axis is logarithmic; zeros are then gaps.
        axis: what runs to the right.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = [(n, np.log10(thinned(v)) if log else thinned(v)) for n, v in series]
    known = np.concatenate([v[np.isfinite(v)] for _, v in drawn] or [np.empty(0)])
    if not len(known):
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="soft">nothing finite</p></figure>'
    domain = Domain(float(known.min()), float(known.max()))
    drawings = (polyline(v, domain, colour="currentColor", width=WIDTH, height=HEIGHT) for _, v in drawn)
    lines = "".join(f'<g class="line l{i % 4}">{drawing}</g>' for i, drawing in enumerate(drawings))
    low, high = (number(10**v if log else v) for v in domain)
    ends = f'<text x="2" y="{HEIGHT + 14}">0</text><text class="end" x="{WIDTH - 2}" y="{HEIGHT + 14}">'
    ends += f"{axis} {max(len(v) for _, v in series) - 1}</text>"
    ends += f'<text class="level" x="4" y="12">{high}</text>'
    ends += f'<text class="level" x="4" y="{HEIGHT - 5}">{low}</text>'
    names = "".join(
        f'<span class="l{i % 4}"><b></b>{escape(n)}</span>' for i, (n, _) in enumerate(series) if n
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" role="img" aria-label="{escape(title)}: '
        f'{low} to {high}"><rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="5"/>{lines}{ends}</svg>'
        f'<div class="legend">{names}</div></figure>'
    )


def curves_section(record: FlowRecord) -> str:
    """Return the loss and the norm of the whole gradient over steps, and the update ratio where known."""
    if not record.steps:
        return ""
    figures = chart(f"Loss over {record.steps} steps", [("", record.losses)])
    if record.parameters:
        figures += chart("Gradient norm of all parameters", [("", total_gradient(record))], log=True)
    return section("Over steps", f'<div class="card figures">{figures}</div>', "curves")


# ------------------------------------------------------------------------------- heat map

CHECKED = 'checked="checked"'

_LOW, _MID, _HIGH = (26, 76, 196), (222, 226, 230), (200, 86, 10)  # blue, grey, orange: told apart by all
_DARK, _LIGHT = (68, 1, 84), (253, 231, 37)  # ends of a scale that grows in one direction, as viridis
_GREEN = (33, 145, 140)
_NONE = (128, 128, 128)


def heat_section(record: FlowRecord) -> str:
    """Return pictures of layers × steps of what was measured, one beside the other behind tabs."""
    maps = [m for grid in GRIDS.values() if (m := _map(grid(record)))]
    if not maps:
        return ""
    tabs = "".join(
        f'<input type="radio" name="heat" id="heat-{i}" {"" if i else CHECKED}/>'
        f'<label for="heat-{i}">{escape(title)}</label>'
        for i, (title, _) in enumerate(maps)
    )
    bodies = "".join(body for _, body in maps)
    return section(
        "Layers × steps", f'<div class="card heat">{tabs}<div class="maps">{bodies}</div></div>', "heat"
    )


def _map(grid: Grid) -> tuple[str, str] | None:
    """Return a heat map with the layers from left to right and the steps downwards, or None if all is NaN."""
    title, rows = grid.title, grid.rows
    length = max((len(v) for _, v in rows), default=0)
    if not length:
        return None
    picked = np.unique(np.linspace(0, length - 1, min(length, MAX_STEPS)).astype(int))
    values = np.full((len(picked), len(rows)), np.nan)
    for i, (_, row) in enumerate(rows):
        if len(row) == length:
            values[:, i] = row[picked]
    if np.isnan(values).all():
        return None
    if grid.scale == "share":
        pixels, scale = _ramp(values), '<i class="ramp"></i>'
        ends = "0", "1"
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log10(values)
        usual, reach = grid.usual, grid.reach
        pixels, scale = _diverging((logs - usual) / reach), '<i class="scale"></i>'
        ends = number(10.0 ** (usual - reach)), number(10.0 ** min(usual + reach, 308.0))
    names = escape("\n".join(name or "(model)" for name, _ in rows))
    return title, (
        f'<figure><div class="grid"><img alt="{escape(title)} of {len(rows)} layers over {length} steps" '
        f'src="data:image/png;base64,{base64.b64encode(png(pixels)).decode()}" '
        f'style="height:{min(max(8 * len(picked), 90), 320)}px"/></div>'
        f'<div class="ends"><span>input</span><span class="tip tool" data-names="{names}" '
        f'data-steps="{length}"></span><span>loss</span></div>'
        f'<div class="legend"><span>layers to the right, {length} steps downwards; {escape(grid.told)}</span>'
        f"<span>{ends[0]}{scale}{ends[1]}</span></div></figure>"
    )


def _ramp(values: Floats) -> np.ndarray:
    half = np.clip(np.nan_to_num(values), 0, 1)[..., None] * 2
    dark, green, light = (np.array(c, float) for c in (_DARK, _GREEN, _LIGHT))
    mixed = np.where(half < 1, dark + (green - dark) * half, green + (light - green) * (half - 1))
    return np.where(np.isnan(values)[..., None], _NONE, mixed).astype(np.uint8)


def _diverging(shares_of: Floats) -> np.ndarray:
    known = np.clip(np.nan_to_num(shares_of, posinf=1, neginf=-1), -1, 1)[..., None]
    middle = np.array(_MID, float)
    end = np.where(known < 0, np.array(_LOW, float), np.array(_HIGH, float))
    mixed = middle + (end - middle) * np.abs(known)
    return np.where(np.isnan(shares_of)[..., None], _NONE, mixed).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """Return an image of 8-bit colours, shape (rows, columns, 3), in the PNG format.

    >>> png(np.zeros((1, 2, 3), np.uint8))[:8] == bytes([137]) + b"PNG" + bytes([13, 10, 26, 10])
    True
    """
    rows, columns, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], axis=1)
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
