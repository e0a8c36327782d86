"""Models that take derivatives and go on with them, against gradients retained at the layers' own outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import gradflow as gf

Taken = dict[str, float]


def slope(y: Tensor, x: Tensor) -> Tensor:
    """Return ∂Σy/∂x with its graph."""
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


class Critic(nn.Module):
    """WGAN-GP: the norm of the slope is held near one."""

    def __init__(self, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.n = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 6), activation(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = self.n(x)
        return y.mean() + 10 * ((slope(y, x).norm(dim=1) - 1) ** 2).mean()


class R1(nn.Module):
    """The squared slope on real images, with convolutions and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(8, 1, 2, 2).repeat(1, 1, 2, 2).requires_grad_()
        y = self.head(torch.sigmoid(self.norm(self.conv(x))).flatten(1))
        return nn.functional.softplus(-y).mean() + slope(y, x).square().sum((1, 2, 3)).mean()


class Residual(nn.Module):
    """PINN: the residual of u_t = u_xx + sin u, with second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.act, self.other = nn.Tanh(), nn.Sigmoid()

    def forward(self, z: Tensor) -> Tensor:
        t = z[:, :1].clone().requires_grad_()
        x = z[:, 1:2].clone().requires_grad_()
        u = self.out(self.other(self.second(self.act(self.first(torch.cat([t, x], 1))))))
        residual = slope(u, t) - slope(slope(u, x), x) - u.sin()
        return residual.square().mean() + u.square().mean()


class Learner(nn.Module):
    """MAML: the loss of parameters after one inner step."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        parameters = dict(self.n.named_parameters())
        inner = self.n(x[:4]).square().mean()
        slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        moved = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), slopes, strict=True)}
        return (functional_call(self.n, moved, (x[4:],)) - 1.0).square().mean()


class Custom(nn.Module):
    """A layer of several operations, whose own derivative is used."""

    class Layer(nn.Module):
        """Its output is the last of them."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight.t()).exp()

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = self.Layer(), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = self.head(self.layer(x))
        return y.mean() + slope(y, x).square().mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "WGAN-GP": Critic,
    "WGAN-GP, sigmoid": lambda: Critic(nn.Sigmoid),
    "WGAN-GP, softplus": lambda: Critic(nn.Softplus),
    "R1": R1,
    "PINN": Residual,
    "MAML": Learner,
    "custom": Custom,
}
X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
STEPS = 6


def built(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]().double()


def retained(model: nn.Module, x: Tensor) -> tuple[Taken, Taken]:
    """Return the norms of the gradients at the layers' outputs, by `retain_grad`, and of the parameters'."""
    outputs: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def kept(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            y = forward(*args)
            y.retain_grad()
            number = counts[name] = counts.get(name, -1) + 1
            outputs[f"{name}@{number}" if number else name] = y
            return y

        return run

    layers = [(n, m) for n, m in model.named_modules() if n and not list(m.children())]
    for name, module in layers:
        module.forward = kept(name, module.forward)
    loss = model(x)
    for y in outputs.values():
        y.grad = None  # what the inner passes have left
    loss.backward()
    for _, module in layers:
        del module.forward
    grads = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    return {n: float(y.grad.norm()) if y.grad is not None else 0.0 for n, y in outputs.items()}, grads


@pytest.mark.parametrize("detail", ["cheap", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_record_and_graph_agree_with_retained_gradients(name: str, detail: Any) -> None:
    expected, of_parameters = retained(built(name), X)
    record = gf.analyze(built(name), [(X,)] * STEPS, None, steps=STEPS, detail=detail)
    assert {layer.name for layer in record} >= set(expected)
    for layer, norm in expected.items():
        np.testing.assert_allclose(record[layer].grad_norm, norm, rtol=1e-10, err_msg=layer)
        if detail == "full":
            np.testing.assert_allclose(record.graph[layer].grad_norm, norm, rtol=1e-10, err_msg=layer)
    for parameter in record.parameters:
        norm = of_parameters[parameter.name]
        np.testing.assert_allclose(parameter.grad_norm, norm, rtol=1e-10, err_msg=parameter.name)


@pytest.mark.parametrize("name", ["WGAN-GP", "PINN", "R1"])
def test_a_run_with_an_optimizer_and_one_that_is_deepened(name: str) -> None:
    model = built(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    record = gf.analyze(
        model, [(X,)] * STEPS, None, steps=STEPS, optimizer=optimizer, deepen=lambda record: True
    )
    plain = built(name)
    stepping = torch.optim.SGD(plain.parameters(), lr=1e-3)
    for step in range(STEPS):
        expected, _ = retained(plain, X)
        for layer, norm in expected.items():
            np.testing.assert_allclose(record[layer].grad_norm[step], norm, rtol=1e-8, err_msg=layer)
        if step == STEPS - 1:
            for layer, norm in expected.items():
                np.testing.assert_allclose(record.graph[layer].grad_norm, norm, rtol=1e-8, err_msg=layer)
        stepping.step()
        stepping.zero_grad()


@pytest.mark.parametrize("name", ["WGAN-GP", "MAML", "PINN"])
def test_derivatives_are_operations_that_hold_the_parameters_they_use(name: str) -> None:
    model = built(name)
    record = gf.analyze(model, [(X,)], None, detail="full")
    graph = record.graph_record
    assert graph is not None
    nodes = {node.name: node for node in graph.nodes}
    for edge in graph.edges:  # no weight is taken for an output
        assert not (nodes[edge.source].kind == "layer" and nodes[edge.target].type == "t"), edge
    weights = {n for n, p in model.named_parameters() if p.dim() == 2}
    held = {p for node in graph.nodes if node.kind == "op" for p in node.parameters}
    assert held & weights, "a derivative goes through the weights of the layers"


def test_what_cannot_be_told_apart_is_said() -> None:
    """Operations of a layer before its last one are entered too: no gradient of its output."""
    record = gf.analyze(built("custom"), [(X,)] * 2, None, steps=2)
    (note,) = [note for note in record.provenance.notes if "Some gradient enters" in note]
    assert note.startswith("Some gradient enters 'layer' elsewhere than by what it returned")
    assert "used by a derivative that the model takes" in note
    plain = gf.analyze(built("WGAN-GP"), [(X,)] * 2, None, steps=2)
    assert not [note for note in plain.provenance.notes if "Some gradient enters" in note]


def test_an_output_that_is_kept_beside_what_is_returned_is_whole() -> None:
    """The same tensor used past its layer's caller, as an attribute."""

    class Kept(nn.Module):
        class Layer(nn.Linear):
            """Keeps its own output."""

            def forward(self, x: Tensor) -> Tensor:
                self.kept = super().forward(x)
                return self.kept

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = self.Layer(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)).mean() + self.layer.kept.square().mean()

    torch.manual_seed(1)
    model = Kept().double()
    y = model.head(h := model.layer(X)).mean() + model.layer.kept.square().mean()
    expected = float(torch.autograd.grad(y, h)[0].norm())
    for detail in ("cheap", "full"):
        record = gf.analyze(model, [(X,)] * STEPS, None, steps=STEPS, detail=detail)
        np.testing.assert_allclose(record["layer"].grad_norm, expected, rtol=1e-10)
