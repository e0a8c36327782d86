"""Gain, divergence, coherence and ω against the vectors they are norms of."""

import json

import attrs
import numpy as np
import pytest
from hypothesis import given, settings

from gradflow.errors import GraphUnavailableError
from gradflow.graph import LayerGraph
from gradflow.graph.flow import arithmetic_mean, geometric_mean
from gradflow.records import GraphRecord
from tests.graph.dags import edge, networks, node, scaled, topology


@settings(max_examples=60, deadline=None)
@given(networks())
def test_numbers_are_those_of_the_vectors(net):
    numbers = net.graph.numbers
    for i, name in enumerate(numbers.names):
        for s in range(2):
            g = np.linalg.norm(net.grads[name][s])
            ins = [c[s] for (_, v), c in net.cotangents.items() if v == name]
            outs = [c[s] for (u, _), c in net.cotangents.items() if u == name]
            if ins:
                c = np.linalg.norm(np.concatenate(ins))
                np.testing.assert_allclose(numbers.gain[i, s], c / g, rtol=1e-12)
                np.testing.assert_allclose(
                    numbers.divergence[i, s], (c**2 - g**2) / (c**2 + g**2), atol=1e-12
                )
            else:
                assert np.isnan(numbers.gain[i, s])
            if outs:
                expected = np.linalg.norm(sum(outs)) / sum(np.linalg.norm(c) for c in outs)
                np.testing.assert_allclose(numbers.coherence[i, s], expected, rtol=1e-12)
            else:
                assert np.isnan(numbers.coherence[i, s])
    for e, (u, v) in enumerate(numbers.edges):
        for s in range(2):
            ratio = np.linalg.norm(net.cotangents[u, v][s]) / np.linalg.norm(net.grads[v][s])
            np.testing.assert_allclose(np.exp(numbers.omega[e, s]), ratio, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(networks())
def test_divergence_is_tanh_of_the_log_gain_for_means_too(net):
    n = net.graph.numbers
    has_gain = np.isfinite(n.mean_gain)
    np.testing.assert_allclose(
        n.mean_divergence[has_gain], np.tanh(np.log(n.mean_gain[has_gain])), rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(n.mean_gain[has_gain], np.sqrt(n.gain[has_gain].prod(axis=1)), rtol=1e-12)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@settings(max_examples=20, deadline=None)
@given(networks())
def test_a_scaled_loss_changes_no_ratio(factor, net):
    one, two = net.graph, LayerGraph(scaled(net.record, factor))
    for name in ("gain", "divergence", "coherence", "omega", "mean_gain", "mean_coherence", "mean_omega"):
        np.testing.assert_allclose(
            getattr(two.numbers, name), getattr(one.numbers, name), rtol=1e-9, atol=1e-12
        )
    np.testing.assert_allclose(two.hodge.cyclic, one.hodge.cyclic, atol=1e-9)
    np.testing.assert_allclose(two.hodge.curl, one.hodge.curl, atol=1e-9)
    np.testing.assert_allclose(two.hodge.potential, one.hodge.potential + np.log(factor), atol=1e-9)
    for a, b in zip(one.circulation(), two.circulation(), strict=True):
        assert abs(a.circulation) == pytest.approx(abs(b.circulation), abs=1e-9)
    assert two.transmission("loss", "n0") == pytest.approx(one.transmission("loss", "n0"), rel=1e-9)
    assert two.path("loss", "n0").nodes == one.path("loss", "n0").nodes


def test_coherence_of_aligned_cancelling_and_orthogonal_cotangents():
    def coherence(total: float) -> float:
        graph = LayerGraph.from_flows(
            {"a": total, "b": 1.0, "c": 1.0, "loss": 1.0},
            {("a", "b"): 1.0, ("a", "c"): 1.0, ("b", "loss"): 1.0, ("c", "loss"): 1.0},
        )
        return graph["a"].coherence

    assert coherence(2.0) == 1.0
    assert coherence(0.0) == 0.0
    assert coherence(np.sqrt(2)) == pytest.approx(np.sqrt(0.5))


def test_coherence_is_one_with_one_consumer_and_nan_where_nothing_flows():
    graph = LayerGraph.from_flows(
        {"dead": 0.0, "a": 1.0, "loss": 1.0}, {("dead", "loss"): 0.0, ("a", "loss"): 1.0}
    )
    assert graph["a"].coherence == 1.0
    assert np.isnan(graph["dead"].coherence)


def test_coherence_with_one_consumer_is_one_by_definition():
    graph = LayerGraph.from_flows({"a": 0.5, "loss": 1.0}, {("a", "loss"): 1.0})  # a second output, unread
    assert graph["a"].coherence == 1.0


def test_what_is_flagged_as_severed_carries_nothing_whatever_was_measured():
    nodes = [node("a", grad_norm=[1.0]), node("b", grad_norm=[1.0]), node("loss", "loss", grad_norm=[1.0])]
    edges = [
        edge("a", "b", flow=[np.nan], severed=True, reason="detach"),
        edge("a", "loss", flow=[1.0]),
        edge("b", "loss", flow=[1.0]),
    ]
    graph = LayerGraph(GraphRecord(nodes=nodes, edges=edges, steps=(0,)))
    assert graph.edge("a", "b").flow == 0.0
    assert graph["a"].coherence == 1.0
    assert graph.transmission("loss", "a") == 1.0


def test_a_severed_edge_does_not_count_as_a_consumer():
    graph = LayerGraph.from_flows(
        {"a": 1.0, "b": 1.0, "loss": 1.0}, {("a", "b"): 0.0, ("a", "loss"): 1.0, ("b", "loss"): 1.0}
    )
    assert graph["a"].coherence == 1.0
    assert graph.edge("a", "b").severed
    assert np.isnan(graph.edge("a", "b").omega)
    assert [(e.source, e.target) for e in graph.severed] == [("a", "b")]


def test_gain_of_zero_and_of_an_unreached_layer():
    graph = LayerGraph.from_flows(
        {"a": 0.0, "b": 1.0, "c": 0.0, "loss": 1.0},
        {("a", "b"): 0.0, ("b", "loss"): 1.0, ("a", "c"): 0.0, ("c", "loss"): 0.0},
    )
    assert graph["b"].gain == 0.0
    assert graph["b"].divergence == -1.0
    assert np.isnan(graph["c"].gain)


def test_a_layer_whose_inputs_are_cut_or_data_has_no_gain():
    nodes = [
        node("data", grad_norm=[1.0], input_grad_norm=[0.0]),
        node("unseen", grad_norm=[1.0], input_grad_norm=[0.5]),  # its input is no node of the graph
        node("behind", grad_norm=[2.0], input_grad_norm=[0.0]),
        node("loss", "loss", grad_norm=[1.0]),
    ]
    edges = [
        edge("data", "behind", flow=[0.0], severed=True, reason="detach"),
        edge("behind", "loss", flow=[2.0]),
        edge("data", "loss", flow=[1.0]),
        edge("unseen", "loss", flow=[1.0]),
    ]
    graph = LayerGraph(GraphRecord(nodes=nodes, edges=edges, steps=(0,)))
    assert np.isnan(graph["data"].gain)
    assert np.isnan(graph["behind"].gain)
    assert graph["unseen"].gain == 0.5


def test_steps_without_a_value_are_left_out_of_the_means():
    graph = LayerGraph.from_flows(
        {"a": [1.0, np.nan, 4.0], "loss": [1.0, 1.0, 1.0]}, {("a", "loss"): [1.0, np.nan, 4.0]}
    )
    assert graph["a"].grad_norm == pytest.approx(2.0)
    assert graph.edge("a", "loss").flow == pytest.approx(2.0)
    assert np.isnan(graph.numbers.omega[0, 1])


def test_an_infinite_gradient_is_kept_out_of_the_logarithms():
    graph = LayerGraph.from_flows({"a": [np.inf, 2.0], "loss": [1.0, 1.0]}, {("a", "loss"): [np.inf, 2.0]})
    assert graph["a"].grad_norm == pytest.approx(2.0)
    assert np.isfinite(graph.hodge.potential).all()


def test_the_loss_has_gradient_one_where_the_record_does_not_say():
    graph = LayerGraph.from_flows({"a": 2.0, "loss": np.nan}, {("a", "loss"): 2.0})
    assert graph["loss"].grad_norm == 1.0
    assert graph["loss"].gain == 2.0


def test_geometric_and_arithmetic_mean():
    rows = np.array([[1.0, 4.0], [0.0, 4.0], [0.0, 0.0], [np.nan, np.nan], [np.nan, 3.0]])
    np.testing.assert_allclose(geometric_mean(rows), [2.0, 4.0, 0.0, np.nan, 3.0])
    np.testing.assert_allclose(arithmetic_mean(rows), [2.5, 2.0, 0.0, np.nan, 3.0])


def test_numbers_are_read_only_and_readable():
    graph = LayerGraph.from_flows({"a": 2.0, "loss": 1.0}, {("a", "loss"): 2.0})
    with pytest.raises(ValueError, match="read-only"):
        graph.numbers.gain[0, 0] = 1.0
    assert repr(graph.numbers) == "FlowNumbers(2 nodes, 1 edges, 1 steps)"


def test_flow_of_a_graph_that_was_not_measured():
    graph = LayerGraph(topology(LayerGraph.from_flows({"a": 2.0, "loss": 1.0}, {("a", "loss"): 2.0}).record))
    calls = {
        "graph.numbers": lambda: graph.numbers,
        "graph.hodge": lambda: graph.hodge,
        "graph.hodge_per_step": lambda: graph.hodge_per_step,
        "graph.path": lambda: graph.path("loss", "a"),
        "graph.transmission": lambda: graph.transmission("loss", "a"),
        "graph.circulation": lambda: graph.circulation(),
        "graph.critical_points": lambda: graph.critical_points(),
    }
    for call, query in calls.items():
        with pytest.raises(GraphUnavailableError, match=rf'^{call} needs the flow .*detail="full"'):
            query()
    assert np.isnan(graph["a"].gain)
    assert np.isnan(graph.edge("a", "loss").flow)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e-320, 1e300])
