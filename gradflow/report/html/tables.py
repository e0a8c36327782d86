"""The tables of the page: layers, parameters, where NaN and Inf were born, and what was measured how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from gradflow.records import FlowRecord, IssueSeverity, LayerRecord, ParameterRecord
from gradflow.report import svg
from gradflow.report.html.pieces import (
    Places,
    badge,
    cell,
    facts,
    middle,
    number,
    percent,
    quantiles,
    section,
    table,
)
from gradflow.report.wording import layer_label, measured_facts

MAX_SPARKLINES = 300  # layers that each get a line over steps; with more, the heat map tells it
MAX_BIRTHS = 400
TABLE_LAYERS = ("#", "Layer", "Type", "Output", "Gradient rms", "Median", "Output rms", "Zeros", "Issue")


def profile_section(layers: Sequence[LayerRecord], places: Places) -> str:
    """Return the gradient over depth, one mark a layer."""
    if not layers:
        return ""
    points = []
    for layer in layers:
        low, mid, high = quantiles(layer.grad_rms)
        label = layer_label(layer.name)
        tip = f"{label}: {number(mid)}"
        if len(layers) <= MAX_SPARKLINES:
            tip = f"{label} ({layer.type}): {number(low)} to {number(high)}, median {number(mid)}"
        worst = places.worst.get(layer.name)
        points.append(svg.Point(label, low, mid, high, _tone(worst), tip))
    return section(
        "Gradient over depth",
        f'<div class="card"><div class="scroll">{svg.profile(points)}</div><div class="legend">'
        "<span>input to the left, loss to the right; mark: median rms of the output gradient, bar: range "
        "over steps, hollow: exactly zero, ×: never reached</span></div></div>",
        "depth",
    )


def _tone(severity: IssueSeverity | None) -> str:
    return f"var(--{severity.value.lower() if severity else 'healthy'})"


def layers_section(record: FlowRecord, places: Places) -> str:
    """Return the table of all layer calls."""
    layers = record.layers
    if not layers:
        return ""
    domain = svg.log_domain([layer.grad_rms for layer in layers])
    lined = len(layers) <= MAX_SPARKLINES
    rows = (_layer_row(layer, places, domain if lined else None) for layer in layers)
    heads = [head for head in TABLE_LAYERS if lined or head != "Gradient rms"]
    right = [i for i, head in enumerate(heads) if head in ("#", "Median", "Output rms", "Zeros")]
    axis = f"lines run from 1e{domain.low:+03.0f} to 1e{domain.high:+03.0f}, logarithmic; ○ exactly zero"
    note = f'<div class="legend"><span>{axis}</span></div>' if lined else ""
    return section(
        "Layers", f'<div class="card">{table(heads, rows, right, "sortable")}{note}</div>', "layers"
    )


def _layer_row(layer: LayerRecord, places: Places, domain: svg.Domain | None) -> str:
    mid, out, zeros = middle(layer.grad_rms), middle(layer.output_rms), middle(layer.output_zero_share)
    worst = places.worst.get(layer.name)
    issues = places.issues.get(layer.name, [])
    mark = f'<a href="#issue-{issues[0]}">{badge(worst.value, worst)}</a>' if worst and issues else ""
    rank = worst.rank if worst else -1
    spark = (
        f"<td>{svg.sparkline(layer.grad_rms, domain, colour=_tone(worst), width=110, height=24)}</td>"
        if domain
        else ""
    )
    return (
        f'<tr id="layer-{places.layers[layer.name]}">{cell(str(layer.order), layer.order)}'
        f"<td><code>{escape(layer_label(layer.name))}</code></td>"
        f'<td class="soft">{escape(layer.type)}</td>'
        f'<td class="soft">{" × ".join(map(str, layer.shape))}</td>{spark}'
        f"{cell(number(mid), mid)}{cell(number(out), out)}{cell(percent(zeros), zeros)}"
        f'<td data-v="{rank}">{mark}</td></tr>'
    )


def numerics_section(record: FlowRecord) -> str:
    """Return the operations that NaN and Inf were born in."""
    if not record.numerics:
        return ""
    heads = ["Step", "Value", "Born in", "Type", "Operation", "Phase", "Its input", "Line", "Loss"]
    rows = (
        f"<tr>{cell(str(n.step), n.step)}<td>{escape(n.value)}</td>"
        f"<td><code>{escape(layer_label(n.layer))}</code></td><td>{escape(n.layer_type)}</td>"
        f"<td><code>{escape(n.op)}</code></td><td>{escape(n.phase)}</td>"
        f"<td>{number(n.input_min)} to {number(n.input_max)}</td>"
        f"<td><code>{escape(n.line or '–')}</code></td>"
        f"<td>{'finite' if n.loss_finite else 'not finite'}</td></tr>"
        for n in record.numerics[:MAX_BIRTHS]
    )
    body = f'<div class="card">{table(heads, rows, (0,), "sortable")}</div>'
    return section("Where NaN and Inf were born", body, "births")


def parameters_section(record: FlowRecord) -> str:
    """Return the table of all parameters."""
    if not record.parameters:
        return ""
    heads = ["Parameter", "Shape", "Norm", "Gradient norm", "Gradient / parameter", ""]
    ratios = {} if record.updates is None else {p.name: middle(p.ratio) for p in record.updates.parameters}
    if ratios:
        heads.insert(5, "Update / parameter")
    rows = (_parameter_row(parameter, ratios) for parameter in record.parameters)
    body = table(heads, rows, range(2, len(heads) - 1), "sortable")
    head = f"Medians over steps of {len(record.parameters)} parameters"
    card = f'<div class="card"><details><summary>{head}</summary>{body}</details></div>'
    return section("Parameters", card, "parameters")


def _parameter_row(parameter: ParameterRecord, ratios: Mapping[str, float]) -> str:
    norm, grad = middle(parameter.norm), middle(parameter.grad_norm)
    ratio = grad / norm if norm > 0 else float("nan")
    step = ratios.get(parameter.name, float("nan"))
    update = cell(number(step), step) if ratios else ""
    return (
        f"<tr><td><code>{escape(parameter.name)}</code></td><td>{' × '.join(map(str, parameter.shape))}</td>"
        f"{cell(number(norm), norm)}{cell(number(grad), grad)}{cell(number(ratio), ratio)}{update}"
        f'<td class="soft">{"" if parameter.trainable else "frozen"}</td></tr>'
    )


def provenance_section(record: FlowRecord) -> str:
    """Return what was measured, how, and what to know to trust it."""
    pairs = measured_facts(record)
    pairs += [(f"{name} version", str(value)) for name, value in record.provenance.versions.items()]
    if record.never_called:
        pairs.append(("never called", ", ".join(record.never_called[:40])))
    return section("What was measured, and how", f'<div class="card">{facts(pairs)}</div>', "how")
