"""From the rows of a history to the numbers of one kind over the steps."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from gradflow.functional.run.history import History
from gradflow.functional.run.rows import NORMS
from gradflow.records import Floats


def series(history: History, kind: str) -> dict[Hashable, tuple[Floats, Floats]]:
    """Return, by key, the numbers of a kind over the steps and the element counts behind them.

    Shapes (steps,). Where a step has none, the number is NaN and its count 0; several (the outputs of one
    call) are added, norms by their squares.
    """
    joined = np.hypot if kind in NORMS else np.add
    steps, found = len(history.rows), {}
    for layout, (at, values, counts) in history.stacked().items():
        for position, key in layout.of_kind.get(kind, ()):
            if key not in found:
                found[key] = (np.full(steps, np.nan), np.zeros(steps))
            total, number = found[key]
            both = joined(total[at], values[position])
            total[at] = np.where(number[at] > 0, both, values[position])
            number[at] += counts[position]
    return found
