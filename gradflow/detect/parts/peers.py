"""Numbers of like things, and those that stand apart from the rest.

NOTE [Standing apart]
Siblings are the best reference that a deep model has: what the others of the same kind are like needs no
threshold of its own. But trained siblings differ, some models more than others. So a number stands apart
only if it is off by a factor, *and* by several times what the others differ among themselves; both are
measured in logarithms, from the median of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import numpy as np

from gradflow.records import FlowRecord

FEWEST = 3  # siblings in all: with two, nobody knows which is right
_TIMES = 4.0  # as far from the others' median as the farthest tenth of them


@attrs.frozen
class Odd:
    """One that stands apart.

    Args:
        name: its name.
        value: its number.
        usual: the median of the others'.
    """

    name: str
    value: float
    usual: float

    @property
    def ratio(self) -> float:
        """How many times as large as the others'; 0 where it is zero."""
        return self.value / self.usual


def standing_apart(values: Mapping[str, float], factor: float) -> dict[str, Odd]:
    """Return by name those that stand apart from the others, see NOTE [Standing apart].

    Args:
        values: non-negative numbers by name; those that are not finite do not count.
        factor: how far off it must be at least.

    >>> sorted(standing_apart({"a": 1.0, "b": 1.1, "c": 0.9, "d": 9.0}, 4.0))
    ['d']
    >>> sorted(standing_apart({"a": 1.0, "b": 5.0, "c": 0.2, "d": 9.0}, 4.0))
    []
    """
    known = {name: float(value) for name, value in values.items() if math.isfinite(value) and value >= 0}
    found = {}
    if len(known) < FEWEST:
        return {}
    for name, value in known.items():
        others = np.array([v for other, v in known.items() if other != name])
        usual = float(np.median(others))
        if not usual > 0 or not (others > 0).all():
            continue
        logs = np.log(others / usual)
        spread = float(np.quantile(np.abs(logs), 0.9))
        far = math.inf if value == 0 else abs(math.log(value / usual))
        if far > max(math.log(factor), _TIMES * spread):
            found[name] = Odd(name, value, usual)
    return found


def type_of(record: FlowRecord, module: str) -> str:
    """Return the class name of a module: of its layer calls, or else as its part was measured."""
    known = {block.name: block.type for block in record.parts.blocks}
    known |= {norm.name: norm.type for norm in record.parts.norms}
    known |= {layer.module: layer.type for layer in record.layers}
    return known.get(module, "")
