"""Warm-ups from a rate of zero: that may yet be advanced, that are, and that nobody is left to raise."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import gradflow as gf

from .test_rates import U, net, report


class OfOnesOwn:
    """No scheduler of PyTorch, and its optimizer is in a list."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizers = [optimizer]
        for group in optimizer.param_groups:
            group["initial_lr"], group["lr"] = group["lr"], 0.0

    def step(self) -> None:
        raise NotImplementedError


WARM_UPS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda adam: lr_scheduler.LambdaLR(adam, lambda step: step / 1000),
    "linear": lambda adam: lr_scheduler.SequentialLR(
        adam,
        [lr_scheduler.LambdaLR(adam, lambda step: step / 10), lr_scheduler.CosineAnnealingLR(adam, 100)],
        [10],
    ),
    "cyclic": lambda adam: lr_scheduler.CyclicLR(adam, 0.0, 1e-3, cycle_momentum=False),
    "own": OfOnesOwn,
}


@pytest.mark.parametrize("kind", WARM_UPS)
@pytest.mark.parametrize("kept", [True, False])
def test_a_warm_up_from_zero_that_is_not_advanced(kind: str, kept: bool) -> None:
    """Whoever keeps the scheduler may advance it with every step; one that nobody keeps stays where it is."""
    model = net()
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = WARM_UPS[kind](adam)
    if not kept:
        del schedule
        gc.collect()
    (issue,) = report(adam, model).issues
    assert issue.issue_type is U
    assert issue.severity is (gf.IssueSeverity.LOW if kept else gf.IssueSeverity.HIGH)


@pytest.mark.parametrize("given", [True, False])
def test_a_warm_up_from_zero_that_is_advanced(given: bool) -> None:
    model = net()
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = lr_scheduler.LambdaLR(adam, lambda step: min(1.0, step / 10))
    if not given:
        adam.register_step_post_hook(lambda *_: scheduler.step())
    options: dict[str, Any] = {"scheduler": scheduler} if given else {}
    assert report(adam, model, **options).ok
