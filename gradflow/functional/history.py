"""The numbers of a run, step by step, on the host: one transfer a step, kept as a row under a layout."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.probes import is_safe, num_nonzero, sum_of_squares
from gradflow.functional.recorder import Call
from gradflow.functional.step import Outcome, Program
from gradflow.functional.trees import wide_dtype
from gradflow.functional.watch import ActivationKey
from gradflow.records import Bools, Floats

Place = tuple[str, Hashable]  # what a number is (`grad`, `out`, ...), and of what

# Numbers whose sums were taken fast or exactly; see NOTE [Exact and fast] in probes.py.
_SUMS = ("grad", "out", "pgrad")


@attrs.frozen(eq=False)
class Layout:
    """What the numbers of a row are. Steps that run alike share one.

    Args:
        places: (kind, key) of every number.
        calls: names of the layer calls, in the order of execution.
    """

    places: tuple[Place, ...]
    calls: tuple[str, ...]
    must_be_finite: Bools = attrs.field(init=False)
    sums: Bools = attrs.field(init=False)
    least_peaks: tuple[int, ...] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        kinds = [kind for kind, _ in self.places]
        object.__setattr__(self, "must_be_finite", np.isin(kinds, ("loss", "grad", "pgrad")))
        object.__setattr__(self, "sums", np.isin(kinds, _SUMS))
        object.__setattr__(self, "least_peaks", tuple(i for i, k in enumerate(kinds) if k == "least_peak"))


@attrs.frozen(eq=False)
class Row:
    """The numbers of one step.

    Args:
        layout: what they are.
        values: the numbers; sums are of squares.
        counts: how many elements are behind each.
        sizes: number of output elements of each layer call.
    """

    layout: Layout
    values: Floats
    counts: Floats
    sizes: tuple[int, ...]

    @property
    def loss(self) -> float:
        """The step's loss."""
        return float(self.values[0])

    @property
    def finite(self) -> bool:
        """Whether the loss and every gradient is finite."""
        return bool(np.isfinite(self.values[self.layout.must_be_finite]).all())


_EXACT_AS_FLOAT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def to_host(values: Sequence[Tensor]) -> list[float]:
    """Return scalars (of shape ()) that may lie on several devices as floats: one transfer a device."""
    if len({(value.device, value.dtype) for value in values}) == 1 and values[0].dtype in _EXACT_AS_FLOAT:
        return torch.stack(list(values)).tolist()
    found: list[float] = [0.0] * len(values)
    by_device: dict[torch.device, dict[torch.dtype, list[int]]] = {}
    for i, value in enumerate(values):
        by_device.setdefault(value.device, {}).setdefault(value.dtype, []).append(i)
    for device, kinds in by_device.items():
        wide = wide_dtype(device)
        parts = [torch.stack([values[i] for i in positions]).to(wide) for positions in kinds.values()]
        numbers = (torch.cat(parts) if len(parts) > 1 else parts[0]).tolist()
        for i, number in zip((i for positions in kinds.values() for i in positions), numbers, strict=True):
            found[i] = number
    return found


