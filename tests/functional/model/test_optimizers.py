"""With an optimizer the record covers the first steps of real training, and the real thing is untouched."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.errors import OptimizerMismatchError
from gradflow.functional import analyze
from gradflow.records import FlowRecord
from tests.functional.snapshots import difference, snapshot
from tests.models import CASES, Loop, squares

STEPS = 6


class Net(nn.Module):
    """Batch norm, dropout, a tied weight, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.b, self.out, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(self.drop(self.bn(self.a(x))))))


def make_net() -> Net:
    torch.manual_seed(1)
    return Net()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(8, 4, generator=generator) for _ in range(STEPS)]


class Lookahead(Optimizer):
    """An optimizer that wraps another: every second step the weights go half way back to a slow copy."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)  # which shares the groups
        self.base, self.count = base, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.count += 1
        if self.count % 2 == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    s.lerp_(p, 0.5)
                    p.copy_(s)


class Wrapper:
    """A wrapper that is no `Optimizer` itself, as mixed-precision libraries have."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        self.inner.step()


class Sharpness(Optimizer):
    """Takes the gradient at a point that is worse (SAM): it needs a closure, and evaluates the loss twice."""

    def __init__(self, parameters: Any, base: type[Optimizer], **options: Any) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = base(self.param_groups, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        moves = [p.grad * (0.05 / norm) for p in held]
        for p, move in zip(held, moves, strict=True):
            p.add_(move)
        with torch.enable_grad():
            closure()
        for p, move in zip(held, moves, strict=True):
            p.sub_(move)
        self.base.step()


class Bare(Optimizer):
    """A wrapper that never calls `Optimizer.__init__` and borrows the attributes of the one inside."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, base.state, {}

    def zero_grad(self, set_to_none: bool = True) -> None:  # that of `Optimizer` changes the class
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()


class Perturbing(Optimizer):
    """SAM as it is published: the closure is an option, and is called where the weights have been moved."""

    def __init__(self, parameters: Any, base: Optimizer, *, by_data: bool) -> None:
        super().__init__(parameters, {})
        self.base, self.by_data, self.moves = base, by_data, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None
        closure = torch.enable_grad()(closure)
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for sign in (1.0, -1.0):
            for p in held:
                self.moves.setdefault(p, 0.05 * p.grad)
                (p.data if self.by_data else p).add_(self.moves[p], alpha=sign)
            if sign > 0:
                self.zero_grad()
                closure()
        self.moves.clear()
        self.base.step()


class Quantised(Optimizer):
    """Keeps its momentum in integers and its scales in a list, beside what cannot be copied."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.lock, self.generator = threading.Lock(), torch.Generator().manual_seed(1)
        self.rounded = torch.round  # a function
        self.scales = [torch.full((), 0.01)] * 2
        self.noted: Any = None
        self.slotted = Slotted(self.param_groups)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        with self.lock:
            for p in self.slotted.groups[0]["params"]:
                if p.grad is not None:
                    kept = self.state[p].setdefault("momentum", torch.zeros(p.shape, dtype=torch.int8))
                    noise = torch.rand(p.shape, generator=self.generator) - 0.5
                    wanted = kept * self.scales[0] * 0.9 + p.grad
                    kept.copy_(self.rounded(wanted / self.scales[0] + noise).clamp(-127, 127))
                    p.sub_(kept * self.scales[1], alpha=0.05)


class Slotted:
    """Refers to the groups of an optimizer from a slot."""

    __slots__ = ("groups",)

    def __init__(self, groups: Any) -> None:
        self.groups = groups


class Averaging(Optimizer):
    """Holds the model, which keeps what it computes, and draws its weights towards their average."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})
        self.model, self.names = model, dict(model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.kept = model.out(torch.ones(1, 4))  # with a graph, so it has no deep copy
        self.then = self.shrink

    def shrink(self) -> None:
        for name, p in self.model.named_parameters():
            self.average[name].lerp_(p, 0.5)
            self.names[name].lerp_(self.average[name], 0.5)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)
        self.then()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    return [{"params": others, "lr": 0.05}, {"params": biases, "lr": 0.5, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.05),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.05, amsgrad=True, foreach=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.3),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True),
    "maximizing": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True),
    "tensor rate": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.05), capturable=False),
    "groups": lambda m: torch.optim.AdamW(groups(m), weight_decay=0.2),
    "some": lambda m: torch.optim.SGD(m.out.parameters(), lr=0.1),
    "wrapping": lambda m: Lookahead(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)),
    "foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, fused=True),
    "muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.05),
    "bare": lambda m: Bare(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)),
    "bare twice": lambda m: Bare(Bare(torch.optim.Adam(m.parameters(), lr=0.05))),
    "quantised": lambda m: Quantised(m.parameters()),
    "averaging": Averaging,
    "wrapped": lambda m: Wrapper(torch.optim.Adam(m.parameters(), lr=0.05)),
}


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
    assert measured == evaluations > 4


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
