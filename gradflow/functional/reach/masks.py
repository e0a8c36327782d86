"""Questions to masks and labels, in the forms that a CPU answers fastest.

PyTorch's reductions of booleans and its comparisons take up to ten times as long on a CPU as those of bytes,
as casts, and as NumPy's; masks here are as large as parameters, and there are many.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradflow.functional.processes.shards import is_distributed

_MANY = 16  # labels from which on counting all at once is faster than one by one
_NUMPY = (torch.float32, torch.float64)  # of whose elements NumPy asks faster whether they are zero


def some(mask: Tensor) -> bool:
    """Return whether any element is True.

    >>> some(torch.tensor([False, True])), some(torch.tensor([False])), some(torch.zeros(0, dtype=torch.bool))
    (True, False, False)
    """
    if mask.is_cpu:
        return bool(mask.numpy().any())
    return mask.numel() > 0 and bool(mask.view(torch.uint8).max())


def number(mask: Tensor) -> int:
    """Return how many elements are True.

    >>> number(torch.tensor([True, False, True]))
    2
    """
    return int(np.count_nonzero(mask.numpy())) if mask.is_cpu else int(mask.sum())


def places(mask: Tensor) -> Tensor:
    """Return the places of the elements that are True, in the mask as a vector.

    >>> places(torch.tensor([[True, False], [False, True]]))
    tensor([0, 3])
    """
    if mask.is_cpu:
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().reshape(-1)


def every(mask: Tensor) -> bool:
    """Return whether all elements are True."""
    return not some(~mask)


def every_in_rows(mask: Tensor) -> Tensor:
    """Return for each row of a matrix, which has columns, whether all of its elements are True."""
    return mask.view(torch.uint8).amin(1).bool()


def is_zero(x: Tensor) -> Tensor:
    """Return which elements are exactly zero; a NaN is not."""
    return torch.from_numpy(np.asarray(x.numpy() == 0)) if x.is_cpu and x.dtype in _NUMPY else ~x.bool()


def is_plain(x: Tensor) -> bool:
    """Whether NumPy takes the elements of a tensor as they are."""
    return x.is_cpu and x.dtype in _NUMPY and x.layout is torch.strided


def nonzero_at(x: Tensor, at: Tensor) -> Tensor:
    """Return which elements of a dense tensor, at some places in it as a vector, are other than zero.

    >>> nonzero_at(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 3]))
    tensor([False,  True])
    """
    if x.is_cpu and x.dtype in _NUMPY and type(x) is Tensor:
        return torch.from_numpy(np.asarray(x.numpy().reshape(-1).take(at.numpy()) != 0))
    return x.reshape(-1).index_select(0, at).bool()


def is_label(labels: Tensor, label: int) -> Tensor:
    """Return which elements have a label."""
    if labels.is_cpu:
        return torch.from_numpy(np.asarray(labels.numpy() == label))
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
    found: Any = labels.reshape(-1)
    here = None if where is None else where.reshape(-1)
    if not found.is_cpu:
        flat = found.int() + 1
        numbers = torch.bincount(flat if here is None else flat * here.int()).tolist()[1:]
        return {label: count for label, count in enumerate(numbers) if count}
    found = found.numpy() if here is None else found.numpy().take(np.flatnonzero(here.numpy()))
    most = int(found.max(initial=0))
    if most < _MANY:
        counts = {label: np.count_nonzero(found == label) for label in range(most + 1)}
    else:
        counts = dict(enumerate(np.bincount(found).tolist()))
    return {label: int(count) for label, count in counts.items() if count}


def relative_size(tensor: Tensor, of: Tensor, but: Tensor) -> float:
    """Return the mean magnitude of some elements of a tensor over that of the rest; NaN if there is none.

    Args:
        tensor: on any device; of one that is spread over processes nothing is said.
        of: which elements, on the host.
        but: those that are not of the rest, on the host.

    >>> x, of = torch.tensor([3.0, -1.0, 5.0]), torch.tensor([True, False, False])
    >>> relative_size(x, of, of | (x > 4))
    3.0
    """
    if is_distributed(tensor) or tensor.shape != of.shape or not some(~but):
        return math.nan
    size = tensor.detach().abs().double().cpu()
    rest = float(size[~but].mean())
    return float(size[of].mean()) / rest if rest > 0 else math.nan
