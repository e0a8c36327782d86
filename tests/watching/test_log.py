"""The history's file: only grows, survives a kill at any byte, and is taken up again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.errors import RecordFormatError
from gradflow.records import EventRecord, HistoryRecord, IssueSeverity, IssueType
from gradflow.watching.log import append, mend


def history() -> HistoryRecord:
    event = EventRecord(
        layer="fc",
        issue_type=IssueType.DEAD,
        severity=IssueSeverity.HIGH,
        since=0,
        told=4,
        description="dead.",
    )
    found = HistoryRecord.empty().with_types({"fc": "Linear"})
    found = found.with_look(0, {"loss": 1.0, "weight_rms/fc.weight": 0.1})
    found = found.with_numbers(0, {"update_ratio/fc.weight": np.inf}).with_events(event)
    return found.with_look(4, {"loss": np.nan}).with_notes("Step 4: a jump.")


def steps_of(path: Path) -> list[HistoryRecord]:
    """Return a history as it grows, each written to a file beyond the one before."""
    event = history().events[0]
    grown = [HistoryRecord.empty()]
    grown.append(
        grown[-1].with_types({"fc": "Linear"}).with_look(0, {"loss": 1.0, "weight_rms/fc.weight": 0.1})
    )
    grown.append(grown[-1].with_numbers(0, {"update_ratio/fc.weight": np.inf}).with_events(event))
    grown.append(grown[-1].with_look(4, {"loss": np.nan}).with_notes("Step 4: a jump."))
    for before, after in zip(grown, grown[1:], strict=False):
        append(path, before, after)
    return grown


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "history.jsonl"
    grown = steps_of(path)
    assert gf.read_history(path) == grown[-1] == history()


def test_an_event_takes_the_place_of_its_former_state(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    grown = steps_of(path)
    import attrs

    over = grown[-1].with_events(attrs.evolve(grown[-1].events[0], until=4))
    append(path, grown[-1], over)
    assert gf.read_history(path).events == over.events
    assert len(over.events) == 1


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    grown = steps_of(path)
    size = path.stat().st_size
    append(path, grown[-1], grown[-1])
    assert path.stat().st_size == size


def test_a_file_cut_at_any_byte_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    whole = steps_of(path)[-1]
    data = path.read_bytes()
    looks = set()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        found = gf.read_history(path)
        looks.add(len(found))
        assert found.steps.tolist() == whole.steps[: len(found)].tolist()
        mend(path)
        assert path.read_bytes() == data[: data[:end].rfind(b"\n") + 1]
    assert looks == {0, 1, 2}


def test_what_is_no_history_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    with pytest.raises(FileNotFoundError):
        gf.read_history(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(RecordFormatError, match="line 1 of .*history.jsonl: expected"):
        gf.read_history(path)
    steps_of(tmp_path / "other.jsonl")
    lines = (tmp_path / "other.jsonl").read_text().splitlines()
    for bad in ('{"step": 9, "values": [1]}', '{"step": 7, "numbers": {"loss": 1}}', '{"what": 1}', "[", "3"):
        path.write_text("\n".join([*lines, bad]) + "\n")
        with pytest.raises(RecordFormatError, match=f"line {len(lines) + 1} of"):
            gf.read_history(path)


def test_a_training_is_taken_up_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), nn.MSELoss()
    first = gf.Monitor(model, loss_fn, every=10, path=path)
    for _ in range(25):
        first((torch.randn(8, 4), torch.randn(8, 1)))
    assert gf.read_history(path) == first.history
    second = gf.Monitor(model, loss_fn, every=10, path=path)
    assert second.history == first.history
    for _ in range(25):
        second((torch.randn(8, 4), torch.randn(8, 1)))
    assert second.history.steps.tolist() == [0, 1, 4, 10, 20, 21, 30, 40]
    assert gf.read_history(path) == second.history


def test_in_memory_it_is_bounded_and_on_disk_whole(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    model = nn.Linear(4, 1)
    monitor = gf.Monitor(model, lambda y: y.square().mean(), every=1, most=8, path=path)
    for _ in range(40):
        monitor(torch.randn(8, 4))
    assert len(monitor.history) <= 8
    assert monitor.history.steps[0] == 0
    assert gf.read_history(path).steps.tolist() == list(range(40))
