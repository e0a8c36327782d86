"""Where the data goes on and the gradient does not: severed edges, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.functional import analyze
from tests.functional.reverse.cuts import Cut, X, graph, mean_square, severed, unreachable


def without_grad(z: Tensor, h: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.tanh(z)
    return z + h


def in_a_slice(z: Tensor, h: Tensor) -> Tensor:
    out = torch.zeros(5, 4)
    out[:, :2] = z.detach()[:, :2] * 2  # reason: the first cut on the way, not what came after it
    return out + h


def in_place(z: Tensor, h: Tensor) -> Tensor:
    out = z.detach() * 2
    out += 1.0
    out.mul_(torch.ones(4)).clamp_(-9, 9)
    return out + h


def in_a_slice_of_what_has_a_gradient(z: Tensor, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = z.detach()[:, 0]
    return h


# name -> (function, op named as the reason, consumer at which the edge ends)
CUTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "detach": (lambda z, h: z.detach() + h, "detach", "add"),
    "data": (lambda z, h: z.data * 2 + h, "data", "add"),
    "argmax": (lambda z, h: F.one_hot(z.argmax(-1), 4).float() + h, "argmax", "add"),
    "argmax of max": (
        lambda z, h: h.gather(1, z.max(-1, keepdim=True).indices.expand(-1, 4)),
        "max",
        "gather",
    ),
    "topk": (lambda z, h: h.gather(1, z.topk(4).indices), "topk", "gather"),
    "argsort": (lambda z, h: h[:, z.argsort(-1)[0]], "argsort", "index"),
    "int": (lambda z, h: z.int().float() + h, "int", "add"),
    "long": (lambda z, h: z.long() * h, "long", "mul"),
    "to an integer": (lambda z, h: z.to(torch.int32) * h, "to", "mul"),
    "comparison": (lambda z, h: (z > 0) * h, "gt", "mul"),
    "comparison in where": (lambda z, h: torch.where(z > 0, h, 2 * h), "gt", "where"),
    "sampling": (lambda z, h: torch.multinomial(z.softmax(-1), 4) * h, "multinomial", "mul"),
    "no_grad": (without_grad, "no_grad", "add"),
    "detach and more": (lambda z, h: z.detach().exp().sqrt() + h, "detach", "add"),
    "detach in a slice": (in_a_slice, "detach", "add"),
    "detach in place": (in_place, "detach", "add"),
    "detach in a slice of another": (in_a_slice_of_what_has_a_gradient, "detach", "copy_slices"),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("detail", ["cheap", "full"])
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_the_cut_is_an_edge_that_names_the_operation(name: str, detail: Any, transform: Any) -> None:
    function, reason, target = CUTS[name]
    record = analyze(Cut(function), [X] * 2, mean_square, steps=2, detail=detail, transform=transform)
    edges = severed(record)
    assert set(edges) == {("b", target)}
    edge = edges["b", target]
    assert edge.reason == reason
    assert edge.flow.tolist() == ([0.0, 0.0] if detail == "full" and transform == "fused" else [])
    why = f"its output goes on without its gradient: {reason} before {target}"
    assert unreachable(record) == {"b": why}
    assert not record["b"].reached.any()
    assert record["a"].reached.all()


@pytest.mark.parametrize("name", CUTS)
def test_no_gradient_is_lost_where_autograd_has_one(name: str) -> None:
    """The naive version: autograd, asked for the gradient of `b`'s output."""
    model = Cut(CUTS[name][0])
    kept: list[Tensor] = []
    handle = model.b.register_forward_hook(lambda module, args, output: kept.append(output))
    loss = mean_square(model(X))
    (gradient,) = torch.autograd.grad(loss, kept, allow_unused=True)
    handle.remove()
    assert gradient is None


def test_a_cut_before_a_layer_ends_at_the_layer() -> None:
    record = analyze(Cut(lambda z, h: z.detach()), [X], mean_square)
    assert set(severed(record)) == {("b", "c")}
    assert unreachable(record) == {
        "b": "its output goes on without its gradient: detach before c",
        "a": "its output does not lead to the loss",
    }


