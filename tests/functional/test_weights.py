"""What became of the weights between two moments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradflow.functional.weights import WeightSample


def test_changes_are_those_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sample = WeightSample.of(model, 7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(4, 6)).mean().backward()
    optimizer.step()
    found = sample.changes(model)
    assert sample.step == 7
    for name, p in model.named_parameters():
        by_hand = (p.detach() - before[name]).norm() / before[name].norm()
        assert found[f"update_ratio/{name}"] == pytest.approx(by_hand.item(), rel=1e-5)
        assert found[f"unchanged_share/{name}"] == (p.detach() == before[name]).float().mean().item()


def test_a_large_parameter_is_sampled_within_a_few_percent() -> None:
    torch.manual_seed(0)
    model = nn.Linear(700, 500)
    sample = WeightSample.of(model, 0)
    assert max(len(entries) for entries in sample.entries.values()) < 2**13
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1e-3 * torch.randn_like(model.weight)
    by_hand = ((model.weight.detach() - before).norm() / before.norm()).item()
    assert sample.changes(model)["update_ratio/weight"] == pytest.approx(by_hand, rel=0.05)


def test_what_rounding_swallows() -> None:
    model = nn.Linear(64, 64).bfloat16()
    sample = WeightSample.of(model, 0)
    with torch.no_grad():
        model.weight *= 1.0001  # less than half of what bfloat16 tells apart
    assert sample.changes(model)["unchanged_share/weight"] == 1.0


def test_what_has_nothing_to_change_from() -> None:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    sample = WeightSample.of(model, 0)
    with torch.no_grad():
        model.weight += 1.0
    found = sample.changes(model)
    assert found["update_ratio/weight"] == math.inf
    assert "update_ratio/bias" not in found


def test_parameters_that_come_and_go() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    sample = WeightSample.of(model, 0)
    model["b"] = nn.Linear(3, 3)
    model["c"] = nn.Linear(2, 2)
    assert {name.partition("/")[2] for name in sample.changes(model)} == {"a.weight", "a.bias"}
    model["a"].requires_grad_(False)
    assert sample.changes(model) == {}
