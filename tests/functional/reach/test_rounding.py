"""Gradients of rounding alone, held against the same in double precision: there next to nothing is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import Reason


class Net(nn.Module):
    """A layer whose output is used in one of several ways, beside one that learns."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.use = nn.Linear(6, 5), nn.Linear(6, 5), use

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + self.use(self.a, x)


USES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "one score": lambda a, x: (torch.stack([a(x), a(x)], 1).softmax(1) * x[:, :2, None]).sum(1),
    "one score, one call": lambda a, x: (torch.stack([a(x)] * 3, 1).softmax(1) * x[:, :3, None]).sum(1),
    "shift": lambda a, x: (x[:, :5] + a(x).sum(1, keepdim=True)).log_softmax(1),
    "normed": lambda a, x: F.layer_norm(x[:, :5] + a(x).mean(1, keepdim=True), (5,)),
    "plain": lambda a, x: a(x).tanh(),
    "faint": lambda a, x: 1e-7 * a(x).tanh(),
    "two calls": lambda a, x: 1e-6 * (a(x) - a(x.roll(1, 1))),
    "scores": lambda a, x: 1e-6 * (torch.stack([a(x), 2 * a(x)], 1).softmax(1) * x[:, :2, None]).sum(1),
}


def gradient(net: Net, x: Tensor) -> Tensor:
    net, x = net.double(), x.double()
    return torch.autograd.grad(net(x).square().mean(), net.a.weight)[0]


@pytest.mark.parametrize("use", USES)
def test_what_is_left_in_double_precision_decides(use: str) -> None:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    net = Net(USES[use])
    record = gf.analyze(net, lambda: x, lambda y: y.square().mean(), steps=2)
    assert record.reach is not None
    lost = any(
        p.parameter == "a.weight" and p.reason is Reason.BY_MATHEMATICS for p in record.reach.unreached
    )
    plain, exact = record["a"].grad_norm, record.parameters[0].grad_norm[0]
    assert len(plain) == 2
    assert lost == (float(gradient(net, x).norm()) < 1e-3 * exact)
