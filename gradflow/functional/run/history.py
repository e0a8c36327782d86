"""The numbers of a run, step by step, on the host: one transfer a step, kept as a row under a layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.model.state import Tensors
from gradflow.functional.model.trees import summable
from gradflow.functional.processes.shards import local
from gradflow.functional.reverse.passing import Gradient, size_of, sizes_of, zeros_in
from gradflow.functional.run.rows import LASTING_SUMS, NORMS, SUMS, Content, Form, Layout, Place, Row, to_host
from gradflow.functional.run.step import Outcome
from gradflow.functional.tap.calls import ActivationKey, Call, Observation
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.sums import careful_magnitude, is_safe, safe_range
from gradflow.functional.tap.tapped import TappedModel
from gradflow.records import Floats, num_last

Mean = tuple[int, str]  # a step, and a layer call
Lasting = tuple[str, str, Gradient]  # kind of number, name of a parameter, tensor it is taken of

_MERGED = 8  # steps after which the peaks of rectifiers' units are merged, if no look comes first


@attrs.define(eq=False)
class History:
    """Everything that was read off the steps so far.

    Args:
        parameters: the working parameters by name.
        taps: told how the sums of the next step are taken.
        exact_first: whether the first step's sums over parameters are in double precision.
        ends: after how many steps the run ends; infinity where that is not known.
    """

    parameters: Tensors
    taps: TappedModel
    exact_first: bool = True
    ends: float = math.inf
    rows: list[Row] = attrs.field(factory=list)
    calls: dict[str, Call] = attrs.field(factory=dict)  # by name, as last run, in the order first met
    out_of_range: set[Place] = attrs.field(factory=set)  # sums that were once unsafe; they stay exact
    in_doubt: bool = False  # whether a fast sum of the last row is so small that it may have underflowed
    peaks: dict[ActivationKey, Tensor | None] = attrs.field(factory=dict)
    rising: dict[ActivationKey, list[Tensor]] = attrs.field(factory=dict)  # peaks that are not merged yet
    settled: set[ActivationKey] = attrs.field(factory=set)  # rectifiers of which every unit has fired
    settling: bool = False  # whether the last step has settled any
    recent: dict[ActivationKey, list[Tensor]] = attrs.field(factory=dict)  # peaks of the last steps
    stuck: dict[ActivationKey, Tensor | None] = attrs.field(factory=dict)
    means: dict[Mean, list[tuple[Tensor, int]]] = attrs.field(factory=dict)  # vectors, and rows behind them
    _form: Form | None = None  # of the last ordinary step
    _formed: list[Call] = attrs.field(factory=list)  # the calls of that step
    _layouts: dict[tuple[tuple[Place, ...], tuple[str, ...]], Layout] = attrs.field(factory=dict)
    _stacked: dict[Layout, tuple[Any, Floats, Floats]] = attrs.field(factory=dict)

    def read(self, outcome: Outcome, *, look: bool, parameters_moved: bool) -> Row:
        """Return the step's numbers: the one transfer to the host that a step makes, after it is done."""
        noted = self._noted(outcome.recorder)
        merging = look or any(len(steps) >= _MERGED for steps in self.rising.values())
        risen = self.merge_peaks() if merging else {}
        moved = parameters_moved or not self.rows
        if not (look or noted or risen) and (tensors := self._tensors_again(outcome, moved)) is not None:
            assert self._form is not None
            self._formed = outcome.recorder.calls
            scalars = [outcome.loss, *outcome.gradients.outputs, *sizes_of(tensors)]
            return self._row(self._form, scalars, lambda: self._lasting(outcome, look, moved))
        content = self._content(outcome, moved)
        lasting = self._lasting(outcome, look, moved)
        arrived = (size for size in outcome.gradients.outputs if size is not None)
        scalars = [outcome.loss, *arrived, *(observation.value for observation in noted), *risen.values()]
        scalars += _sums(lasting, exact=self.exact_first and not self.rows)
        form = self._same_form(outcome.recorder, content)
        if form is None or noted or risen or look:
            return self._read_anew(outcome.recorder, content, scalars, noted, risen, lasting)
        return self._row(form, scalars, lambda: lasting)

    def _row(self, form: Form, scalars: list[Tensor], lasting: Callable[[], list[Lasting]]) -> Row:
        """Return the row of a step that gave the numbers of a form."""
        values = _norms(scalars, form.norms)
        safe = False not in [
            low < n < high for low, n, high in zip(form.least, values, form.most, strict=True)
        ]
        if not safe:
            _repair(values, lasting())
        row = Row(form.layout, np.array(values), form.counts, form.content.sizes, safe)
        self.in_doubt = self.settling = False
        if not safe:
            self._choose_precision(row)
        return row

    def _tensors_again(self, outcome: Outcome, moved: bool) -> list[Tensor] | None:
        """Return what `_lasting` does for a step in which every call ran as in the last ordinary one, and
        every output and parameter had a gradient in both; None of any other."""
        form, recorder, gradients = self._form, outcome.recorder, outcome.gradients
        if form is None or not recorder.repeats or recorder.known is not self._formed:
            return None
        content, found = form.content, gradients.parameters
        if content.moved != moved or {*map(type, gradients.outputs), *map(type, found.values())} != {Tensor}:
            return None
        if len(content.probed) != len(gradients.outputs) or content.reached != (*found,):
            return None
        if not moved:
            return [found[name] for name in self.parameters if name in found]  # type: ignore[misc]
        return [tensor for _, _, tensor in self._lasting(outcome, False, moved)]  # type: ignore[misc]

    def _content(self, outcome: Outcome, moved: bool) -> Content:
        recorder, gradients = outcome.recorder, outcome.gradients
        sites = zip(recorder.sites, gradients.outputs, strict=True)
        return Content(
            probed=tuple([site.call for site, size in sites if size is not None]),
            reached=tuple([name for name, g in gradients.parameters.items() if g is not None]),
            moved=moved,
            sizes=tuple([call.num_elements for call in recorder.calls if call.is_layer]),
            shapes=tuple([call.shape for call in recorder.calls if call.is_layer]),
        )

    def _read_anew(
        self,
        recorder: Recorder,
        content: Content,
        scalars: list[Tensor],
        noted: list[Observation],
        risen: dict[ActivationKey, Tensor],
        lasting: list[Lasting],
    ) -> Row:
        """Return the row of a step that gives other numbers than the one before."""
        behind = [recorder.calls[i] for i in content.probed]
        places: list[Place] = [("loss", ""), *(("grad", call.name) for call in behind)]
        numbers = [1, *(call.num_elements for call in behind)]
        for observation in noted:
            key = observation.key
            places.append((observation.kind, recorder.calls[key].name if isinstance(key, int) else key))
            numbers.append(observation.number)
        places += [("least_peak", key) for key in risen]
        numbers += [1] * len(risen)
        places += [(kind, name) for kind, name, _ in lasting]
        numbers += [tensor.numel() for _, _, tensor in lasting]
        calls = [call for call in recorder.calls if call.is_layer]
        for call in calls:
            if call.name in self.calls:
                call.take_over(self.calls[call.name])
            self.calls[call.name] = call
        layout, counts = self._layout(places, calls), np.array(numbers)
        values = _norms(scalars, layout.norms)
        _repair(values, lasting)
        row = Row(layout, np.array(values), counts, content.sizes)
        self._choose_precision(row)
        self._settle(row)
        if recorder.asked.ordinary and not (noted or risen):
            sums = layout.sums | [kind in LASTING_SUMS for kind, _ in places]
            least, most = safe_range(counts)
            least, most = np.where(sums, least, -np.inf), np.where(sums, most, np.inf)
            norms = layout.norms.tolist()
            self._form = Form(content, layout, counts, norms, least.tolist(), most.tolist())
            self._formed = recorder.calls
        return row

    def _same_form(self, recorder: Recorder, content: Content) -> Form | None:
        """Return the form of the last ordinary step, if this one gave numbers of the same things."""
        form, calls = self._form, recorder.calls
        if form is None or not recorder.asked.ordinary:
            return None
        same_calls = recorder.alike and recorder.known is self._formed and len(calls) == len(self._formed)
        if not same_calls or content != form.content:
            self._form = None
            return None
        self._formed = calls  # by which the next step will know it
        return form

    def _noted(self, recorder: Recorder) -> list[Observation]:
        """Return what was noted and goes into the row; vectors over units are kept apart from it."""
        noted, step = [], len(self.rows)
        if not (recorder.observations or self.means):
            return noted
        for key in [key for key in self.means if key[0] == step]:  # of a step that is run again
            del self.means[key]
        for observation in recorder.observations:
            if observation.kind == "mean":
                found = self.means.setdefault((step, recorder.calls[observation.key].name), [])
                found.append((observation.value, observation.number))
            elif observation.kind == "peak":
                if step >= self.recent_from:
                    self.recent.setdefault(observation.key, []).append(observation.value)
                if observation.key not in self.settled:
                    self.rising.setdefault(observation.key, []).append(observation.value)
            elif observation.kind == "stuck":
                self._merge_stuck(observation.key, observation.value)
            else:
                noted.append(observation)
        return noted

    def meet(self, recorder: Recorder) -> None:
        """Hear of the calls and activations of a step whose numbers are not read."""
        self.calls |= {call.name: call for call in recorder.calls if call.is_layer}
        self.peaks |= {o.key: None for o in recorder.observations if isinstance(o.key, ActivationKey)}

    def keep(self, row: Row) -> None:
        """Keep the row of a step, which now counts."""
        self.rows.append(row)

    def combine(
        self,
        rows: Sequence[Row],
        calls: Mapping[str, Call],
        peaks: Mapping[ActivationKey, Tensor | None],
        stuck: Mapping[ActivationKey, Tensor | None],
    ) -> None:
        """Go on with numbers that are those of several processes together."""
        self.rows, self.calls = list(rows), dict(calls)
        self.peaks, self.stuck, self.means, self.recent = dict(peaks), dict(stuck), {}, {}
        self._stacked = {}

    def stacked(self) -> dict[Layout, tuple[Any, Floats, Floats]]:
        """Return the steps of every layout, and their values and counts, of shape (numbers, steps)."""
        if sum(len(steps) for steps, _, _ in self._stacked.values()) != len(self.rows):
            rows_of: dict[Layout, list[int]] = {}
            for step, row in enumerate(self.rows):
                rows_of.setdefault(row.layout, []).append(step)
            self._stacked = {
                layout: (
                    np.array(steps),
                    np.stack([self.rows[s].values for s in steps], axis=1),
                    np.stack([self.rows[s].counts for s in steps], axis=1),
                )
                for layout, steps in rows_of.items()
            }
        return self._stacked

    @property
    def recent_from(self) -> float:
        """The step from which on, in the last quarter of the run, it is kept which units fire."""
        return self.ends - num_last(int(self.ends)) if self.ends < math.inf else math.inf

    def followed_rectifiers(self, step: int) -> list[ActivationKey]:
        """Return the rectifiers to follow in every step from this one on: those with units that have not
        fired yet, and all of them at the end of a run. Other activations are seen at looks."""
        every = [key for key in self.peaks if key.kind == "rectifier"]
        return [key for key in every if step >= self.recent_from or key not in self.settled]

    def fell_silent(self, key: ActivationKey) -> float:
        """Return the share of a rectifier's units that have fired, and in none of the last steps."""
        peak, steps = self.peaks.get(key), self.recent.get(key, [])
        if peak is None or len(steps) < 2 or any(units.shape != peak.shape for units in steps):
            return math.nan
        gone = (peak > 0) & ~(functools.reduce(torch.fmax, steps) > 0)
        return float(gone.double().mean())

    def merge_peaks(self) -> dict[ActivationKey, Tensor]:
        """Merge the peaks of the last steps; return the smallest of each rectifier that has any."""
        least = {}
        for key, steps in self.rising.items():
            kept = [self.peaks[key], *steps] if key in self.peaks else steps
            shapes = {None if units is None else units.shape for units in kept}
            alike = len(shapes) == 1 and None not in shapes  # units that come and go cannot be told apart
            merged = functools.reduce(torch.fmax, kept) if alike else None  # type: ignore[arg-type]
            self.peaks[key] = merged
            if merged is not None:
                least[key] = merged.min()
        self.rising.clear()
        return least

    def _merge_stuck(self, key: ActivationKey, units: Tensor) -> None:
        old = self.stuck.get(key, units)
        self.stuck[key] = None if old is None or old.shape != units.shape else old & units

    def _settle(self, row: Row) -> None:
        """Stop following the rectifiers of which every unit has fired."""
        before = len(self.settled)
        for position in row.layout.least_peaks:
            if row.values[position] > 0:
                self.settled.add(row.layout.places[position][1])  # type: ignore[arg-type]
        self.settling = len(self.settled) > before

    def _layout(self, places: list[Place], calls: list[Call]) -> Layout:
        key = tuple(places), tuple(call.name for call in calls)
        if key not in self._layouts:
            self._layouts[key] = Layout(*key)
        return self._layouts[key]

    def _lasting(self, outcome: Outcome, look: bool, moved: bool) -> list[Lasting]:
        """Return what numbers are taken of the parameters and their gradients."""
        found: list[Lasting] = []
        gradients = outcome.gradients.parts
        for name, parameter in self.parameters.items():
            if moved:
                found.append(("norm", name, summable(local(parameter.detach()))))
            gradient = gradients.get(name)
            if gradient is not None:
                found.append(("pgrad", name, gradient))
                if look and gradient.layout is torch.strided:
                    found.append(("pzeros", name, gradient))
        return found

    def _choose_precision(self, row: Row) -> None:
        """Choose how the next step's sums are taken; see NOTE [Exact and fast] in tap/sums.py."""
        exact, layout = self.taps.exact, row.layout
        any_exact = not exact or any(exact.values())
        unsafe = layout.sums & ~is_safe(row.values, row.counts)
        self.in_doubt = False
        least, _ = safe_range(row.counts)
        settled = bool(self.rows) and self.rows[-1].layout is layout and not unsafe.any()
        if settled and not any_exact:
            return
        for kind in SUMS:
            for position, (found, key) in enumerate(layout.places):
                if found != kind or not isinstance(key, str):  # those of activations are always exact
                    continue
                if unsafe[position]:
                    self.out_of_range.add((kind, key))
                    too_small = bool(row.values[position] <= least[position])
                    self.in_doubt |= too_small and not exact.get((key, kind), True)
                self.taps.set_exact(key, kind, (kind, key) in self.out_of_range)


