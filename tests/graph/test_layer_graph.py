"""The class: construction, the container's face, levels, steps and immutability."""

import copy
import pickle

import attrs
import numpy as np
import pytest

from gradflow.errors import GraphUnavailableError, RecordFormatError, UnknownLayerError
from gradflow.graph import LayerGraph
from gradflow.records import FlowRecord, GraphRecord, Provenance
from tests.graph.dags import edge, network, node, residual, topology, unknown


def test_from_record_and_record_graph():
    record = FlowRecord(steps=1, losses=[1.0], layers=(), parameters=(), graph_record=residual(0.5).record)
    assert LayerGraph.from_record(record) == residual(0.5) == record.graph


def test_a_record_without_a_graph_says_how_to_get_one():
    record = FlowRecord(
        steps=0, losses=[], layers=(), parameters=(), provenance=Provenance(notes=("the model is scripted.",))
    )
    with pytest.raises(
        GraphUnavailableError, match=r"holds no layer graph.*The run noted: the model is scripted."
    ):
        _ = record.graph


def test_container():
    graph = residual(0.5)
    assert len(graph) == 4
    assert list(graph) == ["a", "fc", "add", "loss"]
    assert "fc" in graph
    assert "x" not in graph
    assert 3 not in graph
    assert graph["fc"].type == "layer"
    assert graph.position("add") == 2
    assert graph.edges[0] == ("a", "fc")
    with pytest.raises(UnknownLayerError, match=r"no entry named 'fcc'. The nearest of 4 names: fc"):
        graph["fcc"]
    with pytest.raises(UnknownLayerError, match="no entry named 'fc -> a'"):
        graph.edge("fc", "a")
    with pytest.raises(UnknownLayerError, match="no entry named 'fc -> x'"):
        graph.edge("fc", "x")


def test_repr():
    assert repr(residual(0.0)) == (
        "LayerGraph(full: 4 nodes (2 layer, 1 op, 1 loss), 4 edges (1 severed), 1 step measured)"
    )
    assert repr(LayerGraph(topology(residual(1.0).record)).layers()) == (
        "LayerGraph(layers: 3 nodes (2 layer, 1 loss), 3 edges, topology only)"
    )


def test_it_is_immutable():
    graph = residual(0.5)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        graph.level = "x"  # type: ignore[misc]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        graph["fc"].gain = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        graph.table.flow[0] = 1.0
    assert hash(graph) == hash(residual(0.5))
    assert graph != residual(0.4)
    before = graph.to_dot()
    graph.bottlenecks()
    graph.layers()
    graph.at(depth=1)
    assert graph.to_dot() == before


def test_it_can_be_copied_and_pickled_with_what_it_has_cached():
    graph = residual(0.5)
    assert graph.nx
    assert graph.hodge
    assert pickle.loads(pickle.dumps(graph)) == graph == copy.deepcopy(graph)


def test_answers_compare_as_a_whole_though_some_numbers_are_not_known():
    for one, two in ((residual(1e-4), residual(1e-4)), (residual(1e-4).layers(), residual(1e-4).layers())):
        assert one["a"] == two["a"]
        assert np.isnan(one["a"].gain)
        assert one.bottlenecks() == two.bottlenecks()
        assert one.path("loss", "a") == two.path("loss", "a")
        assert one.critical_points() == two.critical_points() != ()
        assert one.circulation() == two.circulation() != ()
        assert one.compare(two) == two.compare(one)
    assert residual(0.0).severed == residual(0.0).severed != ()


def test_levels():
    graph = residual(0.5)
    assert graph.full is graph
    layers = graph.layers()
    assert layers.full is graph
    assert layers.layers().full is graph
    assert list(layers.layers()) == list(layers)
    assert graph.at("fc").full is graph


def test_the_graph_at_one_step():
    net = network([(0, 1), (0, 2), (1, 2), (2, 3)], steps=3, ops={2})
    for step in range(3):
        one = net.graph.step(step)
        assert one.record.steps == (step,)
        for i, name in enumerate(net.graph):
            assert one[name].grad_norm == pytest.approx(net.graph.numbers.grad_norm[i, step])
            np.testing.assert_allclose(one[name].curl, net.graph.hodge_per_step.curl[i, step], atol=1e-9)
            np.testing.assert_allclose(
                one[name].potential, net.graph.hodge_per_step.potential[i, step], atol=1e-9
            )
        assert net.graph.layers().step(step).full == one
    with pytest.raises(ValueError, match=r"step 3 was not measured. Measured steps: 0, 1, 2"):
        net.graph.step(3)
    with pytest.raises(ValueError, match="Measured steps: none"):
        LayerGraph(topology(net.record)).step(0)


def test_from_flows_kinds_and_values():
    graph = LayerGraph.from_flows(
        {"input.0": 1.0, "fc": 2.0, "relu": 2.0, "loss": 1.0},
        {("input.0", "fc"): 1.0, ("fc", "relu"): 2.0, ("relu", "loss"): 2.0},
        ops=["relu"],
        num_elements={"fc": 8},
        effective_ranks={"fc": 3.0},
    )
    assert [graph[n].kind for n in graph] == ["input", "layer", "op", "loss"]
    assert (graph["fc"].num_elements, graph["fc"].effective_rank) == (8, 3.0)
    assert graph["fc"].parameters == ("fc.weight",)
    assert graph["relu"].parameters == ()
    assert np.isnan(graph["relu"].effective_rank)


BAD = {
    "two nodes are named 'a'": ([node("a"), node("a")], [], ()),
    "names 'x', which is no node": ([node("a")], [edge("a", "x")], ()),
    "two edges join 'a' -> 'b'": ([node("a"), node("b")], [edge("a", "b"), edge("a", "b")], ()),
    "the flow of 'a' -> 'b' has 2 values for 1 measured steps": (
        [node("a"), node("b")],
        [edge("a", "b", flow=[1.0, 2.0])],
        (0,),
    ),
    "grad_norm of node 'a' has 1 values for 2 measured steps": ([node("a", grad_norm=[1.0])], [], (0, 1)),
}


@pytest.mark.parametrize("message", BAD)
def test_records_that_are_no_graph(message):
    nodes, edges, steps = BAD[message]
    with pytest.raises(RecordFormatError, match=message):
        _ = LayerGraph(GraphRecord(nodes=nodes, edges=edges, steps=steps)).table


def test_a_record_out_of_order_still_has_a_topological_order():
    nodes = [node("loss", "loss"), node("b"), node("a")]
    graph = LayerGraph(unknown(nodes, [edge("a", "b"), edge("b", "loss")]))
    assert graph.table.topo == [2, 1, 0]
    assert graph.bottlenecks() == ()


def test_an_empty_graph():
    graph = LayerGraph(GraphRecord(nodes=[], edges=[]))
    assert len(graph) == 0
    assert graph.unreachable() == ()
    assert len(graph.layers()) == 0
    assert graph.nx.number_of_nodes() == 0
