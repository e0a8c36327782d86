"""BOTTLENECK where a model gives the same for every sample; and models that look like it at the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

X = torch.randn(48, 12, generator=torch.Generator().manual_seed(3))
Y = torch.sin(X[:, :3] + X[:, 3:6])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Between(nn.Module):
    """Encoder and decoder, with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 40), nn.SiLU(), nn.Linear(40, 10))
        self.decoder = nn.Sequential(nn.Linear(10, 24), nn.SiLU(), nn.Linear(24, 3))
        self.between = [between]

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.between[0](self.encoder(x)))


def straight_through(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what replaces each row by the nearest code, and hands the gradient on as it is."""

    def nearest(z: Tensor) -> Tensor:
        picked = codes[torch.cdist(z.detach(), codes).argmin(1)]
        return z + (picked - z).detach()

    return nearest


def report(model: nn.Module, loss: Any = F.mse_loss, **options: Any) -> gf.Report:
    options = {"steps": 6, "optimizer": torch.optim.Adam(model.parameters(), 1e-3)} | options
    return gf.diagnose(model, lambda: (X, Y), loss, **options)


def far_codes() -> Tensor:
    codes = 4 + torch.rand(16, 10)
    codes[0] = 1.0  # nearest to whatever comes near the origin
    return codes


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "one code for all": straight_through(far_codes()),
    "the mean over the batch": lambda z: z.mean(0, keepdim=True) + 0 * z,
    "the largest of the batch": lambda z: z.amax(0, keepdim=True).expand_as(z),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("optimized", [True, False])
def test_the_same_for_every_sample(name: str, optimized: bool) -> None:
    told = report(Between(SAME[name]), **({} if optimized else {"optimizer": None}))
    first = told.causes[0]
    assert (first.issue_type, first.layer) == (IssueType.BOTTLENECK, "decoder.0")
    issue = next(i for i in told.issues if i.issue_type is IssueType.BOTTLENECK)
    assert issue.severity is IssueSeverity.HIGH
    assert "between encoder.2 and decoder.0" in issue.recommended_actions[0]


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_whatever_the_scale_of_the_loss(scale: float) -> None:
    told = report(Between(SAME["one code for all"]), lambda y, t: scale * F.mse_loss(y, t), optimizer=None)
    assert (told.causes[0].issue_type, told.causes[0].layer) == (IssueType.BOTTLENECK, "decoder.0")


def zero_head() -> nn.Module:
    model = Between(torch.clone)
    nn.init.zeros_(model.get_parameter("decoder.2.weight"))
    return model


HEALTHY: dict[str, Callable[[], nn.Module]] = {
    "codes near the outputs": lambda: Between(straight_through(0.3 * torch.randn(16, 10))),
    "a last layer of zeros, and a bias": zero_head,
    "no code": lambda: Between(torch.clone),
    "a deep one, fresh": lambda: nn.Sequential(
        nn.Linear(12, 32), *[nn.Sequential(nn.ReLU(), nn.Linear(32, 32)) for _ in range(8)], nn.Linear(32, 3)
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("optimized", [True, False])
def test_healthy_models(name: str, optimized: bool) -> None:
    told = report(HEALTHY[name](), **({} if optimized else {"optimizer": None}))
    assert told.ok, [str(issue.description) for issue in told.issues]


class FirstSteps(nn.Module):
    """Reads the first step of an average over samples, so that recurrent weights get nothing either."""

    def __init__(self, *, averaged: bool) -> None:
        super().__init__()
        self.rnn, self.head, self.averaged = nn.GRU(3, 12, batch_first=True), nn.Linear(12, 3), averaged

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(x.view(len(x), 4, 3))[0]
        return self.head(h.mean(0)[:1].expand(len(x), -1) if self.averaged else h.mean(1))


@pytest.mark.parametrize("averaged", [True, False])
def test_a_matrix_without_gradient_beside_others_that_train_is_no_other_illness(averaged: bool) -> None:
    found = report(FirstSteps(averaged=averaged))
    told = [i.layer for i in found.issues if "the same for every sample" in i.description]
    assert told == ["head"] * averaged
