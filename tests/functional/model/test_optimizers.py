"""With an optimizer the record covers the first steps of real training, and the real thing is untouched."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.errors import OptimizerMismatchError
from gradflow.functional import analyze
from gradflow.records import FlowRecord
from tests.functional.model.optimizers import (
    OPTIMIZERS,
    STEPS,
    Bare,
    Perturbing,
    Sharpness,
    batches,
    groups,
    make_net,
)
from tests.functional.snapshots import difference, snapshot
from tests.models import ANSWERS, CASES, GUESSES, Loop, squares


def train(
    model: nn.Module, optimizer: Any, data: list[Any], start: int = 0
) -> tuple[list[float], list[list[float]]]:
    """Train for real; return the losses, and the parameters' norms before each step."""
    losses, norms = [], []
    torch.manual_seed(11)
    for batch in data[start:]:
        norms.append([float(p.detach().double().norm()) for p in model.parameters()])
        optimizer.zero_grad()
        loss = squares(model(*batch) if isinstance(batch, tuple) else model(batch))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses, norms


def check(record: FlowRecord, losses: list[float], norms: list[list[float]]) -> None:
    np.testing.assert_allclose(record.losses, losses, rtol=1e-6)
    found = np.array([p.norm for p in record.parameters]).T
    np.testing.assert_allclose(found, norms, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_the_record_covers_real_training_step_by_step(name: str, transform: Any) -> None:
    model = make_net()
    optimizer = OPTIMIZERS[name](model)
    before = snapshot(model, optimizer if isinstance(optimizer, Optimizer) else optimizer.inner)
    record = analyze(
        model, batches(), squares, steps=STEPS, optimizer=optimizer, seed=11, transform=transform
    )
    after = snapshot(model, optimizer if isinstance(optimizer, Optimizer) else optimizer.inner)
    assert difference(before, after) == ""
    losses, norms = train(model, optimizer, batches())
    assert abs(losses[-1] - losses[0]) > 0.01  # so that an optimizer that does nothing would be seen
    check(record, losses, norms)
    assert record.provenance.optimizer == type(optimizer).__name__


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "groups", "wrapping"])
def test_the_optimizers_state_is_taken_over(name: str) -> None:
    model = make_net()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, batches()[:3])
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    record = analyze(model, batches()[3:], squares, steps=3, optimizer=optimizer, seed=11)
    assert difference(before, snapshot(model, optimizer)) == ""
    losses, norms = train(model, optimizer, batches(), start=3)
    check(record, losses, norms)
    fresh = make_net()
    fresh.load_state_dict(model.state_dict())
    assert not np.allclose(train(fresh, OPTIMIZERS[name](fresh), batches(), start=3)[0], losses, rtol=1e-4)


def test_the_cheap_way_without_one_leaves_the_parameters_where_they_are() -> None:
    model = make_net().eval()
    record = analyze(model, [batches()[0]] * 4, squares, steps=4, mode="eval")
    assert (record.losses == record.losses[0]).all()
    for parameter, (_, p) in zip(record.parameters, model.named_parameters(), strict=True):
        np.testing.assert_allclose(parameter.norm, [float(p.detach().double().norm())] * 4, rtol=1e-6)
        assert parameter.optimized


@pytest.mark.parametrize("kind", ["step", "cosine", "lambda"])
def test_a_scheduler_on_the_optimizer_does_not_step_and_is_not_stepped(kind: str) -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scheduler: Any = {
        "step": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.7**epoch),
    }[kind]()
    train(model, optimizer, batches()[:1])
    optimizer.zero_grad()
    scheduler.step()
    rate, state = optimizer.param_groups[0]["lr"], copy.deepcopy(scheduler.state_dict())
    before = snapshot(model, optimizer)
    record = analyze(model, batches()[1:], squares, steps=5, optimizer=optimizer, seed=11)
    assert difference(before, snapshot(model, optimizer)) == ""
    assert scheduler.state_dict() == state
    assert record.provenance.learning_rates == (rate,)
    losses, norms = train(model, optimizer, batches(), start=1)  # at the rate of this moment
    check(record, losses, norms)
    scheduler.step()  # still joined to the optimizer
    assert optimizer.param_groups[0]["lr"] != rate


