"""Synthetic records for tests of what is done with a record, so that they need no model to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradflow.records import (
    Cause,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    LayerRecord,
    NumericalRecord,
    ParameterRecord,
    Provenance,
)


def layer_record(name: str, grad_norm: Sequence[float], *, order: int = 0, **fields: Any) -> LayerRecord:
    """Return the record of a layer of 64 outputs with the given output-gradient norms."""
    steps = len(grad_norm)
    values: dict[str, Any] = {
        "module": name.partition("@")[0],
        "type": "Linear",
        "call": 0,
        "shape": (8, 8),
        "called": np.ones(steps, bool),
        "reached": ~np.isnan(np.asarray(grad_norm)),
        "grad_finite": np.ones(steps, bool),
        "num_elements": np.full(steps, 64),
        "input_rms": np.ones(steps),
        "output_rms": np.ones(steps),
        "output_finite": np.ones(steps, bool),
        "output_zero_share": np.zeros(steps),
        "output_variation": np.ones(steps),
    }
    return LayerRecord(name=name, order=order, grad_norm=grad_norm, **{**values, **fields})


def parameter_record(name: str, grad_norm: Sequence[float], **fields: Any) -> ParameterRecord:
    """Return the record of an 8 × 8 parameter with the given gradient norms."""
    steps = len(grad_norm)
    values: dict[str, Any] = {
        "layer": name.rpartition(".")[0],
        "shape": (8, 8),
        "dtype": "float32",
        "trainable": True,
        "reached": np.ones(steps, bool),
        "grad_finite": np.ones(steps, bool),
        "grad_zero_share": np.zeros(steps),
        "norm": np.ones(steps),
    }
    return ParameterRecord(name=name, grad_norm=grad_norm, **{**values, **fields})


def make_issue(
    layer: str = "fc1",
    issue_type: IssueType = IssueType.VANISHING,
    severity: IssueSeverity = IssueSeverity.CRITICAL,
    **fields: Any,
) -> Issue:
    """Return an issue with one recommended action and one number as evidence."""
    values: dict[str, Any] = {
        "layer_type": "Linear",
        "description": f"The gradient at {layer} is as good as gone.",
        "magnitude": 2.34e-9,
        "recommended_actions": ("Use ReLU and He initialisation.",),
        "metrics": {"median_rms": 2.34e-9},
    }
    return Issue(layer=layer, issue_type=issue_type, severity=severity, **{**values, **fields})


def chain_record(depth: int = 5, steps: int = 20, *, decay: float = 1e-2, **fields: Any) -> FlowRecord:
    """Return the record of a chain `fc1 … fcN` whose gradient shrinks by `decay` per layer towards `fc1`."""
    wave = 1.0 + 0.4 * np.sin(np.arange(steps))
    layers = [
        layer_record(
            f"fc{i + 1}", 1e-2 * decay ** (depth - 1 - i) * wave, order=i, parameters=(f"fc{i + 1}.weight",)
        )
        for i in range(depth)
    ]
    parameters = [parameter_record(f"fc{i + 1}.weight", layers[i].grad_norm * 3) for i in range(depth)]
    provenance = Provenance(
        versions={"gradflow": "0.1.0", "torch": "2.13.0"},
        dtypes=("float32",),
        model="Chain",
        num_parameters=64 * depth,
        seed=0,
        requested_steps=steps,
        transform_reason="no outer transform",
    )
    values: dict[str, Any] = {"provenance": provenance, "losses": np.linspace(2.31, 2.30, steps)}
    return FlowRecord(steps=steps, layers=layers, parameters=parameters, **{**values, **fields})


def sick_chain() -> tuple[FlowRecord, tuple[Issue, ...], tuple[Cause, ...]]:
    """Return a chain with a vanished gradient, its issues, and the cause of two of the three."""
    birth = NumericalRecord(
        step=3,
        layer="fc4",
        layer_type="Linear",
        op="exp",
        phase="forward",
        value="inf",
        input_min=-3.0,
        input_max=91.2,
        line="model.py:12",
    )
    record = chain_record(numerics=(birth,))
    issues = (
        make_issue("fc1"),
        make_issue("fc2", severity=IssueSeverity.HIGH),
        make_issue("fc4", IssueType.UNSTABLE, IssueSeverity.LOW, recommended_actions=()),
    )
    cause = Cause(
        layer="fc1",
        issue_type=IssueType.VANISHING,
        mechanism="Every layer hands on one hundredth of its gradient.",
        issues=issues[:2],
        confidence=0.8,
        reason="the decay is the same at every layer",
        evidence=("gain 0.01 in fc5", "gain 0.01 in fc4"),
    )
    return record, issues, (cause,)
