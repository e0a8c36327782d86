"""Remedies of the data: larger batches, and standardised inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import RemedyError
from gradflow.remedies.kinds.functions import with_inputs
from gradflow.remedies.remedy import Remedy, on_model, unchanged


def larger_batches(times: int = 8) -> Remedy:
    """Return the remedy that joins several batches into one.

    Args:
        times: how many; fewer where fewer were drawn.

    >>> larger_batches(2).on_batches([torch.zeros(1, 3), torch.ones(1, 3)])[0].shape
    torch.Size([2, 3])
    """

    def joined(batches: Sequence[Any]) -> Sequence[Any]:
        together = [batches[i : i + times] for i in range(0, len(batches), times)]
        return [_joined(several) for several in together if len(several) == min(times, len(batches))]

    return Remedy(
        name=f"batches {times} times as large",
        words=f"{times} batches joined into one.",
        code=f"loader = DataLoader(dataset, batch_size={times} * batch_size)",
        apply=unchanged,
        on_batches=joined,
    )


def inputs_standardised() -> Remedy:
    """Return the remedy that standardises what a model is given, feature by feature over the batch.

    Features are the last axis, of images the second. LeCun et al., "Efficient backprop", 1998.
    """

    def change(model: nn.Module) -> None:
        module: Any = model
        module.forward = with_inputs(module.forward, _standardised)

    return Remedy(
        name="standardised inputs of the model",
        general=True,
        words="All quantities that the model is given standardised, feature by feature.",
        code="x = (x - mean) / std  # of every column, over the training data, where the data is loaded",
        apply=on_model(change),
    )


def _standardised(x: Tensor) -> Tensor:
    if x.dim() == 0 or len(x) < 2:
        return x
    feature = -1 if x.dim() == 1 else 1 if x.dim() >= 4 else x.dim() - 1
    axes = [axis for axis in range(x.dim()) if axis != feature]
    with torch.no_grad():
        y = x.double()
        mean, std = y.mean(axes, keepdim=True), y.std(axes, keepdim=True, unbiased=False)
    return ((x - mean) / (std + 1e-5 + 1e-6 * mean.abs())).to(x.dtype)


def _joined(batches: Sequence[Any]) -> Any:
    first = batches[0]
    if isinstance(first, Tensor):
        if first.dim() == 0 or any(b.shape[1:] != first.shape[1:] for b in batches):
            raise RemedyError("the batches differ in shape, so they cannot be joined.")
        return torch.cat(list(batches))
    if isinstance(first, (tuple, list)):
        return type(first)([_joined(parts) for parts in zip(*batches, strict=True)])
    if isinstance(first, Mapping):
        return {key: _joined([batch[key] for batch in batches]) for key in first}
    raise RemedyError(f"batches that hold a {type(first).__name__} cannot be joined.")
