"""What sessions measured, as fields and extras of the record; and the check that no two share a name."""

from __future__ import annotations

import functools
import itertools
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from gradflow.errors import MeasurementError
from gradflow.functional.measurement import Measurement, Session
from gradflow.records import FlowRecord, PartsRecord, frozen, unkept

# Fields of the record that measurements of gradflow fill, where what they give is of that class.
FILLED = frozenset({"transformer", "recurrences", "policy", "parts", "precision"})


def check_names(measurements: Iterable[Measurement]) -> None:
    """Check the names that measurements declare (`Measurement.names`), before anything runs.

    Raises:
        MeasurementError: if two declare the same, or one a field of the record.
    """
    owners: dict[str, Measurement] = {}
    fields = {field.name for field in attrs.fields(FlowRecord)}
    for measurement in measurements:
        names = getattr(measurement, "names", ())
        for name in (names,) if isinstance(names, str) else names:
            if name in fields:
                raise MeasurementError(
                    f"measurements: {measurement!r} gives {name!r}, which is a field of FlowRecord itself. "
                    "Give it another name, in `names` and in what its session's fields() returns."
                )
            if name in owners:
                raise MeasurementError(
                    f"measurements: {measurement!r} gives {name!r}, and so does {owners[name]!r}. One of "
                    "them needs another name, in `names` and in what its session's fields() returns."
                )
            owners[name] = measurement


@attrs.frozen(kw_only=True)
class Measured:
    """What all sessions of a run measured.

    Args:
        fields: fields of the record.
        extras: the rest, by name.
        notes: what a reader must know of both.
        found: what sessions found of their own accord.
    """

    fields: Mapping[str, Any]
    extras: Mapping[str, Any]
    notes: tuple[str, ...]
    found: tuple[str, ...]


def measured(sessions: Iterable[Session]) -> Measured:
    """Return what sessions measured. What is wrong with a name or a value is noted: the run is not lost."""
    hints = _hints()
    fields: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    notes: list[str] = []
    found: list[str] = []
    for session in sessions:
        kind = type(session).__name__
        given: Any = session.fields()
        if not isinstance(given, Mapping):
            said = type(given).__name__
            notes.append(f"What {kind} measured is left out: fields() gave {said}, expected a mapping.")
            given = {}
        for name, value in given.items():
            if name in FILLED and _fits(value, hints[name]):
                known = fields.get(name)
                fields[name] = known.joined(value) if isinstance(known, PartsRecord) else value
            elif problem := unkept(frozen(value), f"extras[{name!r}]"):
                notes.append(f"What {kind} measured is left out: {problem}.")
            else:
                place = _free_name(str(name), extras)
                extras[place] = value
                if place != name:
                    notes.append(f"{name!r} was given before: that of {kind} is extras[{place!r}].")
        notes += session.notes()
        found += session.found()
    return Measured(fields=fields, extras=extras, notes=tuple(notes), found=tuple(found))


@functools.cache
def _hints() -> Mapping[str, Any]:
    return typing.get_type_hints(FlowRecord)


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    if name not in taken:
        return name
    return next(other for i in itertools.count(2) if (other := f"{name}@{i}") not in taken)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the records that a field holds, rather than of the same name by chance."""
    if isinstance(hint, type) and attrs.has(hint):
        return isinstance(value, hint)
    parts = [part for part in typing.get_args(hint) if isinstance(part, type) and attrs.has(part)]
    if typing.get_origin(hint) is tuple:
        return bool(parts) and isinstance(value, tuple) and all(isinstance(v, parts[0]) for v in value)
    return isinstance(value, tuple(parts))
