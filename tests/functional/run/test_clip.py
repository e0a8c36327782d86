"""Updates that are clipped as the user's loop clips them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    xs = torch.randn(8, 32, 6, dtype=torch.float64)
    return [(x, 5 * x.sum(1, keepdim=True)) for x in xs]


def trained(net: nn.Module, optimizer: Any, clip: float | None) -> tuple[list[float], list[float]]:
    """Return the losses and the norms of the gradient before clipping of a plain loop."""
    losses, norms = [], []
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), clip or math.inf)))
            losses.append(float(loss.detach()))
            return loss

        before = len(losses)
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        del losses[before + 1 :], norms[before + 1 :]
    return losses, norms


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5, 20.0])
def test_losses_are_those_of_a_loop_that_clips(name: str, clip: float | None) -> None:
    net = model()
    twin = copy.deepcopy(net)
    losses, norms = trained(twin, OPTIMIZERS[name](twin.parameters()), clip)
    before = copy.deepcopy(net.state_dict())
    record = gf.analyze(
        net, batches(), nn.MSELoss(), steps=8, optimizer=OPTIMIZERS[name](net.parameters()), clip=clip
    )
    assert record.losses.tolist() == pytest.approx(losses, rel=1e-9)
    seen = [math.hypot(*(p.grad_norm[i] for p in record.parameters)) for i in range(8)]
    assert seen == pytest.approx(norms, rel=1e-9)  # as they were before they were clipped
    assert record.provenance.clip == clip
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_a_clipped_run_is_told_and_saved() -> None:
    net = model()
    report = gf.diagnose(
        net, batches(), nn.MSELoss(), steps=4, optimizer=torch.optim.SGD(net.parameters(), 0.01), clip=1
    )
    assert "stepped by a copy of SGD (lr 0.01), gradients clipped to norm 1" in report.text("full")
    assert gf.FlowRecord.from_json(report.record.to_json()) == report.record


@pytest.mark.parametrize("clip", [0, -1.0, math.inf, math.nan, "1", True])
def test_a_norm_that_is_none(clip: Any) -> None:
    net = model()
    with pytest.raises(ValueError, match="clip must be a positive number"):
        gf.analyze(net, batches(), nn.MSELoss(), optimizer=torch.optim.SGD(net.parameters(), 0.1), clip=clip)


def test_clipping_without_an_optimizer_is_an_error() -> None:
    with pytest.raises(ValueError, match="pass `optimizer=` as well"):
        gf.diagnose(model(), batches(), nn.MSELoss(), clip=1.0)
