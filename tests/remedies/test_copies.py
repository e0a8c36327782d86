"""Copies that belong together, and the batches that are handed out again with what came with them."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradflow.remedies.trials.copies import copies_of
from gradflow.remedies.trials.replay import Recorder, replayed
from tests.remedies.models import dead_net, with_targets_kept

MODEL = nn.Linear(2, 2)
LATEST = torch.zeros(1)


def by_global(output: Tensor) -> Tensor:
    return (output - MODEL(LATEST.expand(1, 2))).sum()


def by_inner_function(output: Tensor) -> Tensor:
    return sum((lambda row: (row - MODEL(LATEST)).sum())(row) for row in output)  # type: ignore[return-value]


class Loss:
    """A loss that is an object, with the model and what cannot be copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.lock, self.held = model, threading.Lock(), [model, "more"]

    def __call__(self, output: Tensor) -> Tensor:
        return output.sum() + self.held[0].weight.sum() + 0 * self.model.bias.sum()  # type: ignore[union-attr, operator]


class WithModel(nn.Module):
    """A loss that is a module around the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, output: Tensor) -> Tensor:
        return output.sum() + self.inner.weight.sum()


class OwnLoss(nn.Linear):
    """A model with a loss of its own."""

    def loss(self, output: Tensor) -> Tensor:
        return output.sum() + self.weight.sum()


def _losses() -> dict[str, Any]:
    def closure(model: nn.Module) -> Any:
        deep = {"models": [model]}
        return lambda output: output.sum() + deep["models"][0].weight.sum()  # type: ignore[operator]

    def default(model: nn.Module) -> Any:
        def loss(output: Tensor, weight: Tensor = model.weight, *, bias: Tensor = model.bias) -> Tensor:  # type: ignore[assignment]
            return output.sum() + weight.sum() + bias.sum()

        return loss

    def recursive(model: nn.Module) -> Any:
        def loss(output: Tensor, depth: int = 2) -> Tensor:
            return loss(output, depth - 1) if depth else output.sum() + model.weight.sum()  # type: ignore[operator]

        return loss

    def partly(output: Tensor, model: nn.Module) -> Tensor:
        return output.sum() + model.weight.sum()  # type: ignore[operator]

    return {
        "closure": closure, "default": default, "recursive": recursive, "module": WithModel,
        "object": Loss,
        "partial": lambda model: functools.partial(partly, model=model),
        "method": lambda model: model.loss,
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(_losses()))
def test_a_loss_goes_with_its_model(kind: str) -> None:
    torch.manual_seed(0)
    model = OwnLoss(2, 2)
    loss = _losses()[kind](model)
    made = copies_of(model, loss, torch.optim.SGD(model.parameters(), 0.1))
    output = torch.zeros(1)
    before = loss(output).item()
    assert made.loss_fn(output).item() == before
    with torch.no_grad():
        made.model.weight.add_(1.0)  # type: ignore[operator]
    assert loss(output).item() == before
    assert made.loss_fn(output).item() == pytest.approx(before + 4.0)


@pytest.mark.parametrize("loss_fn", [by_global, by_inner_function])
def test_a_loss_that_names_the_model_as_a_global(loss_fn: Any) -> None:
    made = copies_of(MODEL, loss_fn, torch.optim.SGD(MODEL.parameters(), 0.1))
    assert made.loss_fn is not loss_fn
    assert made.loss_fn.__globals__["MODEL"] is made.model
    assert loss_fn.__globals__["MODEL"] is MODEL
    assert made.loss_fn.__globals__["LATEST"] is LATEST


def test_a_loss_that_knows_no_model_is_shared() -> None:
    loss = nn.MSELoss()
    assert copies_of(MODEL, loss, torch.optim.SGD(MODEL.parameters(), 0.1)).loss_fn is loss
    assert copies_of(MODEL, None, torch.optim.SGD(MODEL.parameters(), 0.1)).loss_fn is None


def test_functions_in_a_model_see_the_copy() -> None:
    model = nn.Linear(2, 2)
    model.scaled = lambda x: x * model.weight.sum()  # type: ignore[assignment]
    made = copies_of(model, None, torch.optim.SGD(model.parameters(), 0.1))
    with torch.no_grad():
        made.model.weight.fill_(1.0)  # type: ignore[operator]
    assert made.model.scaled(1.0).item() == 4.0  # type: ignore[operator]


def test_the_optimizer_steps_the_copies_with_its_state() -> None:
    net = dead_net()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    net(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    made = copies_of(net, None, optimizer)
    held = [p for group in made.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in made.model.parameters()}
    for ours, theirs in zip(made.model.parameters(), net.parameters(), strict=True):
        assert torch.equal(made.optimizer.state[ours]["exp_avg"], optimizer.state[theirs]["exp_avg"])
        assert made.optimizer.state[ours]["exp_avg"] is not optimizer.state[theirs]["exp_avg"]


# -------------------------------------------------------------------------------------- what is replayed


def test_targets_come_again_with_their_inputs() -> None:
    draw, loss, latest = with_targets_kept()
    recorder = Recorder(draw, loss, 0)
    pairs = [(recorder().clone(), latest["y"].clone()) for _ in range(4)]
    again = replayed(recorder.drawn, 0, {})
    for x, y in pairs + pairs:
        assert torch.equal(again(), x)
        assert torch.equal(latest["y"], y)
    shuffled = replayed(recorder.drawn, 1, {})
    seen = [(shuffled(), latest["y"].clone()) for _ in range(4)]
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(seen, pairs, strict=True))
    for x, y in seen:
        assert any(torch.equal(x, a) and torch.equal(y, b) for a, b in pairs)


def test_variables_attributes_and_tensors_in_place_come_again() -> None:
    class Held:
        target = torch.zeros(1)

    held, buffer, log, number = Held(), torch.zeros(1), [], 0.0

    def draw() -> Tensor:
        nonlocal number
        number += 1.0
        held.target = torch.full((1,), number)
        buffer.fill_(number)
        return torch.full((1,), number)

    def loss(output: Tensor) -> Tensor:
        log.append(number)
        return output * number + held.target + buffer

    recorder = Recorder(draw, loss, 0)
    told = [loss(recorder()).item() for _ in range(3)]
    again = replayed(recorder.drawn, 0, {})
    assert [loss(again()).item() for _ in range(3)] == told == [3.0, 8.0, 15.0]
    assert log == [1.0, 2.0, 3.0] * 2  # what no draw changes is let be
    again()
    recorder.close()
    assert (number, held.target.item(), buffer.item()) == (3.0, 3.0, 3.0)


def test_batches_that_end_come_again() -> None:
    recorder = Recorder([torch.zeros(1), torch.ones(1)], None, 0)
    assert [recorder().item() for _ in range(5)] == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert len(recorder.drawn) == 2


def test_random_states_depend_on_seed_and_step_alone() -> None:
    def states(draw: Any, spent: int) -> list[float]:
        found = []
        for _ in range(3):
            draw()
            found.append(torch.rand(1).item())
            torch.rand(spent)
        return found

    recorder = Recorder(lambda: torch.rand(2), None, 0)
    first = states(recorder, 1)
    assert states(replayed(recorder.drawn, 0, {}), 5) == first
    assert states(replayed(recorder.drawn, 1, {}), 1) != first
