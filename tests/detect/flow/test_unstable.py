"""UNSTABLE: jumps by orders of magnitude, and what is only noise."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradflow import diagnose
from gradflow.detect import detect, unstable
from gradflow.detect.flow.unstable import rises, total_gradient
from gradflow.records import FlowRecord, IssueSeverity, KnowledgeRecord
from tests.detect.builders import Layer, flow_record

STEPS = 20
NOISE = 1.0 + 0.5 * np.sin(np.arange(STEPS) * 2.7)


def run(grad: np.ndarray, **fields: Any) -> FlowRecord:
    return flow_record(Layer(name="a", grad=grad), Layer(name="b", grad=grad), steps=STEPS, **fields)


def seen(record: FlowRecord) -> dict[str, IssueSeverity]:
    return {issue.layer: issue.severity for issue in detect(record, unstable())}


def spiked(height: float, *at: int) -> np.ndarray:
    return np.where(np.isin(np.arange(STEPS), at), height, NOISE)


def test_rare_spikes_are_found_at_the_layer_nearest_the_loss() -> None:
    assert seen(run(spiked(1e4, 7, 13))) == {"b": IssueSeverity.HIGH}


@pytest.mark.parametrize(("zeros_cost", "severity"), [(20.0, IssueSeverity.LOW), (4.0, IssueSeverity.MEDIUM)])
def test_a_critic_whose_values_hardly_vary_jumps_about_little_of_their_level(
    zeros_cost: float, severity: IssueSeverity
) -> None:
    """An agent's values: near 5 in every state, with errors of a tenth, and in some batches of one."""
    known = KnowledgeRecord(step=19, loss=0.01, shuffled=0.02, averaged=0.02, silent=zeros_cost)
    losses = np.where(np.isin(np.arange(STEPS), [7, 13]), 1.0, 0.01)
    assert seen(run(spiked(60.0, 7, 13), losses=losses, knowledge=known)) == {"b": severity}


def test_a_run_that_jumps_away_at_once() -> None:
    wild = np.array([1.0, 900.0, 3000.0, *np.geomspace(200.0, 20.0, STEPS - 3)])
    issue = detect(run(wild, optimizer="Adam"), unstable())[0]
    assert issue.metrics["optimizer"] == "Adam"
    assert "learning rate of Adam" in issue.recommended_actions[0]


@pytest.mark.parametrize(
    "grad",
    [
        NOISE,
        NOISE * 3.0 ** np.sin(np.arange(STEPS)),
        np.geomspace(1e4, 1.0, STEPS),
        np.geomspace(1.0, 50.0, STEPS),
        spiked(12.0, 9),
        np.where(np.arange(STEPS) % 3, 0.0, 1.0),
    ],
    ids=["noise", "a factor of a few", "a fast fall", "a slow rise", "one hard batch", "a margin often met"],
)
def test_what_is_no_instability(grad: np.ndarray) -> None:
    assert not seen(run(grad))


def test_an_outlier_that_a_robust_loss_tames() -> None:
    assert not seen(run(spiked(3.0, 8), losses=spiked(100.0, 8)))


def test_a_loss_that_jumps_away_and_stays() -> None:
    record = run(NOISE, losses=np.where(np.arange(STEPS) < 12, 1.0, 1e4))
    assert detect(record, unstable())[0].metrics["series"] == "loss"


@given(st.floats(1e-6, 1e6), st.floats(10.0, 1e4))
def test_scale_of_the_loss_changes_nothing(factor: float, height: float) -> None:
    record = run(spiked(height, 7))
    scaled = attrs.evolve(
        record,
        losses=record.losses * factor,
        parameters=[attrs.evolve(p, grad_norm=p.grad_norm * factor) for p in record.parameters],
    )
    assert seen(record) == seen(scaled)


def test_a_restless_run_needs_smaller_jumps() -> None:
    tails = np.array([1, 30, 2, 60, 1, 9, 40, 3, 200, 1, 12, 2, 90, 1, 25, 3, 150, 2, 30, 1.0])
    found = rises(tails)
    assert found is not None
    assert found.change > 3
    assert seen(run(tails)) == {"b": IssueSeverity.MEDIUM}


