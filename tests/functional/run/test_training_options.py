"""What real loops do between two batches: the record is that of a plain loop, and the user's objects stay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

import gradflow as gf
from gradflow.errors import ModelInputError, OptimizerMismatchError
from tests.functional.snapshots import content

STEPS = 12


class Net(nn.Module):
    """With dropout and batch norm, so that the order of passes and the random state count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(torch.tanh(self.norm(self.first(x))), 0.2, self.training))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(16, 6, generator=g) for _ in range(STEPS)]
    return [(x, 3 * x.sum(1, keepdim=True)) for x in xs]


def plain(model: nn.Module, step: Callable[[Tensor, int], None]) -> list[float]:
    """Train plainly, with `step(loss, index)` for what comes after the forward pass."""
    torch.manual_seed(5)
    losses = []
    for i, (x, y) in enumerate(batches()):
        loss = F.mse_loss(model(x), y)
        losses.append(float(loss.detach()))
        if i < STEPS - 1:
            step(loss, i)
    return losses


def analysed(model: nn.Module, **options: Any) -> gf.FlowRecord:
    return gf.analyze(model, batches(), nn.MSELoss(), steps=STEPS, seed=5, **options)


def test_accumulation_takes_the_mean_of_its_batches() -> None:
    model, twin = net(), net()
    adam = torch.optim.Adam(twin.parameters(), 0.02)

    def step(loss: Tensor, i: int) -> None:
        (loss / 3).backward()
        if i % 3 == 2:
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            adam.step()
            adam.zero_grad()

    losses = plain(twin, step)
    record = analysed(model, optimizer=torch.optim.Adam(model.parameters(), 0.02), accumulate=3, clip=1.0)
    assert record.losses.tolist() == pytest.approx(losses, rel=1e-4)
    assert record.updates is not None
    assert record.updates.num_updates == 3
    assert record.updates.steps == (2, 8)
    assert [math.isnan(rate) for rate in record.updates.rates] == [i not in (2, 5, 8) for i in range(STEPS)]
    assert "an update after 3 batches, with their mean gradient" in record.provenance.loop


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 8)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.CosineAnnealingLR(o, 20)], [3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_step_as_in_a_plain_loop(name: str) -> None:
    model, twin = net(), net()
    adam = torch.optim.Adam(twin.parameters(), 0.05)
    theirs, rates = SCHEDULERS[name](adam), []

    def step(loss: Tensor, i: int) -> None:
        adam.zero_grad()
        loss.backward()
        rates.append(adam.param_groups[0]["lr"])
        adam.step()
        theirs.step(loss.detach()) if name == "plateau" else theirs.step()

    losses = plain(twin, step)
    ours = torch.optim.Adam(model.parameters(), 0.05)
    scheduler = SCHEDULERS[name](ours)
    before = content(vars(scheduler)), content(ours.param_groups)
    record = analysed(model, optimizer=ours, scheduler=scheduler)
    assert (content(vars(scheduler)), content(ours.param_groups)) == before
    assert record.losses.tolist() == losses
    assert record.updates is not None
    assert record.updates.rates[:-1] == tuple(rates)
    assert len(set(rates)) > 1
    assert record.provenance.loop.endswith(
        "rates as the scheduler sets them (assumed without clip=, accumulate=)"
    )


@pytest.mark.parametrize("scale", [2.0**8, 2.0**126])
def test_a_scaler_scales_and_skips_as_in_a_plain_loop(scale: float) -> None:
    model, twin = net(), net()
    adam = torch.optim.Adam(twin.parameters(), 0.02)
    theirs, scales = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4), []

    def step(loss: Tensor, i: int) -> None:
        adam.zero_grad()
        theirs.scale(loss).backward()
        scales.append(theirs.get_scale())
        theirs.unscale_(adam)
        nn.utils.clip_grad_norm_(twin.parameters(), 2.0)
        theirs.step(adam)
        theirs.update()

    losses = plain(twin, step)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
    before = content(vars(scaler))
    record = analysed(model, optimizer=torch.optim.Adam(model.parameters(), 0.02), scaler=scaler, clip=2.0)
    assert content(vars(scaler)) == before
    assert record.losses.tolist() == losses
    assert record.updates is not None
    assert record.updates.loss_scale[:-1] == tuple(scales)
    assert (record.updates.num_skipped > 0) == (scale > 2.0**20)
    assert not record.numerics  # a scale that is too high is no illness
    unscaled = gf.analyze(net(), batches()[:1], nn.MSELoss(), seed=5)
    for ours, other in zip(record, unscaled, strict=True):
        assert ours.grad_norm[0] == pytest.approx(other.grad_norm[0], rel=1e-5)


def test_a_disabled_scaler_does_nothing() -> None:
    model = net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    record = analysed(model, optimizer=torch.optim.Adam(model.parameters(), 0.02), scaler=scaler)
    assert record.updates is not None
    assert all(math.isnan(scale) for scale in record.updates.loss_scale)


@pytest.mark.parametrize("kind", [dict, list])
def test_several_optimizers_step_on_the_same_loss(kind: type) -> None:
    model, twin = net(), net()
    sgd, adam = torch.optim.SGD(twin.first.parameters(), 0.05), torch.optim.Adam(twin.last.parameters(), 0.02)

    def step(loss: Tensor, i: int) -> None:
        twin.zero_grad()
        loss.backward()
        sgd.step()
        adam.step()

    losses = plain(twin, step)
    both = {
        "body": torch.optim.SGD(model.first.parameters(), 0.05),
        "head": torch.optim.Adam(model.last.parameters(), 0.02),
    }
    record = analysed(model, optimizer=both if kind is dict else list(both.values()))
    assert record.losses.tolist() == losses
    assert record.provenance.optimizer == "SGD, Adam"
    assert record.provenance.learning_rates == (0.05, 0.02)
    assert [p.optimized for p in record.parameters] == [True, True, False, False, True, True]


