"""The loss over what ignorance costs: closed forms for every loss function that is listened for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradflow.functional.tap.ignorance import Ignorance


def share(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> float:
    heard = Ignorance()
    heard.hear(func, (x.requires_grad_(), *args), kwargs)
    return heard.share()


HALF = torch.arange(16) % 2


def logits(odds: float) -> Tensor:
    """Return logits of two classes that give the right one these odds to one."""
    return math.log(odds) * F.one_hot(HALF, 2).float()


@pytest.mark.parametrize("func", [F.cross_entropy, lambda x, y: F.nll_loss(x.log_softmax(-1), y)])
def test_of_classes(func: Any) -> None:
    for odds in (1.0, 9.0):
        x = logits(odds) if func is F.cross_entropy else logits(odds).log_softmax(-1)
        named = F.cross_entropy if func is F.cross_entropy else F.nll_loss
        assert share(named, x, HALF) == pytest.approx(math.log(1 + 1 / odds) / math.log(2), rel=1e-5)


def test_shares_of_the_targets_are_what_ignorance_knows() -> None:
    y = torch.tensor([0] * 12 + [1] * 4)
    usual = torch.tensor([0.75, 0.25]).log().expand(16, 2).clone()
    assert share(F.cross_entropy, usual, y) == pytest.approx(1.0, rel=1e-5)
    few = torch.zeros(3, 50)  # too few targets to know their shares
    assert share(F.cross_entropy, few, torch.tensor([0, 0, 0])) == pytest.approx(1.0, rel=1e-5)
    soft = F.one_hot(HALF, 2).float()
    assert share(F.cross_entropy, torch.zeros(16, 2), soft) == pytest.approx(1.0, rel=1e-5)


def test_targets_that_are_ignored_do_not_count() -> None:
    y = torch.where(torch.arange(16) < 8, HALF, -100)
    assert share(F.cross_entropy, torch.zeros(16, 2), y) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("with_logits", [True, False])
def test_of_odds(with_logits: bool) -> None:
    y = HALF.float()[:, None]
    func = F.binary_cross_entropy_with_logits if with_logits else F.binary_cross_entropy
    for p in (0.5, 0.9):
        right = torch.where(y > 0, p, 1 - p)
        x = torch.logit(right) if with_logits else right
        assert share(func, x, y) == pytest.approx(-math.log(p) / math.log(2), rel=1e-5)


def test_of_numbers() -> None:
    y = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    assert share(F.mse_loss, y.mean(0).expand(64, 3).clone(), y) == pytest.approx(1.0, rel=1e-5)
    assert share(F.mse_loss, 0.5 * (y + y.mean(0)), y) == pytest.approx(0.25, rel=1e-5)
    assert share(F.l1_loss, 0.5 * (y + y.mean(0)), y) == pytest.approx(0.5, rel=1e-5)
    assert share(F.huber_loss, 0.5 * (y + y.mean(0)), y) == pytest.approx(0.25, rel=1e-5)


def test_the_worst_of_several_counts_and_what_is_not_known_does_not() -> None:
    heard = Ignorance()
    for x in (logits(9.0), torch.zeros(16, 2)):
        heard.hear(F.cross_entropy, (x.requires_grad_(), HALF), {})
    heard.hear(F.mse_loss, (torch.zeros(3, 1, requires_grad=True), torch.zeros(3)), {})  # shapes that differ
    heard.hear(F.mse_loss, (torch.zeros(3, requires_grad=True), torch.ones(3)), {})  # a constant
    heard.hear(F.relu, (torch.zeros(3, requires_grad=True),), {})
    heard.hear(F.cross_entropy, (torch.zeros(16, 2), HALF), {})  # which teaches nothing
    assert heard.share() == pytest.approx(1.0, rel=1e-5)
    assert math.isnan(Ignorance().share())


def test_what_was_written_to_since_is_left_out() -> None:
    heard, x = Ignorance(), torch.zeros(16, 2)
    heard.hear(F.cross_entropy, (x.requires_grad_(), HALF), {})
    with torch.no_grad():
        x.add_(1.0)
    assert math.isnan(heard.share())
