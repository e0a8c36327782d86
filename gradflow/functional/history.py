"""The numbers of a run, step by step, on the host; and their assembly into a record's arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.probes import is_safe, sum_of_squares
from gradflow.functional.recorder import Call
from gradflow.functional.step import Outcome, Program
from gradflow.functional.watch import ActivationKey
from gradflow.records import ActivationRecord, LayerRecord, ParameterRecord

NAN = float("nan")


@attrs.define(eq=False)
class CallNumbers:
    """What one step gave for one layer call. Sums are of squares."""

    num_elements: int = 0
    grad: float = NAN
    reached: bool = False
    out: float = 0.0
    out_elements: int = 0
    zeros: float = NAN
    mean_row: float = NAN
    entering: float = NAN


@attrs.define(eq=False)
class StepNumbers:
    """What one step gave."""

    loss: float = NAN
    calls: dict[str, CallNumbers] = attrs.field(factory=dict)
    parameters: dict[str, tuple[bool, float, float, float]] = attrs.field(factory=dict)
    activations: dict[ActivationKey, dict[str, tuple[float, int]]] = attrs.field(factory=dict)

    @property
    def finite(self) -> bool:
        """Whether the loss and every gradient is finite."""
        grads = [c.grad for c in self.calls.values() if c.reached]
        grads += [sq for reached, sq, _, _ in self.parameters.values() if reached]
        return bool(np.isfinite(self.loss) and np.isfinite(grads).all())


def to_host(values: Sequence[Tensor]) -> list[float]:
    """Return scalars (of shape ()) that may lie on several devices as floats: one transfer a device."""
    found: list[float] = [NAN] * len(values)
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        by_device.setdefault(value.device, []).append(i)
    for device, positions in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        kinds: dict[torch.dtype, list[int]] = {}
        for i in positions:
            kinds.setdefault(values[i].dtype, []).append(i)
        parts = [torch.stack([values[i] for i in of_kind]).to(wide) for of_kind in kinds.values()]
        numbers = (torch.cat(parts) if len(parts) > 1 else parts[0]).tolist()
        for i, number in zip((i for of_kind in kinds.values() for i in of_kind), numbers, strict=True):
            found[i] = number
    return found


@attrs.define(eq=False)
class History:
    """Everything that was read off the steps so far."""

    program: Program
    steps: list[StepNumbers] = attrs.field(factory=list)
    order: dict[str, tuple[int, Call]] = attrs.field(factory=dict)
    exact_parameters: dict[str, bool] = attrs.field(factory=dict)
    norms: dict[str, float] = attrs.field(factory=dict)
    peaks: dict[ActivationKey, Tensor | None] = attrs.field(factory=dict)
    stuck: dict[ActivationKey, Tensor | None] = attrs.field(factory=dict)
    activations: dict[ActivationKey, None] = attrs.field(factory=dict)

    def read(self, outcome: Outcome, *, look: bool, parameters_moved: bool) -> StepNumbers:
        """Return the step's numbers: the one transfer to the host that a step makes, after it is done."""
        recorder = self.program.recorder
        scalars: list[Tensor] = [outcome.loss]
        places: list[tuple[str, Any]] = [("loss", None)]
        for site, slot in zip(recorder.sites, outcome.slots, strict=True):
            if slot is not None:
                value = slot if outcome.flows is None else sum_slot(slot)
                scalars.append(value)
                places.append(("grad", site.call))
        for observation, value in zip(recorder.observations, recorder.values, strict=True):
            if observation.kind in ("peak", "stuck"):
                self._merge(observation.kind, observation.key, value)
            else:
                scalars.append(value)
                places.append((observation.kind, observation))
        self._add_parameters(outcome, scalars, places, look, parameters_moved)
        return self._sorted(to_host(scalars), places)

    def _merge(self, kind: str, key: ActivationKey, units: Tensor) -> None:
        kept = self.peaks if kind == "peak" else self.stuck
        units = units.detach()
        if key not in kept:
            kept[key] = units.clone()
        elif (old := kept[key]) is not None:
            if old.shape != units.shape:
                kept[key] = None  # units that come and go cannot be told apart
            else:
                kept[key] = torch.maximum(old, units) if kind == "peak" else old & units

    def _add_parameters(
        self,
        outcome: Outcome,
        scalars: list[Tensor],
        places: list[tuple[str, Any]],
        look: bool,
        moved: bool,
    ) -> None:
        for name, parameter in self.program.parameters.items():
            if moved or name not in self.norms:
                scalars.append(sum_of_squares(parameter.detach(), exact=bool(not self.norms)))
                places.append(("norm", name))
            gradient = outcome.gradients.get(name)
            if gradient is None:
                continue
            exact = self.exact_parameters.get(name, True)
            scalars.append(sum_of_squares(gradient, exact=exact))
            places.append(("pgrad", name))
            if look and gradient.layout is torch.strided:
                scalars.append(gradient.numel() - torch.count_nonzero(gradient))
                places.append(("pzeros", name))

    def _sorted(self, numbers: list[float], places: list[tuple[str, Any]]) -> StepNumbers:
        recorder, step = self.program.recorder, StepNumbers()
        calls = recorder.calls
        for call in calls:
            if call.is_layer:
                step.calls[call.name] = CallNumbers(num_elements=call.num_elements)
                if call.name not in self.order:
                    self.order[call.name] = (len(self.order), call)
                elif call.shape:
                    self.order[call.name][1].shape = call.shape
        grads: dict[str, float] = {}
        zeros: dict[str, float] = {}
        for (kind, key), number in zip(places, numbers, strict=True):
            if kind == "loss":
                step.loss = number
            elif kind == "grad":
                found = step.calls[calls[key].name]
                found.grad = number + (found.grad if found.reached else 0.0)
                found.reached = True
            elif kind == "norm":
                self.norms[key] = number
            elif kind == "pgrad":
                grads[key] = number
            elif kind == "pzeros":
                zeros[key] = number
            else:
                self._place_observation(step, kind, key, number)
        for name in self.program.parameters:
            step.parameters[name] = (
                name in grads, grads.get(name, NAN), zeros.get(name, NAN), self.norms[name],
            )  # fmt: skip
        self._choose_precision(step)
        return step

    def _place_observation(self, step: StepNumbers, kind: str, observation: Any, number: float) -> None:
        if isinstance(observation.key, ActivationKey):
            self.activations.setdefault(observation.key)
            step.activations.setdefault(observation.key, {})[kind] = (number, observation.number)
            return
        found = step.calls[self.program.recorder.calls[observation.key].name]
        if kind == "out":
            found.out += number
            found.out_elements += observation.number
        elif kind == "zeros":
            found.zeros = number + (0.0 if np.isnan(found.zeros) else found.zeros)
        elif kind == "input":
            found.entering = number / observation.number
        elif np.isnan(found.mean_row):  # of the first output
            found.mean_row = number / observation.number

    def _choose_precision(self, step: StepNumbers) -> None:
        """Choose how the next step's sums are taken; see NOTE [Exact and fast] in probes.py."""
        exact = self.program.recorder.exact
        for name, found in step.calls.items():
            if found.reached:
                exact[(name, "grad")] = not is_safe(found.grad, found.num_elements)
            if found.out_elements:
                exact[(name, "out")] = not is_safe(found.out, found.out_elements)
        for name, (reached, squares, _, _) in step.parameters.items():
            if reached:
                size = self.program.parameters[name].numel()
                self.exact_parameters[name] = not is_safe(squares, size)


