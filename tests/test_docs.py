"""The outputs shown in the README and in docs/ are what the code prints today."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("paste_outputs", ROOT / "docs" / "paste_outputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paste_outputs = _script()
PLACES = [
    pytest.param(place, id=f"{page}:{' '.join(place.arguments)[:50].splitlines()[0]}")
    for page in paste_outputs.PAGES
    for place in paste_outputs.places((ROOT / page).read_text(encoding="utf-8"))
]


def difference(shown: str, printed: str) -> str:
    """Return the first line that differs, or nothing.

    Words and whole numbers must be equal. Another processor sums in another order, so a number with a
    fraction may be off by one percent, which is about the last digit shown.
    """
    for a, b in zip([*shown.splitlines(), ""], [*printed.splitlines(), ""], strict=False):
        numbers = list(zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=False))
        alike = all(
            x == y or (x.count(".") == y.count(".") == 1 and math.isclose(float(x), float(y), rel_tol=0.01))
            for x, y in numbers
        )
        if _NUMBER.sub("#", a) != _NUMBER.sub("#", b) or not alike:
            return f"{a!r} is shown, {b!r} is printed; run python docs/paste_outputs.py"
    return "" if shown.count("\n") == printed.count("\n") else "more lines on one side"


@pytest.mark.parametrize("place", PLACES)
def test_what_is_shown_is_what_is_printed(place: Any) -> None:
    pytest.importorskip("sklearn")
    assert difference(place.output, paste_outputs.fresh_output(place)) == ""


@pytest.mark.parametrize("page", paste_outputs.SESSIONS)
def test_commands_of_a_page_print_what_is_shown(page: str) -> None:
    pytest.importorskip("sklearn")
    found = paste_outputs.places((ROOT / page).read_text(encoding="utf-8"))
    assert {place.arguments[2] for place in found} >= {"diagnose", "show", "compare", "graph"}
    for place, output in zip(found, paste_outputs.session_outputs(found), strict=True):
        assert difference(place.output, output) == "", place.arguments


def test_pages_have_the_outputs_they_should() -> None:
    readme, pipelines, graph, jacobians, *kinds = (
        paste_outputs.places((ROOT / page).read_text(encoding="utf-8")) for page in paste_outputs.PAGES
    )
    assert [place.arguments[-1] for place in readme] == [
        "examples/vanishing_sigmoid.py",
        "examples/exploding_linear.py",
        "examples/dead_relu.py",
        "examples/dead_relu.py:repaired",
    ]
    assert len(graph) == 2
    assert jacobians
    assert all(kinds)
    (measured,) = kinds[-1]
    (mended,) = kinds[-2]
    assert mended.arguments[1].count("\n") < 25, "a remedy of one's own takes few lines"
    definition, use = measured.arguments[1].split("\n\ntorch.manual_seed(0)\n")
    assert definition.count("\n") < 60, "a measurement of one's own takes less than 60 lines"
    assert "from_json" in use
    for page in pipelines:
        assert page.arguments[1].count("\n") < 35, "a pipeline of one's own takes few lines"
        assert "gf.Issue(" in page.arguments[1]
    _, causes = pipelines
    assert causes.output.splitlines() == [
        "VANISHING in 0 explains ['2']",
        "CLOSED_GATE in 4 explains ['0', '2']",
    ]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("loss 2.303 -> 2.30\n", "loss 2.304 -> 2.31\n", True),
        ("norm 4.85e-04\n", "norm 4.86e-04\n", True),
        ("norm 4.85e-04\n", "norm 4.85e-05\n", False),
        ("12 nodes\n", "13 nodes\n", False),
        ("fc2.weight\n", "fc3.weight\n", False),
        ("a\n", "a\nb\n", False),
        ("a\nb\n", "a\n", False),
    ],
)
def test_difference_forgives_the_last_digit_only(shown: str, printed: str, same: bool) -> None:
    assert (difference(shown, printed) == "") is same


def test_places_are_found_and_read() -> None:
    text = (
        "```python\nprint(1)\n```\n"
        "<!-- output of: the block above -->\n```text\n1\n```\n"
        "<!-- output of: gradflow diagnose 'a b.py' -->\n```text\n```\n"
        "```python\nprint(2)\n```\n"
        "<!-- output of: the blocks above -->\n```text\n```\n"
    )
    first, second, third = paste_outputs.places(text)
    assert third.arguments == ("-c", "print(1)\n\nprint(2)\n")
    assert (first.arguments, first.output) == (("-c", "print(1)\n"), "1\n")
    assert (second.arguments, second.output) == (("-m", "gradflow", "diagnose", "a b.py"), "")
    assert paste_outputs.fresh_output(first) == "1\n"
