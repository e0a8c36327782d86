"""Detectors over the history: each fires on what it is made for, and is silent on what looks alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.detect.time import (
    collapsing,
    diverging,
    dying,
    growing,
    resting,
    sharpening,
    starving,
    stiffening,
    time_detectors,
)
from gradflow.detect.time.series import forgot, goes_well, lasting, smooth
from gradflow.records import HistoryRecord, Issue, IssueSeverity, IssueType

LOOKS = 24


def history(series: Mapping[str, Sequence[float]], every: int = 100) -> HistoryRecord:
    found = HistoryRecord.empty().with_types({"a": "Linear", "b": "ReLU", "c": "Linear"})
    for look in range(len(next(iter(series.values())))):
        found = found.with_look(look * every, {name: float(values[look]) for name, values in series.items()})
    return found


def fall(start: float, end: float, looks: int = LOOKS) -> np.ndarray:
    return np.geomspace(start, end, looks)


def turn(before: float, after: float, at: int = 12, looks: int = LOOKS) -> np.ndarray:
    return np.where(np.arange(looks) < at, before, after).astype(float)


FALLING = fall(2.3, 0.05)  # the loss of a training that goes well
STUCK = np.r_[fall(2.3, 0.5, 12), np.full(12, 1.2)]  # of one that has lost half of what it had won


def issues(detector: object, series: Mapping[str, Sequence[float]]) -> list[Issue]:
    return list(detector(history(series)))  # type: ignore[operator]


def only(detector: object, series: Mapping[str, Sequence[float]]) -> Issue:
    (issue,) = issues(detector, series)
    return issue


# ------------------------------------------------------------------------------------ readings


def test_smoothing_passes_over_one_look() -> None:
    values = np.array([1.0, 1.0, 9.0, 1.0, 1.0])
    assert smooth(values).tolist() == [1.0] * 5
    assert np.isnan(smooth(np.array([np.nan, np.nan, np.nan]))).all()


@given(st.lists(st.booleans(), max_size=30))
def test_lasting_by_hand(beyond: list[bool]) -> None:
    found = lasting(np.array(beyond, dtype=bool))
    if len(beyond) < 2 or not all(beyond[-2:]):
        assert found is None
    else:
        assert found is not None
        assert all(beyond[found:])
        assert found == 0 or not beyond[found - 1]


def test_a_training_goes_well_that_knows_or_is_at_its_best() -> None:
    assert goes_well(history({"loss": FALLING}))
    assert not goes_well(history({"loss": STUCK}))
    assert goes_well(history({"loss": STUCK, "loss_share_left": np.full(LOOKS, 0.05)}))
    assert not goes_well(history({"loss": turn(1.0, np.nan)}))
    assert not goes_well(HistoryRecord.empty())


def test_forgetting_needs_to_have_known() -> None:
    assert forgot(history({"loss_share_left": turn(0.2, 0.98)}))[-1]
    assert not forgot(history({"loss_share_left": np.full(LOOKS, 0.98)})).any()
    assert not forgot(HistoryRecord.empty()).any()


# ------------------------------------------------------------------------------------ dying


def test_units_that_die() -> None:
    issue = only(dying(), {"loss": STUCK, "never_fired/b": turn(0.1, 0.95)})
    assert (issue.layer, issue.issue_type, issue.severity) == ("b", IssueType.DEAD, IssueSeverity.HIGH)
    assert issue.layer_type == "ReLU"
    assert issue.metrics["since_step"] == 1200
    assert "Since step 1200" in issue.description


@pytest.mark.parametrize(
    "share",
    [np.full(LOOKS, 0.95), turn(0.1, 0.35), np.r_[np.full(LOOKS - 1, 0.1), 0.95], turn(0.95, 0.1)],
    ids=["from the start", "few", "one look", "reborn"],
)
def test_units_that_do_not_die(share: np.ndarray) -> None:
    assert not issues(dying(), {"loss": STUCK, "never_fired/b": share})


def test_sparse_features_of_a_model_that_learns_are_mild() -> None:
    issue = only(dying(), {"loss": FALLING, "never_fired/b": np.linspace(0.1, 0.8, LOOKS)})
    assert issue.severity is IssueSeverity.LOW


def test_it_is_told_at_the_second_look() -> None:
    share = turn(0.1, 0.95, at=5)
    for looks in range(1, LOOKS):
        told = issues(dying(), {"loss": STUCK[:looks], "never_fired/b": share[:looks]})
        assert bool(told) == (looks >= 7), looks


# ------------------------------------------------------------------------------------ collapsing


def test_an_output_that_becomes_the_same_for_all() -> None:
    variation = turn(0.8, 0.001)
    issue = only(
        collapsing(), {"loss": STUCK, "output_variation/a": variation, "output_variation/c": variation}
    )
    assert (issue.layer, issue.issue_type) == ("a", IssueType.BOTTLENECK)
    assert "1 more layer" in issue.description
    assert not issues(collapsing(), {"loss": STUCK, "output_variation/a": np.full(LOOKS, 0.001)})
    assert not issues(collapsing(), {"loss": STUCK, "output_variation/a": turn(0.8, 0.3)})


def test_an_output_that_shrinks_to_nothing() -> None:
    series = {"loss": STUCK, "output_rms/a": np.ones(LOOKS), "output_rms/c": turn(1.0, 0.005)}
    assert only(collapsing(), series).layer == "c"
    assert not issues(collapsing(), {**series, "output_rms/a": turn(1.0, 0.005)}), (
        "the data has another scale"
    )
    mild = {**series, "output_rms/c": turn(1.0, 0.1)}
    assert not issues(collapsing(), mild)
    assert only(collapsing(), {**mild, "loss_share_left": turn(0.2, 0.97)}).layer == "c"


# ------------------------------------------------------------------------------------ sharpening


def test_attention_that_collapses() -> None:
    series = {"attention_entropy_share/a": turn(0.8, 0.01), "attention_logit_peak/a": turn(4.0, 90.0)}
    issue = only(sharpening(), {"loss": STUCK, **series})
    assert (issue.layer, issue.issue_type, issue.severity) == (
        "a",
        IssueType.SATURATION,
        IssueSeverity.HIGH,
    )
    assert only(sharpening(), {"loss": FALLING, **series}).severity is IssueSeverity.LOW


def test_logits_that_run_away() -> None:
    series = {"attention_entropy_share/a": np.full(LOOKS, 0.3), "attention_logit_peak/a": fall(4.0, 500.0)}
    assert only(sharpening(), {"loss": STUCK, **series}).metrics["logit_peak"] == pytest.approx(500.0)
    series["attention_logit_peak/a"] = np.full(LOOKS, 40.0)
    assert not issues(sharpening(), {"loss": STUCK, **series}), "large from the start"


# ------------------------------------------------------------------------------------ growth


def test_a_training_that_diverges_names_what_was_moved_most() -> None:
    series = {
        "loss": turn(0.3, 5.0) + fall(2.0, 1e-3),
        "loss_share_left": turn(0.2, 0.97),
        "update_ratio/a.weight": np.full(LOOKS, 1e-3),
        "update_ratio/c.weight": turn(1e-3, 0.4),
        "update_ratio/c.bias": turn(1e-3, 9.0),
    }
    issue = only(diverging(), series)
    assert (issue.layer, issue.issue_type) == ("c", IssueType.UNSTABLE)
    assert "`c.weight` most for its size, by 0.4" in issue.description


@pytest.mark.parametrize(
    "loss",
    [
        FALLING,
        np.full(LOOKS, 2.3),
        fall(1.0, 9.0),
        np.r_[FALLING[:-1], 9.0],
        2.0 + 0.3 * np.sin(np.arange(LOOKS)),
    ],
    ids=["falls", "flat", "never lower", "one batch", "noise"],
)
def test_a_loss_that_does_not_diverge(loss: np.ndarray) -> None:
    assert not issues(diverging(), {"loss": loss})


def test_the_losses_of_an_agent_are_no_measure() -> None:
    loss = turn(0.3, 5.0) + fall(2.0, 1e-3)
    assert not issues(diverging(), {"loss": loss, "policy_entropy/a": np.ones(LOOKS)})
    assert not issues(
        diverging(), {"loss": np.r_[2.0, loss[1:] / 3], "loss_share_left": np.full(LOOKS, 0.05)}
    )


def test_a_player_whose_opponent_gets_better_does_not_diverge() -> None:
    loss = np.r_[fall(0.69, 0.3, 12), np.full(12, 0.66)]
    assert not issues(diverging(), {"loss": loss, "gradient_norm": np.r_[np.full(12, 0.1), np.full(12, 0.9)]})
    loss = np.r_[fall(0.69, 0.3, 12), np.full(12, 9.0)]
    assert not issues(diverging(), {"loss": loss, "gradient_norm": np.full(LOOKS, 0.5)})
    assert issues(diverging(), {"loss": loss, "gradient_norm": turn(0.1, 0.9)})
    assert issues(diverging(), {"loss": loss / 10, "loss_share_left": turn(0.3, 0.97)}), "it guesses again"


def test_a_loss_below_zero_diverges_too() -> None:
    assert issues(diverging(), {"loss": np.r_[fall(2.0, 0.1, 12) - 3.0, np.full(12, 30.0)]})


def test_a_gradient_that_falls_away() -> None:
    series = {
        "loss": STUCK,
        "gradient_rms/a": turn(0.1, 1e-9),
        "gradient_rms/b": turn(0.1, 1e-8),
        "gradient_rms/c": np.ones(LOOKS),
    }
    issue = only(starving(), series)
    assert (issue.layer, issue.issue_type) == ("b", IssueType.VANISHING)
    assert issue.metrics["num_layers"] == 2
    assert not issues(
        starving(), {**series, "gradient_rms/a": np.full(LOOKS, 1e-9), "gradient_rms/b": np.ones(LOOKS)}
    )
    scaled = {name: 1e-6 * np.asarray(values) for name, values in series.items()}
    assert only(starving(), {**scaled, "loss": STUCK}).layer == "b", "the scale of the loss changes nothing"


def test_weights_that_grow_and_do_not_stop() -> None:
    rest = {f"weight_rms/l{i}.weight": np.full(LOOKS, 0.1) for i in range(4)}
    issue = only(growing(), {"loss": STUCK, "weight_rms/c.weight": fall(0.1, 5.0), **rest})
    assert (issue.layer, issue.issue_type, issue.severity) == (
        "c",
        IssueType.EXPLODING,
        IssueSeverity.MEDIUM,
    )
    stopped = np.r_[fall(0.1, 5.0, 8), np.full(16, 5.0)]
    assert not issues(growing(), {"loss": STUCK, "weight_rms/c.weight": stopped, **rest})
    all_alike = {name: fall(0.1, 5.0) for name in rest}
    assert not issues(growing(), {"loss": STUCK, **all_alike})
    bias = {"weight_rms/c.bias": fall(1e-3, 5.0)}
    assert not issues(growing(), {"loss": STUCK, **bias, **rest}), "a bias starts at zero"
    from_zero = np.r_[0.0, fall(1e-5, 0.02, LOOKS - 1)]
    assert not issues(growing(), {"loss": STUCK, "weight_rms/c.weight": from_zero, **rest})


# ------------------------------------------------------------------------------------ plasticity


def test_lost_plasticity() -> None:
    series = {
        "loss": np.r_[fall(2.0, 0.5, 8), np.linspace(0.9, 3.0, 16)],
        "never_fired/b": np.linspace(0.1, 0.7, LOOKS),
        "weight_norm": fall(1.0, 5.0),
        "gradient_norm": fall(1.0, 0.01),
    }
    issue = only(stiffening(), series)
    assert issue.layer == ""
    assert "more of its units are silent" in issue.description
    assert not issues(stiffening(), {**series, "loss": FALLING})
    assert not issues(stiffening(), {"loss": series["loss"], "weight_norm": series["weight_norm"]})


def test_weights_that_stand_still() -> None:
    assert not issues(resting(), {"loss": STUCK, "weight_checksum": np.arange(LOOKS)})
    stopped = {"weight_checksum": np.minimum(np.arange(LOOKS), 16)}
    issue = only(resting(), {"loss": STUCK, **stopped})
    assert (issue.layer, issue.issue_type, issue.severity) == (
        "",
        IssueType.VANISHING,
        IssueSeverity.HIGH,
    )
    assert not list(resting()(history(stopped, every=10))), "micro-batches between two updates"


# ------------------------------------------------------------------------------------ all of them

_NAMES = ["loss", "loss_share_left", "weight_norm", "gradient_norm"] + [
    f"{quantity}/{where}"
    for quantity in ("never_fired", "output_variation", "output_rms", "gradient_rms")
    for where in ("a", "b", "c")
]


@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_no_history_breaks_them(looks: int, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    values = 10.0 ** numbers.uniform(-12, 6, (looks, len(_NAMES)))
    values[numbers.random(values.shape) < 0.2] = np.nan
    values[numbers.random(values.shape) < 0.05] = np.inf
    values[numbers.random(values.shape) < 0.05] = 0.0
    found = HistoryRecord(steps=np.arange(looks), names=tuple(_NAMES), values=values)
    for detector in time_detectors():
        for issue in detector(found):
            assert 0 <= issue.metrics["since_step"] < looks


def test_a_steady_healthy_training_is_silent() -> None:
    numbers = np.random.default_rng(0)
    for _ in range(50):
        noise = np.exp(0.2 * numbers.standard_normal((LOOKS, len(_NAMES))))
        series = {name: noise[:, i] * 0.3 for i, name in enumerate(_NAMES)}
        series["loss"] = FALLING * noise[:, 0]
        found = [issue for detector in time_detectors() for issue in detector(history(series))]
        assert not [issue for issue in found if issue.severity >= IssueSeverity.MEDIUM]