def test_a_cut_in_the_loss_ends_at_the_losss_operation() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.student(x), self.teacher(x)

    record = analyze(Teacher(), [X], lambda out: F.mse_loss(out[0], out[1].detach()))
    assert {edge: e.reason for edge, e in severed(record).items()} == {("teacher", "mse_loss"): "detach"}


def test_two_cuts_of_one_layer_are_both_there() -> None:
    record = analyze(Cut(lambda z, h: z.detach() + h * z.argmax(-1, keepdim=True)), [X], mean_square)
    assert {edge: e.reason for edge, e in severed(record).items()} == {
        ("b", "add"): "detach",
        ("b", "mul"): "argmax",
    }
    assert "detach before add" in unreachable(record)["b"]
    assert "argmax before mul" in unreachable(record)["b"]


def test_a_cut_beside_a_way_that_is_open_leaves_the_layer_reachable() -> None:
    record = analyze(Cut(lambda z, h: z + h.detach() * 2), [X], mean_square, detail="full")
    assert {edge: e.reason for edge, e in severed(record).items()} == {("a", "add"): "detach"}
    assert unreachable(record) == {}
    straight_through = analyze(
        Cut(lambda z, h: z + (z.round() - z).detach() + h), [X], mean_square, detail="full"
    )
    assert severed(straight_through) == {}  # the edge itself carries a gradient
    assert unreachable(straight_through) == {}


READS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "item": (lambda z, h: torch.tensor(z.mean().item()) * h, "item"),
    "tolist": (lambda z, h: torch.tensor(z.tolist()) + h, "tolist"),
    "numpy": (lambda z, h: torch.from_numpy(z.detach().numpy() * 2) + h, "numpy"),
    "float": (lambda z, h: float(z.mean().detach()) * h, "float"),
    "int": (lambda z, h: int(z.detach().abs().sum()) * h, "int"),
    "bool": (lambda z, h: h if bool((z > 1e9).any()) else 2 * h, "bool"),
}


@pytest.mark.parametrize("name", READS)
def test_values_that_are_read_out_and_built_in_again(name: str) -> None:
    function, read = READS[name]
    record = analyze(Cut(function), [X], mean_square)
    assert unreachable(record) == {"b": f"its values were read out with {read}, which ends the gradient"}


def test_a_value_that_is_read_for_a_log_makes_nothing_unreachable() -> None:
    log: list[float] = []

    def function(z: Tensor, h: Tensor) -> Tensor:
        log.append(z.mean().item())
        return z + h

    record = analyze(Cut(function), [X], mean_square)
    assert log
    assert unreachable(record) == {}
    assert severed(record) == {}


# an operation whose derivative is zero keeps its graph: the flow is exactly zero, and not cut
ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "round": torch.round,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "zeros": lambda z: z * 0.0,
}


@pytest.mark.parametrize("name", ZERO)
def test_an_operation_of_zero_derivative_shows_as_exactly_zero_flow(name: str) -> None:
    op = "mul" if name == "zeros" else name
    record = analyze(Cut(lambda z, h: ZERO[name](z) + h), [X] * 2, mean_square, steps=2, detail="full")
    edges = {(e.source, e.target): e for e in graph(record).edges}
    assert edges["b", op].flow.tolist() == [0.0, 0.0]
    assert edges["b", op].severed
    assert edges["b", op].reason == ""
    assert (edges[op, "add"].flow > 0).all()
    assert edges["a", "b"].severed  # what comes of nothing is nothing
    assert not edges["a", "add"].severed
    assert unreachable(record) == {}
    assert record["b"].reached.all()
    assert record["b"].grad_zero.all()
    cheap = analyze(Cut(lambda z, h: ZERO[name](z) + h), [X] * 2, mean_square, steps=2)
    assert cheap["b"].grad_zero.all()
    assert severed(cheap) == {}  # not known without the flow


def test_an_edge_that_carries_something_in_one_step_is_not_severed() -> None:
    batches = [(X, torch.tensor(0.0)), (X, torch.tensor(1.0)), (X, torch.tensor(0.0))]

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return self.c(self.a(x) * gate)

    record = analyze(Gated(), batches, mean_square, steps=3, detail="full")
    (edge,) = [e for e in graph(record).edges if (e.source, e.target) == ("a", "mul")]
    assert (edge.flow == 0).tolist() == [True, False, True]
    assert not edge.severed
