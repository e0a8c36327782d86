"""Small pieces of HTML that the sections of the report share, and how it shows numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import attrs
import numpy as np

from gradflow.records import Floats, FlowRecord, Issue, IssueSeverity
from gradflow.report.html.style import NAMES
from gradflow.report.wording import number as number


@attrs.frozen
class Places:
    """Where things stand on the page, so that one can lead to another.

    Args:
        layers: by name of a layer call, its place in the order of execution.
        boxes: by name of a layer call, the place of its box in the picture.
        issues: by name of a layer, the places of its issues.
        worst: by name of a layer, its gravest severity.
    """

    layers: Mapping[str, int]
    boxes: Mapping[str, int]
    issues: Mapping[str, list[int]]
    worst: Mapping[str, IssueSeverity]

    @classmethod
    def of(cls, record: FlowRecord, issues: Sequence[Issue], boxes: Mapping[str, int]) -> Places:
        """Return the places of a report; an issue of a module that is no layer is at its first layer."""
        found: dict[str, list[int]] = {}
        worst: dict[str, IssueSeverity] = {}
        for place, issue in enumerate(issues):
            found.setdefault(issue.layer, []).append(place)
            worst[issue.layer] = max(worst.get(issue.layer, issue.severity), issue.severity)
        layers = {layer.name: i for i, layer in enumerate(record.layers)}
        boxes = dict(boxes)
        for name in found:
            inner = (call for call in layers if call.startswith((f"{name}.", f"{name}@")))
            if name and name not in boxes and (first := next((n for n in inner if n in boxes), None)):
                boxes[name] = boxes[first]
        return cls(layers, boxes, found, worst)


def badge(text: str, severity: IssueSeverity | None, kind: str = "badge") -> str:
    """Return a word on the colour of a severity; None is healthy."""
    return f'<span class="{kind} {NAMES[severity]}">{escape(text)}</span>'


def list_of(lines: Iterable[str]) -> str:
    """Return lines as a list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return (name, value) pairs, one a line."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{rows}</dl>'


def percent(share: float) -> str:
    """Return a share in percent."""
    return "–" if math.isnan(share) else f"{100 * share:.0f}%"


def quantiles(values: Floats) -> tuple[float, float, float]:
    """Return the smallest, the median and the largest of what was measured; NaN where nothing was."""
    if not len(values):
        return math.nan, math.nan, math.nan
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing measured: NaN is the answer
        return float(np.nanmin(values)), float(np.nanmedian(values)), float(np.nanmax(values))


def middle(values: Floats) -> float:
    """Return the median of what was measured; NaN where nothing was."""
    return quantiles(values)[1]


def cell(text: str, value: float | None = None) -> str:
    """Return a table's cell of HTML; `value` is what it sorts by, if not its text."""
    if value is None:
        return f"<td>{text}</td>"
    key = "" if math.isnan(value) else f"{value:.6g}" if math.isfinite(value) else f"{'-' * (value < 0)}1e999"
    return f'<td class="number" data-v="{key}">{text}</td>'


def table(heads: Sequence[str], rows: Iterable[str], numbers: Iterable[int], kind: str = "") -> str:
    """Return a table of rows that are HTML already; the columns in `numbers` are set right."""
    right = set(numbers)
    kinds = ("number" if i in right else "word" for i in range(len(heads)))
    top = "".join(
        f'<th class="{kind}" scope="col">{escape(head)}</th>' for kind, head in zip(kinds, heads, strict=True)
    )
    body = "".join(rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(title: str, body: str, name: str) -> str:
    """Return a section with its title, or nothing where it has no body."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>' if body else ""
