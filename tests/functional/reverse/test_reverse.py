"""Reverse passes: their parts, functions of the users, hooks, changes in place and retries."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradflow.functional import analyze, graph_of
from gradflow.functional.reverse.reverse import accumulated, fused
from gradflow.functional.run.program import Before, Given, Program, WorkingState
from gradflow.functional.run.step import Request, run_step
from gradflow.functional.tap.nodes import is_leaf, operation, topological
from gradflow.functional.tap.recorder import NeedsRetry
from gradflow.functional.tap.tapped import TappedModel
from tests.functional.naive import naive_step
from tests.functional.reverse.models import X, assert_same, mean_square

# ---------------------------------------------------------------------------- parts of the passes


def test_fused_gives_none_where_no_path_leads() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    gradients = fused((a * 3).sum(), [a, b])
    assert gradients[0] is not None
    assert gradients[0].tolist() == [3.0, 3.0]
    assert gradients[1] is None
    assert fused(torch.tensor(1.0), [a, b]) == [None, None]


def test_fused_passes_other_errors_on() -> None:
    a = torch.ones(2, requires_grad=True)
    y = a.exp()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused(y.sum(), [a])


def test_accumulated_leaves_what_is_not_ours_as_it_was() -> None:
    ours, fresh, graded = (torch.ones(2, requires_grad=True) for _ in range(3))
    graded.grad = kept = torch.full((2,), 5.0)
    accumulated((ours * fresh * graded * 2).sum(), [ours])
    assert ours.grad is not None
    assert ours.grad.tolist() == [2.0, 2.0]
    assert fresh.grad is None
    assert graded.grad is kept
    assert kept.tolist() == [5.0, 5.0]
    accumulated(torch.tensor(1.0), [ours])  # no graph, no gradient
    assert ours.grad.tolist() == [2.0, 2.0]


def test_topological_order_has_consumers_first_on_a_deep_graph() -> None:
    leaf = torch.ones(2, requires_grad=True)
    h = leaf
    for _ in range(3000):  # no recursion limit is met
        h = h + h.tanh()
    order = list(topological(h.sum().grad_fn))
    place = {node: i for i, node in enumerate(order)}
    assert len(place) == len(order) == 2 * 3000 + 2
    assert all(
        place[node] < place[child] for node in order for child, _ in node.next_functions if child is not None
    )
    assert is_leaf(order[-1])
    assert operation(order[0]) == "sum"


# ------------------------------------------------------------------------- functions of the users


class OldStyle(torch.autograd.Function):
    """A function in the style that torch.func does not take; its backward is not its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.factor = factor
        return x * 2, x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, other: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        assert other is not None  # zeros, where nothing has arrived
        return grad * ctx.factor, None


class Unmaterialised(torch.autograd.Function):
    """A function that would take None for an output that nothing has used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale)
        return x * scale, x + 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        assert other is None or not other.any()
        assert grad is not None
        return grad * scale, (grad * x).sum()


@pytest.mark.parametrize("detail", ["cheap", "full"])
@pytest.mark.parametrize("kind", ["old", "unmaterialised"])
def test_functions_of_the_users_are_measured(kind: str, detail: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 2), nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h = OldStyle.apply(h, 0.25)[0] if kind == "old" else Unmaterialised.apply(h, self.scale)[0]
            return self.b(h)

    record, naive = analyze(Model(), [X], mean_square, detail=detail), naive_step(Model(), X, mean_square)
    for layer in record:
        np.testing.assert_allclose(layer.grad_norm, naive.output_norm(layer.name), rtol=1e-6)
    for parameter in record.parameters:
        np.testing.assert_allclose(parameter.grad_norm, naive.parameter_norm(parameter.name), rtol=1e-6)
    if kind == "old":
        with pytest.raises(RuntimeError, match="setup_context"):
            analyze(Model(), [X], mean_square, transform="vjp")


@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_a_gradient_penalty_in_the_loss(detail: Any) -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            y = self.b(torch.tanh(self.a(x)))
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return y.mean() + (slope.norm(dim=1) - 1).square().mean()

    model = Critic()
    record = analyze(model, [X], steps=2, detail=detail)
    for parameter, gradient in zip(
        record.parameters, torch.autograd.grad(model(X), list(model.parameters())), strict=True
    ):
        np.testing.assert_allclose(parameter.grad_norm, gradient.norm(), rtol=1e-5)


# ------------------------------------------------------------------------------------------ hooks


class Hooked(nn.Module):
    """Halves the gradient on its way, by a hook on a tensor or on a module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), kind
        if kind == "module":
            self.b.register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.kind == "tensor":
            h.register_hook(lambda gradient: gradient * 0.5)
        return self.c(self.b(h))


