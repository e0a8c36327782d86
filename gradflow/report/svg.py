"""Small drawings for the HTML report, as inline SVG text: sparklines and the profile over depth.

Gradients differ by many powers of ten, so every gradient axis is logarithmic. Exact zeros and values
that are not finite have no place on such an axis and are drawn as marks at its lower and upper edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from gradflow.records import Floats
from gradflow.report.wording import shortened

MAX_POINTS = 120  # points per sparkline; more than a pixel can show
MAX_NAMES = 36  # layer names under the profile; beyond, they would overlap
ZERO_COLOUR, BAD_COLOUR = "#64748b", "#b42318"


class Domain(NamedTuple):
    """An axis: the values at its lower and upper edge (of log10, for gradients)."""

    low: float
    high: float


def log_domain(series: Sequence[Floats]) -> Domain:
    """Return the powers of ten that hold every positive finite value of all series."""
    values = np.concatenate([np.asarray(s, dtype=np.float64).ravel() for s in series] or [np.empty(0)])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return Domain(-1.0, 0.0)
    low, high = math.floor(np.log10(values.min())), math.ceil(np.log10(values.max()))
    return Domain(float(low), float(max(high, low + 1)))


def heat(decades: float) -> str:
    """Return a colour for a gradient `decades` powers of ten above (red) or below (blue) a reference.

    >>> heat(0.0), heat(-6.0), heat(6.0)
    ('#64748b', '#1d4ed8', '#c2410c')
    """
    if not math.isfinite(decades):
        return BAD_COLOUR
    share = min(abs(decades) / 6.0, 1.0)
    end = (0x1D, 0x4E, 0xD8) if decades < 0 else (0xC2, 0x41, 0x0C)
    mixed = (round(a + (b - a) * share) for a, b in zip((0x64, 0x74, 0x8B), end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def thinned(values: Floats, limit: int = MAX_POINTS) -> Floats:
    """Return at most `limit` values: the largest of each stretch, so that no spike is lost."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) <= limit:
        return values
    return np.array([_largest(part) for part in np.array_split(values, limit)])


def _largest(part: Floats) -> float:
    known = part[~np.isnan(part)]
    return float(known.max()) if len(known) else float("nan")


def sparkline(values: Floats, domain: Domain, *, colour: str, width: int = 150, height: int = 28) -> str:
    """Return a sparkline of gradients over steps on a logarithmic axis.

    Args:
        values: shape (steps,); NaN, and what is below zero, is a gap; zero and infinity are marks at the
            edges.
        domain: log10 of the lower and upper edge, shared by all that are to be compared.
        colour: of the line.
        width: in pixels.
        height: in pixels.
    """
    values = thinned(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values)
    line = polyline(logs, domain, colour=colour, width=width, height=height)
    marks = []
    for x, value in zip(_positions(len(values), width), values, strict=True):
        if value == 0:
            marks.append(
                f'<circle cx="{x:.1f}" cy="{height - 3}" r="1.8" fill="none" stroke="{ZERO_COLOUR}"/>'
            )
        elif value == math.inf:
            marks.append(f'<rect x="{x - 1.5:.1f}" y="1" width="3" height="5" fill="{BAD_COLOUR}"/>')
    return _svg(width, height, line + "".join(marks), "spark")


def loss_chart(losses: Floats, *, width: int = 220, height: int = 44) -> str:
    """Return a chart of the loss over steps on a linear axis; steps without a finite loss are gaps."""
    losses = thinned(losses)
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return ""
    low, high = float(finite.min()), float(finite.max())
    line = polyline(losses, Domain(low, high), colour="#334155", width=width, height=height)
    return _svg(width, height, line, "loss")


def polyline(values: Floats, domain: Domain, *, colour: str, width: int, height: int) -> str:
    """Return a line through the finite values, broken where there is none; a lone value is a dot."""
    shapes: list[str] = []
    run: list[tuple[float, float]] = []
    for x, value in zip([*_positions(len(values), width), 0.0], [*values, float("nan")], strict=True):
        if math.isfinite(value):
            run.append((x, _height_of(float(value), domain, height)))
            continue
        if len(run) == 1:
            shapes.append(f'<circle cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="2" fill="{colour}"/>')
        elif run:
            points = " ".join(f"{px:.1f},{py:.1f}" for px, py in run)
            shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        run = []
    return "".join(shapes)


def _positions(count: int, width: int) -> list[float]:
    if count == 1:
        return [width / 2]
    return [3 + (width - 6) * i / (count - 1) for i in range(count)]