def test_copying_an_optimizer_leaves_its_class_alone() -> None:
    model = make_net()
    optimizer = Bare(torch.optim.SGD(model.parameters(), lr=0.1))
    before = [dict(vars(kind)) for kind in (Bare, torch.optim.SGD, Optimizer)]
    analyze(model, batches(), squares, steps=2, optimizer=optimizer)
    assert [dict(vars(kind)) for kind in (Bare, torch.optim.SGD, Optimizer)] == before
    optimizer.step()


def test_an_error_of_the_optimizers_step_says_so() -> None:
    class Second(Optimizer):
        """Needs gradients that can be differentiated again."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                torch.autograd.grad(p.grad.sum(), p)

    model = make_net()
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        analyze(model, batches(), squares, steps=2, optimizer=Second(model.parameters(), {}))
    assert "gradflow: raised by the step of a copy of the Second." in caught.value.__notes__


@pytest.mark.parametrize("name", ["lbfgs", "sharpness", "perturbing", "perturbing by data"])
def test_optimizers_that_evaluate_the_loss_again(name: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))
    batch, evaluations = torch.randn(5, 6), 0
    optimizer: Any
    if name == "lbfgs":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    elif name.startswith("perturbing"):
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = Perturbing(model.parameters(), base, by_data=name.endswith("data"))
    else:
        optimizer = Sharpness(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

    def loss_fn(output: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return squares(output)

    before = snapshot(model, optimizer)
    record = analyze(model, [batch] * 4, loss_fn, steps=4, optimizer=optimizer, seed=11)
    assert difference(before, snapshot(model, optimizer)) == ""
    measured, evaluations = evaluations, 0
    losses: list[float] = []
    firsts: list[bool] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(batch))
        loss.backward()
        if not firsts:  # the first evaluation of a step is the one that is measured
            losses.append(loss.item())
        firsts.append(True)
        return loss

    torch.manual_seed(11)  # so that the same elements drop out, as long as evaluations are as many
    for _ in range(3):
        firsts.clear()
        if name.startswith("perturbing"):
            closure()
        optimizer.step(closure)
    losses.append(float(loss_fn(model(batch)).detach()))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(record.losses, losses, rtol=1e-5)
    assert evaluations > 4
    assert 0 <= measured - GUESSES - evaluations <= ANSWERS


def test_a_parameter_that_no_gradient_reaches_in_a_step_is_not_stepped_then() -> None:
    torch.manual_seed(0)
    model = Loop()
    x = torch.randn(5, 4)
    data = [(x, torch.tensor(n)) for n in (2, 0, 1, 0, 3, 1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for transform in ("fused", "vjp"):
        record = analyze(model, data, squares, steps=STEPS, optimizer=optimizer, transform=transform)
        copied = copy.deepcopy(model)
        losses, norms = train(copied, torch.optim.AdamW(copied.parameters(), lr=0.05, weight_decay=0.5), data)
        if transform == "fused":
            check(record, losses, norms)
            weight = record.parameter("cell.weight")
            assert weight.reached.tolist() == [True, False, True, False, True, True]
            assert weight.norm[1] == weight.norm[2]
        else:  # torch.func gives zeros for what it has not met, so decay goes on
            np.testing.assert_allclose(record.losses[:2], losses[:2], rtol=1e-6)


def test_sparse_gradients_are_stepped() -> None:
    model, batch = CASES["sparse"].build(), CASES["sparse"].batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    record = analyze(model, [batch] * 4, squares, steps=4, optimizer=optimizer)
    losses, norms = train(model, optimizer, [batch] * 4)
    assert losses[-1] < losses[0]
    check(record, losses, norms)


def test_a_rollout_in_the_source_acts_with_the_parameters_of_its_step() -> None:
    seen: list[Tensor] = []

    def roll_out(policy: nn.Linear) -> tuple[Tensor, Tensor]:
        state = torch.ones(3, 2)
        with torch.no_grad():
            action = policy(state)  # of the policy as it is now
        seen.append(policy.weight.detach().clone())
        return torch.cat([state, state * 2]), torch.cat([action, action])

    def loss(output: Tensor, action: Tensor) -> Tensor:
        return (output - action - 1.0).square().mean()

    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    record = analyze(model, lambda: roll_out(model), loss, steps=4, optimizer=optimizer)
    measured, seen = seen, []
    losses = []
    for _ in range(4):
        x, y = roll_out(model)
        optimizer.zero_grad()
        value = loss(model(x), y)
        losses.append(float(value.detach()))
        value.backward()
        optimizer.step()
    np.testing.assert_allclose(record.losses, losses, rtol=1e-6)
    assert not torch.equal(measured[0], measured[3])
    for ours, theirs in zip(measured, seen, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_update_with_a_gradient_that_is_not_finite_is_skipped_and_noted() -> None:
    model = make_net()
    data = batches()
    data[2] = data[2] * float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = analyze(model, data, squares, steps=STEPS, optimizer=optimizer)
    assert np.isfinite(record.losses).tolist() == [True, True, False, True, True, True]
    assert any(note.startswith("1 updates with a non-finite") for note in record.provenance.notes)
    norms = record.parameter("out.weight").norm
    assert norms[2] == norms[3] != norms[4]


def test_parameters_that_it_does_not_step_are_told() -> None:
    model = make_net()
    record = analyze(model, batches(), squares, optimizer=torch.optim.SGD(model.out.parameters(), lr=0.1))
    assert [p.name for p in record.parameters if p.optimized] == ["out.weight", "out.bias"]
    assert record.provenance.learning_rates == (0.1,)
    rates = analyze(model, batches(), squares, optimizer=torch.optim.SGD(groups(model), lr=1.0)).provenance
    assert rates.learning_rates == (0.05, 0.5)


def test_foreign_parameters_in_a_group_are_copied_as_well() -> None:
    model, temperature = make_net(), nn.Parameter(torch.tensor(2.0))
    temperature.grad = torch.tensor(1.0)
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    analyze(model, batches(), squares, optimizer=optimizer)
    assert float(temperature.detach()) == 2.0
    assert float(temperature.grad) == 1.0


def test_the_parameters_of_a_loss_module_are_stepped_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(0.0))

        def forward(self, y: Tensor) -> Tensor:
            return squares(y) * self.log_scale.exp() - self.log_scale

    model, loss = nn.Linear(4, 2), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.2)
    modules = nn.ModuleList([model, loss])
    before = snapshot(modules, optimizer)
    record = analyze(model, batches(), loss, steps=STEPS, optimizer=optimizer)
    assert difference(before, snapshot(modules, optimizer)) == ""
    losses = []
    for x in batches():
        optimizer.zero_grad()
        value = loss(model(x))
        losses.append(float(value.detach()))
        value.backward()
        optimizer.step()
    assert float(loss.log_scale.detach()) != 0.0
    np.testing.assert_allclose(record.losses, losses, rtol=1e-6)


# ---------------------------------------------------------------------------------------- errors


def test_an_optimizer_of_another_model() -> None:
    model = make_net()
    other = torch.optim.Adam(copy.deepcopy(model).parameters())
    with pytest.raises(
        OptimizerMismatchError, match=r"none of the optimizer's 9 parameters .* deep copy.*Adam\("
    ):
        analyze(model, batches(), squares, optimizer=other)


@pytest.mark.parametrize("thing", [1e-3, "adam", torch.optim.Adam])
def test_what_is_no_optimizer(thing: Any) -> None:
    with pytest.raises(
        OptimizerMismatchError, match=rf"optimizer is a {type(thing).__name__}, not a torch\.optim"
    ):
        analyze(make_net(), batches(), squares, optimizer=thing)
