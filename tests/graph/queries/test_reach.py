"""What the gradient never reaches, and why."""

import pytest

from gradflow.graph import LayerGraph
from gradflow.records import GraphRecord
from tests.graph.dags import edge, node, residual


def reasons(nodes, edges, steps=()):
    found = LayerGraph(GraphRecord(nodes=nodes, edges=edges, steps=steps)).unreachable()
    return {layer.name: layer.reason for layer in found}


def test_nothing_is_unreachable_in_a_sound_graph():
    assert residual(1.0).unreachable() == ()


def test_all_layers_behind_a_cut_name_it():
    nodes = [node("a"), node("relu", "op"), node("b"), node("argmax", "op"), node("c"), node("loss", "loss")]
    edges = [edge("a", "relu"), edge("relu", "b"), edge("b", "argmax", severed=True, reason="argmax"),
             edge("argmax", "c"), edge("c", "loss")]  # fmt: skip
    found = LayerGraph(GraphRecord(nodes=nodes, edges=edges)).unreachable()
    assert [layer.name for layer in found] == ["a", "b"]
    assert {layer.cut for layer in found} == {("b", "argmax")}
    assert found[0].reason == "the gradient on its way from the loss is cut by argmax at b -> argmax."
    assert found[0].parameters == ("a.weight",)


def test_the_reason_of_the_record_comes_first():
    nodes = [node("a", reachable=False, reason="runs under no_grad."), node("loss", "loss")]
    assert reasons(nodes, [edge("a", "loss", severed=True)]) == {"a": "runs under no_grad."}


def test_a_layer_that_nothing_reads_and_one_that_leads_nowhere():
    nodes = [node("lost"), node("side"), node("end", "op"), node("a"), node("loss", "loss")]
    edges = [edge("side", "end"), edge("a", "loss")]
    assert reasons(nodes, edges) == {
        "lost": "nothing that the loss depends on reads its output.",
        "side": "no way leads from its output to the loss.",
    }


def test_a_gradient_of_exactly_zero_is_traced_to_where_it_ends():
    graph = LayerGraph.from_flows(
        {"a": 0.0, "b": 0.0, "relu": 1.0, "loss": 1.0},
        {("a", "b"): 0.0, ("b", "relu"): 0.0, ("relu", "loss"): 1.0},
        ops=("relu",),
    )
    found = {layer.name: layer for layer in graph.unreachable()}
    assert list(found) == ["a", "b"]
    assert found["a"].cut == ("b", "relu")
    assert found["a"].reason == (
        "the gradient on its way from the loss is exactly zero at every measured step at b -> relu."
    )


def test_cotangents_that_cancel_leave_a_layer_without_gradient():
    graph = LayerGraph.from_flows(
        {"a": 0.0, "b": 1.0, "c": 1.0, "loss": 1.0},
        {("a", "b"): 1.0, ("a", "c"): 1.0, ("b", "loss"): 1.0, ("c", "loss"): 1.0},
    )
    (found,) = graph.unreachable()
    assert (found.name, found.cut) == ("a", None)
    assert found.reason == "its output gradient is exactly zero at every measured step."


def test_one_live_step_is_enough():
    graph = LayerGraph.from_flows({"a": [0.0, 1.0], "loss": [1.0, 1.0]}, {("a", "loss"): [0.0, 1.0]})
    assert graph.unreachable() == ()
    assert [layer.name for layer in graph.step(0).unreachable()] == ["a"]


@pytest.mark.parametrize("kind", ["op", "input"])
def test_only_layers_count(kind):
    assert reasons([node("x", kind), node("loss", "loss")], []) == {}
