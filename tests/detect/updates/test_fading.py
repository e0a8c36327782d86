"""Learning rates that come to nothing while the run goes on, and schedules that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import gradflow
from gradflow.records import Issue, IssueType

STEPS = 24


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))


def told(
    optimizer: Callable[[nn.Sequential], Any], scheduler: Callable[[Any], Any] | None = None
) -> list[Issue]:
    model, generator = net(), torch.Generator().manual_seed(1)
    mix, target = torch.randn(12, 1, generator=generator), [torch.empty(0)]

    def batch() -> torch.Tensor:
        x = torch.randn(32, 12, generator=generator)
        target[0] = (x @ mix).sin()
        return x

    adam = optimizer(model)
    report = gradflow.diagnose(
        model,
        batch,
        lambda out: F.mse_loss(out, target[0]),
        steps=STEPS,
        optimizer=adam,
        scheduler=None if scheduler is None else scheduler(adam),
    )
    return [i for i in report.issues if i.issue_type is IssueType.UNSTABLE and "rate" in i.description]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-3)


class Again(torch.optim.Adam):
    """Adam that multiplies the rate of every group by its factor before each step."""

    def __init__(self, groups: Any, factor: Callable[[int, dict[str, Any]], float]) -> None:
        super().__init__(groups, 1e-3)
        self.factor, self.taken = factor, 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = group["lr"] * self.factor(self.taken, group)
        self.taken += 1
        return super().step(closure)


def layers(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": list(model[i].parameters()), "scale": scale} for i, scale in ((0, 0.4), (2, 0.6), (4, 1.0))
    ]


def test_the_factor_of_a_layer_is_applied_at_every_step() -> None:
    (issue,) = told(lambda model: Again(layers(model), lambda _, group: group["scale"]))
    assert issue.layer == "0"
    assert issue.severity.value == "HIGH"
    assert issue.metrics["groups"] == 2
    assert issue.metrics["factor"] == pytest.approx(0.4)
    assert "2 of the 3 parameter groups" in issue.description
    assert issue.metrics["elements"] == 12 * 24 + 24 + 24 * 24 + 24


def test_the_factor_of_a_warm_up_is_multiplied_on() -> None:
    (issue,) = told(lambda model: Again(model.parameters(), lambda t, _: min((t + 1) / 100, 1.0)))
    assert issue.metrics["last_rate"] < 1e-20


def test_a_schedule_of_epochs_is_stepped_with_every_batch() -> None:
    (issue,) = told(adam, lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    assert "the parameter groups" not in issue.description
    assert issue.metrics["factor"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS - 1),
        lambda o: lr_scheduler.LinearLR(o, 1.0, 1e-4, STEPS - 1),
        lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
        lambda o: lr_scheduler.OneCycleLR(o, 3e-3, total_steps=STEPS),
        lambda o: lr_scheduler.ExponentialLR(o, 0.01 ** (1 / STEPS)),
        lambda o: lr_scheduler.MultiStepLR(o, [STEPS // 4, STEPS // 3]),
        lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 10)),
        lambda o: lr_scheduler.LambdaLR(o, lambda t: (1 + t) ** -0.5),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 6),
    ],
    ids=["cosine", "line", "square", "cycle", "exponential", "steps", "warm-up", "root", "restarts"],
)
def test_schedules(scheduler: Callable[[Any], Any]) -> None:
    assert not told(adam, scheduler)


def test_a_group_that_is_frozen() -> None:
    def frozen(t: int, group: dict[str, Any]) -> float:
        return 0.0 if group["scale"] < 0.5 and t >= 5 else 1.0

    assert not told(lambda model: Again(layers(model), frozen))


def test_factors_that_are_set_once() -> None:
    assert not told(lambda model: Again(layers(model), lambda t, group: group["scale"] if t == 0 else 1.0))


def test_the_rates_of_all_groups() -> None:
    model = net()
    sgd = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[4].parameters()}], 0.2
    )
    record = gradflow.analyze(
        model, lambda: torch.ones(4, 12), lambda out: out.square().mean(), steps=3, optimizer=sgd,
        scheduler=lr_scheduler.ExponentialLR(sgd, 0.5),
    )  # fmt: skip
    assert record.updates is not None
    first, second = record.updates.group_rates
    assert first[:2] == pytest.approx((0.1, 0.05))
    assert second[:2] == pytest.approx((0.2, 0.1))
    assert record.updates.rates == pytest.approx(first, nan_ok=True)
    assert {u.name: u.group for u in record.updates.parameters if u.held} == {
        "0.weight": 0, "0.bias": 0, "4.weight": 1, "4.bias": 1,
    }  # fmt: skip
    assert record.updates["2.weight"].group == -1
    assert gradflow.FlowRecord.from_json(record.to_json()).updates == record.updates


def test_a_schedule_with_steps_is_stepped_with_every_batch() -> None:
    (issue,) = told(adam, lambda o: lr_scheduler.StepLR(o, 4))
    assert issue.metrics["factor"] == pytest.approx(0.1)
    assert "5 times by a factor of 0.1, so" in issue.description
    assert "step it once an epoch" in issue.recommended_actions[0]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: lr_scheduler.StepLR(o, STEPS // 3),
        lambda o: lr_scheduler.StepLR(o, 4, 0.5),
        lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 6]),
        lambda o: lr_scheduler.CyclicLR(o, 1e-5, 1e-3, 4, cycle_momentum=False),
    ],
    ids=["two falls", "halves", "three early falls", "cycles"],
)
def test_schedules_with_steps(scheduler: Callable[[Any], Any]) -> None:
    assert not told(adam, scheduler)


def test_a_schedule_that_is_a_hook_of_the_optimizer() -> None:
    def hooked(model: nn.Sequential) -> torch.optim.Optimizer:
        optimizer, done = adam(model), [0]

        def after(opt: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            done[0] += 1
            if done[0] % 3 == 0:
                for group in opt.param_groups:
                    group["lr"] *= 0.1

        optimizer.register_step_post_hook(after)
        return optimizer

    (issue,) = told(hooked)
    assert issue.metrics["first_rate"] == pytest.approx(1e-3)
