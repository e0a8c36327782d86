"""From an unrolled recurrent layer and the gradients at its states to plain numbers.

NOTE [Where a sequence ends]
A profile counts back from the last step that the loss's gradient arrives at, sample by sample. For a packed
sequence that is its end; for a padded one, of which the loss reads the last true step, it is that step,
though the layer knows nothing of padding. The step of index k from the end is averaged over the samples that
have one.

NOTE [What one read-out keeps]
Where the loss reads every step, each has a gradient of its own, and the profile of their sum does not tell
how far any of them reaches back. So the gradient of what is read at the last step alone is sent back as well:
its profile falls by what the recurrence itself keeps per step. Where only the last step is read, the two are
one.

NOTE [What is sampled, and how far off that is]
Profiles, gates and rms are those of all steps and units, and of all samples unless a batch is too large. The
eigenvalues of the transition are taken at some moments, of samples spread over the batch, and a tangent
vector is carried along for some samples. Each mean over n of these comes with its standard error, the
standard deviation over √n; for a profile, the root of a mean of squares over some of the samples, with the
relative one of the mean square halved, times √(1 − share measured) since it is drawn without putting back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.recurrent.course import Course
from gradflow.functional.recurrent.transition import Radii, growth_rates, radii_of
from gradflow.functional.tap.watch import SATURATED
from gradflow.records import Bools, Floats, GateRecord, Ints, RecurrentLevelRecord

IDLE = 0.1  # of a step: what an idle gate amounts to over a whole sequence, see `GateRecord`


@attrs.frozen(kw_only=True)
class Budget:
    """On how much the costlier numbers are taken.

    Args:
        numbers: of gates, over steps and samples; of larger batches some samples stand for all.
        samples: at most, whatever their size.
        points: transitions whose eigenvalues are taken.
        vectors: samples along which a tangent vector is carried.
        steps: over which it is carried; with none the Lyapunov exponent is NaN.
        dense: largest state whose transition is taken whole.
        tolerance: relative residual of the eigenvalues of larger ones.
        states: whether the rms of the states is taken at every step.
        looks: whether at every measured step, and not at the first and the last alone.
    """

    numbers: int = 2**25
    samples: float = math.inf
    points: int = 8
    vectors: int = 8
    steps: int = 512
    dense: int = 64
    tolerance: float = 1e-2
    states: bool = True
    looks: bool = False


EXACT = Budget(numbers=2**28, points=32, vectors=2**10, steps=2**20, dense=256, tolerance=1e-4, looks=True)


class Told(NamedTuple):
    """How far inputs tell what the loss asks for, at heard steps and at others; and how many are heard."""

    heard: float = math.nan
    faint: float = math.nan
    share: float = math.nan


@attrs.frozen(eq=False, kw_only=True)
class LevelNumbers:
    """What a `RecurrentLevelRecord` holds, of one measured step; and `products`, the rows that the transition
    of its state was multiplied with."""

    level: str
    state_size: int
    gradient_profile: Floats
    state_profile: Floats
    readout_profile: Floats
    profile_error: float
    spectral_radius: float
    spectral_error: float
    spectral_residual: float
    lyapunov: float
    lyapunov_error: float
    hidden_rms: Floats
    cell_rms: Floats
    gates: dict[str, tuple[float, float, float]]  # mean, saturated share, idle share
    products: int


@attrs.frozen(eq=False, kw_only=True)
class CallNumbers:
    """What one measured step gave for one call or loop; see `RecurrenceRecord`."""

    num_steps: int
    num_samples: int  # measured, of
    batch: int
    read_share: float
    heard_share: float
    state_error: float
    subnormal_share: float
    cost: float
    levels: list[LevelNumbers]
    unmasked: bool = False  # its dropout masks are not known
    still_end: float = math.nan
    told: Told = attrs.field(factory=Told)


def profile(norms: Floats, ends: Ints, total: int) -> Floats:
    """Return norms by step, ending at each sample's end; see NOTE [Where a sequence ends].

    Args:
        norms: (steps, samples).
        ends: index of each sample's last step; -1 for one that is left out.
        total: number of samples that these stand for.

    Returns:
        √(total · mean square) by step, the end last. All zeros where no sample is left.

    >>> profile(np.array([[1.0, 3.0], [2.0, 0.0]]), np.array([1, 0]), 2).tolist()
    [1.4142135623730951, 3.605551275463989]
    """
    known = ends >= 0
    if not known.any():
        return np.zeros(len(norms))
    norms, ends = norms[:, known], ends[known]
    rows = ends - np.arange(int(ends.max()) + 1)[:, None]
    squares = np.take_along_axis(norms, np.maximum(rows, 0), 0) ** 2 * (rows >= 0)
    share = known.mean()
    return np.sqrt(total * share * squares.sum(1) / (rows >= 0).sum(1))[::-1].copy()


def profile_error(norms: Floats, ends: Ints, total: int) -> float:
    """Return the relative standard error of a profile; see NOTE [What is sampled, and how far off that is].

    Args:
        norms: (steps, samples).
        ends: index of each sample's last step; -1 for one that is left out.
        total: number of samples that these stand for.

    Returns:
        Of the entries within a percent of the peak, the largest; 0 where no sample was left out.
    """
    number = norms.shape[1]
    known = ends >= 0
    if number >= total or not known.any():
        return 0.0
    norms, ends = norms[:, known], ends[known]
    rows = ends - np.arange(int(ends.max()) + 1)[:, None]
    inside = rows >= 0
    squares = np.where(inside, np.take_along_axis(norms, np.maximum(rows, 0), 0) ** 2, 0.0)
    counts = inside.sum(1)
    mean = squares.sum(1) / counts
    variance = np.where(inside, (squares - mean[:, None]) ** 2, 0.0).sum(1) / np.maximum(counts - 1, 1)
    counted = (mean >= 1e-4 * mean.max()) & (mean > 0) & (counts > 1)
    if not counted.any():
        return math.nan
    of_square = np.sqrt(variance / counts)[counted] / mean[counted]
    return float(of_square.max() / 2 * math.sqrt(1 - number / total))


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values that are known; NaN for fewer than two."""
    known = values[values.isfinite()]
    return float(known.std() / math.sqrt(len(known))) if len(known) > 1 else math.nan