@attrs.define(eq=False)
class History:
    """Everything that was read off the steps so far."""

    program: Program
    rows: list[Row] = attrs.field(factory=list)
    calls: dict[str, Call] = attrs.field(factory=dict)  # by name, as last run, in the order first met
    exact_parameters: dict[str, bool] = attrs.field(factory=dict)
    out_of_range: set[Place] = attrs.field(factory=set)  # sums that were once unsafe; they stay exact
    in_doubt: bool = False  # whether a fast sum of the last row is zero, which may be an underflow
    peaks: dict[ActivationKey, Tensor | None] = attrs.field(factory=dict)
    settled: set[ActivationKey] = attrs.field(factory=set)  # rectifiers of which every unit has fired
    settling: bool = False  # whether the last step has settled any
    stuck: dict[ActivationKey, Tensor | None] = attrs.field(factory=dict)
    _layouts: dict[tuple[tuple[Place, ...], tuple[str, ...]], Layout] = attrs.field(factory=dict)

    def read(self, outcome: Outcome, *, look: bool, parameters_moved: bool) -> Row:
        """Return the step's numbers: the one transfer to the host that a step makes, after it is done."""
        recorder = self.program.recorder
        calls = [call for call in recorder.calls if call.is_layer]
        scalars: list[Tensor] = [outcome.loss]
        places: list[Place] = [("loss", "")]
        counts: list[int] = [1]
        risen: dict[ActivationKey, None] = {}  # rectifiers with units that have not fired yet
        for site, slot in zip(recorder.sites, outcome.slots, strict=True):
            if slot is not None:
                scalars.append(slot)
                places.append(("grad", recorder.calls[site.call].name))
                counts.append(recorder.calls[site.call].num_elements)
        for observation, value in zip(recorder.observations, recorder.values, strict=True):
            key = observation.key
            if observation.kind in ("peak", "stuck"):
                if key not in self.settled:
                    self._merge(observation.kind, key, value)
                    if observation.kind == "peak":
                        risen[key] = None
                continue
            scalars.append(value)
            places.append((observation.kind, recorder.calls[key].name if isinstance(key, int) else key))
            counts.append(observation.number)
        for key in risen:
            if (peak := self.peaks[key]) is not None:
                scalars.append(peak.min())
                places.append(("least_peak", key))
                counts.append(1)
        self._add_parameters(outcome, scalars, places, counts, look, parameters_moved)
        for call in calls:
            self.calls[call.name] = self._merged_call(call)
        layout = self._layout(places, calls)
        row = Row(layout, np.array(to_host(scalars)), np.array(counts), tuple(c.num_elements for c in calls))
        self._choose_precision(row)
        self._settle(row)
        return row

    def _settle(self, row: Row) -> None:
        """Stop following rectifiers of which every unit has fired: nothing more can come of it."""
        before = len(self.settled)
        for position in row.layout.least_peaks:
            if row.values[position] > 0:
                self.settled.add(row.layout.places[position][1])  # type: ignore[arg-type]
        self.settling = len(self.settled) > before

    def _merged_call(self, call: Call) -> Call:
        """Return the call with what only the first step shows."""
        first = self.calls.get(call.name)
        if first is not None:
            call.differentiable, call.has_children = first.differentiable, first.has_children
            call.shape = call.shape or first.shape
        return call

    def _layout(self, places: list[Place], calls: list[Call]) -> Layout:
        key = tuple(places), tuple(call.name for call in calls)
        if key not in self._layouts:
            self._layouts[key] = Layout(*key)
        return self._layouts[key]

    def _merge(self, kind: str, key: ActivationKey, units: Tensor) -> None:
        kept = self.peaks if kind == "peak" else self.stuck
        units = units.detach()
        if key not in kept:
            kept[key] = units.clone()
        elif (old := kept[key]) is not None:
            if old.shape != units.shape:
                kept[key] = None  # units that come and go cannot be told apart
            else:
                kept[key] = torch.fmax(old, units) if kind == "peak" else old & units

    def _add_parameters(
        self,
        outcome: Outcome,
        scalars: list[Tensor],
        places: list[Place],
        counts: list[int],
        look: bool,
        moved: bool,
    ) -> None:
        for name, parameter in self.program.parameters.items():
            size = parameter.numel()
            if moved or not self.rows:
                scalars.append(sum_of_squares(parameter.detach(), exact=not self.rows))
                places.append(("norm", name))
                counts.append(size)
            gradient = outcome.gradients.get(name)
            if gradient is None:
                continue
            scalars.append(sum_of_squares(gradient, exact=self.exact_parameters.get(name, True)))
            places.append(("pgrad", name))
            counts.append(size)
            if look and gradient.layout is torch.strided:
                scalars.append(size - num_nonzero(gradient))
                places.append(("pzeros", name))
                counts.append(size)

    def _choose_precision(self, row: Row) -> None:
        """Choose how the next step's sums are taken; see NOTE [Exact and fast] in probes.py."""
        exact, layout = self.program.recorder.exact, row.layout
        unsafe = layout.sums & ~is_safe(row.values, row.counts)
        self.in_doubt = False
        settled = bool(self.rows) and self.rows[-1].layout is layout and not unsafe.any()
        if settled and not any(exact.values()) and not any(self.exact_parameters.values()):
            return
        for kind in _SUMS:
            for position, (found, key) in enumerate(layout.places):
                if found != kind:
                    continue
                kept, name = (self.exact_parameters, key) if kind == "pgrad" else (exact, (key, kind))
                if unsafe[position]:
                    self.out_of_range.add((kind, key))
                    self.in_doubt |= row.values[position] == 0 and not kept.get(name, True)  # type: ignore[arg-type]
                kept[name] = (kind, key) in self.out_of_range  # type: ignore[index]


def series(history: History, kind: str) -> dict[Hashable, tuple[Floats, Floats]]:
    """Return, by key, the numbers of a kind over the steps and the element counts behind them.

    Shapes (steps,). Where a step has none, the number is NaN and its count 0; several (the outputs of one
    call) are added.
    """
    rows, found = history.rows, {}
    steps_of: dict[Layout, list[int]] = {}
    for step, row in enumerate(rows):
        steps_of.setdefault(row.layout, []).append(step)
    for layout, steps in steps_of.items():
        at = np.array(steps)
        values = np.stack([rows[s].values for s in steps])
        counts = np.stack([rows[s].counts for s in steps])
        for position, (of, key) in enumerate(layout.places):
            if of != kind:
                continue
            if key not in found:
                found[key] = (np.full(len(rows), np.nan), np.zeros(len(rows)))
            total, number = found[key]
            total[at] = np.where(number[at] > 0, total[at] + values[:, position], values[:, position])
            number[at] = number[at] + counts[:, position]
    return found
