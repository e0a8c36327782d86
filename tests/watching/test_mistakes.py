"""What goes wrong round a monitor: a full disk, another model's file or optimizer, steps that go back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.errors import ModelInputError, OptimizerMismatchError
from gradflow.watching import log
from tests.watching.test_observer import batches, network, trained


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(OptimizerMismatchError, match="belongs to the model"):
        gf.Monitor(network(), None, torch.optim.Adam(network().parameters()))
    with pytest.raises(Exception, match="optimizer"):
        gf.Monitor(network(), None, "adam")


def test_steps_before_the_last_look_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = gf.Monitor(network(), nn.CrossEntropyLoss(), every=10)
    for step, batch in enumerate(batches(60)):
        monitor(batch, step=step % 30)
    told = [record for record in caplog.records if "before the last look" in record.getMessage()]
    assert len(told) == 1


def test_a_rate_of_zero_is_told() -> None:
    monitors: list[gf.Monitor] = []

    def watch(model: nn.Module, loss_fn: Any, optimizer: Any) -> Any:
        optimizer.param_groups[0]["lr"] = 0.0
        monitors.append(gf.Monitor(model, loss_fn, optimizer, every=25))
        return lambda batch, loss: monitors[0](batch, loss=loss)

    trained(watch, steps=120)
    assert "No weight has changed" in " ".join(e.description for e in monitors[0].history.events)


def test_a_failed_look_is_not_ok() -> None:
    monitor = gf.Monitor(network(), None, forward_fn=lambda model, batch: 1 / 0)
    report = monitor(next(batches(1)))
    assert report is not None
    assert not report.ok
    assert str(report).startswith("gradflow: nothing could be measured")


def test_a_disk_that_is_full_ends_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.jsonl"
    monitor = gf.Monitor(network(), nn.CrossEntropyLoss(), every=10, path=path)
    full = [False]
    write = log.append

    def failing(path: Any, before: Any, after: Any) -> None:
        if full[0]:
            with path.open("ab") as file:
                file.write(b'{"step": 9, "val')
            raise OSError(28, "No space left on device")
        write(path, before, after)

    monkeypatch.setattr("gradflow.watching.monitor.append", failing)
    for step, batch in enumerate(batches(60)):
        full[0] = 15 < step < 35
        monitor(batch)
    assert gf.read_history(path) == monitor.history
    resumed = gf.Monitor(network(), nn.CrossEntropyLoss(), every=10, path=tmp_path / "resumed.jsonl")
    full[0] = True
    resumed.load_state_dict(monitor.state_dict())
    full[0] = False
    for batch in batches(30):
        resumed(batch)
    assert gf.read_history(tmp_path / "resumed.jsonl") == resumed.history
    assert resumed.history.steps[0] == 0


def test_a_history_of_another_model_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "history.jsonl"
    gf.Monitor(network(), nn.CrossEntropyLoss(), path=path)(next(batches(1)))
    with pytest.raises(ModelInputError, match="is of a model with layers 0, 1, 2, which"):
        gf.Monitor(nn.ModuleDict({"a": nn.Linear(2, 2)}), None, path=path)
    with pytest.raises(ModelInputError, match="is a folder"):
        gf.Monitor(network(), None, path=tmp_path)
