"""What the loss reads of a fused layer: the gradients at what it returns, and which steps these are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.recurrent.numbers import last_of
from gradflow.records import Bools, Ints

HEARD = 1e-6  # of a sample's largest: float32 keeps 7 digits, so what is smaller is lost in the sum


@attrs.frozen(eq=False, kw_only=True)
class Cotangents:
    """Gradients at what a fused layer returns.

    Args:
        output: ∂L/∂output, (steps, samples, directions · size).
        last: ∂L/∂h_n, and ∂L/∂c_n, each (levels, samples, size).
        lengths: of the samples, (samples,).
    """

    output: Tensor
    last: tuple[Tensor, ...]
    lengths: Tensor

    @property
    def directions(self) -> int:
        """1 or 2."""
        return self.output.shape[-1] // self.last[0].shape[-1]

    @property
    def read(self) -> Bools:
        """Which steps of the output the loss reads, (steps, samples)."""
        return (self.output != 0).any(-1).cpu().numpy()

    def final(self, reverse: bool) -> Bools:
        """Which samples' last states, of one direction, the loss reads, (samples,)."""
        ends = [part[int(reverse) :: self.directions] for part in self.last]
        return np.any([(part != 0).any(-1).any(0).cpu().numpy() for part in ends], axis=0)

    @property
    def read_steps(self) -> Bools:
        """Which steps the loss reads, in the output or as a last state, (steps, samples)."""
        read = self.read.copy()
        for reverse in (False, True)[: self.directions]:
            final = self.final(reverse)
            ends = np.zeros(len(final), np.int64) if reverse else self.lengths.numpy() - 1
            read[ends[final], np.flatnonzero(final)] = True
        return read

    def same(self, other: Cotangents) -> bool:
        """Whether these are the same gradients."""
        pairs = zip((self.output, *self.last), (other.output, *other.last), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def of_last_read(self, reverse: bool) -> tuple[Cotangents, Ints]:
        """Return the gradient of what is read at the last step alone, and that step by sample.

        Args:
            reverse: whether the last step in reverse is meant: the first of the sequence.
        """
        read, final, directions = self.read, self.final(reverse), self.directions
        lengths = self.lengths.numpy()
        if reverse:
            first = np.where(read.any(axis=0), np.argmax(read, axis=0), -1)
            place, end = np.where(final, 0, first), np.zeros_like(lengths)
        else:
            place, end = np.where(final, lengths - 1, last_of(read)), lengths - 1
        marks = torch.arange(len(read))[:, None] == torch.from_numpy(place)
        last = tuple(torch.zeros_like(part) for part in self.last)
        here = torch.from_numpy(place == end).to(self.output.device)
        for new, old in zip(last, self.last, strict=True):
            new[int(reverse) :: directions] = old[int(reverse) :: directions] * here[:, None]
        marks = marks.to(self.output.device)[..., None]
        output = torch.where(marks, self.output, torch.zeros_like(self.output))
        return attrs.evolve(self, output=output, last=last), place


def heard_share(drives: Sequence[Tensor], alive: Tensor | None, *, one_way: bool) -> float:
    """Return the share of steps whose gradient is not lost to rounding; see `RecurrenceRecord`.

    Args:
        drives: ∂L/∂d_t of the lowest level, by direction, (steps, samples, gates · hidden).
        alive: which steps belong to each sample, (steps, samples); None where all do.
        one_way: whether there is one direction, so that steps after the last read one do not count.
    """
    wide = wide_dtype(drives[0].device)
    norms = [torch.linalg.vector_norm(d, dim=-1, dtype=wide).cpu().double().numpy() for d in drives]
    joint = np.sqrt(np.square(norms).sum(0))
    counted = np.ones(joint.shape, np.bool_) if alive is None else alive.cpu().numpy().copy()
    if one_way:
        counted &= np.arange(len(joint))[:, None] <= last_of(joint != 0)
    counted &= joint.max(0) > 0
    return float((joint >= HEARD * joint.max(0))[counted].mean()) if counted.any() else math.nan


def still_end(x: Tensor, read: Bools) -> float:
    """Return at how many steps up to the last one that is read the input stays the same, which is padding.

    Only what several samples share counts, and one that is read nowhere does not.

    Args:
        x: the input, (steps, samples, features).
        read: which outputs the loss reads, (steps, samples).

    Returns:
        The median over the samples: 1 where the input changes from step to step, 0 where samples do not share
        their last input.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 3.0], [0.0, 0.0], [0.0, 0.0]])[..., None]
    >>> still_end(x, np.array([[False, False], [False, False], [False, False], [True, True]]))
    2.5
    """
    known = np.flatnonzero(read.any(axis=0))
    if len(known) < 2:
        return math.nan
    steps = np.arange(len(read))[:, None]
    last = len(read) - 1 - read[::-1, known].argmax(axis=0)
    x = x[:, known]
    ends = x[torch.from_numpy(last).to(x.device), torch.arange(len(known), device=x.device)]
    same = (x == ends).all(-1).cpu().numpy() | (steps > last)
    changes = np.where(same, -1, steps).max(axis=0)  # the last step with another input; -1 for none
    lengths = last - changes
    shared = (ends == ends[int(lengths.argmax())]).all(-1).cpu().numpy()
    return float(np.median(np.where(shared, lengths, 0))) if shared.sum() >= 2 else 0.0
