"""Trackers, each with its real library: what is written is read back from the files."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import gradflow as gf
from gradflow.integrations.trackers import (
    Tracker,
    json_lines_tracker,
    mlflow_tracker,
    tensorboard_tracker,
    wandb_tracker,
)
from gradflow.records import FlowRecord, few_scalars
from tests.integrations.trainings import train

LOOKS = [0, 1, 4, 16, 20, 40]  # of 60 steps, every=20; a sick one is looked at more closely besides


def tracked(tracker: Any, *, dead: bool = False) -> tuple[dict[int, gf.Report], gf.Monitor]:
    """Return the last report of every step that was told of in a training, and the monitor."""
    reports: dict[int, gf.Report] = {}

    def watch(model: nn.Module, optimizer: Any) -> gf.Monitor:
        monitor = gf.Monitor(model, nn.CrossEntropyLoss(), optimizer, every=20)
        monitor.on_look(lambda report, step: reports.update({step: report}))
        monitor.on_look(tracker)
        return monitor

    return reports, train(watch, dead=dead)


def report(loss: float = 0.5) -> gf.Report:
    return gf.Report(record=FlowRecord(steps=1, losses=[loss], layers=(), parameters=()))


# ------------------------------------------------------------------------------------------- scalars


def test_scalars_of_a_report_are_the_records_and_the_counts_of_its_issues() -> None:
    reports, _ = tracked(lambda report, step: None, dead=True)
    last = reports[max(reports)]
    few, every = last.scalars(), last.scalars("all")
    assert {n: v for n, v in few.items() if not n.startswith("issues/")} == few_scalars(last.record)
    assert len(every) != len(few)
    assert every["weight_rms/4.bias"] == pytest.approx(100.0, rel=1e-3)
    for severity in gf.IssueSeverity:
        number = sum(issue.severity is severity for issue in last.issues)
        assert few[f"issues/{severity.value.lower()}"] == every[f"issues/{severity.value.lower()}"] == number
    assert sum(few[f"issues/{s}"] for s in ("critical", "high")) > 0
    assert all(type(v) is float for v in every.values())


def test_other_scalars_are_refused() -> None:
    with pytest.raises(ValueError, match="which must be few or all, got 'many'"):
        report().scalars("many")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which must be few or all, got 'many'"):
        Tracker(lambda scalars, report, step: None, which="many")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- trackers


def test_a_report_is_written_where_its_grave_issues_change() -> None:
    written: list[tuple[int, bool]] = []
    tracker = Tracker(lambda scalars, report, step: written.append((step, report is not None)))
    reports, _ = tracked(tracker, dead=True)
    grave: set[Any] = set()
    for step, told in written:
        severe = [i for i in reports[step].issues if i.severity >= gf.IssueSeverity.MEDIUM]
        now = {(i.layer, i.issue_type, i.severity) for i in severe}
        assert told == (now != grave), step
        grave = now
    assert [told for _, told in written].count(True) in (1, 2)


def test_json_lines(tmp_path: Path) -> None:
    reports, _ = tracked(json_lines_tracker(tmp_path / "looks.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "looks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == LOOKS
    assert [line["loss"] for line in lines] == [reports[step].scalars()["loss"] for step in LOOKS]
    assert not any("issues" in line for line in lines)


def test_json_lines_tell_of_issues_and_of_numbers_that_json_lacks(tmp_path: Path) -> None:
    tracked(json_lines_tracker(tmp_path / "looks.jsonl", which="all", prefix="a/"), dead=True)
    json_lines_tracker(tmp_path / "looks.jsonl")(report(float("inf")), 99)
    *lines, last = [json.loads(line) for line in (tmp_path / "looks.jsonl").read_text().splitlines()]
    told = next(line["issues"] for line in lines if "issues" in line)
    assert ("5", "DEAD") in [(issue["layer"], issue["type"]) for issue in told] or told[0]["type"] == "DEAD"
    assert set(told[0]) == {"layer", "type", "severity", "description"}
    assert "a/weight_rms/4.bias" in lines[0]
    assert (last["step"], last["loss"]) == (99, "inf")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    try:
        reports, _ = tracked(tensorboard_tracker(writer), dead=True)
        events = EventAccumulator(str(tmp_path))  # before the writer is closed: every look is flushed
        events.Reload()
        losses = events.Scalars("gradflow/loss")
        assert [event.step for event in losses] == sorted(reports)
        assert [e.value for e in losses] == pytest.approx(
            [reports[s].scalars()["loss"] for s in sorted(reports)]
        )
        assert max(event.value for event in events.Scalars("gradflow/issues/critical")) > 0
        (name,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("gradflow/report")]
        assert b"DEAD" in events.Tensors(name)[0].tensor_proto.string_val[0]
    finally:
        writer.close()


def records_of(path: Path) -> Iterator[Any]:
    """Yield the records of a run's file, which lie in blocks as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        kind = struct.unpack("<IHB", data[at : at + 7])[2] if left >= 7 else 0
        if not kind:
            at += left
            continue
        size = struct.unpack("<IHB", data[at : at + 7])[1]
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's file, once its last record is there: another process writes it."""
    for _ in range(200):
        records = list(records_of(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row} for row in rows]