def _height_of(value: float, domain: Domain, height: int, margin: float = 3.0) -> float:
    share = _share(value, domain)
    return height - margin - (height - 2 * margin) * min(max(share, 0.0), 1.0)


def _share(value: float, domain: Domain) -> float:
    """Return how far up an axis a value stands; half way where the axis has no length."""
    size = max(abs(domain.low), abs(domain.high), abs(value))  # no difference may overflow
    if size == 0:
        return 0.5
    low, high = domain.low / size, domain.high / size
    return (value / size - low) / (high - low) if high > low else 0.5


def _svg(width: float, height: float, body: str, kind: str) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg class="{kind}" {size} role="img">{body}</svg>'


class Point(NamedTuple):
    """One layer in the profile: what is drawn, in which colour, and what hovering over it tells."""

    name: str
    low: float
    middle: float
    high: float
    colour: str
    tip: str


def profile(points: Sequence[Point], *, width: int = 1040) -> str:
    """Return the gradient over depth: one mark per layer, first layer to the left, loss to the right.

    Args:
        points: in the order of execution; `low`, `middle` and `high` are the smallest, median and
            largest gradient over the steps (NaN where not known).
        width: in pixels.
    """
    names = [p.name for p in points] if len(points) <= MAX_NAMES else []
    # Names hang slanted under their marks: half their length, at about 6 pixels a letter, is their depth.
    foot = min(12 + 4.2 * max((len(n) for n in names), default=0), 150.0)
    left, plot = 64, 220
    domain = log_domain([np.array([p.low, p.middle, p.high]) for p in points])
    parts = _grid(domain, left, width, plot)
    gap = (width - left - 40) / max(len(points), 1)
    previous: tuple[float, float] | None = None
    dots: list[str] = []
    for index, point in enumerate(points):
        x = left + gap * (index + 0.5)
        y = _plot_height(point.middle, domain, plot)
        if y is not None:
            if previous is not None:
                start = f'x1="{previous[0]:.1f}" y1="{previous[1]:.1f}"'
                parts.append(f'<line {start} x2="{x:.1f}" y2="{y:.1f}" class="path"/>')
            previous = (x, y)
        dots.append(_mark(point, x, y, domain, plot, gap))
        if names:
            place = f'x="{x:.1f}" y="{plot + 16}" transform="rotate(-32 {x:.1f} {plot + 16})"'
            dots.append(f'<text {place} class="name">{escape(shortened(point.name, 32))}</text>')
    return _svg(width, plot + 14 + foot, "".join(parts + dots), "profile")


def _plot_height(value: float, domain: Domain, plot: int) -> float | None:
    """Return where a gradient is drawn; None where it is not known, or no norm."""
    if math.isnan(value) or value < 0:
        return None
    if value == 0:
        return float(plot)
    return _height_of(math.log10(value), domain, plot, 10.0) if math.isfinite(value) else 4.0


def _grid(domain: Domain, left: int, width: int, plot: int) -> list[str]:
    """Return the lines at powers of ten, at most nine of them, with their labels."""
    stride = max(1, math.ceil((domain.high - domain.low) / 8))
    parts = []
    for power in range(int(domain.low), int(domain.high) + 1, stride):
        y = _height_of(float(power), domain, plot, 10.0)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 20}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" class="tick">1e{power:+03d}</text>')
    return parts


def _mark(point: Point, x: float, y: float | None, domain: Domain, plot: int, gap: float) -> str:
    tip = f"<title>{escape(point.tip)}</title>"
    if y is None:
        return f'<text x="{x:.1f}" y="{plot - 2}" class="none" fill="{point.colour}">×{tip}</text>'
    band = ""
    low, high = (_plot_height(v, domain, plot) for v in (point.low, point.high))
    if low is not None and high is not None and low - high > 1:
        thick = min(8.0, max(gap * 0.5, 1.0))
        band = (
            f'<rect x="{x - thick / 2:.1f}" y="{high:.1f}" width="{thick:.1f}" '
            f'height="{low - high:.1f}" rx="2" fill="{point.colour}" opacity="0.25"/>'
        )
    fill = "#ffffff" if point.middle == 0 else point.colour
    radius = min(5.0, max(gap * 0.4, 1.5))
    look = f'fill="{fill}" stroke="{point.colour}" stroke-width="1.5"'
    return f'{band}<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" {look}>{tip}</circle>'
