"""From the rows of a history to the arrays of the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gradflow.functional.run.history import History, series
from gradflow.functional.tap.calls import ActivationKey
from gradflow.records import ActivationRecord, Floats, LayerRecord, ParameterRecord

NAN = float("nan")


def layer_records(history: History, owned: Mapping[str, Sequence[str]]) -> list[LayerRecord]:
    """Return a record per layer call, in the order of execution.

    Args:
        history: the run's rows.
        owned: names of the parameters that belong to each module.
    """
    steps = len(history.rows)
    nothing = (np.full(steps, NAN), np.zeros(steps))
    found = {kind: series(history, kind) for kind in ("grad", "out", "zeros", "mean_row", "input")}
    sizes = _sizes(history)
    records = []
    with np.errstate(all="ignore"):
        for order, (name, call) in enumerate(history.calls.items()):
            numbers = {kind: of_kind.get(name, nothing) for kind, of_kind in found.items()}
            grad, reached = numbers["grad"][0], numbers["grad"][1] > 0
            out, count = numbers["out"]
            looked = count > 0
            rms = np.where(looked, out / np.sqrt(count), NAN)
            mean_row = numbers["mean_row"][0] / np.sqrt(numbers["mean_row"][1])
            records.append(
                LayerRecord(
                    name=name,
                    module=call.module,
                    type=call.type,
                    call=call.number,
                    order=order,
                    composite=call.has_children,
                    parameters=tuple(owned.get(call.module, ())),
                    shape=call.shape,
                    inputs_differentiable=call.differentiable,
                    called=sizes[name] >= 0,
                    reached=reached,
                    grad_norm=grad,
                    grad_finite=~reached | np.isfinite(grad),
                    num_elements=np.maximum(sizes[name], 0),
                    output_rms=rms,
                    output_finite=~looked | np.isfinite(out),
                    output_zero_share=np.where(np.isfinite(out), numbers["zeros"][0] / count, NAN),
                    output_variation=np.sqrt(np.clip(1.0 - (mean_row / rms) ** 2, 0.0, 1.0)),
                    input_rms=numbers["input"][0] / np.sqrt(numbers["input"][1]),
                )
            )
    return records


def _sizes(history: History) -> dict[str, Floats]:
    """Return the number of output elements of each call over the steps, −1 where it did not run."""
    sizes = {name: np.full(len(history.rows), -1) for name in history.calls}
    for step, row in enumerate(history.rows):
        for name, size in zip(row.layout.calls, row.sizes, strict=True):
            sizes[name][step] = size
    return sizes


def parameter_records(
    history: History, owners: Mapping[str, str], optimized: set[str] | None
) -> list[ParameterRecord]:
    """Return a record per parameter, in the order of `model.named_parameters()`.

    Args:
        history: the run's rows.
        owners: the module that each parameter belongs to.
        optimized: names of those that the optimizer steps; None where there is no optimizer.
    """
    steps = len(history.rows)
    nothing = (np.full(steps, NAN), np.zeros(steps))
    grads, zeros, norms = (series(history, kind) for kind in ("pgrad", "pzeros", "norm"))
    records = []
    for name, parameter in history.parameters.items():
        grad, count = grads.get(name, nothing)
        norm = norms.get(name, nothing)[0]
        if steps > 1 and np.isnan(norm[1:]).all():  # measured once, since no optimizer moves it
            norm = np.full(steps, norm[0])
        records.append(
            ParameterRecord(
                name=name,
                layer=owners[name],
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                trainable=parameter.requires_grad,
                optimized=optimized is None or name in optimized,
                reached=count > 0,
                grad_norm=grad,
                grad_finite=(count == 0) | np.isfinite(grad),
                grad_zero_share=np.where(
                    np.isfinite(grad), zeros.get(name, nothing)[0] / max(parameter.numel(), 1), NAN
                ),
                norm=norm,
            )
        )
    return records


def activation_records(history: History) -> list[ActivationRecord]:
    """Return a record per activation, in the order in which they were first seen."""
    steps = len(history.rows)
    nothing = (np.full(steps, NAN), np.ones(steps))
    found = {kind: series(history, kind) for kind in ("fired", "saturated", "input", "width")}
    layouts = dict.fromkeys(row.layout for row in history.rows)
    in_order = [key for layout in layouts for _, key in layout.places]
    keys = dict.fromkeys(
        key for key in [*in_order, *history.peaks, *history.stuck] if isinstance(key, ActivationKey)
    )

    def share(kind: str, key: ActivationKey) -> Floats:
        values, counts = found[kind].get(key, nothing)
        return values / np.maximum(counts, 1)

    records = []
    for key in keys:
        peak, stuck = history.peaks.get(key), history.stuck.get(key)
        units = peak if peak is not None else stuck
        width = found["width"].get(key, nothing)[0]
        entering, elements = found["input"].get(key, nothing)
        records.append(
            ActivationRecord(
                name=key.name,
                op=key.op,
                kind=key.kind,
                functional=key.functional,
                layer=key.layer,
                num_units=0 if units is None else units.numel(),
                fired_share=share("fired", key),
                saturated_share=share("saturated", key),
                input_rms=entering / np.sqrt(np.maximum(elements, 1)),
                never_fired=NAN if peak is None else float((~(peak > 0)).double().mean()),
                always_saturated=NAN if stuck is None else float(stuck.double().mean()),
                width=0 if np.isnan(width).all() else int(np.nanmax(width)),
            )
        )
    return records
