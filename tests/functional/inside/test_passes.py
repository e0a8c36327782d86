"""What is a pass of the training, what is none, and what cannot be looked into."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.errors import ModelInputError, NoTrainableParametersError
from gradflow.functional.inside.look import InsideLook
from gradflow.functional.inside.passes import MOST
from gradflow.functional.measurement import Session
from gradflow.functional.model.threads import exclusive
from gradflow.functional.tap.calls import Call
from tests.functional.inside.looks import beside, check_layers, check_parameters, looked
from tests.functional.inside.loops import MODELS, Residual, batch


def test_what_was_heard_of_no_reverse_pass_has_failed() -> None:
    model, (x, y) = Residual(), batch()
    look = InsideLook.of(model)
    with look.listening() as passes:
        model(x)
    assert passes.failed.startswith("no reverse pass of the model was run")
    with InsideLook.of(model).listening() as passes, torch.no_grad():
        model(x)
    assert passes.failed.startswith("no reverse pass of the model was run")
    outside = F.cross_entropy(model(x), y)
    with InsideLook.of(model).listening() as passes:
        outside.backward()
    assert passes.failed.startswith("no reverse pass of the model was run")


def test_calls_without_grad_mode_and_of_other_threads_are_no_part_of_a_pass() -> None:
    model, (x, y) = MODELS["pictures"](), batch()
    look = InsideLook.of(model)
    with look.listening() as passes:
        with torch.no_grad():
            model(x)
        thread = threading.Thread(target=lambda: model(x).sum().backward())
        thread.start()
        thread.join()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            model(x)
    assert passes.failed == ""
    record = look.record()
    assert [layer.name for layer in record] == [f"net.{i}" for i in range(7)]
    assert record.steps == 1
    assert any("was called without grad mode as well" in note for note in record.provenance.notes)


def test_of_many_reverse_passes_the_first_are_measured() -> None:
    model, (x, y) = MODELS["pictures"](), batch()
    record, passes = looked(model, *[lambda p: F.cross_entropy(model(x), y)] * (MOST + 3))
    assert (record.steps, passes.left_out) == (MOST, 3)
    assert any(f"Only the first {MOST} reverse passes" in note for note in record.provenance.notes)


def test_several_tensors_and_cotangents_are_taken_for_their_sum() -> None:
    model, (x, _) = nn.Linear(8, 3), batch()
    look = InsideLook.of(model)
    with look.listening() as passes:
        out = model(x)
        torch.autograd.backward([out[:, 0], out[:, 1]], [torch.ones(16), 2 * torch.ones(16)])
    assert passes.failed == ""
    record = look.record()
    out = model(x)
    assert record.losses[0] == pytest.approx((out[:, 0].sum() + 2 * out[:, 1].sum()).item(), rel=1e-5)
    assert record[""].grad_norm[0] == pytest.approx(math.sqrt(16 * (1 + 4)))


def test_what_is_handed_on_has_the_gradient_of_the_tensor_that_it_is() -> None:
    model, (x, y) = Residual(), batch()
    record, _ = looked(model, lambda p: F.cross_entropy(model(x), y))
    assert record["skip"].grad_norm[0] == record["relu"].grad_norm[0] > 0
    free = nn.Sequential(nn.Identity(), nn.Linear(8, 3))
    record, _ = looked(free, lambda p: F.cross_entropy(free(x.clone().requires_grad_()), y))
    assert np.isnan(record["0"].grad_norm[0])
    assert any("at the output of '0': it is a parameter or an input" in n for n in record.provenance.notes)


def test_sparse_gradients_and_tied_weights_are_measured() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 7, bias=False)
            self.back = nn.Linear(4, 7, bias=False)
            self.back.weight = self.out.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.out(h) + self.back(h.tanh())

    model, words = Tied(), torch.randint(0, 7, (12,))
    other = beside(copy.deepcopy(model), (words, words))
    record, passes = looked(model, lambda p: F.cross_entropy(model(words), words))
    check_layers(record, other, set(), 1e-6)
    check_parameters(record, other, 1e-6)
    assert passes.left == pytest.approx(1.0)


def test_gradients_that_are_taken_away_as_they_arrive_are_refused_in_a_sentence() -> None:
    model, (x, y) = nn.Linear(8, 3), batch()

    def take(parameter: Tensor) -> None:
        parameter.grad = None

    model.weight.register_post_accumulate_grad_hook(take)
    with InsideLook.of(model).listening() as passes:
        F.cross_entropy(model(x), y).backward()
    assert "a hook takes the gradients away as they arrive" in passes.failed


def test_compiled_models_and_transforms_are_refused_in_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    for compiled in (
        torch.compile(model, backend="eager"),
        nn.Sequential(torch.compile(model[0], backend="eager")),
    ):
        with pytest.raises(ModelInputError, match="is compiled: its inside cannot be listened to"):
            InsideLook.of(compiled)
    model[0].compile(backend="eager")
    with pytest.raises(ModelInputError, match="'0' is compiled"):
        InsideLook.of(model)

    residual = Residual()

    def transformed(x: Tensor) -> Tensor:
        InsideLook.of(residual)
        return x.sum()

    with pytest.raises(ModelInputError, match=r"in a transform of torch.func"):
        torch.func.grad(transformed)(torch.ones(2))
    with pytest.raises(ModelInputError, match="has not seen a batch yet"):
        InsideLook.of(nn.LazyLinear(3))


def test_a_step_in_a_transform_is_left_alone() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), batch()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    plain = torch.func.grad(loss)(weights)
    with InsideLook.of(model).listening() as passes:
        found = torch.func.grad(loss)(weights)
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert passes.failed.startswith("no reverse pass of the model was run")


def test_a_look_waits_for_no_other_thread_that_measures() -> None:
    model, (x, y) = nn.Linear(8, 3), batch()
    there, done = threading.Event(), threading.Event()

    def measure() -> None:
        with exclusive():
            there.set()
            done.wait(30)

    thread = threading.Thread(target=measure)
    thread.start()
    there.wait(30)
    with InsideLook.of(model).listening() as passes:
        F.cross_entropy(model(x), y).backward()
    done.set()
    thread.join()
    assert passes.failed == "another thread is measuring at this moment"
    assert model.weight.grad is not None


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(NoTrainableParametersError, match="requires a gradient, so there is no flow"):
        InsideLook.of(nn.Linear(8, 3).requires_grad_(False))


class Counting(Session):
    """Counts the calls that it hears of."""

    def __init__(self) -> None:
        self.calls = 0

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        return self

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.calls += 1

    def fields(self) -> Mapping[str, Any]:
        return {"calls": float(self.calls)}


class Differentiating(Counting):
    """Needs gradients of its own."""

    def differentiate(self, loss: Tensor) -> None:
        raise AssertionError("nothing is differentiated inside")

    def fields(self) -> Mapping[str, Any]:
        return {"gradients": 1.0}


def test_measurements_that_only_hear_are_taken() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), batch()
    look = InsideLook.of(model, (Counting(), Differentiating()))
    with look.listening() as passes:
        F.cross_entropy(model(x), y).backward()
    assert passes.failed == ""
    assert dict(look.record().extras) == {"calls": 4.0}


def test_a_hidden_state_that_is_kept_with_its_graph_is_no_part_of_the_next_pass() -> None:
    cell, head = nn.GRUCell(8, 8), nn.Linear(8, 3)
    model, (x, y) = nn.ModuleList([cell, head]), batch()
    hidden = torch.zeros(16, 8)
    look = InsideLook.of(model)
    for _ in range(2):
        with look.listening() as passes:
            hidden = cell(x, hidden)
            F.cross_entropy(head(hidden.relu()), y).backward(retain_graph=True)
        assert passes.failed == ""
    record = look.record()
    assert record.steps == 2
    assert [layer.name for layer in record] == ["0", "1"]
    assert [used.layer for used in record.activations] == ["0"]
