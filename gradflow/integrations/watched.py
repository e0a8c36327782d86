"""What the callbacks share: monitors that are made when a training begins, and what they are to call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from gradflow.integrations.trackers import Tracker
from gradflow.records import HistoryRecord, Issue
from gradflow.report import Report
from gradflow.watching import Monitor


class Watched:
    """The monitors of a training that a library runs: one, or one for each loss that is trained by itself.

    Args:
        every: steps between two looks in the long run.
        path: a file for the history, as for `Monitor`. Where there are several monitors, the name of each is
            put before the file's ending.
        pipeline: judges a look; as for `gradflow.diagnose`.

    Attributes:
        monitors: by name; the only one of a training that has one loss is named "". Empty before it begins.
    """

    def __init__(self, every: int, path: str | os.PathLike[str] | None, pipeline: Any) -> None:
        self._options = {"every": every, "pipeline": pipeline}
        self._path = None if path is None else Path(path)
        self._wishes: list[Callable[[str, Monitor], None]] = []
        self._saved: Mapping[str, Any] = {}
        self.monitors: dict[str, Monitor] = {}

    @property
    def history(self) -> HistoryRecord:
        """What the first monitor's looks have measured; empty before the training begins."""
        return self._first.history if self.monitors else HistoryRecord.empty()

    @property
    def report(self) -> Report | None:
        """The first monitor's last report; None before its first look."""
        return self._first.report if self.monitors else None

    @property
    def _first(self) -> Monitor:
        return next(iter(self.monitors.values()))

    def on_issue(self, function: Callable[[Issue, int], Any], severity: Any = "HIGH") -> None:
        """Have a function called when an issue is told; see `Monitor.on_issue`."""
        self._wish(lambda name, monitor: monitor.on_issue(function, severity))

    def on_look(self, function: Callable[[Report, int], Any]) -> None:
        """Have a function called with the report of every look; see `Monitor.on_look`.

        Where there are several monitors, a tracker writes what each has seen under its name.
        """

        def listen(name: str, monitor: Monitor) -> None:
            if name and isinstance(tracker := cast(object, function), Tracker):
                monitor.on_look(tracker.under(name))
            else:
                monitor.on_look(function)

        self._wish(listen)

    def _wish(self, wish: Callable[[str, Monitor], None]) -> None:
        self._wishes.append(wish)
        for name, monitor in self.monitors.items():
            wish(name, monitor)

    def watch(
        self, name: str, model: nn.Module, forward_fn: Callable[[nn.Module, Any], Any], optimizer: Any
    ) -> Monitor:
        """Return the monitor of a name, which is made if there is none yet for this model.

        Args:
            name: "" where it is the only one.
            model: that is trained.
            forward_fn: from the model and a batch to the loss.
            optimizer: of the model.
        """
        known = self.monitors.get(name)
        if known is not None and known.model is model:
            return known
        path = self._path
        if path is not None and name:
            path = path.with_name(f"{path.stem}-{name}{path.suffix}")
        monitor = Monitor(model, None, optimizer, forward_fn=forward_fn, path=path, **self._options)
        saved = self._saved.get(name) if known is None else known.state_dict()
        if saved is not None:
            monitor.load_state_dict(saved)
        self.monitors[name] = monitor
        for wish in self._wishes:
            wish(name, monitor)
        return monitor

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the monitors by name, for a checkpoint."""
        return {name: monitor.state_dict() for name, monitor in self.monitors.items()} or dict(self._saved)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, as `Monitor.load_state_dict` does."""
        self._saved = dict(state)
        for name, monitor in self.monitors.items():
            if name in state:
                monitor.load_state_dict(state[name])
