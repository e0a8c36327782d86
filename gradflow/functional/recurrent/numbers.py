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
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.recurrent.cells import Cell, State
from gradflow.functional.recurrent.transition import lyapunov_exponents, spectral_radii
from gradflow.functional.recurrent.unroll import Track, TrackGradients, Unrolled, track_gradients
from gradflow.functional.tap.watch import SATURATED
from gradflow.records import Bools, Floats, GateRecord, Ints, RecurrentLevelRecord

HEARD = 1e-6  # of a sample's largest: float32 keeps 7 digits, so what is smaller is lost in the sum
IDLE = 0.1  # of a step: what an idle gate amounts to over a whole sequence, see `GateRecord`


@attrs.frozen(kw_only=True)
class Budget:
    """On how much the costlier numbers are taken.

    Args:
        numbers: of gates, over steps and samples; of larger batches some samples stand for all.
        samples: at most, whatever their size.
        points: transitions whose eigenvalues are taken, and samples whose Lyapunov exponent is.
        steps: over which a tangent vector is carried; with none the Lyapunov exponent is NaN.
        states: whether the rms of the states is taken at every step.
    """

    numbers: int = 2**25
    samples: float = math.inf
    points: int = 8
    steps: int = 512
    states: bool = True


@attrs.frozen(eq=False, kw_only=True)
class LevelNumbers:
    """What a `RecurrentLevelRecord` holds, of one measured step."""

    level: str
    state_size: int
    gradient_profile: Floats
    state_profile: Floats
    readout_profile: Floats
    spectral_radius: float
    spectral_residual: float
    lyapunov: float
    hidden_rms: Floats
    cell_rms: Floats
    gates: dict[str, tuple[float, float, float]]  # mean, saturated share, idle share


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


def last_of(marks: Bools) -> Ints:
    """Return the index of the last true entry along axis 0, -1 where there is none.

    >>> last_of(np.array([[True, False], [True, False], [False, False]])).tolist()
    [1, -1]
    """
    last = len(marks) - 1 - np.argmax(marks[::-1], axis=0)
    return np.where(marks.any(axis=0), last, -1)


def level_numbers(
    track: Track, whole: TrackGradients, readout: Floats, *, total: int, budget: Budget
) -> LevelNumbers:
    """Return the numbers of one track.

    Args:
        track: the level, unrolled.
        whole: the gradients at its states.
        readout: the profile of the last read step alone.
        total: number of samples that the track's stand for.
        budget: on how much the costlier numbers are taken.
    """
    hidden, both = whole.norms.numpy(), whole.state_norms.numpy()
    ends = last_of(hidden != 0)
    drive = track.drive.detach()
    drive = drive.flip(0) if track.level.reverse else drive
    before = [tuple(part.detach() for part in state) for state in track.before]
    radii, residuals = _radii(track.level.cell, drive, before, track.alive, budget.points)
    after = [torch.stack(part).detach() for part in zip(*track.after, strict=True)]
    rms = [_rms(part, track.alive) for part in after] if budget.states else []
    return LevelNumbers(
        level=track.level.name,
        state_size=sum(track.level.cell.sizes),
        gradient_profile=profile(hidden, ends, total),
        state_profile=profile(both, ends, total),
        readout_profile=readout,
        spectral_radius=float(radii.mean()),
        spectral_residual=float(residuals.max()),
        lyapunov=_lyapunov(track.level.cell, drive, before[0], track.alive, budget),
        hidden_rms=rms[0] if rms else np.empty(0),
        cell_rms=rms[1] if len(rms) > 1 else np.empty(0),
        gates=_gates(track.gates, track.alive),
    )