@pytest.mark.parametrize("kind", ["tensor", "module"])
def test_hooks_act_on_gradients_in_every_detail_and_are_noted_where_edges_lack_them(kind: str) -> None:
    cheap, full = (analyze(Hooked(kind), [X] * 2, mean_square, steps=2, detail=d) for d in ("cheap", "full"))
    plain = analyze(Hooked(""), [X] * 2, mean_square, steps=2)
    model = Hooked(kind)
    mean_square(model(X)).backward()
    for parameter, (_, p) in zip(cheap.parameters, model.named_parameters(), strict=True):
        assert p.grad is not None
        np.testing.assert_allclose(parameter.grad_norm, p.grad.norm(), rtol=1e-6)
    assert_same(full, cheap)
    np.testing.assert_allclose(
        cheap.parameter("a.weight").grad_norm * 2, plain.parameter("a.weight").grad_norm, rtol=1e-6
    )
    assert [n for n in full.provenance.notes if "hooks on tensors" in n and "without them" in n]
    assert not [n for n in plain.provenance.notes if "hooks" in n]


# ------------------------------------------------------------------------- in place, and retries


class InPlaceOnAView(nn.Module):
    """Changes what a layer returned, which shares its storage with the layer's input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.flat, self.b = nn.Linear(4, 6), nn.Flatten(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).unsqueeze(-1)
        flat = self.flat(h)
        flat *= 2.0
        return self.b(flat) + h.sum()


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_a_view_that_is_changed_in_place_costs_a_probe_and_no_gradient(transform: Any) -> None:
    record = analyze(InPlaceOnAView(), [X] * 2, mean_square, steps=2, transform=transform)
    plain = naive_parameters(InPlaceOnAView())
    for parameter in record.parameters:
        np.testing.assert_allclose(parameter.grad_norm, plain[parameter.name], rtol=1e-6)
    assert not record["flat"].reached.any()
    assert record["flat"].shape == (5, 6)
    assert [
        n
        for n in record.provenance.notes
        if n.startswith("No gradient could be measured at the output of 'flat'")
    ]
    assert record.graph_record is not None
    assert all(node.reachable for node in record.graph_record.nodes)


def naive_parameters(model: nn.Module) -> dict[str, float]:
    mean_square(model(X)).backward()
    return {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_more_calls_than_were_foreseen(transform: Any) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(100):
                x = x + 0.1 * torch.tanh(self.drop(self.cell(x)))
            return x

    model = Deep()
    record = analyze(model, [X], mean_square, transform=transform, seed=5)
    torch.manual_seed(5)
    naive = naive_step(model, X, mean_square)
    assert len(record) == 200
    for layer in record:
        np.testing.assert_allclose(layer.grad_norm, naive.output_norm(layer.name), rtol=1e-5)


def test_a_step_that_never_settles_ends_with_an_error() -> None:
    model = nn.Linear(4, 2)

    def forward(batch: Any, step: int) -> Tensor:
        raise NeedsRetry("again")

    given = Given(model, None, forward, mean_square, lambda batch: {})
    program = Program(given, WorkingState.of(given), TappedModel.of(model))
    with pytest.raises(RuntimeError, match="could not settle on the probes of this model"):
        run_step(program, Request(batch=X, step=0, before=Before.of(program)))


def test_a_graph_is_measured_without_touching_the_users_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    loss = mean_square(model(X))  # the user's own, with its graph still alive
    twin = copy.deepcopy(model)
    graph_of(model, X, mean_square)
    loss.backward()
    mean_square(twin(X)).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
