"""Remedies of the data: larger batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradflow.errors import RemedyError
from gradflow.remedies.remedy import Remedy, unchanged


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
