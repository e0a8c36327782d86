"""What the loss reads of a fused layer: the gradients at what it returns, and which steps these are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.recurrent.numbers import Told, last_of
from gradflow.records import Bools, Ints

HEARD = 1e-6  # of a sample's largest: float32 keeps 7 digits, so what is smaller is lost in the sum
FAINT = 1e-5  # the same, of steps that would take thousands of updates to be heard above the others
_SHUFFLES, _FEWEST, _MOST = 32, 8, 64  # of samples; fewest and most samples
_LEAST = 1e-15  # share of a tail: what is smaller is not told apart
_STEPS = 256  # most steps at which inputs are held against what the loss asks for


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

    @property
    def asked(self) -> Tensor:
        """The gradients at all that is read, (samples, numbers); outputs are added up over the steps."""
        last = [part.movedim(1, 0).flatten(1) for part in self.last]
        return torch.cat([self.output.sum(0), *last], 1)

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


def tells(x: Tensor, asked: Tensor, drives: Sequence[Tensor]) -> Told:
    """Return how far inputs go with what the loss asks of the layer, at steps that are heard and at others.

    ∂L/∂y at what is read holds, sample by sample, how far outputs are from their targets; while a model
    guesses, that is the targets, shifted. Where an input x_t tells of them, samples alike in one are alike in
    the other: Σ_ij ⟨x_ti, x_tj⟩ ⟨g_i, g_j⟩ of centred vectors (the Hilbert–Schmidt independence criterion of
    Gretton et al., 2005, with linear kernels, each of norm one) is larger than of samples that are shuffled.

    Args:
        x: the input, (steps, samples, features).
        asked: ∂L/∂y at all that is read, (samples, numbers).
        drives: as for `heard_share`; a step is heard where it gets at least `FAINT` of a sample's largest.

    Returns:
        Of the heard steps up to the last one with a gradient, and of the others: by how many standard
        deviations their sum, or their largest, is above that of shuffled samples; the larger of the two.
        And how many of the steps are heard, as a share. NaN for less than eight samples, and where all are.
    """
    wide = wide_dtype(x.device)
    joint = torch.stack([d.to(wide).square().sum(-1) for d in drives]).sum(0).sqrt()[:, :_MOST]
    reached = torch.nonzero((joint > 0).any(1)).flatten()
    if joint.shape[1] < _FEWEST or not len(reached):
        return Told()
    steps = torch.arange(int(reached[-1]) + 1, device=x.device)
    steps = steps[torch.linspace(0, len(steps) - 1, min(len(steps), _STEPS)).long().to(x.device)]
    heard = (joint[steps] >= FAINT * joint.max(0).values).any(1)
    if bool(heard.all()):
        return Told()
    inputs, answers = _alike(x[steps, :_MOST]), _alike(asked[None, :_MOST])[0]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(answers), generator=generator).to(x.device) for _ in range(_SHUFFLES)]
    shuffled = torch.stack([answers, *(answers[order][:, order] for order in orders)])
    found = torch.einsum("tij,sij->st", inputs, shuffled)
    share = float(heard.double().mean())
    return Told(_above_chance(found[:, heard]), _above_chance(found[:, ~heard]), share)


def _alike(rows: Tensor) -> Tensor:
    """Return Gram matrices of centred samples, of norm one, (steps, samples, samples)."""
    rows = rows.to(wide_dtype(rows.device))
    rows = rows - rows.mean(1, keepdim=True)
    gram = rows @ rows.mT
    return gram / torch.linalg.matrix_norm(gram).clamp_min(1e-30)[:, None, None]


def _above_chance(found: Tensor) -> float:
    """Return how far the first row is above the others, by its sum and by its largest number.

    Of shuffled samples these are sums of squares, so a gamma distribution of their mean and deviation stands
    for them; its tail is given as deviations of a normal one.
    """
    if not found.shape[1]:
        return math.nan
    measures = torch.stack([found.sum(1), found.amax(1)]).cpu().double()
    real, mean, deviation = measures[:, 0], measures[:, 1:].mean(1), measures[:, 1:].std(1)
    scale = (deviation.square() / mean.clamp_min(1e-300)).clamp_min(1e-300)
    tail = torch.special.gammaincc((mean / scale).clamp_min(1e-12), (real / scale).clamp_min(0.0))
    return float(-torch.special.ndtri(tail.clamp(_LEAST, 1 - _LEAST)).min())


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
