"""From the rows of a history to the arrays of the records."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradflow.functional.run.history import History, series
from gradflow.functional.tap.calls import ActivationKey
from gradflow.records import ActivationRecord, Floats, Ints, LayerRecord, ParameterRecord

NAN = float("nan")


def layer_records(history: History, owned: Mapping[str, Sequence[str]]) -> list[LayerRecord]:
    """Return a record per layer call, in the order of execution.

    Args:
        history: the run's rows.
        owned: names of the parameters that belong to each module.
    """
    calls, steps = history.calls, len(history.rows)
    kinds = ("grad", "out", "zeros", "mean_row", "input")
    found = {kind: _table(series(history, kind), calls, steps) for kind in kinds}
    sizes = _sizes(history)
    with np.errstate(all="ignore"):
        grad, reached = found["grad"][0], found["grad"][1] > 0
        out, count = found["out"]
        looked = count > 0
        rms = np.where(looked, out / np.sqrt(count), NAN)
        mean_row = found["mean_row"][0] / np.sqrt(found["mean_row"][1])
        numbers = {  # a row for each call
            "called": sizes >= 0,
            "reached": reached,
            "grad_norm": grad,
            "grad_finite": ~reached | np.isfinite(grad),
            "num_elements": np.maximum(sizes, 0),
            "output_rms": rms,
            "output_finite": ~looked | np.isfinite(out),
            "output_zero_share": np.where(np.isfinite(out), found["zeros"][0] / count, NAN),
            "output_variation": np.sqrt(np.clip(1.0 - (mean_row / rms) ** 2, 0.0, 1.0)),
            "input_rms": found["input"][0] / np.sqrt(found["input"][1]),
        }
    return [
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
            **{what: of_all[order] for what, of_all in numbers.items()},
        )
        for order, (name, call) in enumerate(calls.items())
    ]


def _table(
    found: Mapping[Hashable, tuple[Floats, Floats]], keys: Collection[Hashable], steps: int
) -> tuple[Floats, Floats]:
    """Return numbers and the counts behind them, of shape (keys, steps); NaN and 0 where there are none."""
    nothing = (np.full(steps, NAN), np.zeros(steps))
    pairs = [found.get(key, nothing) for key in keys]
    shape = len(pairs), steps
    return np.array([n for n, _ in pairs]).reshape(shape), np.array([c for _, c in pairs]).reshape(shape)


def _sizes(history: History) -> Ints:
    """Return the number of output elements of each call over the steps, −1 where it did not run."""
    sizes = np.full((len(history.calls), len(history.rows)), -1)
    places = {name: place for place, name in enumerate(history.calls)}
    for step, row in enumerate(history.rows):
        sizes[[places[name] for name in row.layout.calls], step] = row.sizes
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
    parameters, steps = history.parameters, len(history.rows)
    (grads, counts), (zeros, _), (norms, _) = (
        _table(series(history, kind), parameters, steps) for kind in ("pgrad", "pzeros", "norm")
    )
    finite, elements = np.isfinite(grads), np.array([max(p.numel(), 1) for p in parameters.values()])
    once = np.isnan(norms[:, 1:]).all(axis=1, keepdims=True)  # measured once, since no optimizer moves it
    norms = np.where(once, norms[:, :1], norms)
    numbers = {  # a row for each parameter
        "reached": counts > 0,
        "grad_norm": grads,
        "grad_finite": (counts == 0) | finite,
        "grad_zero_share": np.where(finite, zeros / elements[:, None], NAN),
        "norm": norms,
    }
    return [
        ParameterRecord(
            name=name,
            layer=owners[name],
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            trainable=parameter.requires_grad,
            optimized=optimized is None or name in optimized,
            **{what: of_all[i] for what, of_all in numbers.items()},
        )
        for i, (name, parameter) in enumerate(parameters.items())
    ]


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
                never_fired=NAN if peak is None else _share_of(~(peak > 0)),
                fell_silent=history.fell_silent(key),
                always_saturated=NAN if stuck is None else _share_of(stuck),
                width=0 if np.isnan(width).all() else int(np.nanmax(width)),
            )
        )
    return records


def _share_of(flags: Tensor) -> float:
    """Return the share of flags that are set."""
    return int(torch.count_nonzero(flags)) / flags.numel() if flags.numel() else NAN
