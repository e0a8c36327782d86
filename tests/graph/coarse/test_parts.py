"""Parts of a graph: what is kept of it, and what lies between two nodes."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest
from hypothesis import given, settings

from gradflow.errors import UnknownLayerError
from gradflow.graph import LayerGraph
from gradflow.graph.coarse.parts import between
from tests.graph.dags import networks, residual


@settings(max_examples=40, deadline=None)
@given(networks(max_nodes=9))
def test_between_holds_the_nodes_of_every_way_and_no_other(net) -> None:
    graph = net.graph
    whole = nx.DiGraph(graph.edges)
    for source in graph:
        for target in graph:
            ways = list(nx.all_simple_paths(whole, target, source)) if source != target else [[source]]
            assert set(between(graph, source, target)) == {name for way in ways for name in way}
    assert list(between(graph, None, None)) == list(graph)


@settings(max_examples=30, deadline=None)
@given(networks(max_nodes=9))
def test_a_part_keeps_the_numbers_of_its_nodes_and_the_edges_among_them(net) -> None:
    graph = net.graph
    names = list(graph)[::2]
    part = graph.subgraph(*names)
    assert list(part) == names
    assert set(part.edges) == {(u, v) for u, v in graph.edges if u in names and v in names}
    for name in part:
        assert part[name].grad_norm == graph[name].grad_norm
        assert part[name].gain == graph[name].gain or part[name].gain != part[name].gain
    for pair in part.edges:
        assert part.edge(*pair).flow == graph.edge(*pair).flow
    assert part.full is part
    assert set(part.layers()) <= set(names)


def blocks() -> LayerGraph:
    names = ["input", "h.0.fc", "h.0:relu", "h.1.fc", "h.10.fc", "head", "loss"]
    flows = dict.fromkeys(itertools.pairwise(names), 1.0)
    return LayerGraph.from_flows(dict.fromkeys(names, 1.0), flows, ops=("h.0:relu",))


def test_globs_are_of_names_and_of_modules() -> None:
    graph = blocks()
    assert list(graph.subgraph("h.1")) == ["h.1.fc"]  # not h.10
    assert list(graph.subgraph("h.0*")) == ["h.0.fc", "h.0:relu"]
    assert list(graph.subgraph("h.?.fc", "loss")) == ["h.0.fc", "h.1.fc", "loss"]
    assert list(graph.subgraph("h.*")) == ["h.0.fc", "h.0:relu", "h.1.fc", "h.10.fc"]
    with pytest.raises(UnknownLayerError, match=r"no entry named 'h.7'. The nearest"):
        graph.subgraph("h.7")
    with pytest.raises(ValueError, match=r"^graph.subgraph takes one glob or more"):
        graph.subgraph()


def test_an_operation_comes_with_the_module_it_ran_in() -> None:
    import torch
    from torch import nn

    import gradflow as gf

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.relu(self.fc(x))

    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block(), nn.Linear(4, 1))
    graph = gf.layer_graph(net, torch.randn(8, 4), lambda out: out.square().mean())
    part = graph.subgraph("1")
    assert {part[name].type for name in part} == {"Linear", "relu", "add"}
    assert all(part[name].layer.startswith("1") for name in part)
    assert len(part.edges) == 2  # fc -> relu -> add: what the block reads lies outside


def test_an_exchanged_pair_of_names_is_told() -> None:
    graph = residual(0.5)
    with pytest.raises(ValueError, match=r"'a' feeds 'loss'.*source='loss', target='a'"):
        graph.bottlenecks(source="a", target="loss")
    with pytest.raises(UnknownLayerError, match="no entry named 'x'"):
        graph.bottlenecks(source="x")
