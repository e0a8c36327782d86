"""Runs of a trial that are not measured: their losses are those of measured ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradflow as gf
from gradflow.functional.analyze import analyzed
from gradflow.functional.model.purity import seed_all
from gradflow.functional.run.run import Plan
from gradflow.functional.run.training.options import Loop
from gradflow.records import IssueType
from gradflow.remedies.trials.plain import plain_losses
from gradflow.remedies.trials.trial import MEASURED
from gradflow.remedies.trials.verdict import Outcome, effect
from tests.samples import make_issue


def classifier() -> nn.Sequential:
    """A network that draws random numbers, and keeps statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def drawing() -> Callable[[], Any]:
    """Return a source that puts the random states at its number, as that of a trial does."""
    step = 0

    def draw() -> Any:
        nonlocal step
        step += 1
        seed_all(step)
        return torch.randn(16, 4), torch.randint(0, 2, (16,))

    return draw


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_plain_run_has_the_losses_of_a_measured_one(clip: float | None, mode: Any, broken: bool) -> None:
    model, calls = classifier(), [0]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return F.cross_entropy(output, target) * (float("nan") if broken and target[:8].sum() > 5 else 1.0)

    own = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, own)]
    plans = [Plan(steps=12, loop=Loop(optimizer=o, clip=clip), seed=3, mode=mode) for o in optimizers]
    before = torch.get_rng_state()
    measured = analyzed(model, drawing(), loss, plans[0])
    found = plain_losses(own, drawing(), loss, optimizers[1], plans[1])
    np.testing.assert_allclose(found, measured.losses, rtol=1e-6)
    assert np.isnan(found).any() == broken
    assert torch.equal(torch.get_rng_state(), before)


def test_evidence_is_measured_with_the_first_seeds_and_the_loss_with_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    nn.init.constant_(model[0].bias, -9.0)  # type: ignore[arg-type]
    x = torch.randn(64, 8)
    given = model, [(x, x[:, :1])], nn.MSELoss(), torch.optim.Adam(model.parameters(), 0.01)
    report = gf.diagnose(*given[:3], optimizer=given[3], steps=5)
    trials = gf.try_remedies(report, *given, steps=20, seeds=MEASURED + 2)
    best = trials.best(report.causes[0])
    assert best is not None
    assert best.losses_with.shape == (20, MEASURED + 2)
    assert np.isfinite(best.losses_with).all()
    assert best.gone == 1.0


def test_a_run_that_was_not_measured_counts_for_the_loss_alone() -> None:
    issue = make_issue("fc", IssueType.DEAD)
    cause = gf.Cause(layer="fc", issue_type=IssueType.DEAD, mechanism="", issues=[issue], confidence=0.9)
    high, low = np.full(10, 2.0), np.linspace(2.0, 0.1, 10)
    without = [Outcome(high, (issue,), 1.0), Outcome(high, (issue,), 1.0), Outcome(high, None, 1.0)]
    treated = [Outcome(low, (), 1.0), Outcome(low, (issue,), 1.0), Outcome(high, None, 1.0)]
    found = effect(without, treated, cause)
    assert (found.present, found.gone) == (1.0, 0.5)
    assert found.gain == pytest.approx(2 / 3 * effect(without[:1], treated[:1], cause).gain)