@settings(max_examples=15, deadline=None)
@given(networks(max_nodes=9, steps=2))
def test_no_value_of_a_gradient_makes_a_query_fail_or_warn(value, net):
    places = range(0, len(net.record.edges), 2)
    edges, nodes = list(net.record.edges), list(net.record.nodes)
    for i in places:
        edges[i] = attrs.evolve(edges[i], flow=[value, edges[i].flow[1]])
    for i in range(0, len(nodes) - 1, 3):
        nodes[i] = attrs.evolve(nodes[i], grad_norm=[value, 1.0], input_grad_norm=[value, value])
    graph = LayerGraph(attrs.evolve(net.record, nodes=nodes, edges=edges))
    for one in (graph, graph.step(0), graph.layers(), graph.at(depth=1)):
        assert one.hodge_per_step
        assert one.to_dot()
        json.dumps(one.to_node_link(), allow_nan=False)
        for name in one:
            one.path("loss", name)
            assert not one.transmission("loss", name) < 0
        one.circulation()
        one.bottlenecks()
        one.critical_points()
        one.unreachable()
        str(one.compare(graph))


@pytest.mark.parametrize("factor", [1e-200, 1e200])
@settings(max_examples=15, deadline=None)
@given(networks(max_nodes=9))
def test_squares_neither_overflow_nor_vanish(factor, net):
    one, two = net.graph, LayerGraph(scaled(net.record, factor))
    for a, b in ((one, two), (one.layers(), two.layers()), (one.at(depth=1), two.at(depth=1))):
        np.testing.assert_allclose(b.numbers.flow / factor, a.numbers.flow, rtol=1e-9)
        np.testing.assert_allclose(b.numbers.gain, a.numbers.gain, rtol=1e-9)
