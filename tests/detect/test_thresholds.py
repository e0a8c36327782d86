"""docs/detectors.md states the thresholds that the factories have, and each docstring gives their reasons."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradflow.detect import (
    bottleneck,
    copied_parts,
    copied_rows,
    copied_units,
    dead,
    deaf_functions,
    decaying_weights,
    drowned_codes,
    exploding,
    fading_rates,
    held_at_zero,
    idle_codes,
    leaking_attention,
    misscaled_norms,
    numerical,
    saturation,
    slow_updates,
    still_sinusoids,
    stray_dropout,
    swallowed_norms,
    tiny_divisors,
    uneven_siblings,
    unheld_parameters,
    unstable,
    vanishing,
)

PAGE = (Path(__file__).parents[2] / "docs" / "detectors.md").read_text(encoding="utf-8")
FACTORIES = [bottleneck, dead, exploding, numerical, saturation, unstable, vanishing]
PARTS = [
    copied_parts,
    copied_rows,
    copied_units,
    deaf_functions,
    decaying_weights,
    drowned_codes,
    fading_rates,
    held_at_zero,
    idle_codes,
    leaking_attention,
    misscaled_norms,
    slow_updates,
    still_sinusoids,
    stray_dropout,
    swallowed_norms,
    tiny_divisors,
    unheld_parameters,
    uneven_siblings,
]


def defaults(factory: Callable[..., Any]) -> dict[str, float]:
    return {name: p.default for name, p in inspect.signature(factory).parameters.items()}


@pytest.mark.parametrize("factory", [*FACTORIES, *PARTS], ids=lambda f: f.__name__)
def test_the_page_states_the_defaults(factory: Callable[..., Any]) -> None:
    name = factory.__name__
    title = f"\n### {name}\n" if factory in PARTS else f"\n## {name.upper()}\n"
    section = re.split(r"\n###? ", PAGE.split(title)[1])[0]
    stated = re.findall(r"^\| `(\w+)` \| ([\d.e+-]+) \| (.+) \|$", section, re.M)
    assert {name: float(value) for name, value, _ in stated} == defaults(factory)
    assert all(len(reason) > 3 for _, _, reason in stated)


@pytest.mark.parametrize("factory", [*FACTORIES, *PARTS], ids=lambda f: f.__name__)
def test_the_docstring_tells_measure_reason_and_look_alikes(factory: Callable[..., Any]) -> None:
    text = inspect.getdoc(factory) or ""
    for part in ("Measured", "Why this is evidence", "Looks alike and is not"):
        assert part in text, part
    for name in defaults(factory):
        assert re.search(rf"^    {name}: ", text, re.M), name


def test_the_thresholds_of_the_default_detectors_are_those_of_the_factories() -> None:
    from gradflow.detect import default_detectors

    named = {"vanishing": vanishing, "exploding": exploding, "dead": dead, "unstable_cv": unstable}
    for name, value in defaults(default_detectors).items():
        factory = named[name.removesuffix("_threshold")]
        assert value == next(iter(defaults(factory).values()))
