"""NUMERICAL: what is not finite, with and without a birth certificate."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.detect import detect, numerical
from gradflow.records import FlowRecord, IssueSeverity, IssueType, NumericalRecord
from tests.detect.builders import STEPS, Layer, flow_record

ONE = np.arange(STEPS) != 3  # finite in all steps but one


def broken(*, grad: np.ndarray | None = None, loss: np.ndarray | None = None, **fields: Any) -> FlowRecord:
    finite = {"grad_finite": grad} if grad is not None else {}
    losses = np.where(loss, 1.0, np.nan) if loss is not None else np.ones(STEPS)
    return flow_record(
        Layer(name="a", fields=finite, weight=finite), Layer(name="b"), losses=losses, **fields
    )


def birth(**fields: Any) -> NumericalRecord:
    values: dict[str, Any] = {
        "step": 3,
        "layer": "a",
        "layer_type": "Linear",
        "op": "sqrt",
        "phase": "backward",
        "value": "nan",
        "input_min": 0.0,
        "input_max": 0.0,
        "line": "loss.py:7",
        "loss_finite": True,
    }
    return NumericalRecord(**{**values, **fields})


def test_a_healthy_run_has_none() -> None:
    assert not detect(broken(), numerical())


def test_a_certificate_of_an_infinity_that_reached_nothing_is_ignored() -> None:
    assert not detect(broken(numerics=[birth(value="inf", op="masked_fill")]), numerical())


def test_nan_gradients_under_a_finite_loss() -> None:
    (issue,) = detect(broken(grad=ONE, numerics=[birth()]), numerical())
    assert (issue.layer, issue.severity) == ("a", IssueSeverity.HIGH)
    assert "born in sqrt in the backward pass of 0, called at loss.py:7" in issue.description
    assert "The loss itself is finite" in issue.description
    assert "constant inside" in issue.recommended_actions[0]
    assert (issue.metrics["step"], issue.metrics["op"]) == (3, "sqrt")


def test_a_nan_loss_over_finite_gradients() -> None:
    (issue,) = detect(broken(loss=ONE), numerical())
    assert issue.metrics["phase"] == "loss"
    assert issue.layer == "b"  # the layer nearest the loss


def test_from_one_step_on_to_the_end_is_critical() -> None:
    (issue,) = detect(broken(grad=np.arange(STEPS) < 5, numerics=[birth(step=5)]), numerical())
    assert issue.severity is IssueSeverity.CRITICAL


@pytest.mark.parametrize(
    ("field", "layer", "phase"), [("output_finite", "a", "forward"), ("grad_finite", "b", "backward")]
)
def test_without_a_certificate_the_flags_tell(field: str, layer: str, phase: str) -> None:
    record = broken(loss=ONE)
    layers = [attrs.evolve(x, **{field: ONE}) for x in record.layers]
    (issue,) = detect(attrs.evolve(record, layers=layers), numerical())
    assert (issue.layer, issue.metrics["phase"]) == (layer, phase)


@pytest.mark.parametrize(
    ("op", "phase", "cure"),
    [
        ("exp", "forward", "Clamp the argument before exp"),
        ("log", "forward", "log_softmax"),
        ("div", "forward", "Guard the denominator"),
        ("softmax", "forward", "masked throughout"),
        ("cosh", "forward", "inside its domain"),
        ("input", "input", "nan_to_num"),
        ("", "parameter", "before the step"),
    ],
)
def test_the_cure_goes_by_the_operation(op: str, phase: str, cure: str) -> None:
    (issue,) = detect(broken(grad=ONE, numerics=[birth(op=op, phase=phase)]), numerical())
    assert cure in " ".join(issue.recommended_actions)


class _OwnBatchNorm(nn.Module):
    """Normalises over the batch, with the unbiased variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * (x - x.mean(0)) / torch.sqrt(x.var(0) + 1e-5)


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("number", [1, 2])
def test_a_batch_norm_that_gives_no_numbers_is_not_also_noisy(number: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), _OwnBatchNorm(8), nn.Tanh(), nn.Linear(8, 2))
    batches = [torch.randn(number, 4) for _ in range(6)]
    found = gf.diagnose(model, batches, lambda out: out.square().mean(), steps=6).issues
    types = {i.issue_type for i in found if i.layer == "1" and i.severity.is_serious}
    assert types == ({IssueType.NUMERICAL} if number == 1 else {IssueType.UNSTABLE})
