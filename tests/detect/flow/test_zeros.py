"""Exact zeros that are the end of a long decay, and those that are not."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.detect import dead, detect, vanishing
from gradflow.detect.flow.readings.zeros import zeros_of
from gradflow.detect.view import flow_of
from gradflow.records import FlowRecord, IssueSeverity, IssueType
from tests.detect.builders import STEPS, Layer, flow_record


def frontier(smallest: float, *, largest: float = 1.0, dtype: str = "float32") -> FlowRecord:
    """A chain whose gradient is zero before a layer that gets `smallest`."""
    weight = {"dtype": dtype}
    return flow_record(
        Layer(name="a", grad=0.0, weight=weight),
        Layer(name="b", grad=0.0, weight=weight),
        Layer(name="c", grad=smallest, weight=weight),
        Layer(name="head", grad=largest, weight=weight),
    )


@pytest.mark.parametrize(
    ("smallest", "largest", "dtype", "why"),
    [
        (1e-44, 1.0, "float32", "underflow"),
        (1e-21, 1.0, "bfloat16", "underflow"),
        (1e-12, 1.0, "float32", "operation"),  # far from where the format ends
        (1e-21, 1e-20, "float32", "operation"),  # the loss itself is that small
        (1e-44, 1.0, "float64", "operation"),
        (1e-160, 1.0, "float64", "underflow"),
    ],
)
def test_a_zero_is_an_underflow_at_the_end_of_a_decay_only(
    smallest: float, largest: float, dtype: str, why: str
) -> None:
    record = frontier(smallest, largest=largest, dtype=dtype)
    zeros = zeros_of(flow_of(record))
    assert dict(zeros.why) == {"a": (why, "c"), "b": (why, "c")}
    assert zeros.underflown() == ({"a": "c", "b": "c"} if why == "underflow" else {})
    found = {issue.layer for issue in detect(record, dead())}
    assert found == (set() if why == "underflow" else {"a", "b"})
    starved = {issue.layer for issue in detect(record, vanishing())}
    assert {"a", "b"} <= starved if why == "underflow" else not {"a", "b"} & starved


def test_a_weight_of_zero_is_told_however_small_the_gradient_is() -> None:
    record = flow_record(Layer(name="a", grad=0.0), Layer(name="b", grad=1e-40, gain=0.0), Layer(name="head"))
    assert zeros_of(flow_of(record)).why["a"] == ("zero weight", "b")


@pytest.mark.parametrize("entering", [1.0, 0.0])
def test_a_product_too_small_for_its_format_is_an_underflow_where_something_enters(entering: float) -> None:
    record = frontier(1e-44)
    layers = list(record.layers)
    layers[2] = attrs.evolve(layers[2], input_rms=np.full(STEPS, entering))
    parameters = [
        attrs.evolve(p, grad_norm=np.zeros(STEPS)) if p.layer == "c" else p for p in record.parameters
    ]
    flow = flow_of(attrs.evolve(record, layers=layers, parameters=parameters))
    assert zeros_of(flow).blocked_by(flow, "c")[0] == ("underflow" if entering else "zero input")


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_what_is_rounding_behind_a_norm_over_one_feature_does_not_vanish(scale: float) -> None:
    """Its gradient is zero by mathematics, and told as such, once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 16), nn.GELU(), nn.Linear(16, 1), nn.LayerNorm(1), nn.Linear(1, 2))
    x = torch.randn(32, 7)
    report = gf.diagnose(
        model,
        lambda: x,
        lambda y: scale * nn.functional.cross_entropy(y, (x[:, 0] > 0).long()),
        optimizer=torch.optim.SGD(model.parameters(), 0.1 / scale),
        seed=0,
    )
    serious = {i.issue_type for i in report.issues if i.severity >= IssueSeverity.MEDIUM}
    assert serious == {IssueType.DEAD}
    assert report.causes[0].layer == "2"
