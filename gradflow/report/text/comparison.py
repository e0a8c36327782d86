"""Plain text for a comparison of two records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradflow.records import Issue
from gradflow.report.wording import layer_label

_MOST = 12  # changes shown of each kind
_SMALL = 0.1  # sizes below this are not told: ten percent


def comparison_text(change: Any) -> str:
    """Return what changed, in words: verdicts first, then numbers, then the graph.

    Args:
        change: a `gradflow.comparing.Comparison`.
    """
    lines = [_head(change)]
    lines += _issues("begun", change.begun) + _issues("ended", change.ended)
    lasting = []
    for before, after in change.lasting:
        graver = f"{before.severity.value} -> {after.severity.value}"
        as_before = after.severity.value if before.severity is after.severity else graver
        lasting.append(f"  lasts    [{as_before}] {after.issue_type.value} in {layer_label(after.layer)}")
    lines += _shortened(lasting)
    for label, names in (("only before", change.layers_before), ("only after", change.layers_after)):
        if names:
            lines.append(f"layers {label}: {', '.join(map(layer_label, names[:_MOST]))}{_more(names)}")
    if math.isfinite(change.common_shift) and abs(change.common_shift) >= _SMALL:
        lines += ["", f"All gradients together: {_factor(math.exp(change.common_shift))}."]
    large = [number for number in change.numbers if number.size >= _SMALL]
    if large:
        width = max(len(number.name) for number in large[:_MOST])
        lines += ["", "Largest changes, gradients against the change that all share:"]
        lines += _shortened(
            [f"  {number.name:<{width}}  {number.before:.4g} -> {number.after:.4g}" for number in large]
        )
    if change.graph is not None:
        cut = [("severed", change.graph.severed), ("restored", change.graph.restored)]
        told = [
            f"{word}: {', '.join(f'{u} -> {v}' for u, v in edges[:_MOST])}{_more(edges)}"
            for word, edges in cut
            if edges
        ]
        lines += ["", *told] if told else []
    return "\n".join(lines)


def _head(change: Any) -> str:
    counts = f"{len(change.begun)} issue(s) begun, {len(change.ended)} ended, {len(change.lasting)} lasting"
    changed = sum(number.size >= _SMALL for number in change.numbers)
    return f"gradflow: {counts}; {changed} of {len(change.numbers)} numbers changed by 10 percent or more"


def _issues(word: str, issues: Sequence[Issue]) -> list[str]:
    lines = [
        f"  {word:<8} [{i.severity.value}] {i.issue_type.value} in {layer_label(i.layer)}: {i.description}"
        for i in issues
    ]
    return _shortened(lines)


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _MOST else [*lines[:_MOST], f"  ... {len(lines) - _MOST} more"]


def _more(found: Sequence[Any]) -> str:
    return f" and {len(found) - _MOST} more" if len(found) > _MOST else ""


def _factor(ratio: float) -> str:
    return f"{ratio:.3g} times as large" if ratio >= 1 else f"{1 / ratio:.3g} times smaller"
