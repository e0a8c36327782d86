"""Exports: what others read is what was measured."""

import json
import re

import networkx as nx
import pytest
from hypothesis import given, settings

from gradflow.graph import LayerGraph
from gradflow.records import GraphRecord
from tests.graph.dags import edge, networks, node, residual, topology


@settings(max_examples=20, deadline=None)
@given(networks())
def test_networkx_attributes_are_plain_and_equal_the_numbers(net):
    graph = net.graph
    assert list(graph.nx) == list(graph)
    assert set(graph.nx.edges) == set(graph.edges)
    plain = (str, int, float, bool)
    for name, values in graph.nx.nodes(data=True):
        assert all(type(v) in plain for v in values.values())
        assert values["grad_norm"] == graph[name].grad_norm
        assert values.get("gain") == (graph[name].gain if "gain" in values else None)
    for u, v, values in graph.nx.edges(data=True):
        assert all(type(v) in plain for v in values.values())
        assert values["flow"] == graph.edge(u, v).flow
    json.dumps(nx.node_link_data(graph.nx, edges="edges"), allow_nan=False)


def test_networkx_graph_is_frozen_and_cached():
    graph = residual(0.5)
    assert graph.nx is graph.nx
    assert nx.is_frozen(graph.nx)
    with pytest.raises(nx.NetworkXError, match="Frozen graph"):
        graph.nx.add_node("x")
    nx.DiGraph(graph.nx).add_node("x")
    assert nx.is_directed_acyclic_graph(graph.nx)
    assert graph.nx.graph == {"level": "full", "steps": "0"}


def test_what_was_not_measured_is_absent_and_null():
    graph = LayerGraph(topology(residual(0.5).record))
    assert "gain" not in graph.nx.nodes["a"]
    data = graph.to_node_link()
    assert data["nodes"][0]["gain"] is None
    assert data["edges"][0]["flow"] is None
    json.dumps(data, allow_nan=False)


def test_node_link_data_comes_back_as_a_graph():
    nodes = [node("a", shape=(2, 3), num_elements=6), node("loss", "loss")]
    graph = LayerGraph(GraphRecord(nodes=nodes, edges=[edge("a", "loss", severed=True, reason="detach")]))
    data = json.loads(json.dumps(graph.to_node_link(), allow_nan=False))
    back = nx.node_link_graph(data, edges="edges")
    assert back.nodes["a"]["shape"] == [2, 3]
    assert back.nodes["a"]["parameters"] == ["a.weight"]
    assert back.edges["a", "loss"]["reason"] == "detach"
    assert graph.nx.nodes["a"]["shape"] == "2x3"


def test_graphml_comes_back_as_a_graph(tmp_path):
    for number, graph in enumerate((residual(0.0), LayerGraph(topology(residual(0.5).record)))):
        path = tmp_path / f"{number}.graphml"
        graph.to_graphml(path)
        back = nx.read_graphml(path)
        assert {n: dict(d) for n, d in back.nodes(data=True)} == {
            n: dict(d) for n, d in graph.nx.nodes(data=True)
        }
        assert {e: dict(back.edges[e]) for e in back.edges} == {
            e: dict(graph.nx.edges[e]) for e in graph.nx.edges
        }
        nx.write_graphml(graph.nx, tmp_path / "direct.graphml")


def test_dot_text():
    nodes = [node('odd "name"\\'), node("b"), node("c"), node("loss", "loss")]
    edges = [
        edge('odd "name"\\', "b", severed=True, reason="detach"),
        edge("b", "c", flow=[1.0]),
        edge("c", "loss", flow=[100.0]),
        edge("b", "loss"),
    ]
    text = LayerGraph(GraphRecord(nodes=nodes, edges=edges, steps=(0,))).to_dot()
    assert r'"odd \"name\"\\" -> "b" [label="detach", color=red, style=dashed];' in text
    assert '"b" -> "c" [label="1", penwidth=1.0];' in text
    assert '"c" -> "loss" [label="100", penwidth=5.0];' in text
    assert '"b" -> "loss" [penwidth=1.0];' in text
    assert text.startswith("digraph gradient_flow {")
    assert len(re.findall(r"->", text)) == 4
    assert 'label="severed"' in residual(0.0).to_dot()


def test_graphml_of_names_that_xml_cannot_hold_can_be_read(tmp_path):
    graph = LayerGraph.from_flows({"a\x00\x1b": 1.0, "loss": 1.0}, {("a\x00\x1b", "loss"): 1.0})
    graph.to_graphml(tmp_path / "odd.graphml")
    assert list(nx.read_graphml(tmp_path / "odd.graphml")) == [r"a\x00\x1b", "loss"]
