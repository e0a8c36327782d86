"""VANISHING: fires where the gradient is lost, and not on what looks alike."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradflow as gf
from gradflow.detect import detect, vanishing
from gradflow.records import Evidence, FlowRecord, IssueSeverity, Role
from tests.detect.builders import Layer, activation, decaying, flow_record


def seen(record: FlowRecord, **options: float) -> dict[str, IssueSeverity]:
    return {issue.layer: issue.severity for issue in detect(record, vanishing(**options))}


def scaled(record: FlowRecord, factor: float) -> FlowRecord:
    """The record of the same run with the loss multiplied."""
    return attrs.evolve(
        record,
        losses=record.losses * factor,
        layers=[attrs.evolve(x, grad_norm=x.grad_norm * factor) for x in record.layers],
        parameters=[attrs.evolve(p, grad_norm=p.grad_norm * factor) for p in record.parameters],
    )


def test_uniform_decay_is_found_though_all_layers_look_alike() -> None:
    found = seen(decaying(6, 0.02))
    assert found["fc0"] is IssueSeverity.CRITICAL
    assert "fc5" not in found


@pytest.mark.parametrize("depth", [2, 6, 12])
def test_decay_of_the_default_initialisation_is_not_blamed(depth: int) -> None:
    assert not seen(decaying(depth, 0.41))


def test_weights_that_promise_more_are_held_to_it() -> None:
    """He's initialisation keeps the gradient: if less is left at each layer, something else takes it."""
    assert not seen(decaying(9, 0.4))
    assert seen(decaying(9, 0.4, gain=2**0.5))["fc0"] >= IssueSeverity.MEDIUM


def test_whatever_the_kinds_nothing_left_is_an_illness() -> None:
    assert seen(decaying(20, 0.41))["fc0"] is IssueSeverity.MEDIUM


# Powers of an odd number: rounding decides exactly at a threshold, and only there.
@given(st.integers(1, 160).map(lambda i: 0.9731**i), st.integers(2, 10), st.floats(1e-6, 1e6))
def test_scale_of_the_loss_changes_nothing(keep: float, depth: int, factor: float) -> None:
    record = decaying(depth, keep)
    assert seen(record) == seen(scaled(record, factor))


def test_one_layer_that_absorbs_is_named() -> None:
    record = flow_record(
        Layer(name="a", grad=1e-5),
        Layer(name="tiny", grad=1.0, gain=1e-5),
        Layer(name="b"),
        Layer(name="head"),
    )
    issues = {i.layer: i for i in detect(record, vanishing())}
    assert set(issues) == {"a", "tiny"}
    assert issues["tiny"].evidence == Evidence(roles=Role.ABSORBING)
    assert issues["a"].evidence == Evidence(roles=Role.STARVED, origin="tiny")
    assert "lost at tiny" in issues["a"].description
    assert any("rms" in action for action in issues["tiny"].recommended_actions)


def test_a_loss_high_in_a_growing_stack_does_not_hide() -> None:
    """Twenty times per layer what a kind should keep: the fall is measured from the peak before it."""
    grads = [1e-5, 5.0, 3.0, 2.0, 1.0]
    record = flow_record(*(Layer(name=f"fc{i}", grad=g) for i, g in enumerate(grads)))
    assert seen(record)["fc0"] >= IssueSeverity.MEDIUM


def test_an_operation_is_blamed_where_the_weights_are_ordinary() -> None:
    record = flow_record(Layer(name="a", grad=1e-7), Layer(name="b", grad=1e-6, op="mul"), Layer(name="head"))
    issues = {i.layer: i for i in detect(record, vanishing())}
    assert issues["b"].metrics["op"] == "mul"
    assert "head" not in issues


def test_a_saturated_activation_on_the_way_is_named() -> None:
    record = flow_record(
        Layer(name="a", grad=1e-7),
        Layer(name="b", grad=1e-6, op="sigmoid"),
        Layer(name="head"),
        activations=[activation("b:sigmoid", "b", "sigmoid", "bounded", saturated_share=np.full(8, 0.99))],
    )
    issues = {i.layer: i for i in detect(record, vanishing())}
    assert issues["b"].metrics["op"] == "sigmoid"


def test_a_gated_branch_beside_a_path_that_carries_is_no_illness() -> None:
    record = flow_record(
        Layer(name="stem", grad=1.0),
        Layer(name="branch", grad=1e-7, op="mul"),
        Layer(name="head"),
        edges=[("stem", "branch"), ("branch", "op:branch"), ("op:branch", "head"), ("stem", "head"),
               ("head", "loss")],
    )  # fmt: skip
    assert not seen(record)


def test_a_long_branch_that_loses_it_layer_by_layer_is() -> None:
    tower = [Layer(name=f"tower{i}", grad=0.02 ** (5 - i)) for i in range(6)]
    record = flow_record(
        Layer(name="stem", grad=1.0),
        *tower,
        Layer(name="head"),
        edges=[
            ("stem", "tower0"),
            *((f"tower{i}", f"tower{i + 1}") for i in range(5)),
            ("tower5", "head"),
            ("stem", "head"),
            ("head", "loss"),
        ],
    )
    found = seen(record)
    assert "tower0" in found
    assert "stem" not in found


def test_what_training_cures_does_not_count_and_what_it_brings_does() -> None:
    cured = np.array([1e-7, 1e-5, 1e-2, 1, 1, 1, 1, 1])
    assert not seen(flow_record(Layer(name="a", grad=cured), Layer(name="head")))
    (issue,) = detect(flow_record(Layer(name="a", grad=cured[::-1]), Layer(name="head")), vanishing())[:1]
    assert "training has brought this about" in issue.description


