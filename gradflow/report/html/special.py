"""What special measurements saw, as pictures: attention by head, gradient through time, actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from gradflow.records import AttentionRecord, Floats, FlowRecord
from gradflow.records.recurrent import mean_profile
from gradflow.report.html.curves import chart, finite_middle
from gradflow.report.html.pieces import number, section, shortened

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
    grids = [
        _heads("Entropy, as a share of its maximum", layers, lambda a: a.entropy_share),
        _heads("Weight on the first key", layers, lambda a: a.first_weight),
        _heads(
            "Gradient at the head, as a share of the largest", layers, lambda a: a.head_grad, relative=True
        ),
    ]
    return f'<div class="card figures">{"".join(grids)}</div>'


def _heads(
    title: str, layers: Sequence[AttentionRecord], pick: Callable[[AttentionRecord], Floats], *,
    relative: bool = False,
) -> str:  # fmt: skip
    """Return a grid of layers × heads of a number in [0, 1]: the darker, the larger."""
    values = [[finite_middle(column) for column in pick(layer).T] for layer in layers]
    largest = max((v for row in values for v in row if v == v), default=0.0) if relative else 1.0
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
        series = [
            (name, profile)
            for level in layer.levels
            for name, profile in (
                (f"{level.level}: whole loss", mean_profile(level.gradient_profile)),
                (f"{level.level}: last step read", mean_profile(level.readout_profile)),
            )
            if len(profile) and np.nanmax(profile, initial=0.0) > 0
        ]
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
        if actions.discrete:
            series = [
                ("entropy, share of its maximum", actions.entropy_share),
                ("largest probability", actions.max_prob),
                ("samples that are as good as decided", actions.deterministic_share),
            ]
        else:
            deviation = actions.deviation
            series = [
                ("smallest deviation", deviation.std_min), ("mean deviation", deviation.std_mean),
                ("largest deviation", deviation.std_max), ("size of the mean action", deviation.mean_rms),
            ]  # fmt: skip
        figures.append(chart(f"{heads} ({actions.family})", series, axis="look"))
    return f'<div class="card figures">{"".join(figures)}</div>' if figures else ""