def last_of(marks: Bools) -> Ints:
    """Return the index of the last true entry along axis 0, -1 where there is none.

    >>> last_of(np.array([[True, False], [True, False], [False, False]])).tolist()
    [1, -1]
    """
    last = len(marks) - 1 - np.argmax(marks[::-1], axis=0)
    return np.where(marks.any(axis=0), last, -1)


def level_numbers(
    course: Course, norms: tuple[Tensor, Tensor], readout: Floats, *, total: int, budget: Budget
) -> LevelNumbers:
    """Return the numbers of one level.

    Args:
        course: the level over the sequence.
        norms: of the gradients at h and at the whole state, (steps, samples).
        readout: the profile of the last read step alone.
        total: number of samples that the course's stand for.
        budget: on how much the costlier numbers are taken.
    """
    hidden, both = (part.numpy() for part in norms)
    ends = last_of(hidden != 0)
    radii = _radii(course, budget)
    exponents, carried = _exponents(course, budget)
    rms = [_rms(part, course.alive) for part in course.after] if budget.states else []
    known = exponents[~exponents.isnan()]
    return LevelNumbers(
        level=course.level.name,
        state_size=sum(course.level.cell.sizes),
        gradient_profile=profile(hidden, ends, total),
        state_profile=profile(both, ends, total),
        readout_profile=readout,
        profile_error=profile_error(hidden, ends, total),
        spectral_radius=float(radii.radii.mean()),
        spectral_error=standard_error(radii.radii),
        spectral_residual=float(radii.residuals.max()),
        lyapunov=float(known.mean()) if len(known) else math.nan,
        lyapunov_error=standard_error(exponents),
        hidden_rms=rms[0] if rms else np.empty(0),
        cell_rms=rms[1] if len(rms) > 1 else np.empty(0),
        gates=_gates(course),
        products=radii.products * len(radii.radii) + carried,
    )


