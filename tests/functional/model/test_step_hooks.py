"""Hooks on an optimizer's step: which of them run, on copies of what they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.functional import analyze
from tests.functional.model.optimizers import batches, make_net
from tests.functional.model.test_optimizers import check, train
from tests.models import squares


def _hooks(optimizer: Optimizer) -> list[int]:
    """Warm the rate up and clip the gradients, by hooks that share a counter."""
    done, number = [0], 0

    def before(opt: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal number
        number += 1
        for group in opt.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-0.01 * number, 0.01 * number)

    def after(opt: Optimizer, args: Any, kwargs: Any) -> None:
        done[0] += 1
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(done[0] / 3, 1.0) + 0 * number

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return done


def test_hooks_on_a_step_that_set_numbers_run_on_copies_of_them() -> None:
    model, twin = make_net(), make_net()
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=0.0) for m in (model, twin))
    done, _ = _hooks(optimizer), _hooks(other)
    torch.manual_seed(11)
    record = analyze(model, batches(), squares, optimizer=optimizer)
    assert done == [0]
    assert optimizer.param_groups[0]["lr"] == 0
    assert not [note for note in record.provenance.notes if "hooks" in note]
    check(record, *train(twin, other, batches()))


def test_the_hooks_of_an_optimizer_run_all_or_none() -> None:
    model, seen = make_net(), list[nn.Module]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    done = _hooks(optimizer)
    optimizer.register_step_post_hook(lambda *_: seen.append(model))
    record = analyze(model, batches(), squares, optimizer=optimizer)
    assert done == [0]
    assert not seen
    assert [note for note in record.provenance.notes if "step hooks of the Adam are not run" in note]
    assert record.updates is not None
    assert record.updates.scheduled
    assert set(record.updates.rates[:-1]) == {0.0}


def _warmed(optimizer: Optimizer) -> list[Any]:
    """Step schedulers from a hook, one of them within another, as a training that keeps them there does."""
    up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    down = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rule = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [2])
    optimizer.register_step_post_hook(lambda *_: rule.step())
    return [up, down, rule]


def test_hooks_that_step_schedulers_run_on_copies_of_them() -> None:
    model, twin = make_net(), make_net()
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=0.02) for m in (model, twin))
    rules, _ = _warmed(optimizer), _warmed(other)
    before, rate = [rule.last_epoch for rule in rules], optimizer.param_groups[0]["lr"]
    torch.manual_seed(11)
    record = analyze(model, batches(), squares, optimizer=optimizer)
    assert [rule.last_epoch for rule in rules] == before
    assert optimizer.param_groups[0]["lr"] == rate
    assert not [note for note in record.provenance.notes if "hooks" in note]
    check(record, *train(twin, other, batches()))


def test_hooks_that_step_what_is_no_scheduler_of_that_optimizer_do_not_run() -> None:
    class Own(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float | Tensor]:
            return [0.1]

    model = make_net()
    optimizer, other = (torch.optim.Adam(model.parameters(), lr=0.02) for _ in range(2))
    seen = list[nn.Module]()
    for rule in (
        Own(optimizer),
        torch.optim.lr_scheduler.StepLR(other, 1),
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(len(seen) or not seen.append(model))),
    ):
        handle = optimizer.register_step_post_hook(lambda *_, rule=rule: rule.step())
        before = rule.last_epoch
        record = analyze(model, batches(), squares, optimizer=optimizer)
        assert rule.last_epoch == before
        assert [note for note in record.provenance.notes if "step hooks of the Adam are not run" in note]
        handle.remove()