def series(history: History, kind: str) -> dict[Hashable, tuple[Floats, Floats]]:
    """Return, by key, the numbers of a kind over the steps and the element counts behind them.

    Shapes (steps,). Where a step has none, the number is NaN and its count 0; several (the outputs of one
    call) are added, norms by their squares.
    """
    joined = np.hypot if kind in NORMS else np.add
    steps, found = len(history.rows), {}
    for layout, (at, values, counts) in history.stacked().items():
        met: set[Hashable] = set()
        every = len(at) == steps
        for position, key in layout.of_kind.get(kind, ()):
            if key not in found and every:
                found[key] = (values[position].copy(), counts[position].astype(float))
                met.add(key)
                continue
            if key not in found:
                found[key] = (np.full(steps, np.nan), np.zeros(steps))
            total, number = found[key]
            if key in met:
                both = joined(total[at], values[position])
                total[at] = np.where(number[at] > 0, both, values[position])
                number[at] += counts[position]
            else:
                total[at], number[at] = values[position], counts[position]
                met.add(key)
    return found


def _sums(lasting: list[Lasting], *, exact: bool) -> list[Tensor]:
    """Return a number of each tensor: how many elements are zero, or its magnitude.

    Args:
        lasting: kind of number, name, and tensor.
        exact: whether gradients are summed in double precision.
    """
    if not exact:
        sizes = iter(sizes_of([tensor for kind, _, tensor in lasting if kind != "pzeros"]))
        return [zeros_in(tensor) if kind == "pzeros" else next(sizes) for kind, _, tensor in lasting]
    found: list[Tensor] = []
    for kind, _, tensor in lasting:
        if kind == "pzeros":
            found.append(zeros_in(tensor))
        elif kind == "norm" and isinstance(tensor, Tensor):
            found.append(careful_magnitude(tensor))
        else:
            found.append(size_of(tensor, exact=True))
    return found


def _norms(scalars: list[Tensor], are_norms: Iterable[bool]) -> list[float]:
    """Return numbers on the host, magnitudes as norms: see NOTE [Exact and fast] in tap/sums.py."""
    numbers, single, root = zip(to_host(scalars), scalars, are_norms, strict=True), torch.float32, math.sqrt
    return [root(n) if is_norm and scalar.dtype is single else n for n, scalar, is_norm in numbers]


def _repair(values: list[float], lasting: list[Lasting]) -> None:
    """Take again, exactly, what may have over- or underflowed of a row's last values, the lasting ones."""
    unsafe = []
    for position, (kind, _, tensor) in enumerate(lasting, len(values) - len(lasting)):
        if kind in LASTING_SUMS:
            least, most = safe_range(tensor.numel())
            if not least < values[position] < most:
                unsafe.append((position, size_of(tensor, exact=True)))
    if unsafe:
        positions, sizes = zip(*unsafe, strict=True)
        for position, size in zip(positions, _norms(list(sizes), [True] * len(sizes)), strict=True):
            values[position] = size
