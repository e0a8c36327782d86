"""SATURATION: activations driven into their flat ends, and those that only look like it."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from gradflow.detect import detect, saturation
from gradflow.records import FlowRecord, Issue, IssueSeverity, KnowledgeRecord
from tests.detect.builders import STEPS, Layer, activation, flow_record


def share(value: Any) -> np.ndarray:
    return np.broadcast_to(np.asarray(value, float), (STEPS,)).copy()


def saturated(
    op: str, kind: str, value: Any, *, last: bool = False, gain: float = 1.0, **fields: Any
) -> FlowRecord:
    options = {"losses": fields.pop("losses")} if "losses" in fields else {}
    layers = [Layer(name="fc", gain=gain, op=op), *([] if last else [Layer(name="head")])]
    used = activation(f"fc:{op}", "fc", op, kind, saturated_share=share(value), **fields)
    return flow_record(*layers, activations=[used], **options)


def seen(record: FlowRecord) -> dict[str, Issue]:
    return {issue.layer: issue for issue in detect(record, saturation())}


@pytest.mark.parametrize(
    ("value", "severity"), [(0.95, IssueSeverity.HIGH), (0.6, IssueSeverity.MEDIUM), (0.3, None)]
)
def test_severity_goes_by_the_share(value: float, severity: IssueSeverity | None) -> None:
    found = seen(saturated("tanh", "bounded", value))
    assert (found["fc"].severity if found else None) is severity


def test_units_that_are_stuck_for_every_sample() -> None:
    issue = seen(saturated("sigmoid", "bounded", 0.45, always_saturated=0.6))["fc"]
    assert issue.severity is IssueSeverity.MEDIUM
    assert "60% of its units for every sample" in issue.description


def test_scores_that_are_masked_by_an_infinity_are_off_by_intent() -> None:
    masked = {"input_rms": np.full(STEPS, np.inf)}
    assert not seen(saturated("sigmoid", "bounded", 0.75, **masked))
    assert seen(saturated("sigmoid", "bounded", 0.75))


def test_what_feeds_it_decides_the_cure() -> None:
    raw = seen(saturated("sigmoid", "bounded", 0.95, gain=0.6))["fc"]
    big = seen(saturated("sigmoid", "bounded", 0.95, gain=60.0))["fc"]
    assert "tandardise what enters fc" in raw.recommended_actions[0]
    assert "xavier" in big.recommended_actions[0]


def test_a_trend_is_told() -> None:
    rising = np.linspace(0.1, 0.9, STEPS)
    assert "in the first steps" in seen(saturated("tanh", "bounded", rising))["fc"].description


def test_an_output_that_has_learned_to_be_sure() -> None:
    rising, falling = np.linspace(0.0, 0.9, STEPS), np.linspace(2.0, 0.1, STEPS)
    issue = seen(saturated("softmax", "softmax", rising, last=True, losses=falling))["fc"]
    assert issue.severity is IssueSeverity.LOW
    worse = seen(saturated("softmax", "softmax", rising, last=True, losses=falling[::-1]))["fc"]
    assert worse.severity >= IssueSeverity.MEDIUM
    assert any("cross-entropy" in action for action in worse.recommended_actions)


def test_a_softmax_over_one_alternative_is_left_to_dead() -> None:
    assert not seen(saturated("softmax", "softmax", 1.0, width=1))


def test_the_ceiling_of_a_rectifier_is_no_bound() -> None:
    record = flow_record(
        Layer(name="fc"),
        Layer(name="act", gain=None, fields={"type": "ReLU6"}),
        Layer(name="head"),
        activations=[activation("act", "act", "hardtanh", "bounded", saturated_share=share(0.6))],
    )
    assert not seen(record)


def test_the_calls_of_one_module_are_told_once() -> None:
    record = flow_record(
        Layer(name="fc"),
        Layer(name="act", gain=None),
        Layer(name="act@1", gain=None),
        Layer(name="head"),
        activations=[
            activation("act", "act", "tanh", "bounded", saturated_share=share(0.6)),
            activation("act@1", "act@1", "tanh", "bounded", saturated_share=share(0.9)),
        ],
    )
    assert set(seen(record)) == {"act@1"}


def test_an_attention_module_is_named_and_told_to_scale() -> None:
    """The softmax of scores that two layers feed is booked to the module that holds both."""
    record = flow_record(
        Layer(name="attn.q"),
        Layer(name="attn.k"),
        Layer(name="attn.o"),
        activations=[activation("attn:softmax", "attn", "softmax", "softmax", saturated_share=share(0.9))],
    )
    assert "sqrt" in seen(record)["attn"].recommended_actions[0]


@pytest.mark.parametrize(
    ("kind", "entering", "sick"), [("LSTM", 4000.0, True), ("LSTM", 1.0, False), ("Linear", 4000.0, False)]
)
def test_the_gates_of_a_recurrent_layer_go_by_what_enters_them(
    kind: str, entering: float, sick: bool
) -> None:
    fields = {"type": kind, "input_rms": np.full(STEPS, entering), "parameters": ("rnn.weight_ih_l0",)}
    record = flow_record(Layer(name="rnn", gain=0.6, fields=fields), Layer(name="head"))
    weight = attrs.evolve(record.parameters[0], name="rnn.weight_ih_l0", layer="rnn")
    record = attrs.evolve(record, parameters=[weight, record.parameters[1]])
    assert ("rnn" in seen(record)) is sick


def test_a_rectified_recurrence_has_no_gates() -> None:
    fields = {
        "type": "RNN",
        "input_rms": np.full(STEPS, 4000.0),
        "output_rms": np.full(STEPS, 900.0),
        "parameters": ("rnn.weight_ih_l0",),
    }
    record = flow_record(Layer(name="rnn", gain=0.6, fields=fields), Layer(name="head"))
    weight = attrs.evolve(record.parameters[0], name="rnn.weight_ih_l0", layer="rnn")
    assert not seen(attrs.evolve(record, parameters=[weight, record.parameters[1]]))


def soft_edge(before: float, *, stuck: float = 0.1, falls: bool = True) -> IssueSeverity:
    """Return how ill a steep sigmoid between two layers is, by the gradient that comes before it."""
    used = activation(
        "edge:sigmoid", "edge", "sigmoid", "bounded", saturated_share=share(0.85), always_saturated=stuck
    )
    losses = np.linspace(1.0, 0.3 if falls else 1.0, STEPS)
    known = KnowledgeRecord(step=STEPS - 1, loss=float(losses[-1]), shuffled=1.0)
    record = flow_record(
        Layer(name="edge", op="sigmoid", grad=before),
        Layer(name="head", grad=1.0),
        activations=[used],
        losses=losses,
    )
    return seen(attrs.evolve(record, knowledge=known))["edge"].severity


def test_a_soft_edge_that_is_a_function_is_judged_by_what_it_hands_back() -> None:
    assert soft_edge(2.0) is IssueSeverity.LOW
    assert soft_edge(0.1) is IssueSeverity.HIGH
    assert soft_edge(2.0, stuck=0.6) is IssueSeverity.HIGH
    assert soft_edge(2.0, falls=False) is IssueSeverity.HIGH


def test_a_clamp_that_guards_probabilities_follows_them() -> None:
    def guarded(of_softmax: float) -> bool:
        record = flow_record(
            Layer(name="fc", op="clamp"),
            activations=[
                activation("fc:softmax", "fc", "softmax", "softmax", saturated_share=share(of_softmax)),
                activation("fc:clamp", "fc", "clamp", "bounded", saturated_share=share(0.9)),
            ],
        )
        return not any(issue.metrics["op"] == "clamp" for issue in detect(record, saturation()))

    assert guarded(0.95)
    assert not guarded(0.1)
