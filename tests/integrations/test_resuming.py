"""A training that is killed, or stopped and taken up again: what was seen is kept, and goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import gradflow as gf
from tests.integrations.trainings import Batch, batches, network, train

KILLED = """
import sys
from torch import nn
import gradflow as gf
from tests.integrations.trainings import train

def watch(model, optimizer):
    monitor = gf.Monitor(model, nn.CrossEntropyLoss(), optimizer, every=5, path=sys.argv[1])
    monitor.on_look(lambda report, step: print(step, report.scalars()["loss"], flush=True))
    return monitor

train(watch, steps=20_000)
"""


def monitor_of(model: nn.Module, **options: Any) -> gf.Monitor:
    return gf.Monitor(model, nn.CrossEntropyLoss(), **options)


def looks(monitor: gf.Monitor, drawn: list[Batch]) -> list[int]:
    """Return the steps at which a monitor has looked, of calls with these batches."""
    seen: list[int] = []
    monitor.on_look(lambda report, step: seen.append(step))
    for batch in drawn:
        monitor(batch)
    return seen


def test_a_killed_job_leaves_its_history_and_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        told = [job.stdout.readline().split() for _ in range(20)]
        job.send_signal(signal.SIGKILL)
        told += [line.split() for line in job.stdout.read().splitlines()]
    assert job.returncode == -signal.SIGKILL
    history = gf.read_history(path)
    # the file is written before a look is told: all that were told are there, and at most one more
    steps = [int(step) for step, _ in told]
    assert history.steps[: len(told)].tolist() == steps
    assert len(history) - len(told) in (0, 1)
    assert history["loss"][: len(told)].tolist() == [float(loss) for _, loss in told]
    with path.open("ab") as file:
        file.write(b'{"step": 999, "val')  # as a kill in the midst of writing leaves it
    again = train(lambda m, o: gf.Monitor(m, nn.CrossEntropyLoss(), o, every=5, path=path), steps=12)
    assert again.history.steps[: len(history)].tolist() == history.steps.tolist()
    last = int(history.steps[-1])
    assert again.history.steps[len(history)] == last + 1
    assert gf.read_history(path).steps.tolist() == again.history.steps.tolist()
    np.testing.assert_array_equal(gf.read_history(path)["loss"], again.history["loss"])


def test_a_checkpoint_takes_the_monitor_with_it() -> None:
    first, drawn = monitor_of(network(), every=10), batches(61)
    assert looks(first, drawn[:25]) == [0, 1, 4, 10, 20]
    second = monitor_of(network(), every=10)
    second.load_state_dict(first.state_dict())
    assert second.history.to_json() == first.history.to_json()
    assert looks(second, drawn[25:]) == [25, 30, 40, 50, 60]
    assert second.history.steps.tolist() == [0, 1, 4, 10, 20, 25, 30, 40, 50, 60]


def test_a_checkpoint_without_its_file_fills_the_new_one(tmp_path: Path) -> None:
    first = monitor_of(network(), every=10)
    looks(first, batches(25))
    second = monitor_of(network(), every=10, path=tmp_path / "new.jsonl")
    second.load_state_dict(first.state_dict())
    assert gf.read_history(tmp_path / "new.jsonl").to_json() == first.history.to_json()
    looks(second, batches(6))
    assert gf.read_history(tmp_path / "new.jsonl").steps.tolist() == [0, 1, 4, 10, 20, 25, 30]


def test_steps_that_a_checkpoint_repeats_are_not_looked_at_again(tmp_path: Path) -> None:
    """The file goes on to step 40, the checkpoint was saved after step 24."""
    first = monitor_of(network(), every=10, path=tmp_path / "history.jsonl")
    looks(first, batches(25))
    checkpoint = first.state_dict()
    looks(first, batches(16))
    second = monitor_of(network(), every=10, path=tmp_path / "history.jsonl")
    second.load_state_dict(checkpoint)
    x, y = batches(1)[0]
    assert second((x, y), loss=1e9) is None  # step 25, a jump: was gone through before
    assert looks(second, batches(26)) == [41, 50]
    assert second.history.notes == ()
    assert second.history.steps.tolist() == [0, 1, 4, 10, 20, 30, 40, 41, 50]


def test_a_batch_is_needed_only_where_a_look_is_due() -> None:
    monitor = monitor_of(network(), every=10)
    for batch in batches(21):
        monitor(batch if monitor.is_due else None)
    assert monitor.history.steps.tolist() == [0, 1, 4, 10, 20]
    assert monitor.history.notes == ()


@pytest.mark.parametrize("state", [{}, {"history": "{}"}, None, 3])
def test_what_is_no_state_is_refused(state: Any) -> None:
    message = r"load_state_dict: expected what `monitor.state_dict\(\)` returned"
    with pytest.raises(gf.GradflowError, match=message):
        monitor_of(network()).load_state_dict(state)
    with pytest.raises(gf.errors.RecordFormatError, match="format"):
        monitor_of(network()).load_state_dict({"history": "{}", "step": 0})
