"""Answers that come to the same for every sample, held against a teacher that follows; and healthy ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


def encoder(kind: str, out: int) -> nn.Sequential:
    if kind == "rows":
        return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, out))
    conv = (nn.Conv1d(1, 24, 5, padding=2), nn.GELU(), nn.AdaptiveAvgPool1d(4), nn.Flatten())
    return nn.Sequential(nn.Unflatten(1, (1, 20)), *conv, nn.Linear(96, out))


class Taught(nn.Module):
    """A student held against a teacher: how it is kept from one answer for all, and how the teacher moves."""

    centre: Tensor

    def __init__(self, kept: str, *, kind: str = "rows", follow: float = 0.1, out: int = 16) -> None:
        super().__init__()
        self.student = encoder(kind, out)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(out))
        self.kept, self.follow = kept, follow

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        said = self.student(two)
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(theirs, self.follow)
            target = self.teacher(one)
            if self.kept == "centre":
                self.centre.lerp_(target.mean(0), 0.3)
            target = ((target - self.centre) / 0.04).softmax(1)
            if self.kept == "shared":
                for _ in range(3):
                    target = target / target.sum(0)
                    target = target / target.sum(1, keepdim=True)
        told = -(target * (said / 0.1).log_softmax(1)).sum(1).mean()
        if self.kept == "entropy":
            mean = (said / 0.1).softmax(1).mean(0)
            told = told + 2 * (mean * mean.log()).sum() + 2 * np.log(len(mean))
        if self.kept == "queue":  # a likeness to its own first, then to others'
            one_, two_ = F.normalize(self.teacher(one), dim=1), F.normalize(said, dim=1)
            others = two_ @ F.normalize(torch.ones(15, 16).tril(), dim=1).T
            scores = torch.cat([(one_ * two_).sum(1, keepdim=True), others], 1)
            return -(scores / 0.05).log_softmax(1)[:, 0].mean()
        return told


def report(model: nn.Module, rate: float = 3e-3, *, steps: int = 40, noise: float = 0.2) -> gf.Report:
    g = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 20, generator=g)
        return x + noise * torch.randn(32, 20, generator=g), x + noise * torch.randn(32, 20, generator=g)

    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), rate)
    return gf.diagnose(model, batch, steps=steps, optimizer=optimizer)


def told(found: gf.Report) -> list[str]:
    return [issue.layer for issue in found.issues if issue.issue_type is IssueType.BOTTLENECK]


@pytest.mark.parametrize(("rate", "follow"), [(3e-3, 0.1), (1e-2, 0.1), (3e-3, 0.3), (2e-3, 0.05)])
def test_nothing_keeps_answers_apart(rate: float, follow: float) -> None:
    torch.manual_seed(0)
    assert told(report(Taught("", follow=follow), rate)) == ["student.4"]


@pytest.mark.parametrize("kept", ["centre", "shared", "entropy", "queue"])
@pytest.mark.parametrize("kind", ["rows", "signal"])
def test_something_keeps_them_apart(kept: str, kind: str) -> None:
    torch.manual_seed(0)
    assert not told(report(Taught(kept, kind=kind)))


def test_a_teacher_that_stands_still() -> None:
    torch.manual_seed(0)
    model = Taught("", follow=0.0)
    with torch.no_grad():
        model.teacher.get_parameter("4.bias")[3] = 5.0
    found = report(model, 1e-2)
    (answers,) = found.record.parts.answers
    assert answers.largest[-1] > 0.95
    assert not told(found)


class Labelled(Taught):
    """The same student with labels, of which nearly all are one, and with its teacher beside them."""

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        told = super().forward(one, one)
        return 0.1 * told + F.nll_loss(self.student(one).log_softmax(1), two)


def test_labels_of_which_nearly_all_are_one() -> None:
    torch.manual_seed(0)
    model, g = Labelled(""), torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 20, generator=g)
        return x, (x[:, 0] > 2.2).long()

    optimizer = torch.optim.Adam(model.student.parameters(), 1e-2)
    found = gf.diagnose(model, batch, steps=40, optimizer=optimizer)
    assert max(answers.largest[-1] for answers in found.record.parts.answers) > 0.9
    assert not told(found)


def test_what_is_said_is_the_mean_of_the_softmax() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(12, 6)
    with torch.no_grad():
        expected = float((2 * model(x)).softmax(1).mean(0).max())
    record = gf.analyze(model, [x], lambda y: -(2 * y).log_softmax(1)[:, 0].mean())
    (found,) = record.parts.answers
    assert (found.layer, found.num_alternatives) == ("2", 5)
    assert found.largest == pytest.approx([expected], rel=1e-5)
