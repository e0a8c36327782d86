"""EXPLODING: growth along the path, off-scale weights, and a head that swamps its neighbour."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.detect import detect, exploding
from gradflow.records import FlowRecord, IssueSeverity, KnowledgeRecord, Role
from tests.detect.builders import Layer, activation, flow_record
from tests.detect.flow.test_vanishing import scaled


def seen(record: FlowRecord) -> dict[str, IssueSeverity]:
    return {issue.layer: issue.severity for issue in detect(record, exploding())}


def growing(depth: int, factor: float) -> FlowRecord:
    return flow_record(*(Layer(name=f"fc{i}", grad=factor ** (depth - 1 - i)) for i in range(depth)))


def test_layers_that_amplify_are_named() -> None:
    found = seen(growing(4, 113.0))
    assert set(found) == {"fc1", "fc2", "fc3"}  # what goes through fc0 is not seen: nothing is before it
    assert found["fc2"] is IssueSeverity.CRITICAL


@pytest.mark.parametrize("loss", [0.1, 20.0])
@pytest.mark.parametrize("growth", [2.2, 4.0])
def test_growth_of_no_great_extent_in_a_model_that_came_knowing(loss: float, growth: float) -> None:
    record, known = growing(8, growth), KnowledgeRecord(step=7, loss=loss, shuffled=28.0, silent=68.0)
    record = attrs.evolve(record, losses=np.full(record.steps, loss), knowledge=known)
    excused = loss == 0.1 and growth == 2.2
    assert max(seen(record).values()) == (
        IssueSeverity.LOW if excused else max(seen(growing(8, growth)).values())
    )


def test_uniform_growth_below_the_threshold_of_a_layer_adds_up() -> None:
    assert seen(growing(8, 2.5)) != {}
    assert not seen(growing(4, 2.5))


def test_one_layer_of_gain_ten_is_no_explosion() -> None:
    assert not seen(flow_record(Layer(name="a", grad=12.0), Layer(name="b", grad=1.0), Layer(name="c")))


# Multiples of an odd number: rounding decides exactly at a threshold, and only there.
@given(st.integers(1, 20).map(lambda i: 0.9731 * i), st.integers(2, 8), st.floats(1e-6, 1e6))
def test_scale_of_the_loss_changes_nothing(factor: float, depth: int, scale: float) -> None:
    record = growing(depth, factor)
    assert seen(record) == seen(scaled(record, scale))


def test_calls_of_a_reused_module_count_together() -> None:
    calls = ["cell", *(f"cell@{i}" for i in range(1, 12))]
    layers = [Layer(name=name, grad=1.6 ** (12 - i)) for i, name in enumerate(calls)]
    (issue,) = detect(flow_record(*layers, Layer(name="head")), exploding())
    assert issue.layer == "cell"
    assert issue.metrics["num_calls"] == 11
    assert "gate the state" in issue.recommended_actions[0]


def test_an_explosion_that_the_first_steps_tame_still_counts() -> None:
    tamed = np.array([1e4, 1e4, 1e3, 10, 5, 2, 2, 2])
    assert seen(flow_record(Layer(name="a", grad=tamed), Layer(name="b", gain=100.0), Layer(name="c")))


def test_the_gradient_before_a_norm_layer_may_be_large() -> None:
    norm = {"type": "LayerNorm", "input_rms": np.full(8, 0.002)}
    embed = {"type": "Embedding", "output_rms": np.full(8, 0.002)}
    record = flow_record(
        Layer(name="embed", grad=500.0, fields=embed),
        Layer(name="norm", fields=norm, weight={"shape": (16,)}),
        Layer(name="head"),
    )
    assert not seen(record)


def test_a_broadcast_adds_up_what_it_spreads_and_a_concatenation_does_not() -> None:
    def behind(op: str) -> FlowRecord:
        record = flow_record(Layer(name="a", grad=150.0, op=op), Layer(name="b"))
        graph = record.graph_record
        assert graph is not None
        nodes = [attrs.evolve(n, num_elements=512 * 100) if n.kind == "op" else n for n in graph.nodes]
        return attrs.evolve(record, graph_record=attrs.evolve(graph, nodes=nodes))

    assert not seen(behind("expand"))
    assert seen(behind("cat"))


def test_large_weights_of_a_first_layer_show_forward() -> None:
    big = {"output_rms": np.full(8, 140.0)}
    record = flow_record(Layer(name="first", gain=140.0, fields=big), Layer(name="head"))
    assert seen(record) == {"first": IssueSeverity.HIGH}


@pytest.mark.parametrize(
    "what", ["norm behind it", "bounded activation behind it", "input is small", "frozen"]
)
def test_large_weights_that_do_no_harm(what: str) -> None:
    big = {"output_rms": np.full(8, 140.0)}
    behind = {"type": "LayerNorm"} if what == "norm behind it" else {}
    extra = {}
    if what == "bounded activation behind it":
        extra["activations"] = [activation("first:tanh", "first", "tanh", "bounded")]
    if what == "input is small":
        big["output_rms"] = np.full(8, 1.0)
    weight = {"trainable": False} if what == "frozen" else {}
    record = flow_record(
        Layer(name="first", gain=140.0, fields=big, weight=weight), Layer(name="head", fields=behind), **extra
    )
    assert not seen(record)


def two_heads(value: float, policy: float, loss: float) -> FlowRecord:
    return flow_record(
        Layer(name="trunk", grad=1.0),
        Layer(name="policy", grad=policy),
        Layer(name="value", grad=value, fields={"output_rms": np.full(8, 0.1)}),
        edges=[("trunk", "policy"), ("trunk", "value"), ("policy", "loss"), ("value", "loss")],
        losses=np.full(8, loss),
    )


def test_a_head_that_swamps_the_other_and_is_off_scale() -> None:
    (issue,) = detect(two_heads(300.0, 0.1, 2e6), exploding())
    assert issue.layer == "value"
    assert issue.metrics["rival"] == "policy"
    assert any("detach" in action for action in issue.recommended_actions)


@pytest.mark.parametrize(
    ("value", "policy", "loss"),
    [(0.2, 0.1, 1.0), (1.0, 1e-3, 2.0)],
    ids=["balanced", "auxiliary head of small weight"],
)
def test_heads_that_are_well(value: float, policy: float, loss: float) -> None:
    assert not seen(two_heads(value, policy, loss))


def test_a_runaway_recurrent_layer() -> None:
    fields = {
        "type": "RNN",
        "shape": (32, 40, 16),
        "parameters": ("rnn.weight_hh_l0",),
        "output_rms": np.full(8, 50.0),
    }
    record = flow_record(Layer(name="rnn", gain=1.5, op="select", fields=fields), Layer(name="head"))
    graph = record.graph_record
    assert graph is not None
    nodes = [attrs.evolve(n, shape=(32, 16), num_elements=512) if n.kind == "op" else n for n in graph.nodes]
    weight = attrs.evolve(record.parameters[0], name="rnn.weight_hh_l0", layer="rnn")
    record = attrs.evolve(
        record, graph_record=attrs.evolve(graph, nodes=nodes), parameters=[weight, record.parameters[1]]
    )
    assert seen(record) == {"rnn": IssueSeverity.CRITICAL}


def test_growth_beyond_the_weights_is_booked_to_what_feeds_the_operation() -> None:
    record = flow_record(
        Layer(name="a", grad=1e6, op="bmm"), Layer(name="b", grad=1e3, op="bmm"), Layer(name="c", gain=0.6)
    )
    assert set(seen(record)) == {"a", "b"}


def test_growth_along_a_residual_stream_is_booked_to_the_blocks() -> None:
    names = [f"blocks.{i}" for i in range(6)]
    edges = [("stem", names[0]), ("stem", "op:blocks.0")]
    for i, name in enumerate(names):
        behind = names[i + 1] if i < 5 else "head"
        edges += [(name, f"op:{name}"), (f"op:{name}", behind)]
        if i < 5:
            edges.append((f"op:{name}", f"op:{behind}"))
    record = flow_record(
        Layer(name="stem", grad=3.0**6),
        *(Layer(name=name, grad=3.0 ** (5 - i), op="add") for i, name in enumerate(names)),
        Layer(name="head"),
        edges=[*edges, ("head", "loss")],
    )
    assert all(layer.startswith("blocks.") for layer in seen(record))


@pytest.mark.parametrize(("blows_up", "loss"), [(True, 1e6), (False, 1e6), (True, 5.0)])
def test_far_targets_explain_a_run_that_blows_up(blows_up: bool, loss: float) -> None:
    grad = np.geomspace(1.0, 1e8, 8) if blows_up else np.ones(8)
    losses = loss * grad**2 if blows_up else np.full(8, loss)
    size = {"output_rms": np.full(8, 0.1)}
    record = flow_record(
        Layer(name="fc", grad=grad), Layer(name="out", grad=grad, fields=size), losses=losses, optimizer="SGD"
    )
    found = [i for i in detect(record, exploding()) if i.evidence.plays(Role.OFF_SCALE)]
    assert [i.layer for i in found] == (["out"] if blows_up and loss > 10 else [])


@pytest.mark.parametrize(("first_loss", "start", "developed"), [
    (9.0, 200.0, False), (2.0, 200.0, True), (9.0, 20.0, True), (2.0, 2e3, False),
])  # fmt: skip
def test_growth_with_a_first_loss_far_above_that_of_zeros_was_there_before_the_steps(
    first_loss: float, start: float, developed: bool
) -> None:
    """Between a hundred and a thousand the loss decides whether the signal was blown up from the start."""
    grown = np.array([start, *[1e5] * 7])
    layers = [Layer(name=f"fc{i}", grad=grown ** (1 - i / 3)) for i in range(4)]
    known = KnowledgeRecord(step=7, loss=9.0, shuffled=9.0, silent=2.0)
    losses = np.linspace(first_loss, 20.0, 8)
    record = attrs.evolve(flow_record(*layers, optimizer="Adam"), losses=losses, knowledge=known)
    found = [i for i in detect(record, exploding()) if "total_growth" in i.metrics]
    assert found
    assert {issue.evidence.developed for issue in found} == {developed}
