"""Attention layers as a table of plain text."""

from __future__ import annotations

from collections.abc import Mapping

from gradflow.records import AttentionStats

_COLUMNS = (
    ("entropy", "mean_entropy"),
    ("share", "entropy_share"),
    ("largest", "max_attention"),
    ("heads differ", "head_diversity"),
    ("residual in", "input_residual"),
    ("out", "rank_collapse"),
    ("branch", "branch_share"),
)


def attention_text(stats: Mapping[str, AttentionStats]) -> str:
    """Return a table of attention layers, a line each; `-` for NaN.

    Args:
        stats: by the layer's name, in the order to be shown.

    >>> print(attention_text({}))
    No attention was seen.
    """
    if not stats:
        return "No attention was seen."
    names = [name or "(model)" for name in stats]
    width = max(len("attention"), *map(len, names))
    lines = ["  ".join(["attention".ljust(width), *(title.rjust(5) for title, _ in _COLUMNS)])]
    for name, layer in zip(names, stats.values(), strict=True):
        cells = [_number(getattr(layer, field)).rjust(max(len(title), 5)) for title, field in _COLUMNS]
        lines.append("  ".join([name.ljust(width), *cells]))
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"
