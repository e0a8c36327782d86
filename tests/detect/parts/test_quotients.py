"""Divisions by next to nothing: the numbers measured, and the verdicts on sick and healthy losses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import tiny_divisors
from gradflow.records import IssueType

G = torch.Generator().manual_seed(5)
X = torch.randn(64, 1, 9, generator=G)
WAVE = 2 * torch.sin(X[:, 0, :4]) + 0.5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def model() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(42, 4))


def report(loss: Callable[[Tensor], Tensor], net: nn.Module | None = None) -> gf.Report:
    net = net or model()
    return gf.diagnose(net, lambda: X, loss, steps=5, optimizer=torch.optim.Adam(net.parameters(), 1e-3))


def test_the_numbers_of_a_division() -> None:
    divisor = torch.full((64, 4), 0.5)
    divisor[:16] = 1e-8

    def loss(y: Tensor) -> Tensor:
        above = torch.ones_like(y) + 0 * y
        return (above / divisor).mean()

    (found,) = report(loss).record.parts.quotients
    assert found.layer == "3"
    assert found.small_share == pytest.approx(0.25)
    assert found.smallest == pytest.approx(1e-8)
    assert found.excess == pytest.approx(0.5 / 1e-8, rel=1e-5)  # closed form


def test_the_numbers_of_a_division_slowly() -> None:
    divisor = torch.rand(64, 4, generator=G) ** 40
    seen: list[Tensor] = []

    def loss(y: Tensor) -> Tensor:
        seen.append(y.detach().clone())
        return (y / divisor).square().mean().log()

    (found,) = report(loss).record.parts.quotients
    quotients = (seen[4] / divisor).abs().flatten().tolist()  # of the fifth step, which is the last
    both = zip(quotients, divisor.flatten().tolist(), strict=True)
    pairs = [(q, d) for q, d in both if 0 < q < float("inf")]
    largest = max(d for _, d in pairs)
    small = [q for q, d in pairs if d <= 1e-4 * largest]
    others = [q for q, d in pairs if d > 1e-4 * largest]
    assert found.small_share == pytest.approx(len(small) / len(pairs))
    ratio = (sum(small) / len(small)) / (sum(others) / len(others))
    assert found.excess == pytest.approx(ratio, rel=1e-4)


FALLING = torch.logspace(0, -9, 64)[torch.randperm(64, generator=G), None]
SPREAD = torch.logspace(0, -5, 64)[torch.randperm(64, generator=G), None]

SICK: dict[str, Callable[[Tensor], Tensor]] = {
    "percentages of targets that may be negative": lambda y: ((y - WAVE).abs() / WAVE.clamp_min(1e-8)).mean(),
    "squares over a spread that is zero in one column": lambda y: (
        (y - WAVE).square() / (WAVE * torch.tensor([1.0, 1.0, 0.0, 1.0])).var(0).add(1e-10)
    ).mean(),
    "a target in fifty that is zero": lambda y: (
        (y - WAVE).abs() / torch.where(torch.arange(64)[:, None] == 7, 1e-9, WAVE.abs() + 0.1)
    ).mean(),
    "squares over noise levels that fall far off": lambda y: ((y - WAVE).square() / FALLING).mean(),
    "rewarded errors of a column whose scale is small and negative": lambda y: (
        (y - WAVE).square() / torch.tensor([1.5, 4.0, -1e-4, 2.0])
    ).mean(),
}


@pytest.mark.parametrize("name", SICK)
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_some_elements_outweigh_all_others(name: str, scale: float) -> None:
    told = report(lambda y: scale * SICK[name](y))
    assert (told.causes[0].issue_type, told.causes[0].layer) == (IssueType.EXPLODING, "3")
    assert "divided by numbers" in told.issues[0].description


class Units(nn.Module):
    """Gives its outputs in the units of the data, which differ by orders of magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()
        self.register_buffer("units", torch.tensor([1e-7, 1.0, 1e3, 30.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.units


HEALTHY: dict[str, Callable[[Tensor], Tensor]] = {
    "percentages of targets away from zero": lambda y: ((y - WAVE).abs() / (WAVE.abs() + 0.1)).mean(),
    "percentages of targets over five orders of magnitude": lambda y: ((y - SPREAD).abs() / SPREAD).mean(),
    "errors that fall off as the levels do": lambda y: ((y * FALLING - FALLING) / FALLING).square().mean(),
    "one divisor for all": lambda y: ((y - WAVE).abs() / torch.tensor([1e-9])).mean(),
    "masked where the divisor is nothing": lambda y: (
        (y - WAVE).abs() * (WAVE > 0) / WAVE.clamp_min(1e-8)
    ).mean(),
    "a mean over a mask": lambda y: ((y - WAVE).square().sum(1) / (WAVE > 0).sum(1).clamp_min(1)).mean(),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_losses(name: str) -> None:
    assert not list(tiny_divisors()(report(HEALTHY[name]).record))


def test_outputs_in_units_over_the_units_are_no_tiny_divisors() -> None:
    net = Units()
    told = report(lambda y: ((y - WAVE * net.units) / net.units).square().mean(), net)  # type: ignore[operator]
    assert not list(tiny_divisors()(told.record))


def test_what_is_not_told() -> None:
    fields: dict[str, Any] = {"layer": "3", "smallest": 1e-8}
    few = gf.records.QuotientRecord(small_share=1e-4, excess=2e5, **fields)
    near = gf.records.QuotientRecord(small_share=0.5, excess=5e3, **fields)
    record = report(HEALTHY["one divisor for all"]).record
    for found in (few, near):
        changed = attrs.evolve(record, parts=attrs.evolve(record.parts, quotients=(found,)))
        assert not list(tiny_divisors()(changed))


def events(*, standardised: bool) -> Callable[[Tensor], Tensor]:
    """A mean over the samples with an event, of 31 and 33 by turns, whose indicator may be standardised."""
    number = itertools.cycle((31, 33))

    def loss(y: Tensor) -> Tensor:
        event = (torch.randperm(64, generator=G) < next(number)).float()
        if standardised:
            event = 2 * event - 1
        return ((y - WAVE).square().mean(1) * event).sum() / event.sum()

    return loss


def told_of(loss: Callable[[Tensor], Tensor]) -> list[str]:
    return [str(issue.issue_type.value) for issue in tiny_divisors()(report(loss).record)]


def test_a_divisor_that_cancels() -> None:
    assert told_of(events(standardised=True)) == ["UNSTABLE"]
    assert told_of(events(standardised=False)) == []


def test_the_size_of_a_sum_that_cancels() -> None:
    weights = torch.randn(64, generator=G)
    (found,) = report(lambda y: (y.mean(1) * weights).sum() / weights.sum()).record.parts.quotients
    expected = abs(float(weights.sum())) / float(weights.square().sum()) ** 0.5
    assert found.cancelled == pytest.approx(expected, rel=1e-4)
    assert report(lambda y: y.square().mean() / WAVE.abs().sum()).record.parts.quotients == ()


def test_a_divisor_that_cancels_inside_of_a_square_is_not_told() -> None:
    weights = torch.randn(64, generator=G)
    assert told_of(lambda y: (y.mean() / weights.mean()).square()) == []


def test_a_division_by_a_mask() -> None:
    found = report(lambda out: ((out - WAVE).square() / (WAVE > -9)).mean())
    assert found.ok, str(found)