@pytest.mark.parametrize("logs", [True, False])
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: bool) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    reports: dict[int, gf.Report] = {}
    with wandb.init(project="test", dir=str(tmp_path), mode="offline") as run:
        own = Tracker(lambda scalars, report, step: run.log({"mine": step}, step=step))
        tracker = wandb_tracker(None if logs else run)

        def both(report: gf.Report, step: int) -> None:
            reports[step] = report
            if logs:
                own(report, step)
            tracker(report, step)

        tracked(both, dead=True)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [row for row in rows_of(file) if "gradflow/step" in row]
    assert [row["gradflow/step"] for row in rows] == sorted(reports)
    assert [r["gradflow/loss"] for r in rows] == [reports[s].scalars()["loss"] for s in sorted(reports)]
    if logs:
        assert [row["mine"] for row in rows] == [row["_step"] for row in rows] == sorted(reports)
    pages = list(tmp_path.glob("wandb/offline-run-*/files/media/html/gradflow/report*.html"))
    assert pages
    assert any("DEAD" in page.read_text() for page in pages)


def test_weights_and_biases_needs_a_run() -> None:
    pytest.importorskip("wandb")
    with pytest.raises(RuntimeError, match=r"there is no run yet; call `wandb.init"):
        wandb_tracker()


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"file:{tmp_path}/runs")
    try:
        with mlflow.start_run() as run:
            reports, _ = tracked(mlflow_tracker(), dead=True)
        mlflow_tracker(run.info.run_id, prefix="again@1/")(report(0.25), 7)
        client = mlflow.MlflowClient()
        seen = client.get_metric_history(run.info.run_id, "gradflow/loss")
        assert {metric.step: metric.value for metric in seen} == {
            s: r.scalars()["loss"] for s, r in reports.items()
        }
        (more,) = client.get_metric_history(run.info.run_id, "again_1/loss")
        assert (more.step, more.value) == (7, 0.25)
        pages = client.list_artifacts(run.info.run_id, "gradflow")
        assert pages
        text = Path(client.download_artifacts(run.info.run_id, pages[0].path, str(tmp_path))).read_text()
        assert "DEAD" in text
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize(("make", "name"), [(wandb_tracker, "wandb"), (mlflow_tracker, "mlflow")])
def test_what_is_not_installed_is_named(make: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'gradient-flow\[{name}\]'"):
        make()


# ---------------------------------------------------------------------------------- the monitor's hooks


def test_what_on_look_raises_comes_through() -> None:
    monitor = gf.Monitor(nn.Linear(2, 1), lambda y: y.sum())
    monitor.on_look(lambda report, step: 1 / 0)
    import torch

    with pytest.raises(ZeroDivisionError):
        monitor(torch.ones(2, 2))
    with pytest.raises(gf.GradflowError, match=r"on_look: 3 cannot be called\. Pass a function of \(report"):
        monitor.on_look(3)  # type: ignore[arg-type]
