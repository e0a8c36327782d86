"""`HistoryRecord`: a training over time, look by look, in plain numbers; and what was said of it when."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import attrs
import numpy as np

from gradflow.errors import RecordInputError, UnknownLayerError
from gradflow.records.fields import NAN, Floats, Ints, array_field, mapping_field, to_tuple
from gradflow.records.flow import read
from gradflow.records.issues import AnyIssueType, IssueSeverity, type_place
from gradflow.records.saving.plain import FORMAT_VERSION, from_plain, write


@attrs.frozen(kw_only=True)
class EventRecord:
    """An issue over the time of a training.

    Args:
        layer: the layer at fault, as in `Issue`.
        issue_type: of what.
        severity: the gravest that it had.
        since: the step of the look that first showed it.
        told: the step at which it was certain, and told.
        until: the step of the look that no longer showed it; None while it lasts.
        description: what was said of it when it was told.
    """

    layer: str
    issue_type: AnyIssueType
    severity: IssueSeverity
    since: int
    told: int
    until: int | None = None
    description: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Layer and type: what tells one issue from another."""
        return self.layer, self.issue_type.value


@attrs.frozen(kw_only=True, repr=False)
class HistoryRecord:
    """What the looks at a training measured, one column of numbers each; no verdicts but for the events.

    Args:
        steps: the training step of every look, shape (looks,), rising.
        names: of the series, as `every_scalar` gives them: `loss`, `gradient_rms/encoder.0`, ...
        values: shape (looks, series); NaN where a look did not give the number.
        types: class names of the layers, by layer call.
        events: the issues that were told, in the order of their beginnings.
        notes: what a reader must know: looks that failed, and why.

    >>> history = HistoryRecord.empty().with_look(0, {"loss": 2.3}).with_look(100, {"loss": 0.4})
    >>> history["loss"].tolist(), history.steps.tolist()
    ([2.3, 0.4], [0, 100])
    """

    format_version: ClassVar[int] = FORMAT_VERSION

    steps: Ints = array_field(np.int64)
    names: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    values: Floats = array_field(axes=2)
    types: Mapping[str, str] = mapping_field()
    events: tuple[EventRecord, ...] = attrs.field(default=(), converter=to_tuple)
    notes: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)

    @classmethod
    def empty(cls) -> HistoryRecord:
        """Return the history of a training that was not looked at yet."""
        return cls(steps=np.empty(0, np.int64), values=np.empty((0, 0)))

    def __len__(self) -> int:
        """The number of looks."""
        return len(self.steps)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Floats:
        """Return a series, shape (looks,).

        Raises:
            UnknownLayerError: if there is none of that name; the message lists the nearest ones.
        """
        if name not in self._places:
            raise UnknownLayerError.at(name, self.names)
        return self.values[:, self._places[name]]

    def of(self, quantity: str) -> dict[str, Floats]:
        """Return all series of a quantity by what they are about, each of shape (looks,).

        >>> HistoryRecord.empty().with_look(0, {"weight_rms/fc": 0.1}).of("weight_rms")
        {'fc': array([0.1])}
        """
        return {where: self.values[:, place] for where, place in self._of_quantity.get(quantity, {}).items()}

    @functools.cached_property
    def _of_quantity(self) -> dict[str, dict[str, int]]:
        """By quantity, where each series of it is, by what it is about."""
        found: dict[str, dict[str, int]] = {}
        for name, place in self._places.items():
            quantity, slash, where = name.partition("/")
            if slash:
                found.setdefault(quantity, {})[where] = place
        return found

    def with_look(self, step: int, numbers: Mapping[str, float]) -> HistoryRecord:
        """Return the history with one look more.

        Args:
            step: of the training; after those that are here.
            numbers: by name. A name that is new is NaN before, one that is missing is NaN now.

        Raises:
            RecordInputError: if the step is not after the last one.
        """
        if len(self) and step <= self.steps[-1]:
            raise RecordInputError(
                f"HistoryRecord.with_look: step {step} is not after the last look, at step {self.steps[-1]}. "
                "Looks are added in the order of the training; pass `step=` the training's own count."
            )
        names, values = self._widened(numbers, len(self) + 1)
        values[-1] = [numbers.get(name, NAN) for name in names]
        return attrs.evolve(self, steps=[*self.steps, step], names=names, values=values)

    def with_numbers(self, step: int, numbers: Mapping[str, float]) -> HistoryRecord:
        """Return the history with numbers that became known after a look: what its update has done, say.

        Raises:
            UnknownLayerError: if there was no look at that step.
        """
        at = np.flatnonzero(self.steps == step)
        if not len(at):
            raise UnknownLayerError.at(str(step), [str(known) for known in self.steps])
        names, values = self._widened(numbers, len(self))
        values[at[0]] = [numbers.get(name, value) for name, value in zip(names, values[at[0]], strict=True)]
        return attrs.evolve(self, names=names, values=values)

    def _widened(self, names: Iterable[str], looks: int) -> tuple[tuple[str, ...], Floats]:
        """Return the names with new ones behind them, and the values with room for so many looks."""
        every = (*self.names, *(name for name in names if name not in self._places))
        values = np.full((looks, len(every)), NAN)
        values[: len(self), : len(self.names)] = self.values
        return every, values

    def with_events(self, *events: EventRecord) -> HistoryRecord:
        """Return the history with events added, in the place of those of the same beginning and issue."""
        if all(event in self.events for event in events):
            return self
        kept = {(*event.key, event.since): event for event in (*self.events, *events)}
        ordered = sorted(kept.values(), key=lambda e: (e.since, e.told, e.layer, type_place(e.issue_type)))
        return attrs.evolve(self, events=ordered)

    def with_types(self, types: Mapping[str, str]) -> HistoryRecord:
        """Return the history with the class names of more layers, by layer call."""
        if all(self.types.get(name) == kind for name, kind in types.items()):
            return self
        return attrs.evolve(self, types={**self.types, **types})

    def with_notes(self, *sentences: str) -> HistoryRecord:
        """Return the history with what else a reader must know."""
        return attrs.evolve(self, notes=(*self.notes, *sentences))

    def thinned(self, most: int) -> HistoryRecord:
        """Return the history in bounded space: the older the looks, the further apart those that are kept.

        The first look is kept and the latter half of `most`. Between them those go first whose neighbours are
        nearest for their age, so that what is left lies at times that grow by about a constant factor.

        Args:
            most: how many looks to keep; at least 4.
        """
        kept = np.arange(len(self))
        while len(kept) > most:
            steps = self.steps[kept]
            apart = (steps[2:] - steps[:-2]) / (steps[-1] - steps[1:-1] + 1)
            kept = np.delete(kept, 1 + int(np.argmin(apart[: len(kept) - most // 2 - 1])))
        return (
            self
            if len(kept) == len(self)
            else attrs.evolve(self, steps=self.steps[kept], values=self.values[kept])
        )

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def __repr__(self) -> str:
        span = f"steps {self.steps[0]} to {self.steps[-1]}" if len(self) else "no step"
        return (
            f"HistoryRecord({len(self)} looks, {span}, {len(self.names)} series, {len(self.events)} events)"
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the history as strict JSON, and write it to `path` where one is given."""
        return write(self, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> HistoryRecord:
        """Return the history from JSON text, or from a file of it.

        Raises:
            RecordFormatError: if it is no history of this format; the message tells the field.
            FileNotFoundError: if it is a `Path` to no file.
        """
        return from_plain(cls, read(source))
