"""The zeros of one tensor and their labels, as places; and random numbers to call a node with."""

from __future__ import annotations

import functools
import math

import attrs
import torch
from torch import Tensor

from gradflow.functional.reach.masks import is_zero, places


@attrs.frozen(eq=False)
class Zeros:
    """Where a tensor is exactly zero. Zeros are few, so their places are followed, and not masks of all.

    Places count in the order of the tensor's memory, in which it is a vector without a copy.

    Args:
        order: of its axes, from the one with the longest stride.
        sizes: of the tensor, in that order.
        places: of the zeros.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    places: Tensor
    _labels: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Zeros:
        """Return the zeros of a tensor, without labels.

        >>> zeros = Zeros.of(torch.tensor([[1.0, 0.0, 3.0], [0.0, 5.0, 6.0]]))
        >>> zeros.label(zeros.places[1:], 7)
        >>> zeros.places, zeros.labels()
        (tensor([1, 3]), tensor([[0, 0, 0],
                [7, 0, 0]], dtype=torch.int16))
        """
        order = tuple(sorted(range(x.dim()), key=lambda axis: -x.stride(axis)))
        inside = x.permute(order)
        labels = torch.zeros(inside.numel(), dtype=torch.int16, device=x.device)
        return cls(order, tuple(inside.shape), places(is_zero(inside)), labels)

    @property
    def numel(self) -> int:
        """The number of elements of the tensor, zero or not."""
        return self._labels.numel()

    def reached(self, x: Tensor | None, at: Tensor | None = None) -> Tensor:
        """Return at which places another tensor of the same shape is not zero; at none where there is none.

        Args:
            x: the tensor.
            at: the places; by default, all of the zeros.
        """
        at = self.places if at is None else at
        if x is None:
            return torch.zeros_like(at, dtype=torch.bool)
        return x.permute(self.order).reshape(-1).index_select(0, at).bool()

    def label(self, at: Tensor, label: int) -> None:
        """Put a label on some places."""
        self._labels.index_fill_(0, at, label)

    def labels(self) -> Tensor:
        """Return the labels in the form of the tensor, 0 where there is none."""
        back = sorted(range(len(self.order)), key=lambda axis: self.order[axis])
        return self._labels.reshape(self.sizes).permute(back)


_POOL = 2**18  # numbers that are kept from run to run, since to draw them is slow on a CPU


@attrs.define(eq=False)
class RandomNumbers:
    """Random numbers between 1 and 2, without a draw from the user's generators.

    Those of small tensors are parts of a pool that goes round: a few tensors in a row share none.
    """

    _used: int = 0  # of the pool
    _generators: dict[torch.device, torch.Generator] = attrs.field(factory=dict)

    def like(self, x: Tensor) -> Tensor:
        """Return random numbers in the shape and dtype of a tensor, on its device, contiguous."""
        size = math.prod(x.shape)
        if 4 * size > _POOL:
            if x.device not in self._generators:
                self._generators[x.device] = torch.Generator(x.device).manual_seed(0)
            return x.new_empty(tuple(x.shape)).uniform_(1, 2, generator=self._generators[x.device])
        start = self._used if self._used + size <= _POOL else 0
        self._used = start + size
        return _pool(x.device, x.dtype)[start : self._used].reshape(tuple(x.shape))


@functools.cache
def _pool(device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(_POOL, dtype=dtype, device=device).uniform_(1, 2, generator=generator)