def test_pooling_and_softmax_keep_less_by_their_kind() -> None:
    pooled = flow_record(
        Layer(name="conv", grad=1e-3, fields={"shape": (32, 16, 64, 64)}),
        Layer(name="pool", gain=None, fields={"type": "AdaptiveAvgPool2d", "shape": (32, 16, 1, 1)}),
        Layer(name="head"),
    )
    assert not seen(pooled)
    logits = {"shape": (32, 2000)}
    wide = flow_record(
        Layer(name="a", grad=4e-4, fields=logits),
        Layer(name="soft", gain=None, fields={"type": "Softmax", **logits}),
    )
    assert not seen(wide)


def test_exact_zeros_are_another_illness() -> None:
    assert not seen(flow_record(Layer(name="a", grad=0.0), Layer(name="head")))


def test_frozen_layers_are_not_told() -> None:
    record = flow_record(Layer(name="a", grad=1e-9, weight={"trainable": False}), Layer(name="head"))
    assert not seen(record)


def test_without_a_graph_the_order_of_execution_stands_in() -> None:
    assert seen(decaying(6, 0.02, graph=False)) == seen(decaying(6, 0.02))


@pytest.mark.parametrize(("gain", "sick"), [(0.577, True), (1.0, False)])
def test_a_plain_recurrent_layer_read_at_its_last_step(gain: float, sick: bool) -> None:
    fields = {"type": "RNN", "shape": (32, 60, 16), "parameters": ("rnn.weight_hh_l0",)}
    record = flow_record(
        Layer(name="rnn", gain=gain, op="select", fields=fields),
        Layer(name="head"),
        nodes={"op:rnn": {}},
    )
    graph = record.graph_record
    assert graph is not None
    nodes = [attrs.evolve(n, shape=(32, 16), num_elements=512) if n.kind == "op" else n for n in graph.nodes]
    weight = attrs.evolve(record.parameters[0], name="rnn.weight_hh_l0", layer="rnn")
    record = attrs.evolve(
        record, graph_record=attrs.evolve(graph, nodes=nodes), parameters=[weight, *record.parameters[1:]]
    )
    assert ("rnn" in seen(record)) is sick


@pytest.mark.parametrize(
    ("taken", "sick"),
    [((1, 59, 60), True), ((1, 5, 60), False), ((2, 5, 16), True), ((), True)],
    ids=["last", "sixth", "another axis", "unknown"],
)
def test_steps_behind_the_one_that_is_read_need_not_be_remembered(taken: tuple[int, ...], sick: bool) -> None:
    fields = {"type": "RNN", "shape": (32, 60, 16), "parameters": ("rnn.weight_hh_l0",)}
    record = flow_record(
        Layer(name="rnn", gain=0.577, op="select", fields=fields),
        Layer(name="head"),
        nodes={"op:rnn": {}},
    )
    graph = record.graph_record
    assert graph is not None
    read = {"shape": (32, 16), "num_elements": 512, "taken": taken}
    nodes = [attrs.evolve(n, **read) if n.kind == "op" else n for n in graph.nodes]
    weight = attrs.evolve(record.parameters[0], name="rnn.weight_hh_l0", layer="rnn")
    record = attrs.evolve(
        record, graph_record=attrs.evolve(graph, nodes=nodes), parameters=[weight, *record.parameters[1:]]
    )
    assert ("rnn" in seen(record)) is sick


def test_the_part_that_loses_it_is_told_from_what_it_starves() -> None:
    record = flow_record(
        Layer(name="stem", grad=0.1**5),
        *(Layer(name=f"blocks.{i}", grad=0.1 ** (5 - i), gain=1.4) for i in range(6)),
        Layer(name="head"),
    )
    found = {i.layer: i.evidence.elsewhere for i in detect(record, vanishing())}
    assert found["stem"]
    assert not found["blocks.0"]


def test_a_residual_stream_is_seen_block_by_block() -> None:
    """The sums of the stream stand for the blocks that end in them."""
    names = [f"blocks.{i}" for i in range(6)]
    edges = [("stem", names[0]), ("stem", "op:blocks.0")]
    for i, name in enumerate(names):
        edges.append((name, f"op:{name}"))
        behind = names[i + 1] if i < 5 else "head"
        edges.append((f"op:{name}", behind))
        if i < 5:
            edges.append((f"op:{name}", f"op:{behind}"))
    record = flow_record(
        Layer(name="stem", grad=0.02**6),
        *(Layer(name=name, grad=0.02 ** (5 - i), op="add") for i, name in enumerate(names)),
        Layer(name="head"),
        edges=[*edges, ("head", "loss")],
    )
    issues = {i.layer: i for i in detect(record, vanishing())}
    assert issues["stem"].metrics["num_layers_to_loss"] >= 7
    assert "head" not in issues


@pytest.mark.parametrize("starved", [False, True])
def test_what_is_heard_below_the_tower_of_a_logarithm(starved: bool) -> None:
    """A probability next to 1 has a slope of a million in a cross entropy, beside which all else is
    next to nothing; a layer that hardly feeds it is not heard all the same."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 32), nn.Linear(32, 1)
    model = nn.Sequential(first, nn.ReLU(), last, nn.Sigmoid())
    with torch.no_grad():
        first.weight.mul_(1e-6 if starved else 1.0)
        first.bias.zero_()
        last.bias.fill_(14.0)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(64, 4)
        return x, (x[:, :1] + 0.5 * torch.randn(64, 1) > 0).float()

    record = gf.analyze(model, batch, F.binary_cross_entropy, steps=4, seed=0)
    vanished = {i.layer for i in detect(record, vanishing()) if i.severity.is_serious}
    assert ("0" in vanished) == starved
