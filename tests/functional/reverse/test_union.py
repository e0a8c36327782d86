"""Graphs of several steps in one: each node is the same thing at every step, and nothing goes round.

A graph over several steps, at one of them and without what is not there, is the graph of that step alone.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional import analyze
from gradflow.records import FlowRecord, GraphRecord


def linear(inputs: int = 4, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs).double()


class LayerDrop(nn.Module):
    """Residual blocks of which a step runs some."""

    def __init__(self, *, stem: bool = False, shared: bool = False) -> None:
        super().__init__()
        act = nn.Tanh()
        self.stem = linear() if stem else None
        self.blocks = nn.ModuleList(
            nn.Sequential(linear(), act if shared else nn.Tanh(), linear()) for _ in range(4)
        )
        self.head, self.bias = linear(4, 3), nn.Parameter(torch.zeros(3).double())

    def forward(self, x: Tensor, choice: int) -> Tensor:
        x = self.stem(x) if self.stem is not None else x
        for i, block in enumerate(self.blocks):
            if choice >> i & 1:
                x = torch.relu(x + block(x))
        return self.head(x) + self.bias


class EarlyExit(nn.Module):
    """A chain with a head at every depth; a step leaves by one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(linear() for _ in range(4))
        self.exits = nn.ModuleList(linear(4, 3) for _ in range(4))

    def forward(self, x: Tensor, choice: int) -> Tensor:
        for i in range(choice % 4 + 1):
            x = torch.tanh(self.body[i](x))
        return self.exits[choice % 4](x).softmax(-1)


class Branches(nn.Module):
    """Two branches of unlike form, one of them at a time, and operations alone as often as the step wants."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.a, self.b, self.out = (linear() for _ in range(4))

    def forward(self, x: Tensor, choice: int) -> Tensor:
        h = self.inp(x)
        h = torch.tanh(self.a(h)) if choice % 2 else torch.relu(self.b(torch.relu(h)) + h)
        for _ in range(choice // 2 % 4):
            h = torch.sin(h) * 1.5
        return self.out(h)


class Mixture(nn.Module):
    """Each sample goes to the expert of its choice."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate, self.out = linear(), linear(4, 3), linear()
        self.experts = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: Tensor, choice: int) -> Tensor:
        h = self.inp(x)
        weight = self.gate(h).softmax(-1)
        best = (torch.arange(len(x)) * (choice % 3 + 1) + choice) % 3
        best = best if choice % 4 else torch.zeros_like(best)  # all to one
        y = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            chosen = (best == i).nonzero()[:, 0]
            if len(chosen):
                y = y.index_add(0, chosen, expert(h[chosen]) * weight[chosen, i, None])
        return self.out(y)


