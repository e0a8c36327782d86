"""Gates that are saturated, stuck, shut or closed are found; those that are open on purpose are not."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import nn

from gradflow.detect import detect, gated
from gradflow.records import IssueSeverity, IssueType, Role
from tests.detect.recurrent.readers import LOW, Reader, diagnosed, loud, ours, rnn, scaled


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_inputs_out_of_scale_saturate_the_gates(kind: type[nn.RNNBase]) -> None:
    report = diagnosed(Reader(rnn(kind)), 20, size=1000.0)
    issue = ours(report.record)[("rnn", IssueType.SATURATION)]
    assert issue.severity is IssueSeverity.HIGH
    assert issue.metrics["gate"] == "candidate"
    assert issue.recommended_actions[0].startswith("Standardise what enters rnn (rms ")
    assert loud(report)[0] == ("HIGH", "SATURATION", "rnn")


def test_a_gate_that_never_writes_is_stuck_and_one_that_never_forgets_is_not() -> None:
    sick = ours(diagnosed(Reader(scaled(rnn(nn.GRU), keep=14.0)), 20).record)
    issue = sick[("rnn", IssueType.SATURATION)]
    assert (issue.metrics["gate"], issue.severity) == ("update", IssueSeverity.HIGH)
    assert "it never writes" in issue.description
    assert ours(diagnosed(Reader(scaled(rnn(nn.LSTM), keep=14.0)), 20).record) == {}


@pytest.mark.parametrize(("part", "text"), [(0, "it never writes"), (3, "it lets nothing out")])
def test_input_and_output_gates_that_are_shut(part: int, text: str) -> None:
    module = rnn(nn.LSTM)
    with torch.no_grad():
        module.bias_ih_l0[part * 24 : (part + 1) * 24] -= 16.0
    issue = ours(diagnosed(Reader(module), 20, lr=None, steps=1).record)[("rnn", IssueType.SATURATION)]
    assert text in issue.description
    assert issue.recommended_actions[0].startswith("Start the ")


def test_chrono_initialisation_is_no_illness() -> None:
    """Forget gates at up to 1 − 1/T and input gates as nearly closed: saturated, and needed so."""
    module, length = rnn(nn.LSTM), 800
    bias = torch.log(torch.rand(24) * (length - 2) + 1)
    with torch.no_grad():
        module.bias_hh_l0.zero_()
        module.bias_ih_l0[24:48], module.bias_ih_l0[:24] = bias, -bias
    record = diagnosed(Reader(module), length, lr=None, steps=1, batch=4).record
    forget = record.recurrences[0].levels[0].gate("forget")
    assert forget is not None
    assert forget.saturated_share[0] > 0.3
    assert all(issue.severity <= LOW for issue in ours(record).values())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_forget_gates_that_are_closed(kind: type[nn.RNNBase]) -> None:
    report = diagnosed(Reader(scaled(rnn(kind), keep=-5.0), "every"), 40)
    issue = ours(report.record)[("rnn", IssueType.VANISHING)]
    assert issue.severity is IssueSeverity.MEDIUM
    assert "gate is closed" in issue.description
    assert issue.evidence.plays(Role.ABSORBING)
    assert issue.metrics["steps_to_percent"] <= 5
    short = diagnosed(Reader(scaled(rnn(kind), keep=-5.0), "every"), 8)
    assert ours(short.record) == {}
    learned = attrs.evolve(report.record, losses=[1.0] * 3 + [0.1] * 3)
    assert ours(learned)[("rnn", IssueType.VANISHING)].severity is LOW


def test_gated_thresholds() -> None:
    record = diagnosed(Reader(rnn(nn.LSTM)), 20, lr=None, steps=1, size=30.0).record
    candidate = record.recurrences[0].levels[0].gate("candidate")
    assert candidate is not None
    share = float(candidate.saturated_share[0])
    assert 0.3 < share < 1.0
    (medium,) = detect(record, gated(share - 0.01, severe_share=share + 0.01))
    (high,) = detect(record, gated(share - 0.01, severe_share=share - 0.01))
    assert (medium.severity, high.severity) == (IssueSeverity.MEDIUM, IssueSeverity.HIGH)
    assert detect(record, gated(share + 0.01)) == ()


@pytest.mark.parametrize(
    ("bias", "kinds"), [(-30.0, {"SATURATION", "VANISHING"}), (-3.5, {"VANISHING"}), (0.0, set())]
)
def test_a_forget_gate_that_is_shut_for_good_is_saturated_too(bias: float, kinds: set[str]) -> None:
    module = rnn(nn.LSTM)
    with torch.no_grad():
        module.bias_ih_l0[24:48] += bias
    found = ours(diagnosed(Reader(module), 20).record)
    assert {kind.value for layer, kind in found if layer == "rnn"} == kinds
