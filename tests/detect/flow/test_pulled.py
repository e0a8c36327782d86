"""Embeddings that a model's own loss pulls together, and such as something keeps apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.records import Issue, IssueType


class Views(nn.Module):
    """Two views through one encoder, and a predictor; the output is the loss."""

    def __init__(self, how: str, act: type[nn.Module] = nn.ReLU, **options: bool) -> None:
        super().__init__()
        self.how, self.stop, self.twice = how, options.get("stop", False), options.get("twice", False)
        layers = [nn.Linear(16, 32), nn.BatchNorm1d(32), act(), nn.Linear(32, 32)]
        self.enc = nn.Sequential(*layers, *([nn.BatchNorm1d(32)] if options.get("norm") else []))
        self.pred = nn.Sequential(nn.Linear(32, 8), act(), nn.Linear(8, 32))
        if how in ("picture", "labels"):
            self.more = nn.Linear(32, 16)

    def apart(self, p: Tensor, z: Tensor) -> Tensor:
        z = z.detach() if self.stop else z
        return F.mse_loss(p, z) if self.how == "squares" else 1 - F.cosine_similarity(p, z).mean()

    def forward(self, a: Tensor, b: Tensor, kind: Tensor) -> Tensor:
        za, zb = (self.enc(a), self.enc(b)) if self.twice else self.enc(torch.cat([a, b])).chunk(2)
        if self.how == "negatives":
            return F.cross_entropy(F.normalize(za) @ F.normalize(zb).T / 0.1, torch.arange(len(za)))
        if self.how == "variance":
            spread = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (za, zb))
            return F.mse_loss(za, zb) + spread
        loss = self.apart(self.pred(za), zb) + self.apart(self.pred(zb), za)
        if self.how == "picture":
            return loss + F.mse_loss(self.more(za), a)
        return loss + F.cross_entropy(self.more(za), kind) if self.how == "labels" else loss


def told(model: nn.Module, rate: float = 1e-2) -> list[Issue]:
    g = torch.Generator().manual_seed(1)
    centres, batches = torch.randn(8, 16, generator=g), []
    for _ in range(20):
        kind = torch.randint(8, (64,), generator=g)
        x = centres[kind] + 0.5 * torch.randn(64, 16, generator=g)
        a, b = (x + 0.4 * torch.randn(64, 16, generator=g) for _ in range(2))
        batches.append(((a, b, kind), torch.zeros(1)))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    report = gf.diagnose(model, batches, lambda output, _: output, optimizer=optimizer)
    return [issue for issue in report.issues if issue.severity.is_serious]


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("twice", [True, False])
def test_both_sides_open_and_nothing_else_to_meet(act: type[nn.Module], twice: bool) -> None:
    torch.manual_seed(0)
    (issue,) = told(Views("directions", act, twice=twice))
    assert (issue.issue_type, issue.layer) == (IssueType.BOTTLENECK, "enc.3")
    assert issue.metrics["variation"] <= 0.5 * issue.metrics["variation_at_first"]
    assert issue.recommended_actions[0].startswith("Stop the gradient")


def test_what_is_told_is_what_differs() -> None:
    torch.manual_seed(0)
    model = Views("directions")
    (issue,) = told(model)
    x = torch.randn(64, 16)
    rows = model.enc(torch.cat([x, x])).detach()
    share = float((rows - rows.mean(0)).norm() / rows.norm())
    assert 0.5 < issue.metrics["variation_at_first"] / share < 2


@pytest.mark.parametrize("how", ["directions", "squares"])
@pytest.mark.parametrize("twice", [True, False])
def test_a_stopped_gradient(how: str, twice: bool) -> None:
    torch.manual_seed(0)
    assert not told(Views(how, stop=True, twice=twice))


@pytest.mark.parametrize("how", ["negatives", "variance", "picture", "labels"])
@pytest.mark.parametrize("twice", [True, False])
def test_something_that_keeps_samples_apart(how: str, twice: bool) -> None:
    torch.manual_seed(0)
    model = Views(how, twice=twice)
    if how in ("negatives", "variance"):
        del model.pred
    assert not told(model)


def test_a_norm_over_the_samples() -> None:
    torch.manual_seed(0)
    assert not told(Views("directions", norm=True))
