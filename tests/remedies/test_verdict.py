"""What trials say of a remedy: the gain in closed form, its laws, and the verdict's rules."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.records import Cause, Issue, IssueSeverity, IssueType, TrialVerdict
from gradflow.remedies.kinds.optimizing import clipped
from gradflow.remedies.kinds.structure import norm_behind
from gradflow.remedies.trials.verdict import Outcome, effect, gain, is_clear

ISSUE = Issue(
    layer="fc", layer_type="Linear", issue_type=IssueType.DEAD, severity=IssueSeverity.HIGH,
    description="", magnitude=1.0,
)  # fmt: skip
CAUSE = Cause(layer="fc", issue_type=IssueType.DEAD, mechanism="", issues=[ISSUE], confidence=0.9)
OTHER = attrs.evolve(ISSUE, issue_type=IssueType.EXPLODING, layer="out")


def line(start: float, end: float, steps: int = 50) -> np.ndarray:
    """A loss that is at its end for the last fifth."""
    fall = np.linspace(start, end if np.isfinite(end) else start, steps - steps // 5)
    return np.concatenate([fall, np.full(steps // 5, end)])


def outcome(losses: np.ndarray, *issues: Issue) -> Outcome:
    return Outcome(losses, issues, 0.0)


@pytest.mark.parametrize(
    ("without", "treated", "expected"),
    [
        (line(2.0, 2.0), line(2.0, 1.0), 1.0),  # one learns, the other does not
        (line(2.0, 1.5), line(2.0, 1.0), 0.5),  # half of the fall was missing
        (line(2.0, 1.0), line(2.0, 1.5), -0.5),
        (line(2.0, 8.0), line(2.0, 5.0), 0.5),  # half of the rise is undone
        (line(1000.0, 10.0), line(4.0, 1.0), 1.0),  # the lower start counts: 9 of 9
        (line(2.0, 0.2), line(2.0, 0.1), 0.25),  # halved near the end: half of a half
        (line(2.0, np.nan), line(2.0, 1.9), 1.0),
        (line(2.0, 1.0), line(2.0, np.inf), -1.0),
        (line(2.0, np.inf), line(2.0, np.nan), 0.0),
        (line(-1.0, -1.0), line(-1.0, -3.0), 1.0),
        (line(0.0, 0.0), line(0.0, 0.0), 0.0),
    ],
)
def test_gain_in_closed_form(without: np.ndarray, treated: np.ndarray, expected: float) -> None:
    assert gain(without, treated) == pytest.approx(expected)


def test_noise_of_the_batches_is_no_gain() -> None:
    random = np.random.default_rng(0)
    found = [gain(*(2 + 0.1 * random.standard_normal((2, 50)))) for _ in range(200)]
    assert np.mean(np.abs(found) >= 0.25) < 0.1
    assert abs(float(np.mean(found))) < 0.1


losses = st.lists(st.floats(-100, 100), min_size=10, max_size=30)


@given(losses, losses, st.floats(1e-3, 1e3))
def test_gain_is_bounded_antisymmetric_and_free_of_scale(
    a: list[float], b: list[float], scale: float
) -> None:
    n = min(len(a), len(b))
    u, w = np.array(a[:n]), np.array(b[:n])
    assert -1.0 - 1e-9 <= gain(u, w) <= 1.0 + 1e-9
    assert gain(u, w) == pytest.approx(-gain(w, u), abs=1e-9)
    assert gain(scale * u, scale * w) == pytest.approx(gain(u, w), abs=1e-6)


def test_clear_means_large_and_larger_than_the_spread() -> None:
    assert is_clear(0.25, 0.1)
    assert not is_clear(0.24, 0.0)
    assert not is_clear(0.5, 0.3)
    assert is_clear(0.2, 0.05, least=0.1)


def test_less_is_asked_where_the_issue_is_gone_as_well() -> None:
    without = [outcome(line(2.0, 1.0), ISSUE)] * 2
    better = line(2.0, 0.8)
    assert effect(without, [outcome(better)] * 2, CAUSE).verdict is TrialVerdict.CURES
    assert effect(without, [outcome(better, ISSUE)] * 2, CAUSE).verdict is TrialVerdict.NO_EFFECT


def test_more_is_asked_of_what_helps_most_networks() -> None:
    without = [outcome(line(2.0, 1.0), ISSUE)] * 2
    for end, verdict in ((0.8, TrialVerdict.NO_EFFECT), (0.7, TrialVerdict.CURES)):
        assert effect(without, [outcome(line(2.0, end))] * 2, CAUSE, general=True).verdict is verdict
    norm, other = norm_behind(["0"]), clipped()
    assert [r.general for r in (norm, other, norm + other)] == [True, False, True]


LEARNS, STAYS, RISES = line(2.0, 0.5), line(2.0, 2.0), line(2.0, 9.0)


@pytest.mark.parametrize(
    ("treated", "verdict"),
    [
        ([outcome(LEARNS)] * 2, TrialVerdict.CURES),
        ([outcome(LEARNS), outcome(LEARNS, ISSUE)], TrialVerdict.HELPS),
        ([outcome(LEARNS, ISSUE)] * 2, TrialVerdict.NO_EFFECT),  # it does nothing about the cause
        ([outcome(LEARNS, OTHER)] * 2, TrialVerdict.HELPS),  # something new
        ([outcome(LEARNS), outcome(LEARNS, OTHER)], TrialVerdict.CURES),  # new with one seed of two: not most
        ([outcome(STAYS)] * 2, TrialVerdict.NO_EFFECT),
        ([outcome(RISES)] * 2, TrialVerdict.HARMS),
        ([outcome(LEARNS), outcome(STAYS)], TrialVerdict.NO_EFFECT),  # within its spread
    ],
)
def test_verdicts(treated: list[Outcome], verdict: TrialVerdict) -> None:
    assert effect([outcome(STAYS, ISSUE)] * 2, treated, CAUSE).verdict is verdict


def test_an_issue_that_goes_by_itself_is_told_so() -> None:
    found = effect([outcome(STAYS)], [outcome(LEARNS)], CAUSE)
    assert (found.verdict, found.present, found.gone) == (TrialVerdict.CURES, 0.0, 1.0)
    assert "gone by then, without it too" in found.why


def test_an_issue_in_what_took_the_layers_place_is_still_there() -> None:
    inner = attrs.evolve(ISSUE, layer="fc.0")
    elsewhere = attrs.evolve(ISSUE, layer="fc2")
    assert effect([outcome(STAYS, ISSUE)], [outcome(LEARNS, inner)], CAUSE).gone == 0.0
    assert effect([outcome(STAYS, ISSUE)], [outcome(LEARNS, elsewhere)], CAUSE).gone == 1.0
