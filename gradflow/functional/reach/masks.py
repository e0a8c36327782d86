"""Questions to masks and labels, in the forms that a CPU answers fastest.

PyTorch's reductions of booleans and its comparisons take ten times as long on a CPU as those of bytes, and as
casts; masks here are as large as parameters, and there are many.
"""

from __future__ import annotations

import torch
from torch import Tensor


def some(mask: Tensor) -> bool:
    """Return whether any element is True.

    >>> some(torch.tensor([False, True])), some(torch.tensor([False])), some(torch.zeros(0, dtype=torch.bool))
    (True, False, False)
    """
    return mask.numel() > 0 and bool(mask.view(torch.uint8).max())


def every(mask: Tensor) -> bool:
    """Return whether all elements are True."""
    return not some(~mask)


def every_in_rows(mask: Tensor) -> Tensor:
    """Return for each row of a matrix, which has columns, whether all of its elements are True."""
    return mask.view(torch.uint8).amin(1).bool()


def is_zero(x: Tensor) -> Tensor:
    """Return which elements are exactly zero; a NaN is not."""
    return ~x.bool()


def is_label(labels: Tensor, label: int) -> Tensor:
    """Return which elements have a label."""
    return ~(labels ^ label).bool()


def labelled(mask: Tensor, label: int) -> Tensor:
    """Return labels with one of them where a mask is True, and 0 elsewhere."""
    return mask.to(torch.int16).mul_(label)


def number_of_each(labels: Tensor, where: Tensor | None = None) -> dict[int, int]:
    """Return how often each label occurs, the labels in order.

    Args:
        labels: whole numbers from 0 on.
        where: which elements count; all by default.

    >>> number_of_each(torch.tensor([3, 0, 3])), number_of_each(torch.ones(2).int(), torch.ones(2) > 1)
    ({0: 1, 3: 2}, {})
    """
    flat = labels.reshape(-1).int() + 1
    numbers = torch.bincount(flat if where is None else flat * where.reshape(-1).int()).tolist()
    return {label: number for label, number in enumerate(numbers[1:]) if number}
