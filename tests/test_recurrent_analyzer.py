"""The class interface for recurrent networks: what it documents exists, is finite, moves the right way."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.errors import NotAnalyzedError
from gradflow.pipelines import flow, recurrent
from gradflow.records import ReservoirDynamics, decay_rate, depth, mean_profile
from gradflow.report import dynamics_text, summary_text
from tests.example_modules import example_module
from tests.functional.snapshots import difference, snapshot


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return example_module("forgetful_lstm")


def analysed(built: tuple[Any, ...], **options: Any) -> Any:
    model, batches, loss_fn, optimizer = built
    return gf.RecurrentAnalyzer(model, **options).analyze(batches, loss_fn, steps=2, optimizer=optimizer)


def gru() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(3, 5, num_layers=2, bidirectional=True)


def inputs() -> torch.Tensor:
    return torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(0))


def loss(result: Any) -> torch.Tensor:
    return result[0].square().mean()


def test_the_numbers_of_the_example_tell_the_sick_model_from_its_repair(example: ModuleType) -> None:
    sick, repaired = analysed(example.build()), analysed(example.repaired())
    a, b = sick.reservoir_dynamics, repaired.reservoir_dynamics
    for found in (a, b):
        assert list(found.layers) == ["lstm"]
        for part in (found, found.layers["lstm"], found.layers["lstm"].layers["l0"]):
            numbers = (part.spectral_radius, part.gradient_decay_rate, part.lyapunov)
            assert all(math.isfinite(value) for value in numbers)
            assert np.isfinite(part.gradient_profile).all()
            assert np.isfinite(part.readout_profile).all()
            assert part.gradient_profile.shape == part.readout_profile.shape == (200,)
    assert a.spectral_radius < 0.8 < 0.98 < b.spectral_radius
    assert a.lyapunov < -0.3 < -0.02 < b.lyapunov
    assert a.memory_depth < 20 < 190 < b.memory_depth
    assert a.recall_depth < 20 < 190 < b.recall_depth
    assert a.gradient_decay_rate > 1 - 1e-9 > 0.999 > b.gradient_decay_rate
    shares = [found.gradient_profile[0] / found.gradient_profile[-1] for found in (a, b)]
    assert shares[0] < 1e-20 < 1e-3 < shares[1]
    types = [i.issue_type for i in sick.gradient_issues if i.layer == "lstm"]
    assert types == [gf.IssueType.VANISHING, gf.IssueType.NUMERICAL]  # of subnormal numbers, which are slow
    assert sick.gradient_issues[0].severity >= gf.IssueSeverity.MEDIUM
    assert all(i.severity <= gf.IssueSeverity.LOW for i in repaired.gradient_issues)


def test_the_repair_learns_what_the_sick_model_does_not(example: ModuleType) -> None:
    assert example.learned(example.build()[0]) < 0.7
    assert example.learned(example.repaired()[0]) > 0.9


def test_what_it_says_is_what_was_measured_and_judged() -> None:
    model = gru()
    analyzer = gf.RecurrentAnalyzer(model)
    results = analyzer.analyze(inputs, loss, steps=3)
    report = gf.diagnose(model, inputs, loss, steps=3, pipeline=recurrent())
    assert results.gradient_issues == report.issues
    assert analyzer.record == report.record == results.report.record
    assert results.reservoir_dynamics == ReservoirDynamics.of(report.record.recurrences)
    levels = report.record.recurrences[0].levels
    layer = results.reservoir_dynamics.layers[""]
    assert list(layer.layers) == ["l0", "l0_reverse", "l1", "l1_reverse"]
    for level in levels:
        own = layer.layers[level.level]
        profile = level.gradient_profile.mean(0)
        np.testing.assert_allclose(own.gradient_profile, profile)
        assert own.gradient_decay_rate == pytest.approx(1 - profile[0] / profile[-1])
        assert own.memory_depth == 12 - int(np.flatnonzero(profile >= 0.01 * profile.max())[0])
        assert own.spectral_radius == pytest.approx(level.spectral_radius.mean())
        assert own.lyapunov == pytest.approx(level.lyapunov.mean())
    assert layer.gradient_decay_rate == max(part.gradient_decay_rate for part in layer.layers.values())
    assert layer.spectral_radius == pytest.approx(np.mean([p.spectral_radius for p in layer.layers.values()]))


def test_the_layer_that_loses_most_speaks_for_the_model() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.RNN(3, 8), nn.RNN(3, 8)
            with torch.no_grad():
                self.b.weight_hh_l0.mul_(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)[0][-1].square().mean() + self.b(x)[0][-1].square().mean()

    results = gf.RecurrentAnalyzer(Two()).analyze(inputs, lambda y: y, steps=1)
    found = results.reservoir_dynamics
    assert found.layers["b"].memory_depth < found.layers["a"].memory_depth
    assert found.memory_depth == found.layers["b"].memory_depth
    np.testing.assert_array_equal(found.gradient_profile, found.layers["b"].gradient_profile)
    radii = [part.spectral_radius for part in found.layers.values()]
    assert found.spectral_radius == pytest.approx(np.mean(radii))


def test_the_two_flags() -> None:
    results = gf.RecurrentAnalyzer(gru(), enable_rnn_analyzer=False).analyze(inputs, loss, steps=2)
    assert results.reservoir_dynamics == ReservoirDynamics.of(())
    assert math.isnan(results.reservoir_dynamics.spectral_radius)
    assert results.report.record.recurrences == ()
    assert results.gradient_issues == gf.diagnose(gru(), inputs, loss, steps=2, pipeline=flow()).issues
    with_states, without = (
        gf.RecurrentAnalyzer(gru(), track_hidden_states=on).analyze(inputs, loss, steps=2)
        for on in (True, False)
    )
    assert with_states.reservoir_dynamics == without.reservoir_dynamics
    assert with_states.gradient_issues == without.gradient_issues
    sizes = [r.report.record.recurrences[0].levels[0].hidden_rms.size for r in (with_states, without)]
    assert sizes == [24, 0]


def test_the_general_analyzer_looks_through_time_too_and_in_full_where_it_is_told_to(
    example: ModuleType,
) -> None:
    model, batches, loss_fn, _ = example.build()
    plain, through = (gf.GradientFlowAnalyzer(model, enable_rnn_analyzer=on) for on in (False, True))
    told = [a.analyze(batches, loss_fn, steps=2) for a in (plain, through)]
    fresh, issue = (
        next(i for i in issues if (i.layer, i.issue_type) == ("lstm", gf.IssueType.VANISHING))
        for issues in told
    )
    assert all(i.severity <= gf.IssueSeverity.LOW for i in told[0])
    assert fresh.severity == gf.IssueSeverity.LOW  # it may yet learn to keep more
    assert issue.severity > gf.IssueSeverity.LOW
    exponents = [a.record.recurrences[0].levels[0].lyapunov for a in (plain, through)]
    assert np.isnan(exponents[0]).all()
    assert np.isfinite(exponents[1]).all()


def test_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    analyzer = gf.RecurrentAnalyzer(gru())
    results = analyzer.analyze(inputs, loss, steps=1)
    analyzer.print_summary(results)
    table = dynamics_text(results.reservoir_dynamics)
    assert capsys.readouterr().out == f"{summary_text(results.gradient_issues)}\n\n{table}\n"
    head, *rows = table.splitlines()
    assert head.split() == ["recurrent", "radius", "lyapunov", "steps", "memory", "recall", "lost"]
    assert [row.split()[0] for row in rows] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert len({len(line) for line in table.splitlines()}) == 1
    huge = attrs.evolve(ReservoirDynamics.of(()), gradient_decay_rate=-1.5e7)
    one = attrs.evolve(huge, layers={"rnn": attrs.evolve(huge, layers={"l0": huge})})
    assert dynamics_text(one).splitlines()[1].split() == ["rnn", "-", "-", "0", "0", "0", "-1.5e+07"]


def test_nothing_of_the_model_is_changed() -> None:
    model = gru()
    before = snapshot(model)
    gf.RecurrentAnalyzer(model).analyze(inputs, loss, steps=2)
    assert difference(before, snapshot(model)) == ""


def test_there_is_no_record_before_a_run() -> None:
    with pytest.raises(NotAnalyzedError, match="^RecurrentAnalyzer: nothing was analysed yet"):
        gf.RecurrentAnalyzer(gru()).record  # noqa: B018


@pytest.mark.parametrize(
    ("profile", "memory", "lost"),
    [
        ([0.005, 0.02, 0.5, 1.0], 3, 0.995),
        ([1.0, 0.1, 0.001], 3, -999.0),  # it grows: all of it is remembered
        ([1.0, 1.0, 1.0], 3, 0.0),
        ([0.0, 0.0, 0.0], 0, math.nan),
        ([0.0, 1.0, 0.0], 2, math.nan),
        ([math.nan, 0.5, 1.0], 2, math.nan),
        ([], 0, math.nan),
    ],
)
def test_depth_and_decay_rate(profile: list[float], memory: int, lost: float) -> None:
    assert depth(np.array(profile)) == memory
    assert decay_rate(np.array(profile)) == pytest.approx(lost, nan_ok=True)


def test_the_mean_of_profiles_of_different_lengths() -> None:
    np.testing.assert_allclose(mean_profile(np.array([[math.nan, 1.0], [4.0, 3.0]])), [4.0, 2.0])
    assert mean_profile(np.empty(0)).size == 0