def level_record(numbers: Sequence[LevelNumbers]) -> RecurrentLevelRecord:
    """Join what the measured steps gave for one level."""
    return RecurrentLevelRecord(
        level=numbers[0].level,
        state_size=numbers[0].state_size,
        gradient_profile=_padded([n.gradient_profile for n in numbers]),
        state_profile=_padded([n.state_profile for n in numbers]),
        readout_profile=_padded([n.readout_profile for n in numbers]),
        profile_error=np.array([n.profile_error for n in numbers]),
        spectral_radius=np.array([n.spectral_radius for n in numbers]),
        spectral_error=np.array([n.spectral_error for n in numbers]),
        spectral_residual=np.array([n.spectral_residual for n in numbers]),
        lyapunov=np.array([n.lyapunov for n in numbers]),
        lyapunov_error=np.array([n.lyapunov_error for n in numbers]),
        hidden_rms=_padded([n.hidden_rms for n in numbers], front=False),
        cell_rms=_padded([n.cell_rms for n in numbers], front=False),
        gates=[
            GateRecord(name=name, mean=values[:, 0], saturated_share=values[:, 1], idle_share=values[:, 2])
            for name in numbers[0].gates
            for values in [np.array([n.gates[name] for n in numbers])]
        ],
    )


def _padded(rows: Sequence[np.ndarray], *, front: bool = True) -> np.ndarray:
    """Return rows of different lengths as a matrix, with NaN in front of (or behind) the shorter ones."""
    width = max(len(row) for row in rows)
    sides = [((width - len(row), 0) if front else (0, width - len(row))) for row in rows]
    return np.stack(
        [np.pad(row, side, constant_values=math.nan) for row, side in zip(rows, sides, strict=True)]
    )


def _radii(course: Course, budget: Budget) -> Radii:
    """Return spectral radii at moments spread over the steps and the samples."""
    steps, width = course.after[0].shape[:2]
    samples, number = spread(width, budget.points), budget.points
    points = []
    for i in range(number):
        sample = samples[i % len(samples)]
        times = range(steps)
        if course.alive is not None:
            times = torch.nonzero(course.alive[:, sample]).flatten().tolist()
        points.append((times[int((i + 0.5) / number * len(times))], sample))
    at, which = (list(part) for part in zip(*sorted(set(points)), strict=True))
    return radii_of(course.slopes(at, which), dense=budget.dense, tolerance=budget.tolerance)


def _exponents(course: Course, budget: Budget) -> tuple[Tensor, int]:
    """Return Lyapunov exponents along some samples, and how many products they took."""
    if not budget.steps:
        return torch.empty(0), 0
    samples = spread(course.after[0].shape[1], budget.vectors)
    steps, here, start = len(course.after[0]), None, 0
    if course.alive is not None:
        here = course.alive[:, samples]
        if steps > budget.steps:  # in reverse, the short ones begin late
            start = int(here.any(1).float().argmax())
    window = slice(start, start + budget.steps)
    slopes = course.slopes(window, samples)
    here = None if here is None else here[window]
    return growth_rates(slopes.steps(), len(samples), alive=here), len(slopes.into) * len(samples)


def spread(number: int, most: int) -> list[int]:
    """Return at most `most` indices spread over a range of that number.

    >>> spread(100, 4), spread(2, 4)
    ([0, 33, 66, 99], [0, 1])
    """
    if number <= most:
        return list(range(number))
    return [round(i * (number - 1) / (most - 1)) for i in range(most)] if most > 1 else [0]


def _rms(values: Tensor, alive: Tensor | None) -> Floats:
    """Return the rms over samples and units at each step, (steps,)."""
    squares = torch.linalg.vector_norm(values, dim=-1, dtype=wide_dtype(values.device)).square()
    squares = squares / values.shape[-1]
    if alive is None:
        return squares.mean(1).sqrt().cpu().double().numpy()
    sums = torch.where(alive, squares, 0.0).sum(1)
    return (sums / alive.sum(1)).sqrt().cpu().double().numpy()


def _gates(course: Course) -> dict[str, tuple[float, float, float]]:
    """Return mean, saturated and idle share of every gate; see `GateRecord`."""
    found = {}
    for name, values in course.gates.items():
        steps = len(values)
        values = values.flatten() if course.alive is None else values[course.alive].flatten()
        is_tanh = name in ("candidate", "state")
        slope = 1 - values * values if is_tanh else 4 * values * (1 - values)  # over its largest
        stuck = slope < SATURATED
        idle = math.nan
        if not is_tanh:
            idle = _share(stuck & (torch.minimum(values, 1 - values) * steps < IDLE))
        mean = float(values.mean(dtype=wide_dtype(values.device)))
        found[name] = (mean, _share(stuck), idle)
    return found


def _share(marks: Tensor) -> float:
    return int(torch.count_nonzero(marks)) / marks.numel()
