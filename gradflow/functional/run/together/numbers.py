"""The numbers of a run on several processes, combined: in a few exchanges, however many layers and steps.

NOTE [How numbers combine]
Every process brings a vector of all its numbers, in the same order; where one has no such number (a layer
that only others run), it counts as absent. Along an axis that splits what a number is of, norms are combined
as roots of sums of squares, over the largest so that no square leaves the range of a number, and counts by
addition; along one that does not, all have the same, and it is the mean of those that have it. Means over
samples are kept as vectors until here, as the norm of a mean is not to be had from norms; so are the peaks of
units, of which the largest counts, and which of them are always saturated, which all must say.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gradflow.functional.processes.group import Axis, Processes
from gradflow.functional.processes.line import Line
from gradflow.functional.run.history import History
from gradflow.functional.run.rows import NORMS, Layout, Row
from gradflow.functional.run.run import Run
from gradflow.functional.run.together.split import beside, numbered, split_of
from gradflow.functional.tap.calls import ActivationKey, Call
from gradflow.records import Floats, ProcessesRecord

_MEANT = ("loss", "width")  # alike on all, or to be averaged
_OF_PARAMETERS = ("norm", "pgrad", "pzeros")
Entry = tuple[int, str, Hashable]  # a step, a kind of number, and what it is of
Unit = tuple[Any, ...]  # what a vector is of


@attrs.frozen
class Content:
    """What numbers a process has.

    Args:
        entries: its single numbers.
        means: sizes of its vectors of means.
        peaks: sizes of its peaks; −1 where units cannot be told apart.
        stuck: the same of which units are stuck.
        calls: (name, module, type, number, whether others are called in it, whether its inputs are
            differentiable, shape) of its layer calls.
    """

    entries: tuple[Entry, ...]
    means: tuple[tuple[Unit, int], ...]
    peaks: tuple[tuple[ActivationKey, int], ...]
    stuck: tuple[tuple[ActivationKey, int], ...]
    calls: tuple[tuple[Any, ...], ...]


@attrs.frozen(eq=False)
class _Own:
    """The numbers of this process."""

    values: dict[Entry, tuple[float, float]]  # and the counts behind them
    means: dict[Unit, tuple[Tensor, int]]

    @classmethod
    def of(cls, history: History) -> _Own:
        values: dict[Entry, tuple[float, float]] = {}
        for step, row in enumerate(history.rows):
            for (kind, key), value, count in zip(row.layout.places, row.values, row.counts, strict=True):
                if kind != "least_peak":
                    old = values.get((step, kind, key))  # several outputs of one call
                    values[step, kind, key] = (
                        (float(value), float(count))
                        if old is None
                        else (
                            float(np.hypot(old[0], value) if kind in NORMS else old[0] + value),
                            old[1] + count,
                        )
                    )
            for name, size in zip(row.layout.calls, row.sizes, strict=True):
                values[step, "size", name] = (float(size), 1.0)
        means = {
            (step, name, i): mean
            for (step, name), vectors in history.means.items()
            for i, mean in enumerate(vectors)
        }
        return cls(values, means)

    def content(self, history: History, processes: Processes) -> Content:
        def sizes(found: Mapping[ActivationKey, Tensor | None]) -> tuple[tuple[ActivationKey, int], ...]:
            return tuple((key, -1 if units is None else units.numel()) for key, units in found.items())

        return Content(
            tuple(self.values),
            tuple((unit, vector.numel()) for unit, (vector, _) in self.means.items()),
            sizes(history.peaks),
            sizes(history.stuck),
            tuple(
                (
                    *(c.name, c.module, c.type, c.number, c.has_children, c.differentiable, c.shape),
                    numbered(processes, c.split),
                    numbered(processes, c.entering),
                )
                for c in history.calls.values()
            ),
        )


def combine(run: Run) -> ProcessesRecord | None:
    """Replace the numbers of a run by those of all its processes together; see NOTE [How numbers combine].

    Returns:
        What differs between them; None where there is but one.
    """
    line, history = run.line, run.history
    if line.alone:
        return None
    own = _Own.of(history)
    mine = own.content(history, line.processes)
    every = line.agreed(mine) or [mine]
    entries = _in_order([content.entries for content in every])
    means = _common([content.means for content in every])
    peaks = _common([content.peaks for content in every])
    stuck = _common([content.stuck for content in every])
    calls = _calls(run, every)
    numbers = _Numbers.of(run, own, entries, means, calls)
    for axis in line.processes.axes:
        numbers.over(line, axis)
    told = run.facts.record(line, run.program.given.model, history.rows, numbers.partly_run(own))
    free = {key: None if units is None else ~units for key, units in history.stuck.items()}
    peaks, highest = beside(line, calls, peaks, history.peaks, -np.inf)
    stuck, free = beside(line, calls, stuck, free, 0.0)
    most, free = line.extremes(_flat(peaks, highest, -np.inf)), line.extremes(_flat(stuck, free, 0.0))
    history.combine(
        numbers.rows(every),
        calls,
        _split(peaks, most, lambda units: units),
        _split(stuck, free, lambda units: units == 0),
    )
    return told


@attrs.define(eq=False)
class _Numbers:
    """The numbers of a process as vectors, while they are combined."""

    run: Run
    entries: list[Entry]
    means: dict[Unit, int]
    calls: Mapping[str, Call]
    values: Floats
    counts: Floats
    there: Floats
    sums: Floats  # of the samples behind every mean: the vectors, times how many there are
    numbers: Floats  # of them
    partly: set[str] = attrs.field(factory=set)  # layer calls that only some processes have run in some step

    @classmethod
    def of(
        cls, run: Run, own: _Own, entries: list[Entry], means: dict[Unit, int], calls: Mapping[str, Call]
    ) -> _Numbers:
        found = [own.values.get(entry, (0.0, 0.0)) for entry in entries]
        vectors = [own.means.get(unit, (torch.zeros(n), 0)) for unit, n in means.items() if n >= 0]
        return cls(
            run, entries, means, calls,
            np.array([value for value, _ in found]), np.array([count for _, count in found]),
            np.array([float(entry in own.values) for entry in entries]),
            np.concatenate([np.zeros(0), *(v.double().cpu().numpy() * n for v, n in vectors)]),
            np.array([float(n) for _, n in vectors]),
        )  # fmt: skip

    def over(self, line: Line, axis: Axis) -> None:
        """Combine them along an axis."""
        if axis.splits != "batch":
            self._put_means()
        kinds = [kind for _, kind, _ in self.entries]
        norms = np.isin(kinds, NORMS)
        split = np.array([self._is_split(kind, key, axis) for _, kind, key in self.entries], dtype=bool)
        largest = np.where(np.isfinite(self.values), np.abs(self.values), 0.0)
        largest, most = np.split(
            line.reduced(np.concatenate([largest, self.counts]), axis, dist.ReduceOp.MAX), 2
        )
        unit = np.where(largest > 0, largest, 1.0)
        with np.errstate(invalid="ignore"):
            squares = np.where(norms, (self.values / unit) ** 2, self.values)
        parts = [np.where(split, squares, self.values), self.counts, self.there, self.sums, self.numbers]
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        sums, counts, there, self.sums, self.numbers = np.split(
            line.reduced(np.concatenate(parts), axis), cuts
        )
        with np.errstate(invalid="ignore"):
            whole = np.where(norms, np.sqrt(sums) * unit, sums)
            self.values = np.where(split, whole, sums / np.maximum(there, 1.0))
        self.counts = np.where(split, counts, most)
        if axis.splits == "batch":
            self.values = np.where(split & (np.array(kinds) == "grad"), self.values / axis.size, self.values)
        everywhere = np.array([kind != "size" for kind in kinds]) | (there >= axis.size)
        self.partly |= {str(self.entries[i][2]) for i in np.flatnonzero(~everywhere & (there > 0))}
        self.there = (there > 0).astype(float)

    def _is_split(self, kind: str, key: Any, axis: Axis) -> bool:
        processes = self.run.line.processes
        if kind in _MEANT:
            return False
        if kind in _OF_PARAMETERS:
            return any(axis is other for other in processes.parameter_axes(key))
        name = key.name if isinstance(key, ActivationKey) else key
        axes = processes.call_axes(split_of(self.calls, key, kind))
        return (axis.splits != "batch" or name not in self.run.wholes.calls) and any(axis is a for a in axes)

    def partly_run(self, own: _Own) -> dict[str, tuple[int, float]]:
        """Return, of the layer calls that only some processes ran in a step, in how many steps this one did,
        and the share of the steps in which any did."""
        steps = max((step for step, _, _ in self.entries), default=0) + 1
        found: dict[str, tuple[int, float]] = {}
        for name in sorted(self.partly):
            ran = sum(1 for step in range(steps) if own.values.get((step, "size", name), (0.0, 0.0))[0] > 0)
            anywhere = sum(1 for _, kind, key in self.entries if kind == "size" and key == name)
            found[name] = ran, anywhere / steps
        return found

    def rows(self, every: Sequence[Content]) -> list[Row]:
        """Return them as the rows of a history."""
        if not self.run.line.processes.model_axes:
            self._put_means()
        by_step: dict[int, list[int]] = {}
        for i, (step, _, _) in enumerate(self.entries):
            by_step.setdefault(step, []).append(i)
        layouts: dict[Any, Layout] = {}
        rows = []
        for step in range(len(by_step)):
            at = [i for i in by_step[step] if self.entries[i][1] != "size"]
            sized = [i for i in by_step[step] if self.entries[i][1] == "size"]
            places = tuple((kind, key) for _, kind, key in (self.entries[i] for i in at))
            key = places, tuple(str(self.entries[i][2]) for i in sized)
            layout = layouts.setdefault(key, Layout(*key))
            sizes = tuple(int(self.values[i]) for i in sized)
            rows.append(Row(layout, self.values[at], self.counts[at], sizes))
        return rows

    def _put_means(self) -> None:
        """Take the norms of means from their vectors, where there are any."""
        known = [(unit, n) for unit, n in self.means.items() if n >= 0]
        at = np.cumsum([0, *(n for _, n in known)])
        norms: dict[Entry, float] = {}
        for ((step, name, _), _), a, b, number in zip(known, at, at[1:], self.numbers, strict=False):
            if number > 0:
                # of units of which each process has others, the norms are added up from here on
                norm = float(np.linalg.norm(self.sums[a:b])) / number
                entry = (step, "mean_row", name)
                norms[entry] = float(np.hypot(norms[entry], norm)) if entry in norms else norm
        for i, entry in enumerate(self.entries):
            if entry in norms:
                self.values[i] = norms[entry]
                self.counts[i] = sum(n for (s, name, _), n in known if (s, "mean_row", name) == entry)


def _in_order(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """Return what any of some lists holds, in the order of the first; what others add after what precedes."""
    found = list(lists[0])
    known = set(found)
    for other in lists[1:]:
        at = 0
        for entry in other:
            if entry in known:
                continue
            known.add(entry)
            before = other[other.index(entry) - 1] if other.index(entry) else None
            at = found.index(before) + 1 if before is not None else 0
            found.insert(at, entry)
    return found


def _common(found: Sequence[Sequence[tuple[Any, int]]]) -> dict[Any, int]:
    """Return the sizes of vectors; −1 where processes have other sizes of the same."""
    sizes: dict[Any, int] = {}
    for one in found:
        for key, size in one:
            sizes[key] = size if sizes.get(key, size) == size else -1
    return sizes


def _flat(sizes: Mapping[Any, int], found: Mapping[Any, Tensor | None], absent: float) -> Floats:
    """Return vectors one behind the other; `absent` where this process has none."""
    parts = [np.zeros(0)]
    for key, size in sizes.items():
        if size >= 0:
            units = found.get(key)
            flat = np.full(size, absent) if units is None else units.double().reshape(-1).cpu().numpy()
            parts.append(np.nan_to_num(flat, nan=-np.inf, posinf=np.inf, neginf=-np.inf))
    return np.concatenate(parts)


def _split(sizes: Mapping[Any, int], flat: Floats, units_of: Any) -> dict[Any, Tensor | None]:
    found: dict[Any, Tensor | None] = {}
    at = 0
    for key, size in sizes.items():
        found[key] = None if size < 0 else units_of(torch.from_numpy(flat[at : at + size].copy()))
        at += max(size, 0)
    return found


def _calls(run: Run, every: Sequence[Content]) -> dict[str, Call]:
    """Return the layer calls of all processes, in the order of execution."""
    history, axes = run.history, run.line.processes.axes
    told: dict[str, tuple[Any, ...]] = {}
    for content in every:
        for entry in content.calls:
            if entry[0] not in told or not told[entry[0]][6]:  # nothing may have come to it on some of them
                told[entry[0]] = entry
    found = {}
    for name in _in_order([[entry[0] for entry in content.calls] for content in every]):
        _, module, kind, number, has_children, differentiable, shape, split, entering = told[name]
        known = history.calls.get(name)
        call = Call(
            index=-1 if known is None else known.index, name=name, module=module, type=kind, number=number,
            parent=-1, is_layer=True, has_children=has_children, differentiable=differentiable, shape=shape,
            split={axes[i].ranks: axis for i, axis in split},
            entering={axes[i].ranks: axis for i, axis in entering},
        )  # fmt: skip
        call.sites.extend(() if known is None else known.sites)
        found[name] = call
    return found