@pytest.mark.parametrize(
    ("grad", "optimizer", "sick"), [(6.0, "Adam", True), (1.0, "Adam", False), (6.0, "", False)]
)
def test_a_run_that_ends_far_above_its_start(grad: float, optimizer: str, sick: bool) -> None:
    grads, losses = np.linspace(1.0, grad, STEPS), np.linspace(3.0, 12.0, STEPS)
    assert bool(seen(run(grads, losses=losses, optimizer=optimizer))) is sick


def test_a_lucky_first_batch_is_no_start() -> None:
    noise = 3.0 ** np.where(np.arange(STEPS) % 2, 1.0, -1.0)  # a factor of nine from step to step
    losses = np.where(np.arange(STEPS) == 0, 0.1, 0.5 * noise)
    grads = np.where(np.arange(STEPS) == 0, 0.2, noise)
    assert not seen(run(grads, losses=losses, optimizer="Adam"))
    steady = np.geomspace(0.1, 2.0, STEPS)
    assert seen(run(steady, losses=steady, optimizer="Adam"))


@pytest.mark.parametrize(("rate", "sick"), [(1e-2, False), (1.0, True)])
def test_a_line_whose_first_step_is_the_whole_way(rate: float, sick: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(1, 1), torch.arange(10.0)[:, None]
    descent = torch.optim.SGD(model.parameters(), rate)
    report = diagnose(model, lambda: (x, 2 * x + 1), nn.functional.mse_loss, optimizer=descent)
    assert report.ok is not sick


def test_too_short_a_run_tells_nothing() -> None:
    assert rises(np.array([1.0])) is None
    assert rises(np.array([np.nan, 0.0, 2.0])) is None


def test_a_record_without_parameters() -> None:
    record = FlowRecord(steps=2, losses=np.ones(2), layers=(), parameters=())
    assert np.isnan(total_gradient(record)).all()
    assert not seen(record)


@pytest.mark.parametrize(
    ("values", "severity"), [(2, IssueSeverity.HIGH), (4, IssueSeverity.LOW), (16, None)]
)
def test_a_batch_norm_over_a_handful_of_values(values: int, severity: IssueSeverity | None) -> None:
    fields = {"type": "BatchNorm1d", "shape": (values, 16), "num_elements": np.full(STEPS, values * 16)}
    record = flow_record(
        Layer(name="bn", fields=fields, weight={"shape": (16,)}), Layer(name="head"), steps=STEPS
    )
    assert seen(record).get("bn") is severity
    evaluated = attrs.evolve(record.provenance, mode="eval")
    assert not seen(attrs.evolve(record, provenance=evaluated))


FALLS = np.linspace(10.0, 5.0, STEPS)


@pytest.mark.parametrize(
    ("losses", "zeros_cost", "severity"),
    [
        (np.where(np.arange(STEPS) == 7, 12.0, FALLS), 9.0, IssueSeverity.LOW),
        (np.where(np.arange(STEPS) == 7, 12.0, FALLS), 1.0, IssueSeverity.HIGH),
        (np.where(np.arange(STEPS) == 7, 40.0, FALLS), 9.0, IssueSeverity.HIGH),
        (np.full(STEPS, 10.0), 9.0, IssueSeverity.HIGH),
        (np.array([10.0, 5000.0, *np.full(STEPS - 2, 0.1)]), 9.0, IssueSeverity.LOW),
        (np.array([10.0, 5000.0, *np.full(STEPS - 3, 0.1), 4.0]), 9.0, IssueSeverity.HIGH),
        (np.array([-1.0, *FALLS[1:]]), 9.0, IssueSeverity.HIGH),
    ],
    ids=["falls on", "far above zeros", "far above", "stays", "healed", "leaps again", "below zero"],
)
def test_a_jump_that_does_a_run_no_harm(
    losses: np.ndarray, zeros_cost: float, severity: IssueSeverity
) -> None:
    """As likelihoods of whole pictures do, and ranked pairs: the gradient leaps, the loss goes on."""
    known = KnowledgeRecord(step=19, loss=1.0, shuffled=1.0, averaged=1.0, silent=zeros_cost)
    record = run(spiked(1e4, 7), losses=losses, knowledge=known, optimizer="Adam")
    assert max(seen(record).values()) == severity
