"""The law of reach: every trainable number is reached or in exactly one class, and that is the right one."""

from __future__ import annotations

import functools

import pytest
import torch

import gradflow as gf
from gradflow.records import FlowRecord, ReachAccount, Reason
from tests.functional.reach.planted import Expected, planted

SEEDS = range(200)


@functools.cache
def account(seed: int) -> ReachAccount:
    case = planted(seed)
    record = gf.analyze(case.model, lambda: case.batch, case.loss, steps=2 + seed % 2)
    assert record.reach is not None
    assert FlowRecord.from_json(record.to_json()) == record
    return record.reach


@pytest.mark.parametrize("seed", SEEDS[::5])
def test_so_it_is_while_an_optimizer_steps(seed: int) -> None:
    case = planted(seed)
    optimizer = torch.optim.Adam(case.model.parameters(), 1e-3)
    record = gf.analyze(case.model, lambda: case.batch, case.loss, steps=4, optimizer=optimizer)
    found = record.reach
    assert found is not None
    assert found.num_reached + sum(found.totals().values()) == found.num_elements
    assert Reason.UNEXPLAINED not in found.totals()


def is_there(found: ReachAccount, wanted: Expected) -> bool:
    """Whether what was planted stands in the account, with its reason."""
    for part in found.of(wanted.parameter):
        if part.reason is wanted.reason and wanted.axis is None and part.share == 1:
            return True
        inside = {i for start, stop in part.slices for i in range(start, stop)}
        if part.reason is wanted.reason and part.axis == wanted.axis and wanted.slices <= inside:
            return True
    return False


@pytest.mark.parametrize("seed", SEEDS)
def test_every_element_is_reached_or_in_exactly_one_class(seed: int) -> None:
    found, model = account(seed), planted(seed).model
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert found.num_elements == sum(sizes.values())
    assert found.num_reached + sum(found.totals().values()) == found.num_elements
    for name, size in sizes.items():
        assert sum(part.num_elements for part in found.of(name)) <= size
    assert Reason.UNEXPLAINED not in found.totals()


def test_the_class_is_the_planted_one() -> None:
    wanted = [(seed, e) for seed in SEEDS for e in planted(seed).expected]
    wrong = [(seed, e, account(seed).of(e.parameter)) for seed, e in wanted if not is_there(account(seed), e)]
    assert len(wanted) > 500
    assert {e.reason for _, e in wanted} >= set(Reason) - {Reason.UNEXPLAINED}
    assert len(wrong) <= 0.02 * len(wanted), wrong[:5]
