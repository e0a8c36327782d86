"""The minimum cut against every set of edges, against networkx, and on graphs of ten thousand nodes."""

from __future__ import annotations

import itertools
import math

import networkx as nx
import pytest
from hypothesis import given, settings

from gradflow.errors import GraphUnavailableError, UnknownLayerError
from gradflow.graph import Cut, LayerGraph
from tests.graph.dags import networks, residual, topology


def separates(graph: LayerGraph, edges: set[tuple[str, str]], source: str, target: str) -> bool:
    left = nx.DiGraph([pair for pair in graph.edges if pair not in edges])
    left.add_nodes_from((source, target))
    return not nx.has_path(left, target, source)


@settings(max_examples=40, deadline=None)
@given(networks(max_nodes=7, steps=1))
def test_no_set_of_edges_separates_them_and_carries_less(net) -> None:
    graph = net.graph
    flows = {pair: graph.edge(*pair).flow for pair in graph.edges}
    names = list(graph)
    for target in names[:-1]:
        cut = graph.minimum_cut("loss", target)
        assert separates(graph, set(cut.edges), "loss", target)
        assert cut.flow == pytest.approx(sum(flows[pair] for pair in cut.edges))
        assert cut.share == pytest.approx(cut.flow / graph["loss"].grad_norm)
        capacities = nx.DiGraph()
        capacities.add_edges_from((v, u, {"capacity": flow}) for (u, v), flow in flows.items())
        assert cut.flow == pytest.approx(nx.minimum_cut_value(capacities, "loss", target), rel=1e-9)
        if len(flows) < 10:
            subsets = itertools.chain.from_iterable(
                itertools.combinations(flows, n) for n in range(1, len(flows))
            )
            sums = [sum(flows[p] for p in s) for s in subsets if separates(graph, set(s), "loss", target)]
            assert cut.flow == pytest.approx(min(sums))


@settings(max_examples=30, deadline=None)
@given(networks(max_nodes=9))
def test_a_node_gets_no_more_than_crosses_the_cut_beside_it(net) -> None:
    """With the target's own edges as the cut, the norm of the sum is at most the sum of the norms."""
    graph = net.graph
    for name in list(graph)[:-1]:
        consumers = [pair for pair in graph.edges if pair[0] == name]
        own = sum(graph.edge(*pair).flow for pair in consumers)
        assert graph.minimum_cut("loss", name).flow <= own * (1 + 1e-9)


def test_both_directions_are_understood_and_equal_cuts_lie_near_the_loss() -> None:
    graph = residual(0.02)
    cut = graph.minimum_cut("loss", "a")
    assert cut.edges == (("add", "loss"),)
    assert graph.minimum_cut("a", "loss").edges == cut.edges
    assert graph.minimum_cut("add", "a").edges == (("a", "fc"), ("a", "add"))
    assert str(cut) == "loss .. a: 1 of the gradient can cross add -> loss (1)"


def test_severed_ways_carry_nothing_and_unknown_ones_are_cut_last() -> None:
    assert graph_of(0.0).minimum_cut("loss", "a") == Cut(
        source="loss", target="a", edges=(("a", "b"),), flows=(0.0,), flow=0.0, share=0.0
    )
    assert graph_of(math.nan).minimum_cut("loss", "a").edges == (("b", "loss"),)
    unknown = LayerGraph.from_flows({"a": 1.0, "loss": 1.0}, {("a", "loss"): math.nan})
    assert math.isnan(unknown.minimum_cut("loss", "a").flow)


def graph_of(flow: float) -> LayerGraph:
    norms = {"a": flow, "b": 1.0, "loss": 1.0}
    return LayerGraph.from_flows(norms, {("a", "b"): flow, ("b", "loss"): 1.0})


def test_where_there_is_no_way() -> None:
    norms = {"a": 1.0, "b": 1.0, "loss": 1.0}
    graph = LayerGraph.from_flows(norms, {("a", "loss"): 1.0, ("b", "loss"): 1.0})
    cut = graph.minimum_cut("a", "b")
    assert (cut.edges, cut.flow) == ((), 0.0)
    assert str(cut) == "a .. b: no way leads from one to the other"
    with pytest.raises(ValueError, match=r"'a' was given twice; a cut separates two nodes"):
        graph.minimum_cut("a", "a")
    with pytest.raises(UnknownLayerError, match="no entry named 'c'"):
        graph.minimum_cut("loss", "c")
    with pytest.raises(GraphUnavailableError, match=r"^graph.minimum_cut needs the flow"):
        LayerGraph(topology(graph.record)).minimum_cut("loss", "a")


def test_ten_thousand_nodes_are_cut_where_both_branches_are_thin() -> None:
    norms: dict[str, float] = {"stem": 1.0}
    flows: dict[tuple[str, str], float] = {}
    last = "stem"
    for i in range(3333):
        one, two, add = f"h.{i}.a", f"h.{i}.b", f"h.{i}.add"
        thin = 1e-3 if i == 2000 else 1.0
        norms |= {one: 1.0, two: 1.0, add: 1.0}
        flows |= {(last, one): thin, (last, two): thin, (one, add): 1.0, (two, add): 1.0}
        last = add
    graph = LayerGraph.from_flows({**norms, "loss": 1.0}, {**flows, (last, "loss"): 1.0})
    assert len(graph) > 10_000
    cut = graph.minimum_cut("loss", "stem")
    assert cut.edges == (("h.1999.add", "h.2000.a"), ("h.1999.add", "h.2000.b"))
    assert cut.share == pytest.approx(2e-3)
    found = graph.bottlenecks(source="h.2500.add", target="h.1500.add")
    assert all(1500 < int(b.name.split(".")[1]) <= 2500 for b in found)
    assert len(graph.weakest_path("loss", "stem")) == 2 * 3333 + 2
    assert len(graph.fold(most=20)) <= 23
    assert len(graph.subgraph("h.7", "loss")) == 4


def test_flows_whose_sum_overflows_are_cut_all_the_same() -> None:
    names, ways = ("a", "b", "c", "loss"), (("a", "b"), ("a", "c"), ("b", "loss"), ("c", "loss"))
    graph = LayerGraph.from_flows(dict.fromkeys(names, 1e308), dict.fromkeys(ways, 1e308))
    cut = graph.minimum_cut("loss", "a")
    assert (cut.edges, cut.share) == ((("b", "loss"), ("c", "loss")), 2.0)