def sum_slot(gradient: Tensor) -> Tensor:
    """Return a slot's statistic, whatever its shape."""
    return gradient.reshape(-1)[0]


# ------------------------------------------------------------------------------------ assembly


def layer_records(history: History, owned: dict[str, list[str]]) -> list[LayerRecord]:
    """Return a record per layer call, in the order of execution."""
    steps, records = history.steps, []
    for order, (name, (_, call)) in enumerate(sorted(history.order.items(), key=lambda kv: kv[1][0])):
        numbers = [step.calls.get(name) for step in steps]
        grads = np.array([n.grad if n is not None else NAN for n in numbers])
        reached = np.array([n is not None and n.reached for n in numbers], dtype=bool)
        out = np.array([n.out if n is not None else NAN for n in numbers])
        sizes = np.array([n.out_elements if n is not None else 0 for n in numbers])
        called = np.array([n is not None for n in numbers], dtype=bool)
        zeros = np.array([n.zeros if n is not None else NAN for n in numbers])
        mean_row = np.array([n.mean_row if n is not None else NAN for n in numbers])
        entering = np.array([n.entering if n is not None else NAN for n in numbers])
        measured = called & (sizes > 0)  # at looks
        with np.errstate(all="ignore"):
            mean_square = np.where(measured, out / np.maximum(sizes, 1), NAN)
            variation = np.sqrt(np.clip(1.0 - mean_row / mean_square, 0.0, 1.0))
            records.append(
                LayerRecord(
                    name=name,
                    module=call.module,
                    type=call.type,
                    call=call.number,
                    order=order,
                    composite=call.has_children,
                    parameters=owned.get(call.module, ()),
                    shape=call.shape,
                    inputs_differentiable=call.differentiable,
                    called=called,
                    reached=reached,
                    grad_norm=np.sqrt(grads),
                    grad_finite=~reached | np.isfinite(grads),
                    num_elements=np.array([n.num_elements if n is not None else 0 for n in numbers]),
                    output_rms=np.sqrt(mean_square),
                    output_finite=~measured | np.isfinite(out),
                    output_zero_share=np.where(measured, zeros / np.maximum(sizes, 1), NAN),
                    output_variation=variation,
                    input_rms=np.sqrt(entering),
                )
            )
    return records


