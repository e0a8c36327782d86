"""Path and transmission against enumeration of every path."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings

from gradflow.errors import UnknownLayerError
from gradflow.graph import LayerGraph
from tests.graph.dags import edge, networks, node, residual


def all_paths(edges, low, high):
    """Every path from low to high along the data, slowly."""
    if low == high:
        return [[low]]
    return [[low, *rest] for u, v in edges if u == low for rest in all_paths(edges, v, high)]


@settings(max_examples=60, deadline=None)
@given(networks(max_nodes=8))
def test_path_is_the_best_of_all_paths(net):
    graph = net.graph
    omega = dict(zip(graph.edges, graph.numbers.mean_omega, strict=True))
    for name in graph:
        every = all_paths(graph.edges, name, "loss")
        sums = [sum(omega[pair] for pair in pairwise(p)) for p in every]
        route = graph.path(name, "loss")
        assert route.log_transmission == pytest.approx(max(sums), abs=1e-9)
        assert list(route.nodes) in [p for p, s in zip(every, sums, strict=True) if s > max(sums) - 1e-9]
        assert route.share == pytest.approx(math.exp(max(sums)) / sum(map(math.exp, sums)), rel=1e-9)
        back = graph.path("loss", name)
        assert back.nodes == route.nodes[::-1]
        assert back.ratios == route.ratios[::-1]
        assert math.prod(route.ratios) == pytest.approx(route.transmission)


@settings(max_examples=40, deadline=None)
@given(networks(max_nodes=8))
def test_the_weakest_path_is_the_least_of_all_that_carry_any(net):
    graph = net.graph
    omega = dict(zip(graph.edges, graph.numbers.mean_omega, strict=True))
    for name in graph:
        every = all_paths(graph.edges, name, "loss")
        sums = [sum(omega[pair] for pair in pairwise(p)) for p in every]
        route = graph.weakest_path("loss", name)
        assert route.log_transmission == pytest.approx(min(sums), abs=1e-9)
        assert list(route.nodes[::-1]) in [
            p for p, s in zip(every, sums, strict=True) if s < min(sums) + 1e-9
        ]
        assert route.share == pytest.approx(math.exp(min(sums)) / sum(map(math.exp, sums)), rel=1e-9)
    assert residual(0.0).weakest_path("loss", "a").nodes == ("loss", "add", "a")  # the branch is severed


@settings(max_examples=60, deadline=None)
@given(networks(max_nodes=8))
def test_transmission_from_the_loss_is_the_ratio_of_norms(net):
    graph = net.graph
    for name in graph:
        expected = graph[name].grad_norm / graph["loss"].grad_norm
        assert graph.transmission("loss", name) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(networks(max_nodes=7, steps=1))
def test_transmission_is_the_sum_over_all_paths(net):
    graph = net.graph
    omega = dict(zip(graph.edges, graph.numbers.omega[:, 0], strict=True))
    names = list(graph)
    for i, low in enumerate(names):
        for high in names[i:]:
            total = 0.0
            for p in all_paths(graph.edges, low, high):
                kept = [math.exp(omega[pair]) for pair in pairwise(p)]
                total += math.prod(kept) * math.prod(graph[u].coherence for u in p[:-1])
            assert graph.transmission(high, low) == pytest.approx(total, rel=1e-9, abs=1e-300)
            if high != low and all_paths(graph.edges, low, high):
                with pytest.raises(
                    ValueError, match=rf"{low!r} feeds {high!r}.*graph.transmission\({high!r}"
                ):
                    graph.transmission(low, high)
            elif high != low:
                assert graph.transmission(low, high) == 0.0


def test_transmission_over_steps_is_the_geometric_mean():
    graph = LayerGraph.from_flows({"a": [1.0, 4.0], "loss": [1.0, 1.0]}, {("a", "loss"): [1.0, 4.0]})
    assert graph.transmission("loss", "a") == pytest.approx(2.0)
    assert graph.step(1).transmission("loss", "a") == pytest.approx(4.0)


def test_where_the_way_is_severed():
    graph = residual(0.0)
    assert graph.transmission("fc", "a") == 0.0
    route = graph.path("fc", "a")
    assert route.nodes == ()
    assert len(route) == 0
    assert route.transmission == 0.0
    assert route.reason == "no gradient comes from fc back to a: the flow ends at a -> fc"
    assert str(route) == f"fc .. a: {route.reason}"


def test_the_reason_names_the_operation_that_cuts():
    record = LayerGraph.from_flows(
        {"a": 0.0, "b": 1.0, "loss": 1.0}, {("a", "b"): 0.0, ("b", "loss"): 1.0}
    ).record
    edges = [edge("a", "b", flow=[0.0], severed=True, reason="detach"), record.edges[1]]
    graph = LayerGraph(type(record)(nodes=record.nodes, edges=edges, steps=record.steps))
    assert graph.path("loss", "a").reason.endswith("the flow ends at a -> b (detach)")


def test_a_flow_that_was_not_measured_is_not_called_cut():
    graph = LayerGraph.from_flows(
        {"input": np.nan, "fc": 1.0, "loss": 1.0}, {("input", "fc"): np.nan, ("fc", "loss"): 1.0}
    )
    assert graph.path("loss", "input").reason.endswith("the flow ends at input -> fc (not measured)")
    assert np.isnan(graph.transmission("loss", "input"))


def test_nodes_that_are_not_behind_one_another():
    graph = LayerGraph.from_flows({"a": 1.0, "b": 1.0, "loss": 1.0}, {("a", "loss"): 1.0, ("b", "loss"): 1.0})
    assert graph.path("a", "b").reason == "the data does not run from a to b, nor back"
    assert graph.transmission("a", "b") == graph.transmission("b", "a") == 0.0
    assert graph.transmission("a", "a") == 1.0
    assert graph.path("a", "a").nodes == ("a",)
    assert graph.path("a", "a").share == 1.0


def test_a_gradient_that_cancels_altogether_transmits_nothing():
    graph = LayerGraph.from_flows(
        {"x": 0.0, "a": 0.0, "b": 1.0, "c": 1.0, "loss": 1.0},
        {("x", "a"): 0.0, ("a", "b"): 1.0, ("a", "c"): 1.0, ("b", "loss"): 1.0, ("c", "loss"): 1.0},
    )
    assert graph.transmission("loss", "a") == 0.0
    assert graph.transmission("loss", "x") == 0.0


def test_unknown_names():
    graph = residual(1.0)
    with pytest.raises(UnknownLayerError, match=r"no entry named 'fc9'. The nearest of 4 names: fc"):
        graph.path("fc9", "loss")
    with pytest.raises(UnknownLayerError, match="no entry named 'fc9'"):
        graph.transmission("loss", "fc9")


def test_a_path_reads_well():
    text = str(residual(0.5).path("loss", "a"))
    assert text == "loss -(1)- add -(1)- a"


def test_a_chain_of_thousands_neither_overflows_nor_recurses():
    num = 4000
    norms = {f"n{i}": 0.5 ** min(i, 900) for i in reversed(range(1, num))}
    flows = {(f"n{i + 1}", f"n{i}"): 0.5 ** min(i + 1, 900) for i in range(1, num - 1)}
    deep = LayerGraph.from_flows({**norms, "loss": 1.0}, {**flows, ("n1", "loss"): 0.5})
    assert len(deep.path("loss", f"n{num - 1}")) == num
    assert deep.transmission("loss", f"n{num - 1}") == pytest.approx(0.5**900)
    assert deep.path("loss", f"n{num - 1}").log_transmission == pytest.approx(900 * np.log(0.5))


def test_a_path_needs_flow_and_node_kinds_do_not_matter():
    nodes = [node("input.0", "input", grad_norm=[2.0]), node("loss", "loss", grad_norm=[1.0])]
    record = residual(1.0).record
    graph = LayerGraph(type(record)(nodes=nodes, edges=[edge("input.0", "loss", flow=[2.0])], steps=(7,)))
    assert graph.path("loss", "input.0").transmission == pytest.approx(2.0)
