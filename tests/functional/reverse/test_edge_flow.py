"""Nodes and edges as drawn by hand, and the flow on every edge against autograd by hand.

Each model is written twice: as a module, and as a function in which every consumer of a tensor takes its
own clone of it, through `edge(source, target, tensor)`. The gradient that the clone retains is what that
consumer hands back, which is the flow that the graph must show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf


class Edges:
    """Collects the clones that consumers take."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], list[tuple[int, Tensor]]] = defaultdict(list)

    def __call__(self, source: str, target: str, tensor: Tensor) -> Tensor:
        clone = tensor.clone()
        clone.retain_grad()
        self.kept[source, target].append((id(tensor), clone))
        return clone

    def flows(self) -> dict[tuple[str, str], float]:
        """‖Σ c‖ where a consumer takes a tensor twice; the root of the sum of squares over tensors."""
        found = {}
        for edge, clones in self.kept.items():
            by_tensor: dict[int, Tensor] = {}
            for key, clone in clones:
                assert clone.grad is not None
                by_tensor[key] = by_tensor[key] + clone.grad if key in by_tensor else clone.grad
            found[edge] = float(np.sqrt(sum(float(g.square().sum()) for g in by_tensor.values())))
        return found


class ResidualMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.up, self.down, self.head = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        h = h + self.down(torch.relu(self.up(h)))
        return self.head(h)

    def by_hand(self, e: Edges, x: Tensor) -> Tensor:
        h = self.inp(x)
        up = self.up(e("inp", "up", h))
        relu = torch.relu(e("up", "relu", up))
        down = self.down(e("relu", "down", relu))
        add = e("inp", "add", h) + e("down", "add", down)
        return e("head", "mean", self.head(e("add", "head", add)))


class ResNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.stem(x)
        out = self.relu(self.bn1(self.conv1(identity)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)

    def by_hand(self, e: Edges, x: Tensor) -> Tensor:
        stem = self.stem(x)
        bn1 = self.bn1(e("conv1", "bn1", self.conv1(e("stem", "conv1", stem))))
        relu = F.relu(e("bn1", "relu", bn1))
        bn2 = self.bn2(e("conv2", "bn2", self.conv2(e("relu", "conv2", relu))))
        add = e("bn2", "add", bn2) + e("stem", "add", stem)
        return e("relu@1", "mean", F.relu(e("add", "relu@1", add)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        ab = torch.cat([a, self.b(a)], -1)
        return self.head(torch.cat([ab, self.c(ab)], -1))

    def by_hand(self, e: Edges, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(e("a", "b", a))
        ab = torch.cat([e("a", "cat", a), e("b", "cat", b)], -1)
        c = self.c(e("cat", "c", ab))
        abc = torch.cat([e("cat", "cat@1", ab), e("c", "cat@1", c)], -1)
        return e("head", "mean", self.head(e("cat@1", "head", abc)))


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.ln1, self.ln2 = nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        n = self.ln1(h)
        h = h + self.attn(n, n, n, need_weights=False)[0]
        return h + self.down(F.gelu(self.up(self.ln2(h))))

    def by_hand(self, e: Edges, x: Tensor) -> Tensor:
        h = self.inp(x)
        n = self.ln1(e("inp", "ln1", h))
        taken = e("ln1", "attn", n)  # one tensor, as query, key and value
        a = self.attn(taken, taken, taken, need_weights=False)[0]
        h2 = e("inp", "add", h) + e("attn", "add", a)
        up = self.up(e("ln2", "up", self.ln2(e("add", "ln2", h2))))
        down = self.down(e("gelu", "down", F.gelu(e("up", "gelu", up))))
        return e("add@1", "mean", e("add", "add@1", h2) + e("down", "add@1", down))


class UNetSkip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.pool, self.dec = nn.MaxPool1d(2), nn.Conv1d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        enc = self.enc(x)
        up = F.interpolate(self.mid(self.pool(enc)), scale_factor=2.0)
        return self.dec(torch.cat([enc, up], 1))

    def by_hand(self, e: Edges, x: Tensor) -> Tensor:
        enc = self.enc(x)
        mid = self.mid(e("pool", "mid", self.pool(e("enc", "pool", enc))))
        up = F.interpolate(e("mid", "upsample_nearest1d", mid), scale_factor=2.0)
        both = torch.cat([e("enc", "cat", enc), e("upsample_nearest1d", "cat", up)], 1)
        return e("dec", "mean", self.dec(e("cat", "dec", both)))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x) * self.encode(2 * x + 1))

    def by_hand(self, e: Edges, x: Tensor) -> Tensor:
        one = self.fc2(e("tanh", "fc2", torch.tanh(e("fc1", "tanh", self.fc1(x)))))
        two = self.fc2(e("tanh@1", "fc2@1", torch.tanh(e("fc1@1", "tanh@1", self.fc1(2 * x + 1)))))
        product = e("fc2", "mul", one) * e("fc2@1", "mul", two)
        return e("head", "mean", self.head(e("mul", "head", product)))


class Experts(nn.Module):
    """A dense mixture: every expert sees every token, weighted by a softmax over a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate = nn.Linear(5, 5), nn.Linear(5, 2)
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        w = self.gate(h).softmax(-1)
        first, second = w.narrow(1, 0, 1), w.narrow(1, 1, 1)  # `w[:, :1]` is two operations in older releases
        return self.experts[0](h) * first + self.experts[1](h) * second

    def by_hand(self, e: Edges, x: Tensor) -> Tensor:
        h = self.inp(x)
        gate = self.gate(e("inp", "gate", h))
        w = e("gate", "softmax", gate).softmax(-1)
        one, two = self.experts[0](e("inp", "experts.0", h)), self.experts[1](e("inp", "experts.1", h))
        w0, w1 = e("softmax", "slice", w)[:, :1], e("softmax", "slice@1", w)[:, 1:]
        first = e("experts.0", "mul", one) * e("slice", "mul", w0)
        second = e("experts.1", "mul@1", two) * e("slice@1", "mul@1", w1)
        return e("add", "mean", e("mul", "add", first) + e("mul@1", "add", second))


CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "residual MLP": (ResidualMLP, (7, 5)),
    "ResNet block": (ResNetBlock, (3, 2, 5, 5)),
    "dense concatenation": (Dense, (7, 4)),
    "GPT block": (GPTBlock, (3, 4, 6)),
    "U-Net skip": (UNetSkip, (3, 2, 8)),
    "siamese": (Siamese, (7, 5)),
    "mixture of experts": (Experts, (7, 5)),
}


def measured(name: str) -> tuple[Any, Tensor, gf.graph.LayerGraph]:
    make, shape = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(*shape, dtype=torch.float64)
    weight = torch.randn(1000, dtype=torch.float64)

    def loss(y: Tensor) -> Tensor:
        return (y * weight[: y.numel()].view_as(y)).mean()

    model.weight_of_loss = weight
    return model, x, gf.layer_graph(model, x, loss)


@pytest.mark.parametrize("name", CASES)
def test_edges_are_as_drawn_and_flows_as_by_hand(name: str) -> None:
    model, x, graph = measured(name)
    edges = Edges()
    y = model.by_hand(edges, x)
    (y * model.weight_of_loss[: y.numel()].view_as(y)).mean().backward()
    flows = edges.flows()
    # the loss is a product and a mean: the last edge drawn stands for the way into the product
    flows = {(a, "mul_loss" if b == "mean" else b): f for (a, b), f in flows.items()}
    last = [n for n in graph if graph[n].kind == "op"][-2]
    assert graph[last].type == "mul"
    drawn = {(a, last if b == "mul_loss" else b) for a, b in flows} | {(last, "mean"), ("mean", "loss")}
    found = {(u, v) for u, v in graph.nx.edges if graph[u].kind != "input"}
    assert found == drawn
    for (u, v), flow in flows.items():
        target = last if v == "mul_loss" else v
        np.testing.assert_allclose(graph.edge(u, target).flow, flow, rtol=1e-5, err_msg=f"{u} -> {target}")
    assert not any(graph.edge(u, v).severed for u, v in drawn)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_nodes_add_up(name: str) -> None:
    _, _, graph = measured(name)
    for node in graph:
        out = [graph.edge(node, v).flow for v in graph.nx.successors(node)]
        if graph[node].kind in ("layer", "op") and out:
            assert graph[node].grad_norm <= sum(out) * (1 + 1e-9)
            assert (len(out) > 1) or np.isclose(graph[node].grad_norm, out[0], rtol=1e-9)
        if graph[node].kind in ("layer", "op") and np.isfinite(graph[node].gain):
            np.testing.assert_allclose(graph[node].divergence, np.tanh(np.log(graph[node].gain)), rtol=1e-9)


def test_circulation_of_a_residual_block_is_the_log_ratio_of_its_ways() -> None:
    model, x, graph = measured("residual MLP")
    edges = Edges()
    y = model.by_hand(edges, x)
    (y * model.weight_of_loss[: y.numel()].view_as(y)).mean().backward()
    flows = edges.flows()
    branch = (
        flows["inp", "up"] / flows["down", "add"]
    )  # what the branch hands back of what the addition gave it
    skip = flows["inp", "add"] / flows["down", "add"]  # an addition gives both sides the same
    (loop,) = graph.circulation()
    np.testing.assert_allclose(abs(loop.circulation), abs(np.log(branch / skip)), rtol=1e-9)


class Scaled(torch.autograd.Function):
    """A function that is given a number before its tensor."""

    @staticmethod
    def forward(ctx: Any, factor: float, x: Tensor) -> Tensor:
        ctx.factor = factor
        return factor * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return None, ctx.factor * grad_outputs[0]


def test_a_custom_function_that_is_given_more_than_tensors_hands_its_gradient_on() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Scaled.apply(2.0, self.first(x)))  # type: ignore[arg-type]

    torch.manual_seed(0)
    model, x = Model(), torch.randn(5, 3)
    full, cheap = (
        gf.analyze(model, [x], lambda y: y.square().mean(), steps=1, detail=detail)
        for detail in ("full", "cheap")
    )
    for name in ("first.weight", "first.bias"):
        expected = cheap.parameter(name).grad_norm
        assert expected[0] > 0
        np.testing.assert_allclose(full.parameter(name).grad_norm, expected, rtol=1e-5)
