"""Scores that a constant puts apart, the same for all samples; weights in a loss; guesses left no choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow
from gradflow.records import Issue, IssueSeverity, IssueType
from gradflow.report import Report

KINDS = 12
CENTRES = 2 * torch.randn(KINDS, 16, generator=torch.Generator().manual_seed(5))


def report_of(model: nn.Module, shift: float = 0.0, times: float = 1.0) -> Report:
    generator, target = torch.Generator().manual_seed(2), [torch.empty(0)]

    def batch() -> Tensor:
        target[0] = torch.randint(KINDS - 1, (64,), generator=generator)
        return times * (CENTRES[target[0]] + torch.randn(64, 16, generator=generator) + shift)

    adam = torch.optim.Adam(model.parameters(), 1e-3)
    return gradflow.diagnose(
        model, batch, lambda out: F.cross_entropy(out, target[0]), steps=16, optimizer=adam
    )


def serious(report: Report, kind: IssueType) -> list[Issue]:
    return [i for i in report.issues if i.issue_type is kind and i.severity.is_serious]


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, KINDS, bias=bias))


@torch.no_grad()
def by_bias(new: float) -> nn.Module:
    model = net()
    model.get_parameter("2.bias").sub_(30)
    model.get_parameter("2.bias")[-1] = new
    return model


class Shared(nn.Module):
    """Features that share a direction, and a head without a bias that puts all scores far along it."""

    def __init__(self, new: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(16, 64), nn.Linear(64, KINDS, bias=False)
        with torch.no_grad():
            self.head.weight -= 0.25
            self.head.weight[-1] = new

    def forward(self, x: Tensor) -> Tensor:
        return self.head(2 + torch.tanh(self.body(x)))


@torch.no_grad()
def prior() -> nn.Module:
    model = net()
    model.get_parameter("2.bias")[3] = 40
    return model


@pytest.mark.parametrize(
    "make", [lambda: by_bias(0.0), lambda: Shared(0.0), prior], ids=["bias", "direction", "prior"]
)
def test_one_class_far_above_the_others(make: Callable[[], nn.Module]) -> None:
    report = report_of(make())
    (issue,) = serious(report, IssueType.SATURATION)
    assert issue.severity is IssueSeverity.HIGH
    assert issue.layer in ("2", "head")
    assert issue.metrics["output_variation"] < 0.1
    assert "for all samples alike" in issue.description
    assert report.causes[0].issue_type is IssueType.SATURATION
    assert not serious(report, IssueType.EXPLODING)


@pytest.mark.parametrize("make", [lambda: by_bias(-30.0), lambda: Shared(-0.25)], ids=["bias", "direction"])
def test_all_classes_far_below_zero(make: Callable[[], nn.Module]) -> None:
    report = report_of(make())
    assert report.ok, str(report)


def focal(output: Tensor, target: Tensor) -> Tensor:
    """Of what is told rightly next to nothing counts, and of the rare yes three times as much."""
    odds = output.sigmoid()
    weight = 3 * target * (1 - odds) ** 2 + (1 - target) * odds**2
    return (weight * F.binary_cross_entropy_with_logits(output, target, reduction="none")).mean()


def masks(
    bias: float,
    part: float,
    rate: float = 1e-3,
    loss: Callable[..., Tensor] = F.binary_cross_entropy_with_logits,
) -> Report:
    """Return the report on a model that says yes or no to every pixel, of which a part is yes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    with torch.no_grad():
        model.get_parameter("2.bias").fill_(bias)
    generator = torch.Generator().manual_seed(3)
    level = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - part))

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 1, 12, 12, generator=generator)
        return x, (x > level).float()

    adam = torch.optim.Adam(model.parameters(), rate)
    return gradflow.diagnose(model, batch, loss, steps=16, optimizer=adam)


@pytest.mark.parametrize(("bias", "part"), [(10.0, 0.1), (-30.0, 0.3), (-10.0, 0.5), (100.0, 0.5)])
def test_odds_that_are_sure_whatever_the_sample(bias: float, part: float) -> None:
    report = masks(bias, part)
    (issue,) = serious(report, IssueType.SATURATION)
    assert issue.severity is IssueSeverity.HIGH
    assert issue.layer == "2"
    assert "sigmoid of the loss is at its ends" in issue.description
    assert report.causes[0].layer == "2"


@pytest.mark.parametrize(("bias", "part"), [(-4.6, 0.01), (-3.0, 0.05), (1.0, 0.5), (3.0, 0.95)])
def test_odds_that_start_at_how_rare_a_yes_is(bias: float, part: float) -> None:
    assert masks(bias, part, rate=1e-2).ok