def test_a_step_of_ones_own_is_run_on_copies() -> None:
    """Clipping by value, noise on the gradient: what no option says."""

    def step_fn(model: nn.Module, batch: Any, optimizer: Any) -> None:
        x, y = batch
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        optimizer.step()

    model, twin = net(), net()
    theirs = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(5)
    losses = []
    for i, batch in enumerate(batches()):
        with torch.random.fork_rng():
            losses.append(float(F.mse_loss(copy.deepcopy(twin)(batch[0]), batch[1]).detach()))
        if i < STEPS - 1:
            step_fn(twin, batch, theirs)
    ours = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = content(vars(model)), content(ours.state), torch.get_rng_state()
    record = analysed(model, optimizer=ours, step_fn=step_fn)
    assert record.losses.tolist() == losses
    assert (content(vars(model)), content(ours.state)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert record.provenance.loop == "steps by step_fn, on copies; rates as they stand"


def test_a_step_of_ones_own_gets_optimizers_in_their_form_and_no_batch_under_custom() -> None:
    model, seen = net(), []
    both = {
        "a": torch.optim.SGD(model.first.parameters(), 0.1),
        "b": torch.optim.SGD(model.last.parameters(), 0.1),
    }

    def step_fn(model: nn.Module, step: Any, optimizer: Any) -> None:
        seen.append((step, sorted(optimizer), optimizer["a"] is both["a"]))

    data = batches()
    gf.analyze_custom(
        model,
        lambda m, step: F.mse_loss(m(data[step][0]), data[step][1]),
        steps=3,
        optimizer=both,
        step_fn=step_fn,
    )
    assert seen == [(0, ["a", "b"], False), (1, ["a", "b"], False)]


def test_what_a_step_of_ones_own_raises_tells_the_step() -> None:
    def step_fn(model: nn.Module, batch: Any, optimizer: Any) -> None:
        batch[0].add_(1.0)
        next(iter(model.parameters())).data.add_(1.0)
        raise ArithmeticError("no")

    model = net()
    adam = torch.optim.Adam(model.parameters())
    before = content(vars(model)), content(vars(adam))
    with pytest.raises(ArithmeticError, match="no") as caught:
        analysed(model, optimizer=adam, step_fn=step_fn)
    assert "raised by step_fn at step 0" in caught.value.__notes__[-1]
    assert (content(vars(model)), content(vars(adam))) == before


def test_a_batch_that_a_step_of_ones_own_writes_to_is_its_own() -> None:
    data = batches()
    before = [x.clone() for x, _ in data]

    def step_fn(model: nn.Module, batch: Any, optimizer: Any) -> None:
        batch[0].zero_()

    model = net()
    gf.analyze(model, data, nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), 0.1), step_fn=step_fn)
    assert all(torch.equal(x, was) for (x, _), was in zip(data, before, strict=True))


def test_a_training_that_clips_is_no_explosion() -> None:
    """Far targets, which clipping copes with: told as an illness where the loop is said not to clip."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 1, generator=g)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 8, generator=g)
        return x, 100 * (x @ weight)

    def report(**options: Any) -> gf.Report:
        sgd = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return gf.diagnose(model, draw, nn.MSELoss(), steps=40, optimizer=sgd, **options)

    bare = report()
    assert not bare.ok
    assert "no clipping" in str(bare)
    clipped = report(clip=1.0)
    assert clipped.record.losses[-1] < 0.5 * clipped.record.losses[0]
    assert clipped.ok, str(clipped)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"accumulate": 0}, ValueError, "accumulate must be a whole number of at least 1"),
        ({"accumulate": True}, ValueError, "accumulate must be a whole number of at least 1"),
        ({"scheduler": "cosine"}, ModelInputError, "no scheduler of rates"),
        ({"scaler": 2.0}, ModelInputError, "scaler is a float, which scales no loss"),
        ({"step_fn": 3}, ModelInputError, "step_fn is 3, which cannot be called"),
        ({"step_fn": print, "clip": 1.0}, ValueError, "clip=1.0 says .* and so does step_fn"),
        ({"step_fn": print, "accumulate": 2}, ValueError, "accumulate=2 says .* and so does step_fn"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = net()
    with pytest.raises(error, match=match):
        analysed(model, optimizer=torch.optim.SGD(model.parameters(), 0.1), **options)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"scheduler": []}, {"step_fn": print}, {"scaler": 1}])
def test_options_without_an_optimizer(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pass `optimizer=` as well"):
        analysed(net(), **options)


def test_a_scheduler_of_another_optimizer() -> None:
    model = net()
    ours, other = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    with pytest.raises(ModelInputError, match="steps another optimizer than the one given"):
        analysed(model, optimizer=ours, scheduler=lr_scheduler.ConstantLR(other))


def test_a_scheduler_that_cannot_be_copied() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = lr_scheduler.ConstantLR(sgd)
    scheduler.stream = (i for i in range(3))
    with pytest.raises(OptimizerMismatchError, match="a scheduler or scaler cannot be copied"):
        analysed(model, optimizer=sgd, scheduler=scheduler)
