"""Recommended actions fit the model at hand."""

from __future__ import annotations

import numpy as np
import pytest

from gradflow.detect import default_detectors, detect
from gradflow.detect.actions import initialisation, vanishing_actions
from gradflow.detect.reach.actions import cut_actions
from gradflow.detect.updates.fast import without_rates
from gradflow.detect.view import flow_of
from tests.detect.builders import Layer, activation, decaying, flow_record


@pytest.mark.parametrize(
    ("op", "kind", "call"),
    [
        ("relu", "rectifier", "kaiming_normal_(fc.weight, nonlinearity='relu')"),
        ("tanh", "bounded", "xavier_uniform_(fc.weight, gain=nn.init.calculate_gain('tanh'))"),
        ("hardtanh", "bounded", "xavier_uniform_(fc.weight)"),
    ],
)
def test_the_initialisation_goes_by_the_activation(op: str, kind: str, call: str) -> None:
    record = flow_record(
        Layer(name="fc", op=op), Layer(name="head"), activations=[activation(f"fc:{op}", "fc", op, kind)]
    )
    assert initialisation(flow_of(record), "fc") == f"nn.init.{call}"
    assert initialisation(flow_of(record), "head") == "nn.init.xavier_uniform_(head.weight)"


def test_a_norm_starts_at_ones() -> None:
    norm = {"type": "BatchNorm1d"}
    record = flow_record(
        Layer(name="norm", op="relu", fields=norm),
        Layer(name="head"),
        activations=[activation("norm:relu", "norm", "relu", "rectifier")],
    )
    assert initialisation(flow_of(record), "norm") == "nn.init.ones_(norm.weight)"


def test_rates_that_were_measured_replace_those_that_are_guessed() -> None:
    kept = without_rates(("Lower the learning rate of Adam: 1 to about 0.03.", "Clip the gradient."))
    assert kept == ("Clip the gradient.",)


def test_a_module_activation_counts_too() -> None:
    gelu = {"type": "GELU"}
    record = flow_record(Layer(name="fc"), Layer(name="act", gain=None, fields=gelu), Layer(name="head"))
    assert "kaiming" in initialisation(flow_of(record), "fc")


def test_norm_layers_change_the_advice() -> None:
    plain = flow_of(decaying(4, 0.01))
    assert any(
        "norm layer" in action for action in vanishing_actions(plain, "fc0", absorber="", per_layer=0.01)
    )
    layers = [Layer(name="a", grad=1e-6), Layer(name="n", fields={"type": "LayerNorm"}), Layer(name="head")]
    normed = flow_of(flow_record(*layers, optimizer="Adam"))
    actions = vanishing_actions(normed, "a", absorber="", per_layer=0.5)
    assert any("pre-norm" in action and "Adam" in action for action in actions)
    eps = vanishing_actions(normed, "a", absorber="n", per_layer=0.01)
    assert "eps" in eps[0]


@pytest.mark.parametrize(
    ("why", "word"),
    [("argmax", "gumbel"), ("sign", "straight-through"), ("checkpoint (reentrant)", "use_reentrant=False"),
     ("its output does not lead to the loss", "another tensor")],
)  # fmt: skip
def test_a_cut_is_mended_by_its_operation(why: str, word: str) -> None:
    flow = flow_of(flow_record(Layer(name="fc"), Layer(name="head")))
    assert word in " ".join(cut_actions(flow, "fc", why))


def test_every_issue_of_every_detector_carries_actions_unless_it_is_a_remark() -> None:
    lost = np.full(8, np.nan)
    wild = np.array([1, 1, 1, 1, 1e4, 1, 1, 1])
    record = flow_record(
        Layer(name="idle", grad=lost),
        Layer(name="a", grad=1e-9 * wild, op="tanh"),
        Layer(name="b", grad=1e-3 * wild, op="relu"),
        Layer(name="c", grad=1e3 * wild, gain=500.0),
        Layer(name="head", grad=wild),
        edges=[("a", "op:a"), ("op:a", "b"), ("b", "op:b"), ("op:b", "c"), ("c", "head"), ("head", "loss")],
        activations=[
            activation("a:tanh", "a", "tanh", "bounded", saturated_share=np.full(8, 0.9)),
            activation("b:relu", "b", "relu", "rectifier", never_fired=0.8),
        ],
        losses=wild,
        optimizer="SGD",
    )
    issues = detect(record, default_detectors())
    assert {i.issue_type.value for i in issues} >= {
        "DEAD",
        "VANISHING",
        "EXPLODING",
        "SATURATION",
        "UNSTABLE",
    }
    assert all(i.recommended_actions for i in issues)
    assert all(np.isfinite(i.magnitude) for i in issues)
