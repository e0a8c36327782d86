"""Loops of people's own: whatever they do with the gradient, a monitor changes nothing and sees all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from tests.integrations.trainings import Batch, batches, bits, network

LOOKS = [0, 1, 4, 16, 20, 40]  # of 60 steps, every=20
Watch = Callable[..., Any]
loss_fn = nn.CrossEntropyLoss()


def plain(model: nn.Module, watch: Watch) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches(60):
        optimizer.zero_grad()
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        watch(batch, loss=loss)


def before_the_update(model: nn.Module, watch: Watch) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches(60):
        watch(batch)
        optimizer.zero_grad(set_to_none=False)
        loss_fn(model(batch[0]), batch[1]).backward()
        optimizer.step()


def between_backward_and_update(model: nn.Module, watch: Watch) -> None:
    """The gradients that a look must leave alone are there."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches(60):
        loss_fn(model(batch[0]), batch[1]).backward()
        watch(batch)
        optimizer.step()
        optimizer.zero_grad()


def accumulated_and_clipped(model: nn.Module, watch: Watch) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for number, batch in enumerate(batches(240)):
        loss = loss_fn(model(batch[0]), batch[1])
        (loss / 4).backward()
        if (number + 1) % 4 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            watch(batch, loss=loss)


def scaled(model: nn.Module, watch: Watch) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=20)
    for batch in batches(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        watch(batch, loss=loss)


def by_closures(model: nn.Module, watch: Watch) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    for batch in batches(60):

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(model(batch[0]), batch[1])
            loss.backward()
            return loss

        optimizer.step(closure)
        watch(batch)  # without the loss, which a step of several iterations leaves far behind


LOOPS = [plain, before_the_update, between_backward_and_update, accumulated_and_clipped, scaled, by_closures]


def same(
    loop: Callable[[nn.Module, Watch], None], make: Callable[[], nn.Module] = network, **options: Any
) -> gf.Monitor:
    """Return the monitor of a loop, after a test that it leaves the same bits as no monitor does."""
    bare = make()
    torch.manual_seed(1)
    loop(bare, lambda batch, loss=None: None)
    bare_bits, watched = bits(bare), make()
    monitor = gf.Monitor(watched, **{"loss_fn": loss_fn, "every": 20, **options})
    torch.manual_seed(1)
    loop(watched, monitor)
    assert bits(watched) == bare_bits
    assert not any("could not be looked at" in note for note in monitor.history.notes)
    return monitor


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_is_the_same(loop: Callable[[nn.Module, Watch], None]) -> None:
    monitor = same(loop)
    assert monitor.history.steps.tolist() == LOOKS
    ratios = monitor.history.of("update_ratio")
    assert {name for name, _ in network().named_parameters()} == set(ratios)
    del ratios["0.bias"]  # which batch norm takes away: nothing moves it but rounding
    every = np.any if loop is by_closures else np.all  # a line search may find nothing to do
    assert all(every(values > 0) for values in ratios.values())
    assert monitor.report is not None
    assert monitor.report.ok


def half(model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_fn(model(batch[0]), batch[1])


def test_a_loop_in_half_precision_is_measured_in_it() -> None:
    in_half, in_full = same(scaled, loss_fn=None, forward_fn=half), same(scaled)
    losses = in_half.history["loss"]
    assert losses.tolist() == pytest.approx(in_full.history["loss"].tolist(), rel=0.02)
    assert losses.tolist() != in_full.history["loss"].tolist()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend: str) -> None:
    torch._dynamo.reset()
    monitor = same(plain, lambda: torch.compile(network(), backend=backend))  # type: ignore[return-value]
    assert monitor.history.steps.tolist() == LOOKS
    assert any(name.endswith("0.weight") for name in monitor.history.of("weight_gradient_rms"))


def test_a_training_that_is_lost_is_not_looked_at_in_every_step() -> None:
    model = network()
    optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.1), gf.Monitor(model, loss_fn, every=50)
    for step, batch in enumerate(batches(301)):
        x = batch[0] * float("nan") if step == 123 else batch[0]
        optimizer.zero_grad()
        loss = loss_fn(model(x), batch[1])
        loss.backward()
        optimizer.step()
        monitor((x, batch[1]), loss=loss)
    steps = monitor.history.steps.tolist()
    assert 123 in steps  # at once
    assert len([step for step in steps if step > 123]) < 15
    assert monitor.report is not None
    assert any(issue.issue_type is gf.IssueType.NUMERICAL for issue in monitor.report.issues)


# ------------------------------------------------------------------------------------ two optimizers


class Networks(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.g = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))
        self.d = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


def wrong(scores: Tensor, real: bool) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))


def adversarial(networks: Networks, watch_g: Watch, watch_d: Watch) -> None:
    g, d = networks.g, networks.d
    by_g, by_d = torch.optim.Adam(g.parameters(), lr=1e-3), torch.optim.Adam(d.parameters(), lr=1e-3)
    for real, _ in batches(60):
        z = torch.randn(len(real), 3)
        by_d.zero_grad()
        (wrong(d(real), True) + wrong(d(g(z).detach()), False)).backward()
        by_d.step()
        watch_d((real, z))
        by_g.zero_grad()
        wrong(d(g(z)), True).backward()
        by_g.step()
        watch_g(z)


def test_two_networks_against_each_other_have_two_monitors() -> None:
    bare, watched = Networks(), Networks()
    torch.manual_seed(1)
    adversarial(bare, lambda batch: None, lambda batch: None)
    bare_bits, g, d = bits(bare), watched.g, watched.d
    generator = gf.Monitor(g, forward_fn=lambda g, z: wrong(d(g(z)), True), every=20)
    discriminator = gf.Monitor(
        d, forward_fn=lambda d, b: wrong(d(b[0]), True) + wrong(d(g(b[1]).detach()), False), every=20
    )
    torch.manual_seed(1)
    adversarial(watched, generator, discriminator)
    assert bits(watched) == bare_bits
    for monitor in (generator, discriminator):
        assert monitor.history.steps.tolist() == LOOKS
        assert monitor.history.notes == ()
        assert set(monitor.history.of("weight_gradient_rms")) == {
            f"{n}.{k}" for n in (0, 2) for k in ("weight", "bias")
        }
        assert monitor.report is not None
        assert monitor.report.ok


# ---------------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_with_accelerate(precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    def looped(model: nn.Module, watch: Watch) -> None:
        AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=4, mixed_precision=precision
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(batches(240), batch_size=None)  # type: ignore[arg-type]
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        assert accelerator.unwrap_model(prepared) is model
        for batch in loader:
            with accelerator.accumulate(prepared):
                loss = loss_fn(prepared(batch[0]), batch[1])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                watch(batch, loss=loss)

    assert same(looped).history.steps.tolist() == LOOKS
