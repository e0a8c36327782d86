"""The graph of layers against the true cotangents that layers hand to layers through operations."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow.errors import GraphUnavailableError
from gradflow.graph import LayerGraph
from gradflow.records import GraphRecord
from tests.graph.dags import edge, edges_of, network, networks, node, topology


def true_cotangents(net, step=0):
    """What each layer hands to each other one through operations alone, as a vector: path by path."""
    kinds = {n.name: n.kind for n in net.record.nodes}
    found, hops = {}, {}
    for target in kinds:
        if kinds[target] == "op":
            continue
        carried = {target: net.grads[target][step]}
        for name in reversed(list(kinds)):
            ways = [(v, carried[v]) for u, v in net.maps if u == name and v in carried]
            ways = [(v, c) for v, c in ways if v == target or kinds[v] == "op"]
            if ways:
                total = sum(net.maps[name, v][step].T @ c for v, c in ways)
                if kinds[name] == "op":
                    carried[name] = total
                else:
                    found[name, target] = total
                    hops[name, target] = len(ways)
    return found, hops


@settings(max_examples=60, deadline=None)
@given(networks(max_nodes=10, steps=1))
def test_the_edges_are_the_paths_through_operations(net):
    layers = net.graph.layers()
    found, _ = true_cotangents(net)
    assert set(layers.edges) == set(found)
    assert [n.name for n in layers.record.nodes] == [n.name for n in net.record.nodes if n.kind != "op"]
    assert layers.level == "layers"
    assert layers.full is not layers
    for name in layers:
        for value in ("grad_norm", "gain"):
            np.testing.assert_equal(getattr(layers[name], value), getattr(net.graph[name], value))


@settings(max_examples=60, deadline=None)
@given(networks(max_nodes=10, steps=1))
def test_flows_are_exact_where_operations_have_one_consumer(net):
    layers = net.graph.layers()
    found, hops = true_cotangents(net)
    fans = {u: sum(a == u for a, _ in net.maps) for u in net.grads}
    single = all(fans[n.name] == 1 for n in net.record.nodes if n.kind == "op")
    outs = {u: sum(a == u for a, _ in layers.edges) for u in layers}
    for (u, v), vector in found.items():
        if single and (hops[u, v] == 1 or outs[u] == 1):
            assert layers.edge(u, v).flow == pytest.approx(np.linalg.norm(vector), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000))
def test_flows_through_a_stream_of_additions_are_exact(seed):
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(2, 6))
    edges, ops, last = [], set(), 0
    for i in range(blocks):  # x -> fc -> add, x -> add
        fc, add = 2 * i + 1, 2 * i + 2
        edges += [(last, fc), (fc, add), (last, add)]
        ops.add(add)
        last = add
    edges.append((last, last + 1))
    net = network(edges, seed=seed, ops=ops, identity_ops=True)
    found, _ = true_cotangents(net)
    layers = net.graph.layers()
    assert set(layers.edges) == set(found)
    for (u, v), vector in found.items():
        assert layers.edge(u, v).flow == pytest.approx(np.linalg.norm(vector), rel=1e-9)


def test_two_ways_to_one_layer_add_as_vectors():
    graph = LayerGraph.from_flows(  # x * sigmoid(x), say: x is read twice on its way to fc
        {"x": 0.7, "sigmoid": 1.0, "mul": 2.0, "fc": 1.0, "loss": 1.0},
        {("x", "sigmoid"): 0.4, ("x", "mul"): 0.5, ("sigmoid", "mul"): 1.0, ("mul", "fc"): 2.0,
         ("fc", "loss"): 1.0},
        ops=("sigmoid", "mul"),
    )  # fmt: skip
    assert graph.layers().edge("x", "fc").flow == pytest.approx(0.7)
    assert graph.layers()["x"].coherence == pytest.approx(1.0)


def test_transmission_from_the_loss_stays_exact():
    for seed in range(20):
        net = network(edges_of(seed, 12, 1.0), seed=seed, ops={2, 5, 6, 9})
        layers = net.graph.layers()
        for name in layers:
            assert layers.transmission("loss", name) == pytest.approx(net.graph[name].grad_norm, rel=1e-9)


def test_severed_edges_stay_severed_and_name_the_operation():
    nodes = [node("a"), node("argmax", "op"), node("relu", "op"), node("b"), node("loss", "loss")]
    edges = [
        edge("a", "argmax", severed=True, reason="argmax"),
        edge("argmax", "b"),
        edge("a", "relu", severed=True),
        edge("relu", "b"),
        edge("b", "loss"),
    ]
    layers = LayerGraph(GraphRecord(nodes=nodes, edges=edges)).layers()
    assert layers.edge("a", "b").severed
    assert layers.edge("a", "b").reason == "argmax"
    assert layers.edges == (("a", "b"), ("b", "loss"))
    edges[2] = edge("a", "relu")  # one live way is enough
    assert not LayerGraph(GraphRecord(nodes=nodes, edges=edges)).layers().edge("a", "b").severed
    edges[3] = edge("relu", "b", severed=True, reason="detach")  # but it has to be live all along
    assert LayerGraph(GraphRecord(nodes=nodes, edges=edges)).layers().edge("a", "b").severed


def test_two_severed_ways_of_no_name():
    nodes = [node("a"), node("p", "op"), node("q", "op"), node("loss", "loss")]
    edges = [edge("a", "p", severed=True), edge("a", "q", severed=True), edge("p", "loss"), edge("q", "loss")]
    severed = LayerGraph(GraphRecord(nodes=nodes, edges=edges)).layers().edge("a", "loss")
    assert (severed.severed, severed.reason) == (True, "")


def test_a_graph_that_was_not_measured():
    net = network(edges_of(4, 12, 1.0), seed=4, ops={2, 5, 6, 9})
    assert LayerGraph(topology(net.record)).layers().edges == net.graph.layers().edges


def stream(blocks):
    edges, ops, last = [], set(), 0
    for i in range(blocks):
        edges += [(last, 2 * i + 1), (2 * i + 1, 2 * i + 2), (last, 2 * i + 2)]
        ops.add(2 * i + 2)
        last = 2 * i + 2
    return network([*edges, (last, last + 1)], ops=ops, identity_ops=True).graph


def test_beyond_the_limit_the_additions_of_the_stream_stay(caplog):
    graph = stream(30)
    assert all(n.kind != "op" for n in graph.layers().record.nodes)
    assert len(graph.layers().edges) > 400
    with caplog.at_level(logging.INFO):
        limited = graph.layers(max_edges=100)
    assert len(limited.edges) < 100
    assert sum(n.kind == "op" for n in limited.record.nodes) == 29  # the last addition has one consumer
    assert "junctions kept" in caplog.text
    assert limited.transmission("loss", "n0") == pytest.approx(graph["n0"].grad_norm, rel=1e-9)


def test_operations_in_a_cycle():
    nodes = [node("a"), node("p", "op"), node("q", "op"), node("loss", "loss")]
    edges = [edge("a", "p"), edge("p", "q"), edge("q", "p"), edge("q", "loss")]
    with pytest.raises(GraphUnavailableError, match=r"graph.layers needs a graph without cycles"):
        LayerGraph(GraphRecord(nodes=nodes, edges=edges)).layers()
