"""The HTML report: one file with its style and drawings inside, that loads nothing from anywhere.

Every text that comes from the model (names, types, messages) is escaped on its way in; the page is
well-formed XML besides, so that a test can parse it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from gradflow.records import (
    Cause,
    Floats,
    FlowRecord,
    Issue,
    IssueSeverity,
    LayerRecord,
    TrialsRecord,
)
from gradflow.report import svg
from gradflow.report.style import COLOURS, HEALTHY_COLOUR, STYLE
from gradflow.report.wording import (
    healthy_layers,
    layer_label,
    loss_line,
    measured_facts,
    model_line,
    serious_issues,
    severity_counts,
    trials_facts,
    trials_line,
    verdict,
)

MAX_ROWS = 400  # layers in the table and the profile; the sick ones are always among them


def report_html(
    record: FlowRecord,
    issues: Sequence[Issue],
    causes: Sequence[Cause],
    lines: Sequence[str] = (),
    trials: TrialsRecord | None = None,
) -> str:
    """Return the report as the text of one self-contained HTML page.

    Args:
        record: what was measured.
        issues: in the order to be shown.
        causes: what explains them.
        lines: what the pipeline's summaries tell of the record.
        trials: what became of the model when fixes were tried.
    """
    worst = _worst_by_layer(issues)
    layers = _shown_layers(record, worst)
    body = "".join(
        [
            _verdict_section(record, issues, causes),
            _causes_section(causes, trials),
            _profile_section(layers, worst),
            _issues_section(issues),
            _lines_section(lines),
            _layers_section(record, layers, worst),
            _numerics_section(record),
            _parameters_section(record),
            _provenance_section(record),
        ]
    )
    title = f"gradflow: {record.provenance.model or 'model'}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


# ---------------------------------------------------------------------------- small pieces


def _worst_by_layer(issues: Sequence[Issue]) -> dict[str, IssueSeverity]:
    worst: dict[str, IssueSeverity] = {}
    for issue in issues:
        if issue.layer not in worst or issue.severity > worst[issue.layer]:
            worst[issue.layer] = issue.severity
    return worst


def _shown_layers(record: FlowRecord, worst: Mapping[str, IssueSeverity]) -> list[LayerRecord]:
    """Return the layers that get a row: all, or the sick ones and the first others up to the limit."""
    room = MAX_ROWS - sum(layer.name in worst for layer in record)
    shown = []
    for layer in record:
        if layer.name in worst:
            shown.append(layer)
        elif room > 0:
            shown.append(layer)
            room -= 1
    return shown


def _tone(severity: IssueSeverity | None) -> str:
    return HEALTHY_COLOUR if severity is None else COLOURS[severity]


def _badge(text: str, severity: IssueSeverity | None, kind: str = "badge") -> str:
    return f'<span class="{kind}" style="--tone:{_tone(severity)}">{escape(text)}</span>'


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{rows}</dl>'


def _number(value: Any) -> str:
    """Return a number as the page shows it: integers whole, floats to three digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if np.isnan(value):
        return "–"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _quantiles(values: Floats) -> tuple[float, float, float]:
    """Return the smallest, the median and the largest of what was measured; NaN where nothing was."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing measured: NaN is the answer
        return float(np.nanmin(values)), float(np.nanmedian(values)), float(np.nanmax(values))


def _middle(values: Floats) -> float:
    return _quantiles(values)[1] if len(values) else float("nan")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int]) -> str:
    """Return a table of cells that are HTML already; the columns in `numbers` are set right."""
    kinds = [' class="number"' if i in set(numbers) else "" for i in range(len(heads))]
    top = "".join(f"<th{kind}>{escape(head)}</th>" for head, kind in zip(heads, kinds, strict=True))
    lines = (
        "<tr>" + "".join(f"<td{k}>{c}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


# -------------------------------------------------------------------------------- sections


def _verdict_section(record: FlowRecord, issues: Sequence[Issue], causes: Sequence[Cause]) -> str:
    serious = serious_issues(issues)
    worst = max((issue.severity for issue in serious), default=None)
    counts = " ".join(
        _badge(f"{count} {severity.value}", severity) for severity, count in severity_counts(issues)
    )
    if not counts:
        counts = _badge("HEALTHY", None)
    mechanism = f"<p>{escape(causes[0].mechanism)}</p>" if causes and serious else ""
    healthy = f"{len(healthy_layers(record, issues))} of {len(record.layers)} layer calls have no issue"
    answer = verdict(issues, causes)
    return (
        f'<section class="card verdict" style="--tone:{_tone(worst)}"><div class="answer">'
        f'<div class="eyebrow">gradflow · {escape(model_line(record))}</div>'
        f"<h1>{escape(answer[0].upper() + answer[1:])}</h1>{mechanism}"
        f'<p>{counts} <span class="soft">{escape(healthy)}</span></p></div>'
        f'<div><div class="eyebrow">loss over {record.steps} steps</div>'
        f'{svg.loss_chart(record.losses)}<div class="mono">{escape(loss_line(record))}</div></div></section>'
    )


def _causes_section(causes: Sequence[Cause], trials: TrialsRecord | None) -> str:
    if not causes:
        return ""
    cards = []
    for number, cause in enumerate(causes, start=1):
        worst = max((issue.severity for issue in cause.issues), default=IssueSeverity.INFO)
        share = f"{100 * min(max(0.0, cause.confidence), 1.0):.0f}%"  # 0 for NaN
        evidence = _list(cause.evidence) if cause.evidence else ""
        explained = " ".join(
            _badge(f"{i.issue_type.value} {layer_label(i.layer)}", i.severity, "badge hollow")
            for i in cause.issues[:24]
        )
        more = f" and {len(cause.issues) - 24} more" if len(cause.issues) > 24 else ""
        cards.append(
            f'<div class="card side" style="--tone:{COLOURS[worst]}"><h3>{number}. '
            f"{escape(cause.issue_type.value)} in <code>{escape(layer_label(cause.layer))}</code></h3>"
            f"<p>{escape(cause.mechanism)}</p>"
            f'<p class="soft">Confidence {cause.confidence:.2f} <span class="bar">'
            f'<i style="width:{share}"></i></span> {escape(cause.reason)}</p>'
            f"{_tried(cause, trials)}{evidence}"
            f'<p class="soft">Explains {explained}{more}</p></div>'
        )
    how = f'<p class="soft">{escape(trials_line(trials))}</p>' if trials is not None else ""
    return f"<h2>Causes</h2>{how}{''.join(cards)}"


def _tried(cause: Cause, trials: TrialsRecord | None) -> str:
    """Return what trials say of a cause: the best remedy, both loss curves and its code, then the others."""
    facts = trials_facts(cause, trials)
    if trials is None or not facts:
        return ""
    lines = [f"{label}: {text}" for label, text in facts]
    best = trials.best(cause)
    if best is None:
        return _list(lines)
    chart = svg.two_losses(best.losses_without, best.losses_with)
    return (
        f"<p><b>{escape(lines[0])}</b></p>{chart}"
        f'<p class="soft">loss without (grey) and with it (green)</p>'
        f'<pre class="mono">{escape(best.code)}</pre>{_list(lines[1:]) if lines[1:] else ""}'
    )


def _issues_section(issues: Sequence[Issue]) -> str:
    if not issues:
        return ""
    cards = []
    for issue in issues:
        actions = (
            f"<h3>What to change</h3>{_list(issue.recommended_actions)}" if issue.recommended_actions else ""
        )
        pairs = [(name, _number(value)) for name, value in issue.metrics.items()]
        metrics = f"<details><summary>Evidence</summary>{_facts(pairs)}</details>" if pairs else ""
        cards.append(
            f'<div class="card side" style="--tone:{COLOURS[issue.severity]}">'
            f"<h3>{_badge(issue.severity.value, issue.severity)} {escape(issue.issue_type.value)} in "
            f'<code>{escape(layer_label(issue.layer))}</code> <span class="soft">{escape(issue.layer_type)}, '
            f"magnitude {_number(float(issue.magnitude))}</span></h3>"
            f"<p>{escape(issue.description)}</p>{actions}{metrics}</div>"
        )
    return f"<h2>Issues</h2>{''.join(cards)}"


def _lines_section(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    text = escape("\n".join(lines))
    return f'<h2>Besides</h2><div class="card"><pre class="mono">{text}</pre></div>'


def _profile_section(layers: Sequence[LayerRecord], worst: Mapping[str, IssueSeverity]) -> str:
    if not layers:
        return ""
    points = []
    for layer in layers:
        low, middle, high = _quantiles(layer.grad_rms) if len(layer.grad_rms) else (float("nan"),) * 3
        label = layer_label(layer.name)
        tip = f"{label} ({layer.type}): {_number(low)} to {_number(high)}, median {_number(middle)}"
        points.append(svg.Point(label, low, middle, high, _tone(worst.get(layer.name)), tip))
    keys = [("no issue", HEALTHY_COLOUR)] + [(s.value, c) for s, c in COLOURS.items() if s in worst.values()]
    legend = "".join(f'<span><b style="background:{colour}"></b>{name}</span>' for name, colour in keys)
    return (
        "<h2>Gradient over depth</h2>"
        f'<div class="card">{svg.profile(points)}<div class="legend">{legend}'
        "<span>input to the left, loss to the right; mark: median rms of the output gradient, bar: range "
        "over steps, hollow: exactly zero, ×: never reached</span></div></div>"
    )


def _layers_section(
    record: FlowRecord, layers: Sequence[LayerRecord], worst: Mapping[str, IssueSeverity]
) -> str:
    if not layers:
        return ""
    domain = svg.log_domain([layer.grad_rms for layer in layers])
    middles = {layer.name: _middle(layer.grad_rms) for layer in layers}
    usual = [value for value in middles.values() if np.isfinite(value) and value > 0]
    centre = float(np.median(np.log10(usual))) if usual else 0.0
    rows = [_layer_row(layer, middles[layer.name], centre, domain, worst.get(layer.name)) for layer in layers]
    heads = ["#", "Layer", "Type", "Output", "Gradient rms over steps", "Median", "Output rms", "Zeros", ""]
    cut = len(record.layers) - len(layers)
    note = f'<p class="soft">{cut} more layer calls without an issue are not shown.</p>' if cut else ""
    axis = f"1e{domain.low:+03.0f} to 1e{domain.high:+03.0f}"
    return (
        f'<h2>Layers</h2><div class="card">{_table(heads, rows, (0, 5, 6, 7))}{note}'
        f'<div class="legend"><span>every sparkline runs from {axis}, logarithmic</span>'
        f'<span>smaller than the median layer<i class="scale"></i>larger (six powers of ten each way)</span>'
        "<span>○ exactly zero</span></div></div>"
    )


def _layer_row(
    layer: LayerRecord, middle: float, centre: float, domain: svg.Domain, severity: IssueSeverity | None
) -> list[str]:
    decades = float(np.log10(middle)) - centre if middle > 0 else 0.0
    colour = svg.heat(decades) if not np.isinf(middle) else svg.BAD_COLOUR
    mark = _badge(severity.value, severity) if severity else ""
    return [
        str(layer.order),
        f"<code>{escape(layer_label(layer.name))}</code>",
        f'<span class="soft">{escape(layer.type)}</span>',
        f'<span class="soft">{" × ".join(map(str, layer.shape))}</span>',
        svg.sparkline(layer.grad_rms, domain, colour=colour),
        f'<span style="color:{colour}">{_number(middle)}</span>',
        _number(_middle(layer.output_rms)),
        _percent(_middle(layer.output_zero_share)),
        mark,
    ]


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.0f}%"


def _numerics_section(record: FlowRecord) -> str:
    if not record.numerics:
        return ""
    heads = ["Step", "Value", "Born in", "Type", "Operation", "Phase", "Its input", "Line", "Loss"]
    rows = [
        [
            str(n.step),
            escape(n.value),
            f"<code>{escape(layer_label(n.layer))}</code>",
            escape(n.layer_type),
            f"<code>{escape(n.op)}</code>",
            escape(n.phase),
            f"{_number(n.input_min)} to {_number(n.input_max)}",
            f"<code>{escape(n.line or '–')}</code>",
            "finite" if n.loss_finite else "not finite",
        ]
        for n in record.numerics[:MAX_ROWS]
    ]
    return f'<h2>Where NaN and Inf were born</h2><div class="card">{_table(heads, rows, (0,))}</div>'


def _parameters_section(record: FlowRecord) -> str:
    if not record.parameters:
        return ""
    heads = ["Parameter", "Shape", "Norm", "Gradient norm", "Gradient / parameter", ""]
    rows = []
    for parameter in record.parameters[:MAX_ROWS]:
        norm, grad = _middle(parameter.norm), _middle(parameter.grad_norm)
        state = "" if parameter.trainable else "frozen"
        rows.append(
            [
                f"<code>{escape(parameter.name)}</code>",
                " × ".join(map(str, parameter.shape)),
                _number(norm),
                _number(grad),
                _number(grad / norm if norm > 0 else float("nan")),
                f'<span class="soft">{state}</span>',
            ]
        )
    cut = len(record.parameters) - len(rows)
    note = f'<p class="soft">{cut} more are not shown.</p>' if cut else ""
    table = _table(heads, rows, (2, 3, 4))
    count = len(record.parameters)
    return (
        f'<h2>Parameters</h2><div class="card"><details><summary>Medians over steps of {count} parameters'
        f"</summary>{table}{note}</details></div>"
    )


def _provenance_section(record: FlowRecord) -> str:
    pairs = measured_facts(record)
    pairs += [(f"{name} version", str(value)) for name, value in record.provenance.versions.items()]
    if record.never_called:
        pairs.append(("never called", ", ".join(record.never_called[:40])))
    return f'<h2>What was measured, and how</h2><div class="card">{_facts(pairs)}</div>'
