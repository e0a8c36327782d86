"""A training that all processes watch together."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

import gradflow as gf
from tests.distributed.models import MODELS
from tests.distributed.test_same_record import differences
from tests.distributed.worlds import World


@pytest.mark.parametrize("name", ["watched", "watched_inside"])
def test_the_history_is_that_of_one_process(name: str, world: World) -> None:
    inside = name == "watched_inside"
    model, batches, loss_fn = MODELS["mlp"]("sick")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = gf.Monitor(model, loss_fn, optimizer, every=4)
    for x, y in batches:
        with monitor.step() if inside else contextlib.nullcontext():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            if not inside:
                monitor((x, y))
            optimizer.step()
    (record, history, weight), *others = world.results(name)
    assert monitor.report is not None
    expected = monitor.report.record
    wrong = differences(record, expected)
    assert not wrong, "\n".join(wrong)
    assert history.steps.tolist() == monitor.history.steps.tolist()
    np.testing.assert_allclose(history["loss"], monitor.history["loss"], rtol=1e-5)
    torch.testing.assert_close(weight, model[0].weight.detach())  # type: ignore[index]
    for other, its_history, _ in others:
        assert other == record
        assert its_history.steps.tolist() == history.steps.tolist()
