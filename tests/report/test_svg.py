"""The drawings: where a value stands, what becomes of values that have no place, and long series."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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

COORDINATES = ("x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "width", "height", "points", "transform")
EXTREMES = [0.0, -0.0, 5e-324, 1e-310, 2.2e-308, 1.0, -1.0, 1e15, 1.6e19, 1e308, 1.7976931348623157e308]
series = st.lists(
    st.floats() | st.sampled_from([*EXTREMES, *(-v for v in EXTREMES), np.nan, np.inf, -np.inf]), max_size=8
) | st.builds(
    lambda value, count: [value] * count, st.floats() | st.sampled_from(EXTREMES), st.integers(1, 200)
)


def check_drawn(svg: str, width: float, height: float) -> None:
    """Check that all coordinates of a drawing are finite numbers, and those of its marks within it."""
    for element in ElementTree.fromstring(svg).iter() if svg else ():
        for name in COORDINATES:
            words = re.findall(r"[^\s,()]+", element.attrib.get(name, "").removeprefix("rotate"))
            values = [float(word) for word in words]
            assert all(math.isfinite(value) for value in values), (name, element.attrib)
        for name, limit in (("cx", width), ("cy", height), ("y1", height), ("y2", height)):
            assert -1 <= float(element.attrib.get(name, 0)) <= limit + 1, (name, element.attrib)


@settings(deadline=None)
@given(series)
def test_every_loss_is_drawn_at_finite_places(values: list[float]) -> None:
    losses = np.array(values, dtype=np.float64)
    drawn = loss_chart(losses)
    check_drawn(drawn, 220, 44)
    assert bool(drawn) == bool(np.isfinite(losses).any())
    heights = [y for line in points_of(drawn) for _, y in line]
    assert all(3.0 <= y <= 41.0 for y in heights)
    if len(values) > 1 and len(set(values)) == 1 and np.isfinite(values[0]):
        assert set(heights) == {22.0}  # what is constant runs in the middle


@settings(deadline=None)
@given(st.lists(series, min_size=1, max_size=3))
def test_every_gradient_is_drawn_at_finite_places(several: list[list[float]]) -> None:
    arrays = [np.array(values, dtype=np.float64) for values in several]
    domain = log_domain(arrays)
    assert domain.low < domain.high
    for values in arrays:
        check_drawn(sparkline(values, domain, colour="red"), 150, 28)
        check_drawn(sparkline(values, log_domain([]), colour="red"), 150, 28)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats() | st.sampled_from(EXTREMES)] * 3), max_size=40))
def test_every_profile_is_drawn_at_finite_places(layers: list[tuple[float, float, float]]) -> None:
    points = [Point(f"layer{i}", *numbers, "green", "tip") for i, numbers in enumerate(layers)]
    drawn = profile(points)
    check_drawn(drawn, 1040, 220)
    root = ElementTree.fromstring(drawn)
    unknown = sum(math.isnan(p.middle) or p.middle < 0 for p in points)
    assert len([t for t in root.findall("text") if t.get("class") == "none"]) == unknown
    assert len(root.findall("circle")) == len(points) - unknown


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_larger_losses_stand_higher_wherever_they_lie(one: float, other: float) -> None:
    low, high = sorted((one, other))
    (((_, y_low), (_, y_high)),) = points_of(loss_chart(np.array([low, high])))
    assert y_low >= y_high
    if high / 2 - low / 2 > 1e-12 * max(abs(low), abs(high)) and high - low > 1e-300:
        assert (y_low, y_high) == (41.0, 3.0)


@given(st.floats())
def test_heat_is_a_colour_for_any_number(decades: float) -> None:
    assert re.fullmatch("#[0-9a-f]{6}", heat(decades))


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
