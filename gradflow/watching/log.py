"""A history on disk: a file of JSON lines that only grows, so that a killed training leaves what was seen.

NOTE [The lines]
The first line tells the format. After it, in the order of the training: `names` (the series that the rows
below have; a later one replaces it), `step` with `values` (a look), `step` with `numbers` (what became known
of it later), `types`, `event` (in the place of an earlier one of the same issue and beginning), `note`.
What a look brings is flushed to the disk at once; a last line without its end, which a kill may leave, is
not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gradflow.errors import ModelInputError, RecordFormatError
from gradflow.functional.run.together.beside import module_of
from gradflow.records import EventRecord, HistoryRecord, from_plain, to_plain
from gradflow.watching.staged import is_staged, names_of

_HEAD = {"gradflow": "history", "format": HistoryRecord.format_version}


def append(path: Path, before: HistoryRecord, after: HistoryRecord) -> None:
    """Write what a history has beyond a former one to the end of a file, which is made if there is none.

    Args:
        path: of the file.
        before: what the file holds.
        after: what it will hold.
    """
    lines = list(_new_lines(before, after))
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if not file.tell():
            lines.insert(0, _HEAD)
        file.write("".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def _new_lines(before: HistoryRecord, after: HistoryRecord) -> Iterator[dict[str, Any]]:
    if after.names != before.names:
        yield {"names": list(after.names)}
    known = {int(step): row for row, step in enumerate(before.steps)}
    for row, step in enumerate(after.steps.tolist()):
        values = after.values[row]
        if step not in known:
            yield {"step": step, "values": to_plain(values)}
            continue
        was = np.full(len(values), np.nan)
        was[: before.values.shape[1]] = before.values[known[step]]
        changed = np.flatnonzero(~((values == was) | (np.isnan(values) & np.isnan(was))))
        if len(changed):
            yield {"step": step, "numbers": {after.names[at]: to_plain(float(values[at])) for at in changed}}
    if types := {name: kind for name, kind in after.types.items() if before.types.get(name) != kind}:
        yield {"types": types}
    written = set(before.events)
    yield from ({"event": to_plain(event)} for event in after.events if event not in written)
    yield from ({"note": note} for note in after.notes[len(before.notes) :])


def read_history(path: str | os.PathLike[str]) -> HistoryRecord:
    """Return the history that a monitor has written, up to its last whole line.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: if there is none.
        RecordFormatError: if it is no history of this format; the message tells the line.
    """
    data = Path(path).read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    steps: list[int] = []
    rows: list[dict[str, float]] = []
    names: list[str] = []
    found = HistoryRecord.empty()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if number == 1 and entry != _HEAD:
                raise ValueError(f"expected {json.dumps(_HEAD)}")
            if "names" in entry:
                names = [str(name) for name in entry["names"]]
            elif "values" in entry:
                steps.append(int(entry["step"]))
                rows.append(dict(zip(names, map(float, entry["values"]), strict=True)))
            elif "numbers" in entry:
                more = {str(name): float(value) for name, value in entry["numbers"].items()}
                rows[steps.index(int(entry["step"]))] |= more
            else:
                found = _with_entry(found, entry)
        except (ValueError, TypeError, KeyError, RecordFormatError) as error:
            raise RecordFormatError.at(f"line {number} of {os.fspath(path)}: {error}") from error
    values = np.array([[row.get(name, np.nan) for name in names] for row in rows])
    return HistoryRecord(
        steps=np.array(steps, dtype=np.int64),
        names=names,
        values=values.reshape(len(steps), len(names)),
        types=found.types,
        events=found.events,
        notes=found.notes,
    )


def _with_entry(history: HistoryRecord, entry: Any) -> HistoryRecord:
    if "event" in entry:
        return history.with_events(from_plain(EventRecord, entry["event"]))
    if "note" in entry:
        return history.with_notes(str(entry["note"]))
    if "types" in entry:
        return history.with_types(entry["types"])
    if entry != _HEAD:
        raise ValueError("expected names, a step, types, an event or a note")
    return history


def resumed(path: Path, model: Any) -> HistoryRecord:
    """Return the history in a file, of this very model.

    Raises:
        ModelInputError: if it is a folder, or the history is another model's.
        RecordFormatError: if the file is no history.
    """
    if path.is_dir():
        raise ModelInputError(f"path={str(path)!r} is a folder; pass the name of a file in it.")
    mend(path)
    history = read_history(path)
    layers = {name.partition("@")[0] for name in history.types}
    known = names_of(model)
    fewest = 1 if is_staged(model) else len(layers) / 2  # the history is of all stages
    if layers and len(layers & known) < fewest:
        raise ModelInputError(
            f"the history in {path} is of a model with layers {', '.join(sorted(layers - known)[:3])}, which "
            f"{type(module_of(model)).__name__} does not have. Pass another path=, or move that file away."
        )
    return history


def mend(path: Path) -> None:
    """Cut a last line without its end off a file, so that more can be added."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
