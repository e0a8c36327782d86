"""Activation checkpoints, and tensors that are no parameters of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradflow.functional import analyze
from tests.functional.naive import naive_step
from tests.functional.reverse.models import X, assert_same, mean_square
from tests.models import squares


class Checkpointed(nn.Module):
    """Two segments; each calls one layer twice, with dropout and a batch norm between."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.shared, self.own = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop, self.out, self.reentrant = nn.Dropout(0.4), nn.Linear(4, 2), reentrant

    def segment(self, h: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.shared(h)))
        return self.shared(3 * torch.tanh(self.own(h)))

    def run(self, h: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.segment(h)
        return checkpoint(self.segment, h, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(torch.relu(self.run(self.inp(x)))))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_checkpoints_give_the_gradients_of_a_plain_backward_pass(reentrant: bool, detail: Any) -> None:
    batches = [X, 2 * X, X, -X]
    options: dict[str, Any] = {"steps": 4, "seed": 3, "detail": detail}
    plain = analyze(Checkpointed(None), batches, squares, **options)
    assert_same(analyze(Checkpointed(reentrant), batches, squares, **options), plain)
    model = Checkpointed(None)
    torch.manual_seed(3)
    naive = naive_step(model, X, squares)
    for layer in plain:
        np.testing.assert_allclose(layer.grad_norm[0], naive.output_norm(layer.name), rtol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_train_like_the_plain_model(reentrant: bool) -> None:
    records = []
    for kind in (None, reentrant):
        model = Checkpointed(kind)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        records.append(analyze(model, [X] * 5, squares, steps=5, seed=3, optimizer=optimizer))
        assert all(p.grad is None for p in model.parameters())
    assert records[0].losses[-1] != records[0].losses[0]
    assert_same(*records, rtol=1e-5)


def test_a_reentrant_checkpoint_in_full_detail_falls_back_and_says_so() -> None:
    record = analyze(Checkpointed(True), [X] * 2, squares, steps=2, detail="full")
    assert record.graph_record is not None
    assert record.graph_record.steps == ()
    (note,) = [n for n in record.provenance.notes if "could not be measured" in n]
    assert "reentrant activation checkpoint" in note
    assert "`use_reentrant=False`" in note
    deepened = analyze(Checkpointed(True), [X] * 2, squares, steps=2, deepen=lambda record: True)
    assert deepened.graph_record is not None
    assert deepened.graph_record.steps == ()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_modules_that_hold_others(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.reentrant = nn.Linear(4, 4), reentrant
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            h = self.a(x)
            if self.reentrant is None:
                return self.body(h) * scale
            return checkpoint(self.body, h, use_reentrant=self.reentrant) * scale

    batches = [(X, torch.tensor(s)) for s in (1.0, 1.0, 0.0, 1.0)]
    record, plain = (analyze(Model(kind), batches, mean_square, steps=4) for kind in (reentrant, None))
    assert_same(record, plain)
    assert record["body.1.1"].grad_zero.tolist() == [False, False, True, False]


def test_a_layer_that_ran_without_a_gradient_elsewhere_is_not_taken_for_a_checkpointed_call() -> None:
    class Model(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.reentrant = reentrant

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            y = self.b(h) if self.reentrant is None else checkpoint(self.b, h, use_reentrant=self.reentrant)
            with torch.no_grad():
                target = self.b(h)
            return y - target.sigmoid()

    record, plain = (analyze(Model(kind), [X], mean_square) for kind in (True, None))
    assert_same(record, plain)
    assert record["b"].reached.all()
    assert not record["b@1"].reached.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_parameter_that_is_no_parameter_of_the_model_keeps_its_grad(reentrant: bool) -> None:
    outside, graded = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    kept = graded.grad = torch.full((2,), 7.0)
    model = Checkpointed(reentrant)
    analyze(model, [X] * 2, lambda y: (y * outside * graded).square().mean(), steps=2)
    assert outside.grad is None
    assert graded.grad is kept
    assert kept.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_no_gradient_flows_into_tensors_of_the_users(transform: Any) -> None:
    outside = torch.ones(2, requires_grad=True)
    outside.grad = kept = torch.full((2,), 7.0)
    analyze(nn.Linear(4, 2), [X], lambda y: (y * outside).mean(), transform=transform)
    assert outside.grad is kept
    assert kept.tolist() == [7.0, 7.0]


def test_vjp_cannot_take_a_checkpoint_and_says_so_as_torch_does() -> None:
    for reentrant, message in (
        (True, "checkpoint|setup_context"),
        (False, "checkpoint|saved_tensors_hooks|torch.func"),
    ):
        with pytest.raises(RuntimeError, match=message):
            analyze(Checkpointed(reentrant), [X], squares, transform="vjp")
