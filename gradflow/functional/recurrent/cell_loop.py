"""Loops over recurrent cells: which calls make a sequence, and the same numbers as for a fused layer.

The states of a loop are the outputs of its calls, so the loss's gradient at them needs no unrolling: it is
asked for directly. The pure cell, at the states that the model has computed, gives the rest: gates,
transition, the gradient at the drive, and how far the last read-out reaches back through the cell alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.recurrent.cells import Level, State
from gradflow.functional.recurrent.numbers import (
    Budget,
    LevelNumbers,
    heard_share,
    last_of,
    level_numbers,
    profile,
)
from gradflow.functional.recurrent.unroll import Track, TrackGradients
from gradflow.functional.tap.calls import Call
from gradflow.records import Floats

DIRECT = 1e-3  # of the gradient at a state: well above rounding


@attrs.define(eq=False, kw_only=True)
class CellCall:
    """One call of a cell, until the step has ended.

    Args:
        call: the call.
        x: its input, detached.
        before: the state that it was given, detached; empty for none.
        follows: index of the earlier call of the same cell that its state came from, or None.
        outputs: the new state, h (and c).
        found: the loss's gradient at these.
    """

    call: Call
    x: Tensor
    before: State
    follows: int | None
    outputs: State = ()
    found: list[Tensor | None] = attrs.field(factory=list)


def chains(calls: Mapping[int, CellCall]) -> Iterator[list[CellCall]]:
    """Yield the sequences that calls of cells make, each in the order of time.

    Args:
        calls: by index, in the order of execution.
    """
    last: dict[int, list[CellCall]] = {}
    found: list[list[CellCall]] = []
    for index, heard in calls.items():
        if not heard.outputs:
            continue
        chain = last.pop(heard.follows, None) if heard.follows is not None else None
        if chain is None:
            found.append(chain := [])
        chain.append(heard)
        last[index] = chain
    yield from found


@attrs.frozen(eq=False, kw_only=True)
class LoopNumbers:
    """What one measured step gave for one loop; see `RecurrenceRecord`."""

    read_share: float
    heard_share: float
    state_error: float
    level: LevelNumbers


def loop_numbers(chain: Sequence[CellCall], level: Level, *, budget: Budget) -> LoopNumbers:
    """Return the numbers of one loop.

    Args:
        chain: its calls, in the order of time.
        level: the cell.
        budget: on how much the costlier numbers are taken.
    """
    track, whole, error = _as_track(chain, level)
    state = tuple(torch.stack(part).requires_grad_() for part in zip(*track.before, strict=True))
    drive = track.drive.clone().requires_grad_()
    new, _ = level.cell(drive, state)
    parts = [whole.h] if whole.c is None else [whole.h, whole.c]
    at_drive, *pulled = torch.autograd.grad(new, [drive, *state], parts)
    whole = attrs.evolve(whole, drive=at_drive)
    return LoopNumbers(
        read_share=_read_share(parts, pulled),
        heard_share=heard_share([at_drive], None, one_way=True),
        state_error=error,
        level=level_numbers(track, whole, _readout(track, whole), total=drive.shape[1], budget=budget),
    )


def _as_track(chain: Sequence[CellCall], level: Level) -> tuple[Track, TrackGradients, float]:
    """Return a loop's states and the gradients at them as those of a fused layer, and its state error."""
    dtype = level.weight_ih.dtype

    def stacked(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [torch.stack(_rows(part)).detach().to(dtype) for part in zip(*rows, strict=True)]

    (x,) = stacked([[heard.x] for heard in chain])
    after = stacked([heard.outputs for heard in chain])
    before = stacked([h.before or [torch.zeros_like(part) for part in h.outputs] for h in chain])
    at_states = stacked(
        [
            [torch.zeros_like(o) if g is None else g for g, o in zip(h.found, h.outputs, strict=True)]
            for h in chain
        ]
    )
    drive = level.drive(x)
    new, gates = level.cell(drive, tuple(before))
    track = Track(
        level=level,
        drive=drive,
        before=list(zip(*before, strict=True)),
        after=list(zip(*after, strict=True)),
        last=tuple(part[-1] for part in after),
        gates=[{name: gate[t] for name, gate in gates.items()} for t in range(len(chain))],
        alive=None,
    )
    whole = TrackGradients(h=at_states[0], c=at_states[1] if len(at_states) > 1 else None, drive=drive)
    return track, whole, _error(new, after)


def _read_share(at_states: Sequence[Tensor], pulled: Sequence[Tensor]) -> float:
    """Return the share of steps with a gradient beyond what the following step hands back."""
    whole = torch.cat(list(at_states), -1)
    direct = whole.clone()
    direct[:-1] -= torch.cat(list(pulled), -1)[1:]
    wide = wide_dtype(whole.device)  # squares of float32 underflow
    sizes = [torch.linalg.vector_norm(part, dim=-1, dtype=wide) for part in (direct, whole)]
    return float((sizes[0] > DIRECT * sizes[1]).float().mean())


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return (samples, features) tensors cut to the fewest samples: a loop may drop those that have ended."""
    tensors = [t if t.dim() > 1 else t.unsqueeze(0) for t in tensors]
    least = min(len(t) for t in tensors)
    return [t[:least] for t in tensors]


def _error(found: Sequence[Tensor], real: Sequence[Tensor]) -> float:
    difference = sum(float((f - r).square().sum()) for f, r in zip(found, real, strict=True))
    size = sum(float(r.square().sum()) for r in real)
    return math.sqrt(difference / size) if size else math.sqrt(difference)


def _readout(track: Track, whole: TrackGradients) -> Floats:
    """Return the profile of the last read step's gradient, sent back through the cell alone.

    No step follows the last one that a gradient arrives at, so that gradient is of what is read there.
    """
    norms = whole.state_norms.numpy()
    ends = last_of(norms != 0)
    parts = [whole.h] if whole.c is None else [whole.h, whole.c]
    device = whole.h.device
    carried = [torch.zeros_like(part[0]) for part in parts]
    rows = []
    for t in reversed(range(len(norms))):
        starts = torch.from_numpy(ends == t).to(device)[:, None]
        carried = [torch.where(starts, part[t], old) for part, old in zip(parts, carried, strict=True)]
        rows.append(torch.cat(carried, -1))
        state = tuple(part.detach().requires_grad_() for part in track.before[t])
        new, _ = track.level.cell(track.drive[t], state)
        carried = list(torch.autograd.grad(new, state, carried))
    wide = wide_dtype(device)
    alone = torch.linalg.vector_norm(torch.stack(rows[::-1]), dim=-1, dtype=wide).cpu().double()
    return profile(alone.numpy(), np.asarray(ends), norms.shape[1])
