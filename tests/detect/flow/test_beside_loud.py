"""VANISHING is not told of a head whose term is a small part of the loss beside one that is off scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf

Pair = tuple[Tensor, Tensor]


class TwoHeads(nn.Module):
    """A trunk with a head for kinds and one for a number."""

    def __init__(self, kinds: int, numbers: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.kind, self.number = nn.Linear(32, kinds), nn.Linear(32, numbers)
        nn.init.normal_(self.kind.weight, std=0.01)

    def forward(self, x: Tensor) -> Pair:
        h = self.trunk(x)
        return self.kind(h), self.number(h)


def policy(output: Pair, kind: Tensor, far: Tensor) -> Tensor:
    """A surrogate whose advantages are small, with an entropy bonus, beside a squared error of values."""
    log_probs = output[0].log_softmax(-1)
    gain = (kind == 0).float() - 0.25
    ratio = (log_probs.gather(1, kind[:, None])[:, 0] + 1.386).exp()
    surrogate = -torch.minimum(ratio * gain, ratio.clamp(0.5, 2.0) * gain).mean()
    return (
        surrogate
        + 0.5 * F.mse_loss(output[1][:, 0], far)
        + 0.01 * (log_probs.exp() * log_probs).sum(-1).mean()
    )


def weighed(output: Pair, kind: Tensor, far: Tensor) -> Tensor:
    """Weighted log-likelihoods beside an absolute error in pixels."""
    weight = torch.where(kind == 0, 0.5, 0.1)
    likelihood = (weight * F.cross_entropy(output[0], kind, reduction="none")).mean()
    return likelihood + F.mse_loss(output[1].sum(1), far)


@pytest.mark.parametrize("loss", [policy, weighed])
@pytest.mark.parametrize("scale", [100.0, 300.0])
def test_the_one_off_scale_is_told_alone(loss: Callable[..., Tensor], scale: float) -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    now: list[Tensor] = []

    def batch() -> Tensor:
        x = torch.randn(64, 6, generator=draw)
        now[:] = [torch.randint(0, 4, (64,), generator=draw), scale * (1 + x[:, 0])]
        return x

    model = TwoHeads(4, 1 if loss is policy else 2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    report = gf.diagnose(model, batch, lambda y: loss(y, *now), optimizer=optimizer)
    serious = {(i.issue_type.value, i.layer) for i in report.issues if i.severity.is_serious}
    assert ("EXPLODING", "number") in serious
    assert ("VANISHING", "kind") not in serious
