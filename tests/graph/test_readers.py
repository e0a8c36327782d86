"""Graphs from networkx: what is written is read back, and what is not a graph is refused."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings

from gradflow.errors import RecordFormatError
from gradflow.graph import LayerGraph
from tests.graph.dags import networks, residual, topology


@settings(max_examples=30, deadline=None)
@given(networks())
def test_what_networkx_holds_is_read_back(net) -> None:
    graph = net.graph
    again = LayerGraph.from_networkx(graph.nx)
    assert again.edges == graph.edges
    for name in graph:
        one, two = graph[name], again[name]
        assert (two.kind, two.layer, two.type, two.shape, two.parameters, two.order) == (
            one.kind, one.layer, one.type, one.shape, one.parameters, one.order,
        )  # fmt: skip
        assert two.grad_norm == pytest.approx(one.grad_norm)
        assert two.gain == pytest.approx(one.gain, nan_ok=True)
    for pair in graph.edges:
        assert again.edge(*pair).flow == pytest.approx(graph.edge(*pair).flow)


def test_a_graph_of_topology_alone_and_one_in_graphml_are_read(tmp_path) -> None:
    graph = LayerGraph(topology(residual(0.5).record))
    assert not LayerGraph.from_networkx(graph.nx).measured
    residual(0.0).to_graphml(tmp_path / "graph.graphml")
    again = LayerGraph.from_networkx(nx.read_graphml(tmp_path / "graph.graphml"))
    assert [(edge.source, edge.target) for edge in again.severed] == [("a", "fc")]


def test_a_changed_copy_answers_anew() -> None:
    copy = nx.DiGraph(residual(1.0).nx)
    copy.edges["a", "fc"]["flow"] = 1e-4
    assert LayerGraph.from_networkx(copy).path("loss", "a").nodes == ("loss", "add", "a")


def one(**attributes: object) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_node("a", **attributes)
    return graph


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (nx.Graph([("a", "b")]), r"expected a networkx.DiGraph .* got Graph"),
        (nx.MultiDiGraph([("a", "b")]), r"got MultiDiGraph. networkx.DiGraph\(graph\) makes one"),
        (nx.DiGraph([("a", "b", {"flow": "x"})]), r"edge a -> b: expected a number for flow, got 'x'"),
        (None, r"expected a networkx.DiGraph .* got NoneType"),
        (one(shape="axb"), r"node a: expected whole numbers for shape, got \['a', 'b'\]"),
        (one(shape=3), r"node a: expected whole numbers for shape, got 3"),
        (one(num_elements="many"), r"node a: expected whole numbers for num_elements, got \['many'\]"),
        (one(order=math.inf), r"node a: expected whole numbers for order, got \[inf\]"),
        (one(parameters=5), r"node a: expected names for parameters, got 5"),
    ],
)
def test_what_is_no_graph_of_flows_is_refused(graph: nx.Graph, message: str) -> None:
    with pytest.raises(RecordFormatError, match=message):
        LayerGraph.from_networkx(graph)


def test_node_link_data_and_numbers_of_numpy_are_read() -> None:
    graph = residual(0.5)
    again = LayerGraph.from_networkx(nx.node_link_graph(graph.to_node_link(), edges="edges"))
    assert again.to_node_link() == LayerGraph.from_networkx(graph.nx).to_node_link()
    flows = nx.DiGraph([("a", "b", {"flow": np.float32(0.5)}), ("b", "loss", {"flow": np.int64(2)})])
    assert [LayerGraph.from_networkx(flows).edge(*pair).flow for pair in flows.edges] == [0.5, 2.0]


def test_a_kind_that_there_is_not_is_refused() -> None:
    graph = nx.DiGraph()
    graph.add_node("a", kind="module")
    with pytest.raises(RecordFormatError, match=r"node a: expected a kind of layer, op, .* got 'module'"):
        LayerGraph.from_networkx(graph)


def test_pandas_has_every_number() -> None:
    graph = residual(0.5)
    nodes, edges = graph.to_pandas()
    assert list(nodes.index) == list(graph)
    for name in graph:
        assert nodes.loc[name, "gain"] == pytest.approx(graph[name].gain, nan_ok=True)
    assert edges.loc[("a", "fc"), "omega"] == pytest.approx(math.log(0.5))
    assert graph.subgraph("loss").to_pandas()[1].empty


def test_without_pandas_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "gradient-flow\[pandas\]"'):
        residual(0.5).to_pandas()
