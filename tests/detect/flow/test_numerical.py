"""NUMERICAL: what is not finite, with and without a birth certificate."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from gradflow.detect import detect, numerical
from gradflow.records import FlowRecord, IssueSeverity, NumericalRecord
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
