"""Layers that no gradient reaches, as a whole: hidden, under no_grad, frozen, unused or never called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradflow.errors import ModelInputError
from gradflow.functional import analyze
from tests.functional.reverse.cuts import Cut, X, graph, mean_square, node, severed, unreachable


def test_a_reentrant_checkpoint_hides_its_layers_and_cuts_none() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(checkpoint(self.b, self.a(x), use_reentrant=True))

    record = analyze(Model(), [X], mean_square)
    assert record["b"].reached.all()
    assert severed(record) == {}
    assert unreachable(record) == {}


def test_a_reentrant_checkpoint_whose_input_needs_no_gradient_cuts_what_is_in_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(checkpoint(self.b, x, use_reentrant=True))  # no input requires a gradient

    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        record = analyze(Model(), [X], mean_square)
    assert not record["b"].reached.any()
    assert not record.parameter("b.weight").reached.any()
    assert {edge: e.reason for edge, e in severed(record).items()} == {("b", "c"): "checkpoint (reentrant)"}
    assert "checkpoint (reentrant) before c" in unreachable(record)["b"]


def test_a_layer_under_no_grad() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            with torch.no_grad():
                z = self.b(h)
                self.c(z)  # and this leads nowhere
            return self.c(z + h)

    record = analyze(Model(), [X], mean_square)
    reasons = unreachable(record)
    assert reasons["b"] == "its output goes on without its gradient: no_grad before c, no_grad before add"
    assert reasons["c"] == "it ran under no_grad"
    assert node(record, "c@1").reachable


def test_a_frozen_backbone_needs_no_gradient_and_is_no_fault() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[:2].requires_grad_(False)
    record = analyze(model, [X], mean_square)
    assert {edge: e.reason for edge, e in severed(record).items()} == {
        ("0", "1"): "no gradient needed", ("1", "2"): "no gradient needed",
    }  # fmt: skip
    assert unreachable(record) == dict.fromkeys(("0", "1"), "nothing in it or before it requires a gradient")
    assert not record["1"].inputs_differentiable
    assert record["2"].reached.all()


def test_a_frozen_layer_behind_a_trained_one_is_passed_through() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    record = analyze(model, [X], mean_square)
    assert severed(record) == {}
    assert record["1"].inputs_differentiable


def test_edges_from_inputs_are_no_cuts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, bias: Tensor, index: Tensor) -> Tensor:
            return (self.a(x) + bias)[index]

    record = analyze(Two(), [(X, torch.ones(4), torch.tensor([0, 1]))], mean_square, detail="full")
    edges = {(e.source, e.target): e for e in graph(record).edges}
    for edge in (("input.0", "a"), ("input.1", "add"), ("input.2", "index")):
        assert not edges[edge].severed
        assert edges[edge].reason == ""
        assert np.isnan(edges[edge].flow).all()
    assert unreachable(record) == {}


def test_a_layer_whose_output_is_not_used() -> None:
    record = analyze(Cut(lambda z, h: h * 2), [X], mean_square)
    assert unreachable(record) == {"b": "its output does not lead to the loss"}
    assert severed(record) == {}


def test_the_shape_of_a_tensor_is_none_of_its_values() -> None:
    def function(z: Tensor, h: Tensor) -> Tensor:
        return h + torch.zeros_like(z) + z.new_ones(4) + h.view_as(z) + torch.randn_like(z)

    record = analyze(Cut(function), [X], mean_square)
    assert unreachable(record) == {"b": "its output does not lead to the loss"}
    assert severed(record) == {}


def test_modules_that_are_never_called_are_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.forgotten, self.borrowed = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.parts = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.late = nn.Linear(4, 4)

        def forward(self, x: Tensor, late: Tensor) -> Tensor:
            h = self.used(x) @ self.borrowed.weight
            return self.late(h) if late else h

    batches = [(X, torch.tensor(flag)) for flag in (False, True)]
    for transform in ("fused", "vjp"):
        record = analyze(Model(), batches, mean_square, steps=2, transform=transform)
        assert record.never_called == ("forgotten", "parts.0"), transform
    record = analyze(Model(), batches[:1], mean_square, steps=1)
    assert record.never_called == ("forgotten", "parts.0", "late")
    assert record.passed_by == ("late",)


def test_the_gradient_through_parameters_taken_beforehand_is_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    taken = list(model.parameters())

    def held(y: Tensor) -> Tensor:
        return mean_square(y) + sum(p.square().sum() for p in taken)

    def asked(y: Tensor) -> Tensor:
        return mean_square(y) + sum(p.square().sum() for p in model.parameters())

    clean = analyze(model, [X] * 2, asked, steps=2)
    for detail in ("cheap", "full"):
        record = analyze(model, [X] * 2, held, steps=2, detail=detail)
        for p, q in zip(record.parameters, clean.parameters, strict=True):
            np.testing.assert_allclose(p.grad_norm, q.grad_norm, rtol=1e-6, err_msg=p.name)
    stepped = analyze(model, [X] * 2, held, steps=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert [n for n in stepped.provenance.notes if "'0.weight'" in n and "stays as it is" in n]
    with pytest.raises(ModelInputError, match=r"is used past .* beforehand.*transform='fused'"):
        analyze(model, [X], held, transform="vjp")
    assert all(p.grad is None for p in taken)
