"""The losses of single samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.errors import LossError
from tests.functional.snapshots import content


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def test_losses_are_those_of_the_unreduced_loss() -> None:
    model, x, y = network(), torch.randn(12, 4), torch.randint(0, 3, (12,))
    found = gf.sample_losses(model, (x, y), nn.CrossEntropyLoss())
    model.eval()
    by_hand = nn.functional.cross_entropy(model(x), y, reduction="none")
    assert found == pytest.approx(by_hand.detach().numpy(), rel=1e-5)
    one_by_one = [nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).item() for i in range(12)]
    assert found == pytest.approx(one_by_one, rel=1e-5)


def test_nothing_is_left_behind() -> None:
    model, batch = network(), (torch.randn(12, 4), torch.randint(0, 3, (12,)))
    was, stood = content(model), torch.get_rng_state()
    gf.sample_losses(model, batch, nn.CrossEntropyLoss())
    assert content(model) == was
    assert torch.equal(torch.get_rng_state(), stood)


def test_a_loss_of_a_sample_must_be_one_number() -> None:
    with pytest.raises(LossError, match="the loss has shape"):
        gf.sample_losses(network(), torch.randn(12, 4), lambda y: y)
