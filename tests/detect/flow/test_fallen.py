"""DEAD: units of rectifiers that fired at first, and that the steps have driven below zero for good."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.detect import dead, detect
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType
from tests.detect.builders import STEPS, Layer, activation, flow_record


def gone(share: float, *, optimizer: str = "SGD", fired: float = 0.5, **fields: float) -> FlowRecord:
    fields = {"num_units": 64, **fields}
    shares = np.linspace(fired, fired / 5, STEPS)
    relu = activation("fc:relu", "fc", "relu", "rectifier", fell_silent=share, fired_share=shares, **fields)
    specs = Layer(name="fc", op="relu"), Layer(name="head")
    return flow_record(*specs, activations=[relu], optimizer=optimizer)


def seen(record: FlowRecord) -> dict[str, Issue]:
    return {issue.layer: issue for issue in detect(record, dead())}


@pytest.mark.parametrize(
    ("share", "severity"),
    [(0.95, IssueSeverity.HIGH), (0.8, IssueSeverity.MEDIUM), (0.7, None), (0.3, None), (math.nan, None)],
)
def test_severity_goes_by_the_share_that_fires_no_more(share: float, severity: IssueSeverity | None) -> None:
    found = seen(gone(share))
    assert (found["fc"].severity if found else None) is severity


def test_what_it_says() -> None:
    issue = seen(gone(0.8))["fc"]
    assert (
        "80% of the 64 units of its relu have fired, and do in none of the last batches" in issue.description
    )
    assert issue.recommended_actions[0].startswith("If it died in training: a learning rate below")
    assert issue.evidence.developed


def test_of_few_units_chance_may_switch_off_more() -> None:
    assert not seen(gone(0.8, num_units=16))
    assert seen(gone(0.8, num_units=256))


def test_without_an_optimizer_nothing_has_driven_them() -> None:
    assert not seen(gone(0.8, optimizer=""))


def test_units_that_fire_seldom_from_the_start_are_silent_by_chance() -> None:
    assert not seen(gone(0.8, fired=0.01))


def test_every_call_of_a_module_must_be_silent() -> None:
    record = gone(0.8)
    (relu,) = record.activations
    again = attrs.evolve(relu, name="fc:relu@1", fell_silent=0.1)
    assert not seen(attrs.evolve(record, activations=(relu, again)))


# ------------------------------------------------------------------------------------ whole runs


class Coder(nn.Module):
    """An overcomplete code of rectified units."""

    def __init__(self, *, functional: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(32, 128), nn.Linear(128, 32)
        self.act = nn.Identity() if functional else nn.ReLU()
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        return self.decoder(F.relu(code) if self.functional else self.act(code))


def pictures() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)
    )


def run(
    model: nn.Module, rate: float, *, shape: tuple[int, ...] = (32,), offset: float = 1.0
) -> tuple[gf.Report, float]:
    """Return the report of a run of twenty steps, and the share that fell silent by a plain count."""
    steps, draw = 20, torch.Generator().manual_seed(2)
    middle = offset * torch.randn(shape, generator=draw)
    batches = [middle + torch.randn(48, *shape, generator=draw) for _ in range(steps)]
    kinds = [torch.randint(0, 4, (48,), generator=draw) for _ in range(steps)]
    at = itertools.count()

    def loss(output: Tensor) -> Tensor:
        step = next(at) % steps
        classes = output.shape[-1] == 4
        return F.cross_entropy(output, kinds[step]) if classes else F.mse_loss(output, batches[step])

    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    report = gf.diagnose(model, batches, loss, steps=steps, optimizer=optimizer)

    at, fired = itertools.count(), list[Tensor]()
    modules = [m for m in plain.modules() if isinstance(m, nn.ReLU)]
    for module in modules:
        module.register_forward_hook(lambda _, __, y: fired.append((y > 0).movedim(1, 0).flatten(1).any(1)))
    optimizer = torch.optim.Adam(plain.parameters(), rate)
    for x in batches:
        optimizer.zero_grad()
        loss(plain(x)).backward()
        optimizer.step()
    every = torch.stack(fired) if fired else torch.zeros(steps, 1, dtype=torch.bool)
    return report, float((every.any(0) & ~every[-(steps // 4) :].any(0)).double().mean())


@pytest.mark.parametrize("rate", [3e-3, 0.1])
def test_the_share_is_that_of_a_plain_count(rate: float) -> None:
    torch.manual_seed(1)
    report, counted = run(Coder(), rate)
    (relu,) = report.record.activations
    assert relu.fell_silent == counted
    assert (counted > 0.5) is (rate == 0.1)


def told(report: gf.Report) -> list[Issue]:
    return [i for i in report.issues if "fell_silent" in i.metrics and i.issue_type is IssueType.DEAD]


@pytest.mark.parametrize(
    ("make", "rate", "shape"),
    [
        (Coder, 0.1, (32,)),
        (lambda: Coder(functional=True), 0.1, (32,)),
        (lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)), 0.1, (32,)),
    ],
)
def test_steps_that_are_too_large_are_told(
    make: Callable[[], nn.Module], rate: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    report, _ = run(make(), rate, shape=shape)
    (issue,) = told(report)
    assert issue.severity.is_serious


@pytest.mark.parametrize(
    ("make", "rate", "shape"),
    [
        (Coder, 3e-3, (32,)),
        (Coder, 0.01, (32,)),
        (lambda: Coder(functional=True), 3e-3, (32,)),
        (pictures, 1e-2, (1, 8, 8)),
        (lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)), 1e-2, (32,)),
    ],
)
def test_usual_steps_leave_units_firing(
    make: Callable[[], nn.Module], rate: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    report, _ = run(make(), rate, shape=shape)
    assert not told(report)


def test_of_a_short_run_it_is_not_known() -> None:
    torch.manual_seed(0)
    model = Coder()
    record = gf.analyze(model, [torch.randn(8, 32)] * 3, lambda y: y.square().mean(), steps=3)
    assert math.isnan(record.activations[0].fell_silent)
