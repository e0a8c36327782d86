"""The graph's plain data: nodes and edges as drawn by hand, and what flows on every edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradflow.functional import analyze, effective_rank, graph_of
from gradflow.records import EdgeRecord, GraphRecord, NodeRecord
from tests.functional.run.drawn_models import MODELS, Hand, built, normal


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


def by_edge(record: GraphRecord) -> dict[tuple[str, str], EdgeRecord]:
    found = {(e.source, e.target): e for e in record.edges}
    assert len(found) == len(record.edges)
    return found


def by_name(record: GraphRecord) -> dict[str, NodeRecord]:
    found = {n.name: n for n in record.nodes}
    assert len(found) == len(record.nodes)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_edges_are_as_drawn_and_carry_what_autograd_gives_by_hand(name: str) -> None:
    model, batch, inputs = built(name)
    record = graph_of(model, batch, mean_square)
    hand = Hand()
    model.by_hand(hand, *(batch if isinstance(batch, tuple) else (batch,))).backward()
    edges = by_edge(record)
    assert set(edges) == set(hand.copies) | inputs
    for edge in hand.copies:
        np.testing.assert_allclose(edges[edge].flow, hand.flow(edge), rtol=1e-5, err_msg=str(edge))
        assert not edges[edge].severed
    for edge in inputs:  # no gradient is asked for there
        assert np.isnan(edges[edge].flow).all()
        assert not edges[edge].severed


@pytest.mark.parametrize("name", MODELS)
def test_nodes_carry_the_gradient_of_their_output_and_what_they_hand_on(name: str) -> None:
    model, batch, inputs = built(name)
    record = graph_of(model, batch, mean_square)
    hand = Hand()
    model.by_hand(hand, *(batch if isinstance(batch, tuple) else (batch,))).backward()
    nodes = by_name(record)
    assert set(nodes) == {n for edge in (*hand.copies, *inputs) for n in edge}
    for source in hand.sources:
        np.testing.assert_allclose(nodes[source].grad_norm, hand.grad_norm(source), rtol=1e-5, err_msg=source)
    for node in record.nodes:
        handed = [hand.flow(edge) ** 2 for edge in hand.copies if edge[1] == node.name]
        if handed:
            np.testing.assert_allclose(
                node.input_grad_norm, np.sqrt(sum(handed)), rtol=1e-5, err_msg=node.name
            )
        else:
            assert np.isnan(node.input_grad_norm).all()
    assert nodes["loss"].grad_norm.tolist() == [1.0]
    assert record.steps == (0,)
    assert record.measured


@pytest.mark.parametrize("name", MODELS)
def test_kinds_types_and_parameters_of_nodes(name: str) -> None:
    model, batch, _ = built(name)
    record = graph_of(model, batch, mean_square)
    modules = dict(model.named_modules())
    owned: list[str] = []
    for node in record.nodes:
        if node.kind == "layer":
            assert node.layer == node.name.split("@")[0].replace("(model)", "")
            assert node.type == type(modules[node.layer]).__name__
        if node.kind == "op":
            assert node.type == node.name.split("@")[0]
            assert np.isnan(node.effective_rank).all()
        assert node.reachable
        if node.kind == "op" or "@" not in node.name:  # later calls of a module use the same ones
            owned += node.parameters
    assert sorted(owned) == sorted(n for n, _ in model.named_parameters())
    assert [n.order for n in record.nodes] == list(range(len(record.nodes)))
    assert record.nodes[-1].name == "loss"
    place = {n.name: n.order for n in record.nodes}
    assert all(place[e.source] < place[e.target] for e in record.edges)  # in the order of execution


def test_shapes_and_sizes_are_those_of_the_outputs() -> None:
    model, batch, _ = built("GPT block")
    nodes = by_name(graph_of(model, batch, mean_square))
    assert nodes["qkv"].shape == (2, 3, 12)
    assert nodes["qkv"].num_elements == 72
    assert nodes["softmax"].shape == (2, 3, 3)
    assert nodes["input"].shape == (2, 3, 4)
    assert nodes["loss"].num_elements == 0


@pytest.mark.parametrize("name", ["residual MLP", "ResNet block", "GPT block"])
def test_effective_ranks_are_those_of_the_retained_gradients(name: str) -> None:
    model, batch, _ = built(name)
    hand = Hand()
    nodes = by_name(graph_of(model, batch, mean_square))
    model.by_hand(hand, batch).backward()
    checked = 0
    for source, tensors in hand.sources.items():
        if nodes[source].kind == "layer":
            gradient = tensors[0].grad
            assert gradient is not None
            matrix = (
                gradient.movedim(1, -1).flatten(0, -2) if gradient.dim() == 4 else gradient.flatten(0, -2)
            )
            shares = torch.linalg.svdvals(matrix).square()
            shares = shares[shares > 0] / shares.sum()
            expected = float(torch.exp(-(shares * shares.log()).sum()))
            np.testing.assert_allclose(nodes[source].effective_rank, expected, rtol=1e-6, err_msg=source)
            np.testing.assert_allclose(effective_rank(gradient, nodes[source].type), expected, rtol=1e-6)
            checked += 1
    assert checked >= 3


def test_topology_alone_is_the_same_graph_without_numbers() -> None:
    for name in MODELS:
        model, batch, _ = built(name)
        full, cheap = (graph_of(model, batch, mean_square, detail=d) for d in ("full", "cheap"))
        assert [n.name for n in full.nodes] == [n.name for n in cheap.nodes]
        assert set(by_edge(full)) == set(by_edge(cheap))
        assert cheap.steps == ()
        assert not cheap.measured
        assert all(len(e.flow) == 0 for e in cheap.edges)
        assert all(len(n.grad_norm) == 0 for n in cheap.nodes)


def test_the_graph_of_vjp_is_that_of_fused() -> None:
    model, batch, _ = built("GPT block")
    graphs = [analyze(model, [batch], mean_square, transform=t).graph_record for t in ("fused", "vjp")]
    assert graphs[0] == graphs[1]


def test_an_input_that_requires_a_gradient_has_a_flow() -> None:
    model, batch, _ = built("residual MLP")
    leaf = batch.clone().requires_grad_()
    record = graph_of(model, leaf, mean_square)
    (exact,) = torch.autograd.grad(mean_square(model(leaf)), [leaf])
    np.testing.assert_allclose(by_edge(record)["input", "inp"].flow, exact.norm(), rtol=1e-10)
    np.testing.assert_allclose(by_name(record)["input"].grad_norm, exact.norm(), rtol=1e-10)


def test_every_step_has_its_flow_and_graphs_that_change_are_joined() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, which: Tensor) -> Tensor:
            h = self.inp(x)
            return torch.tanh(self.left(h)) if which else self.right(h)

    model = Branching().double()
    batches = [(normal(4, 3), torch.tensor(flag)) for flag in (True, False, True)]
    record = analyze(model, batches, mean_square, steps=3, detail="full").graph_record
    assert record is not None
    edges = by_edge(record)
    assert set(edges) == {
        ("input.0", "inp"), ("inp", "left"), ("left", "tanh"), ("tanh", "pow"), ("inp", "right"),
        ("right", "pow"), ("pow", "mean"), ("mean", "loss"),
    }  # fmt: skip
    assert record.steps == (0, 1, 2)
    assert np.isnan(edges["inp", "left"].flow).tolist() == [False, True, False]
    assert np.isnan(edges["inp", "right"].flow).tolist() == [True, False, True]
    for step, (x, which) in enumerate(batches):
        h = model.inp(x).detach().requires_grad_()
        loss = mean_square(torch.tanh(model.left(h)) if which else model.right(h))
        (exact,) = torch.autograd.grad(loss, [h])
        edge = edges["inp", "left" if which else "right"]
        np.testing.assert_allclose(edge.flow[step], exact.norm(), rtol=1e-10)


def test_a_loss_that_is_a_layers_output() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(0), nn.Linear(8, 1)).double()
    edges = by_edge(graph_of(model, normal(2, 3)))
    assert set(edges) == {("input", "0"), ("0", "1"), ("1", "2"), ("2", "view"), ("view", "loss")}
    assert edges["2", "view"].flow.tolist() == [1.0]


def test_ops_in_submodules_carry_the_name_of_where_they_ran() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * 2 + x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Inner(), Inner())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x) * 3

    nodes = by_name(graph_of(Outer().double(), normal(2, 3), mean_square))
    assert {"blocks.0:mul", "blocks.0:add", "blocks.1:mul", "blocks.1:add", "mul"} <= set(nodes)
    assert nodes["blocks.1:add"].layer == "blocks.1"
    assert nodes["mul"].layer == ""


def test_the_slice_that_an_operation_takes_is_told() -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y[:, -1].sum() + y[:, 2].sum() + y.select(-2, 0).sum() + y[:, 1:3].sum() + y.sum()

    nodes = by_name(graph_of(Slices(), torch.randn(2, 7, 3), lambda loss: loss)).values()
    taken = [node.taken for node in nodes if node.taken]
    assert taken == [(1, 6, 7), (1, 2, 7), (1, 0, 7)]