class AnyOrder(nn.Module):
    """The same layers in another order at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(3))
        self.act = nn.Tanh()

    def forward(self, x: Tensor, choice: int) -> Tensor:
        for i in np.random.default_rng(choice).permutation(3).tolist():
            x = self.act(self.layers[i](x)) + x
        return x


MODELS = {
    "layer drop": lambda: LayerDrop(),
    "layer drop behind a stem": lambda: LayerDrop(stem=True),
    "layer drop with one activation": lambda: LayerDrop(shared=True),
    "early exit": EarlyExit,
    "branches": Branches,
    "mixture": Mixture,
    "any order": AnyOrder,
}


def square(y: Tensor) -> Tensor:
    return y.square().sum()


def measured(model: nn.Module, batches: list[Any], **options: Any) -> FlowRecord:
    return analyze(model, batches, square, steps=len(batches), detail="full", **options)


def of_step(record: GraphRecord, place: int) -> nx.DiGraph:
    """Return the graph of what has a number at one step, with those numbers."""
    graph = nx.DiGraph()
    nodes = {node.name: node for node in record.nodes}
    for edge in record.edges:
        if np.isfinite(edge.flow[place]):
            graph.add_edge(edge.source, edge.target, flow=float(edge.flow[place]))
    for name in graph:
        node = nodes[name]
        kind = (node.kind, node.layer, node.type)
        graph.nodes[name].update(kind=kind, norm=float(node.grad_norm[place]))
    return graph


def alike(one: nx.DiGraph, two: nx.DiGraph) -> bool:
    def same(a: dict[str, Any], b: dict[str, Any], key: str) -> bool:
        return bool(np.isclose(a[key], b[key], rtol=1e-9, atol=1e-12))

    return nx.is_isomorphic(
        one,
        two,
        node_match=lambda a, b: a["kind"] == b["kind"] and same(a, b, "norm"),
        edge_match=lambda a, b: same(a, b, "flow"),
    )


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None)
@given(choices=st.lists(st.integers(0, 15), min_size=2, max_size=5))
def test_at_each_step_the_graph_is_that_of_the_step_alone(name: str, choices: list[int]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    batches = [(torch.randn(6, 4).double(), choice) for choice in choices]
    record = measured(model, batches).graph_record
    assert record is not None
    assert nx.is_directed_acyclic_graph(nx.DiGraph([(e.source, e.target) for e in record.edges]))
    place = {node.name: node.order for node in record.nodes}
    assert all(place[e.source] < place[e.target] for e in record.edges)
    for i, batch in enumerate(batches):
        alone = measured(model, [batch]).graph_record
        assert alone is not None
        assert alike(of_step(record, i), of_step(alone, 0)), (choices, i)


def test_an_addition_is_told_by_the_block_that_it_adds() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4).double()
    graph = measured(LayerDrop(stem=True), [(x, 0b0101), (x, 0b1110), (x, 0b1111)]).graph
    adders = {u: {v for u2, v in graph.edges if u2 == u} for u in (f"blocks.{i}.2" for i in range(4))}
    assert all(len(found) == 1 for found in adders.values())
    assert len(set.union(*adders.values())) == 4
    for (add,) in adders.values():  # two operands, the second of which differs
        assert len([u for u, v in graph.edges if v == add and u.startswith("blocks")]) == 1
    assert graph.path("loss", "stem").nodes[-1] == "stem"
    (first,) = adders["blocks.0.2"]
    norms = graph.record.nodes[graph.position(first)].grad_norm
    assert np.isnan(norms).tolist() == [False, True, False]


def test_layers_that_change_places_are_kept_apart_and_do_not_stop_the_verdict() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(6, 4).double(), choice) for choice in range(6)]
    graph = measured(AnyOrder(), batches).graph
    assert any(name.endswith(" (2)") for name in graph)
    assert graph.layers().table.topo is not None
    report = gf.diagnose(AnyOrder(), batches, square, detail="full")
    assert report.record.steps == 6


def test_steps_that_are_alike_have_the_names_and_the_order_of_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4).double()
    model = LayerDrop()
    one, three = (measured(model, [(x, 15)] * n).graph_record for n in (1, 3))
    assert one is not None
    assert three is not None
    assert [n.name for n in one.nodes] == [n.name for n in three.nodes]
    assert [(e.source, e.target) for e in one.edges] == [(e.source, e.target) for e in three.edges]


# ---------------------------------------------------------------------------------- names

NASTY = ["loss", "(loss)", "input", "input@1", "add", "add@1", "(model)", "relu", "0", "loss@1"]
NASTY += ["pow", "mean", "größe"]


class Named(nn.Module):
    """A model with its layers under given names, and operations of the kinds that they are named after."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        for name in names:
            self.add_module(name, linear())
        self.scale = nn.Parameter(torch.ones(4).double())

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (self._modules[name] for name in self.names)
        assert first is not None
        assert second is not None
        assert third is not None
        h = torch.relu(first(x) + x)
        h = h + second(second(h))
        return (third(h) + h) * self.scale


@settings(max_examples=25, deadline=None)
@given(names=st.permutations(NASTY).map(lambda names: list(names[:3])), asks=st.booleans())
def test_names_of_modules_change_nothing_but_names(names: list[str], asks: bool) -> None:
    batches = [
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_(asks)
    ] * 2
    plain = ["one", "two", "three"]
    for detail in ("full", "cheap"):
        options: dict[str, Any] = {"detail": detail, "steps": 2, "seed": 0}
        reports = [gf.diagnose(Named(used), batches, square, **options) for used in (names, plain)]
        issues = [
            [(i.issue_type, i.severity, i.layer in ("", *used)) for i in r.issues]
            for r, used in zip(reports, (names, plain), strict=True)
        ]
        assert issues[0] == issues[1]
        back = dict(zip(names, plain, strict=True))
        graphs = []
        for r, rename in zip(reports, (back, {}), strict=True):
            record = r.record.graph_record
            assert record is not None
            graph = nx.DiGraph()
            for n in record.nodes:
                layer = rename.get(n.layer, n.layer)
                graph.add_node(n.name, kind=(n.kind, layer, n.type, len(n.parameters), n.order))
            graph.add_edges_from((e.source, e.target) for e in record.edges)
            graphs.append(graph)
            calls = {n.name for n in record.nodes if n.kind == "layer" and n.layer}
            assert calls == {layer.name for layer in r.record.layers if layer.module}
        assert nx.is_isomorphic(*graphs, node_match=lambda a, b: a["kind"] == b["kind"])


class Lit(nn.Module):
    """A model that holds its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = nn.Linear(8, 3), nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.net(x), y)


def test_a_layer_called_loss_keeps_its_name_and_the_loss_gets_another() -> None:
    batches = [(torch.randn(16, 8), torch.randint(0, 3, (16,)))] * 3
    report = gf.diagnose(Lit(), batches)
    graph = report.record.graph
    assert graph["loss"].kind == "layer"
    assert graph["(loss)"].kind == "loss"
    assert ("loss", "(loss)") in graph.edges
    assert ("net", "loss") in graph.edges


def test_a_layer_called_input_is_not_the_input() -> None:
    model = nn.Sequential()
    model.add_module("input", nn.Linear(8, 8))
    model.add_module("out", nn.Linear(8, 3))
    for asks in (False, True):
        graph = analyze(model, [torch.randn(16, 8).requires_grad_(asks)], square).graph
        assert (graph["input"].kind, graph["(input)"].kind) == ("layer", "input")
        assert set(graph.edges) >= {("(input)", "input"), ("input", "out")}