def parameter_records(
    history: History, owners: dict[str, str], optimized: set[str] | None
) -> list[ParameterRecord]:
    """Return a record per parameter, in the order of `model.named_parameters()`."""
    records = []
    for name, parameter in history.program.parameters.items():
        rows = [step.parameters[name] for step in history.steps]
        squares = np.array([row[1] for row in rows])
        reached = np.array([row[0] for row in rows], dtype=bool)
        records.append(
            ParameterRecord(
                name=name,
                layer=owners[name],
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                trainable=parameter.requires_grad,
                optimized=optimized is None or name in optimized,
                reached=reached,
                grad_norm=np.sqrt(squares),
                grad_finite=~reached | np.isfinite(squares),
                grad_zero_share=np.array([row[2] / max(parameter.numel(), 1) for row in rows]),
                norm=np.sqrt(np.array([row[3] for row in rows])),
            )
        )
    return records


def activation_records(history: History) -> list[ActivationRecord]:
    """Return a record per activation, in the order in which they were first seen."""
    records = []
    keys = dict.fromkeys([*history.peaks, *history.stuck, *history.activations])
    for key in keys:
        rows = [step.activations.get(key, {}) for step in history.steps]

        def share(kind: str, rows: list[dict[str, tuple[float, int]]] = rows) -> np.ndarray:
            return np.array([r[kind][0] / max(r[kind][1], 1) if kind in r else NAN for r in rows])

        units = history.peaks.get(key, history.stuck.get(key))
        peak, stuck = history.peaks.get(key), history.stuck.get(key)
        records.append(
            ActivationRecord(
                name=key.name,
                op=key.op,
                kind=key.kind,
                functional=key.functional,
                layer=key.layer,
                num_units=0 if units is None else units.numel(),
                fired_share=share("fired"),
                saturated_share=share("saturated"),
                input_rms=np.sqrt(share("input")),
                never_fired=NAN if peak is None else float((~(peak > 0)).double().mean()),
                always_saturated=NAN if stuck is None else float(stuck.double().mean()),
                width=int(max((r["width"][0] for r in rows if "width" in r), default=0)),
            )
        )
    return records
