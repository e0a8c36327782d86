"""The drawings: where a value stands, what becomes of values that have no place, and long series."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from gradflow.report.svg import (
    MAX_NAMES,
    MAX_POINTS,
    Domain,
    Point,
    heat,
    log_domain,
    loss_chart,
    polyline,
    profile,
    sparkline,
    thinned,
)


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    """Return the points of every polyline in a drawing."""
    texts = re.findall(r'points="([^"]*)"', svg)
    return [[tuple(map(float, p.split(","))) for p in text.split()] for text in texts]  # type: ignore[misc]


def test_log_domain_holds_all_positive_finite_values() -> None:
    assert log_domain([np.array([2e-5, np.nan]), np.array([0.0, 30.0, np.inf])]) == Domain(-5.0, 2.0)
    assert log_domain([np.array([1.0])]) == Domain(0.0, 1.0)
    assert log_domain([np.array([0.0])]) == log_domain([]) == Domain(-1.0, 0.0)


def test_sparkline_puts_powers_of_ten_at_equal_distances() -> None:
    (line,) = points_of(sparkline(np.array([1e-4, 1e-2, 1.0]), Domain(-4, 0), colour="red"))
    assert line == [(3.0, 25.0), (75.0, 14.0), (147.0, 3.0)]


def test_sparkline_breaks_at_nan_and_marks_zero_and_infinity() -> None:
    svg = sparkline(np.array([1.0, 1.0, np.nan, 0.0, np.inf, 1.0, 1.0]), Domain(-1, 1), colour="red")
    assert [len(line) for line in points_of(svg)] == [2, 2]
    assert (svg.count("<circle"), svg.count("<rect")) == (1, 1)


def test_a_lone_value_is_a_dot() -> None:
    svg = polyline(np.array([np.nan, 5.0, np.nan]), Domain(0, 10), colour="red", width=106, height=26)
    assert svg == '<circle cx="53.0" cy="13.0" r="2" fill="red"/>'


def test_thinning_keeps_the_spike() -> None:
    values = np.full(10_000, 1.0)
    values[5_017] = 99.0
    values[:300] = np.nan
    short = thinned(values)
    assert len(short) == MAX_POINTS
    assert np.nanmax(short) == 99.0
    assert np.isnan(short[0])
    np.testing.assert_array_equal(thinned(values[:MAX_POINTS]), values[:MAX_POINTS])


def test_heat_is_blue_below_and_red_above_the_usual() -> None:
    def channels(colour: str) -> list[int]:
        return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]

    red_low, _, blue_low = channels(heat(-3.0))
    red_high, _, blue_high = channels(heat(3.0))
    assert blue_low > red_low
    assert red_high > blue_high
    assert heat(-60.0) == heat(-6.0) != heat(-3.0)
    assert heat(float("inf")) == "#b42318"


def test_loss_chart_leaves_out_what_is_not_finite() -> None:
    (line,) = points_of(loss_chart(np.array([np.inf, 3.0, 1.0, 2.0])))
    assert [y for _, y in line] == [3.0, 41.0, 22.0]
    assert points_of(loss_chart(np.array([2.0, 2.0])))[0][0][1] == 22.0
    assert loss_chart(np.array([np.nan])) == ""


@pytest.mark.parametrize(("count", "names"), [(MAX_NAMES, MAX_NAMES), (MAX_NAMES + 1, 0)])
def test_profile_has_one_mark_per_layer_and_names_while_they_fit(count: int, names: int) -> None:
    points = [Point(f"fc{i}", 0.5, 1.0, 2.0, "green", f"tip {i}") for i in range(count)]
    root = ElementTree.fromstring(profile(points))
    assert len(root.findall("circle")) == count
    assert [c.findtext("title") for c in root.findall("circle")][:2] == ["tip 0", "tip 1"]
    assert len([t for t in root.findall("text") if t.get("class") == "name"]) == names
    xs = [float(c.attrib["cx"]) for c in root.findall("circle")]
    assert xs == sorted(xs)


def test_profile_draws_zero_hollow_and_unreached_as_a_cross() -> None:
    nan = float("nan")
    points = [
        Point("zero", 0.0, 0.0, 0.0, "green", "zero"),
        Point("never", nan, nan, nan, "green", "never"),
        Point("inf", 1.0, float("inf"), float("inf"), "green", "inf"),
        Point("fine", 1.0, 1.0, 1.0, "green", "fine"),
    ]
    root = ElementTree.fromstring(profile(points))
    fills = {c.findtext("title"): c.attrib["fill"] for c in root.findall("circle")}
    assert fills == {"zero": "#ffffff", "inf": "green", "fine": "green"}
    crosses = [t for t in root.findall("text") if t.get("class") == "none"]
    assert [t.findtext("title") for t in crosses] == ["never"]


def test_profile_grid_has_few_lines_even_over_a_huge_range() -> None:
    root = ElementTree.fromstring(profile([Point("a", 1e-300, 1.0, 1e300, "green", "a")]))
    ticks = [t.text for t in root.findall("text") if t.get("class") == "tick"]
    assert 3 <= len(ticks) <= 10
    assert ticks[0] == "1e-300"
