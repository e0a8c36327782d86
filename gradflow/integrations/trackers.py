"""Trackers of experiments: functions that write what a look has seen to where its user looks.

Each is handed to a monitor or a callback once: `monitor.on_look(tensorboard_tracker(writer))`. At every look
it writes the report's scalars, and the report itself whenever its grave issues are others than before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gradflow.records import Issue, IssueSeverity, to_plain
from gradflow.report import Report

Which = Literal["few", "all"]
Write = Callable[[dict[str, float], Report | None, int], Any]


class Tracker:
    """Writes the report of a look: a function of (report, step), for `Monitor.on_look`.

    Args:
        write: is called with the scalars by name, the report where its issues of severity MEDIUM or above are
            others than at the look before (else None), and the step.
        which: of the scalars; as for `Report.scalars`.
        prefix: put before their names.

    Raises:
        ValueError: if `which` is neither `few` nor `all`.

    >>> from gradflow.records import FlowRecord
    >>> seen = []
    >>> tracker = Tracker(lambda scalars, report, step: seen.append((step, scalars["gradflow/loss"])))
    >>> tracker(Report(record=FlowRecord(steps=1, losses=[0.5], layers=(), parameters=())), 200)
    >>> seen
    [(200, 0.5)]
    """

    def __init__(self, write: Write, *, which: Which = "few", prefix: str = "gradflow/") -> None:
        if which not in ("few", "all"):
            raise ValueError(f"which must be few or all, got {which!r}.")
        self._write, self._prefix = write, prefix
        self._which: Which = which
        self._told: set[tuple[str, str, IssueSeverity]] = set()

    def __call__(self, report: Report, step: int) -> None:
        """Write what a look has seen."""
        scalars = {f"{self._prefix}{name}": value for name, value in report.scalars(self._which).items()}
        now = {_key(issue) for issue in report.issues if issue.severity.is_serious}
        changed, self._told = now != self._told, now
        self._write(scalars, report if changed else None, step)

    def under(self, name: str) -> Tracker:
        """Return a tracker that writes to the same place, with a name before the names of what it writes."""
        return Tracker(self._write, which=self._which, prefix=f"{self._prefix}{name}/")


def _key(issue: Issue) -> tuple[str, str, IssueSeverity]:
    return issue.layer, issue.issue_type.value, issue.severity


def tensorboard_tracker(writer: Any, *, which: Which = "few", prefix: str = "gradflow/") -> Tracker:
    """Return a tracker that writes to TensorBoard: a curve per scalar, and the report as text.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar`, `add_text` and
            `flush`. The last is called at every look, so that a killed training leaves what was seen.
        which, prefix: as for `Tracker`.
    """

    def write(scalars: dict[str, float], report: Report | None, step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        if report is not None:
            text = "".join(f"    {line}\n" for line in report.text("full").splitlines())  # Markdown's code
            writer.add_text(f"{prefix}report", text, step)
        writer.flush()

    return Tracker(write, which=which, prefix=prefix)


def wandb_tracker(run: Any = None, *, which: Which = "few", prefix: str = "gradflow/") -> Tracker:
    """Return a tracker that writes to a run of Weights & Biases: scalars, and the report as a page.

    What is written is plotted over a step of its own, `gradflow/step`, and joins the row that the run is at.
    The run's own count of rows is left alone, unless two looks would fall into one row.

    Args:
        run: what `wandb.init` returned; None for `wandb.run`.
        which, prefix: as for `Tracker`.

    Raises:
        ImportError: if wandb is not installed.
        RuntimeError: if there is no run.
    """
    wandb = _wandb()
    run = wandb.run if run is None else run
    if run is None:
        raise RuntimeError("wandb_tracker: there is no run yet; call `wandb.init(project=...)` first.")
    axis = f"{prefix}step"
    run.define_metric(axis, hidden=True)
    run.define_metric(f"{prefix}*", step_metric=axis)
    rows: set[int] = set()

    def write(scalars: dict[str, float], report: Report | None, step: int) -> None:
        row: dict[str, Any] = {axis: step, **scalars}
        if report is not None:
            row[f"{prefix}report"] = wandb.Html(report.html(), inject=False)
        if run.step in rows:
            run.log({}, commit=True)
        rows.clear()
        rows.add(run.step)
        run.log(row, commit=False)

    return Tracker(write, which=which, prefix=prefix)


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "wandb_tracker needs Weights & Biases: pip install 'gradient-flow[wandb]'."
        ) from error
    return wandb


def mlflow_tracker(run_id: str | None = None, *, which: Which = "few", prefix: str = "gradflow/") -> Tracker:
    """Return a tracker that writes to a run of MLflow: its metrics, and reports as pages among its artifacts.

    Args:
        run_id: of the run; None for the one that is active at the look, or that `mlflow` starts then.
        which, prefix: as for `Tracker`.

    Raises:
        ImportError: if mlflow is not installed.
    """
    try:
        import mlflow
    except ImportError as error:
        raise ImportError("mlflow_tracker needs MLflow: pip install 'gradient-flow[mlflow]'.") from error

    def write(scalars: dict[str, float], report: Report | None, step: int) -> None:
        named = {_mlflow_name(name): value for name, value in scalars.items()}
        mlflow.log_metrics(named, step=step, run_id=run_id)
        if report is not None:
            mlflow.log_text(report.html(), f"{prefix}step-{step:08d}.html", run_id=run_id)

    return Tracker(write, which=which, prefix=prefix)


def _mlflow_name(name: str) -> str:
    """Return a name with nothing in it that MLflow refuses (`@` of a layer's later calls)."""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)


def json_lines_tracker(path: str | os.PathLike[str], *, which: Which = "few", prefix: str = "") -> Tracker:
    """Return a tracker that adds a line of JSON per look to a file: step, scalars, issues where they change.

    Numbers that JSON has no word for are the words `nan`, `inf` and `-inf`.

    Args:
        path: of the file; lines are added to what is there.
        which, prefix: as for `Tracker`.
    """
    file = Path(path)

    def write(scalars: dict[str, float], report: Report | None, step: int) -> None:
        line: dict[str, Any] = {"step": step, **to_plain(scalars)}
        if report is not None:
            line["issues"] = [_told(issue) for issue in report.issues]
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{json.dumps(line, allow_nan=False)}\n")

    return Tracker(write, which=which, prefix=prefix)


def _told(issue: Issue) -> dict[str, str]:
    return {
        "layer": issue.layer,
        "type": issue.issue_type.value,
        "severity": issue.severity.value,
        "description": issue.description,
    }
