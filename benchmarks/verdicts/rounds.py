"""First contact: what gradflow said of cases that nobody who shaped its rules had seen, round by round.

A round's cases come from public reports. They were built, and their labels checked with plain PyTorch and
committed, before gradflow was run on them. The figures are those of that first run, and are never improved;
afterwards the cases are a part of the zoo like all others. They stand in rounds.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Round:
    """The first score on one set of cases.

    Args:
        name: the prefix of its cases' ids.
        date: of the score.
        sick: number of sick cases, each with its repair.
        healthy: number of healthy cases.
        found: sick ones of which every expected pair was told.
        cause: sick ones whose first cause was an expected pair.
        alarms_healthy: healthy ones with a verdict of MEDIUM or above.
        alarms_repaired: repaired ones with such a verdict.
        missed: why, by id, what was not found was not.
        alarmed: why, by id, what is well was flagged.
    """

    name: str
    date: str
    sick: int
    healthy: int
    found: int
    cause: int
    alarms_healthy: int
    alarms_repaired: int
    missed: dict[str, str] = field(default_factory=dict)
    alarmed: dict[str, str] = field(default_factory=dict)


ROUNDS = tuple(Round(**row) for row in json.loads(Path(__file__).with_suffix(".json").read_text()))