def level_record(numbers: Sequence[LevelNumbers]) -> RecurrentLevelRecord:
    """Join what the measured steps gave for one level."""
    return RecurrentLevelRecord(
        level=numbers[0].level,
        state_size=numbers[0].state_size,
        gradient_profile=_padded([n.gradient_profile for n in numbers]),
        state_profile=_padded([n.state_profile for n in numbers]),
        readout_profile=_padded([n.readout_profile for n in numbers]),
        spectral_radius=np.array([n.spectral_radius for n in numbers]),
        spectral_residual=np.array([n.spectral_residual for n in numbers]),
        lyapunov=np.array([n.lyapunov for n in numbers]),
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


def _radii(
    cell: Cell, drive: Tensor, before: Sequence[State], alive: Tensor | None, number: int
) -> tuple[Tensor, Tensor]:
    """Return spectral radii at moments spread over the steps and the samples."""
    samples = spread(drive.shape[1], number)
    points = []
    for i in range(number):
        sample = samples[i % len(samples)]
        times = range(len(drive)) if alive is None else torch.nonzero(alive[:, sample]).flatten().tolist()
        points.append((times[int((i + 0.5) / number * len(times))], sample))
    points = sorted(set(points))
    state = tuple(torch.stack([before[t][k][b] for t, b in points]) for k in range(len(cell.sizes)))
    return spectral_radii(cell, torch.stack([drive[t, b] for t, b in points]), state)


def _lyapunov(cell: Cell, drive: Tensor, first: State, alive: Tensor | None, budget: Budget) -> float:
    if not budget.steps:
        return math.nan
    samples = spread(drive.shape[1], budget.points)
    state = tuple(part[samples] for part in first)
    here = None if alive is None else alive[:, samples]
    if here is not None and len(drive) > budget.steps:  # in reverse, the short ones begin late
        start = int(here.any(1).float().argmax())
        drive, here = drive[start:], here[start:]
    exponents = lyapunov_exponents(
        cell, drive[: budget.steps, samples], state, alive=None if here is None else here[: budget.steps]
    )
    known = exponents[~exponents.isnan()]
    return float(known.mean()) if len(known) else math.nan


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
    squares = values.double().square().mean(-1) if values.device.type != "mps" else values.square().mean(-1)
    if alive is None:
        return squares.mean(1).sqrt().cpu().double().numpy()
    sums = torch.where(alive, squares, 0.0).sum(1)
    return (sums / alive.sum(1)).sqrt().cpu().double().numpy()


def _gates(gates: Sequence[dict[str, Tensor]], alive: Tensor | None) -> dict[str, tuple[float, float, float]]:
    """Return mean, saturated and idle share of every gate; see `GateRecord`."""
    found = {}
    for name in gates[0]:
        values = torch.stack([step[name] for step in gates])
        values = values.flatten() if alive is None else values[alive].flatten()
        is_tanh = name in ("candidate", "state")
        slope = 1 - values * values if is_tanh else 4 * values * (1 - values)  # over its largest
        near = torch.minimum(values, 1 - values) * len(gates) < IDLE
        idle = math.nan if is_tanh else float(((slope < SATURATED) & near).double().mean())
        found[name] = (float(values.double().mean()), float((slope < SATURATED).double().mean()), idle)
    return found


# --------------------------------------------------------------------------- the last read step alone


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


def readout_profiles(
    unrolled: Unrolled, cotangents: Cotangents, whole: Sequence[TrackGradients], total: int
) -> list[Floats]:
    """Return by track the profile of the last read step alone; see NOTE [What one read-out keeps]."""
    profiles: dict[int, Floats] = {}
    for reverse in (False, True)[: cotangents.directions]:
        alone, place = cotangents.of_last_read(reverse)
        same = torch.equal(alone.output, cotangents.output) and all(
            torch.equal(a, b) for a, b in zip(alone.last, cotangents.last, strict=True)
        )
        found = whole if same else track_gradients(unrolled, alone.output, alone.last)
        ends = np.where(place >= 0, len(alone.output) - 1 - place, -1) if reverse else place
        for i, (track, gradient) in enumerate(zip(unrolled.tracks, found, strict=True)):
            if track.level.reverse is reverse:
                profiles[i] = profile(gradient.state_norms.numpy(), ends, total)
    return [profiles[i] for i in range(len(unrolled.tracks))]


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