def test_odds_that_the_run_brings_back_at_once() -> None:
    """A focal loss weighs the rare yes so much that a bias from which it hardly hears a no is no harm."""
    report = masks(-5.3, 0.3, rate=0.3, loss=focal)
    assert [i.severity for i in report.issues if i.issue_type is IssueType.SATURATION] == [IssueSeverity.LOW]
    assert report.ok


@torch.no_grad()
def test_weights_that_are_too_large_are_no_constant() -> None:
    model = net()
    model.get_parameter("2.weight").mul_(60)
    report = report_of(model)
    assert serious(report, IssueType.EXPLODING)
    assert not [i for i in serious(report, IssueType.SATURATION) if "alike" in i.description]


# ------------------------------------------------------------------------- weights in the loss


def regression(loss: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0, rate: float = 3e-3) -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 1))
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(scale)
    generator, target = torch.Generator().manual_seed(1), [torch.empty(0)]
    mix = torch.randn(12, 1, generator=generator)

    def batch() -> Tensor:
        x = torch.randn(64, 12, generator=generator)
        target[0] = x @ mix
        return x

    adam = torch.optim.Adam(model.parameters(), rate)
    return gradflow.diagnose(model, batch, lambda out: loss(out, target[0]), steps=20, optimizer=adam)


WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hard samples": lambda o, t: (
        F.mse_loss(o, t, reduction="none") * (0.1 + torch.sigmoid(50 * (o - t).abs()))
    ).mean(),
    "open": lambda o, t: (F.smooth_l1_loss(o, t, reduction="none") * torch.sigmoid(20 * (o + 10))).mean(),
    "by tanh": lambda o, t: (F.mse_loss(o, t, reduction="none") * (2 + torch.tanh(30 * (o - 9)))).mean(),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_at_its_end(name: str) -> None:
    report = regression(WEIGHTS[name], rate=1e-2 if name == "open" else 3e-3)
    found = [i for i in report.issues if i.issue_type is IssueType.SATURATION]
    assert found
    assert all(i.severity is IssueSeverity.LOW for i in found)
    assert name == "by tanh" or all("past it" in i.description for i in found)  # there it knows as well


SHUT: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "gate": (lambda o, t: F.mse_loss((o - 40) * torch.sigmoid(o - 40), t), 1.0),
    "output": (lambda o, t: F.mse_loss(torch.sigmoid(o - 30), (t > 0).float()), 1.0),
    "large": (lambda o, t: F.mse_loss(torch.sigmoid(o), (t > 0).float()), 300.0),
}


@pytest.mark.parametrize("name", SHUT)
def test_what_is_squashed_itself(name: str) -> None:
    loss, scale = SHUT[name]
    assert serious(regression(loss, scale), IssueType.SATURATION)


# ------------------------------------------------------------------- alternatives that are left out


class Pair(nn.Module):
    """What is guessed of every row, and the codes that rows are told apart by."""

    def __init__(self, codes: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.guess = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
        self.code, self.vectors = nn.Linear(16, codes), nn.Parameter(torch.randn(codes, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = F.gumbel_softmax(self.code(x), tau=2.0, hard=True)
        return self.guess(x), chosen @ self.vectors


def contrast(output: tuple[Tensor, Tensor], masked: float, sharp: float) -> Tensor:
    guess, codes = output
    alike = F.cosine_similarity(guess[:, None], codes[None], dim=-1) / sharp
    same = (codes[:, None] == codes[None]).all(-1) & ~torch.eye(len(codes), dtype=torch.bool)
    return F.cross_entropy(alike.masked_fill(same, masked), torch.arange(len(codes))) + 0.01


@pytest.mark.parametrize("masked", [-math.inf, -1e9])
def test_guesses_that_leave_no_wrong_answer(masked: float) -> None:
    generator = torch.Generator().manual_seed(2)

    def batch() -> Any:
        kinds = torch.randint(KINDS, (48,), generator=generator)
        return CENTRES[kinds] + 0.3 * torch.randn(48, 16, generator=generator)

    model = Pair()
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    report = gradflow.diagnose(model, batch, lambda out: contrast(out, masked, 0.1), steps=16, optimizer=adam)
    known = report.record.knowledge
    assert known is not None
    assert math.isnan(known.silent)
    assert math.isnan(known.averaged)
    assert known.ignorance == known.shuffled > 1
    assert not serious(report, IssueType.SATURATION), str(report)


def test_guesses_of_an_ordinary_choice() -> None:
    known = report_of(net()).record.knowledge
    assert known is not None
    assert known.silent == pytest.approx(math.log(KINDS))
