"""Loops over recurrent cells: which calls make a sequence, and the same numbers as for a fused layer.

The states of a loop are the outputs of its calls, so the loss's gradient at them needs no unrolling: it is
asked for directly. The pure cell, at the states that the model has computed, gives the rest: gates,
transition, the gradient at the drive, and how far the last read-out reaches back through the cell alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.recurrent.cells import Level, State
from gradflow.functional.recurrent.cotangents import heard_share, tells
from gradflow.functional.recurrent.course import Course, Gradients, carried_back, scaled
from gradflow.functional.recurrent.fused import crawls
from gradflow.functional.recurrent.numbers import Budget, CallNumbers, last_of, level_numbers, profile
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

    def gives(self, output: Any) -> None:
        """Take the new state, as the cell returns it."""
        self.outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)

    def receives(self, found: Iterator[Tensor | None]) -> None:
        """Take the gradients at the outputs, which come next, and let go of how these were made."""
        self.outputs = tuple(tensor.detach() for tensor in self.outputs)
        self.found = [next(found) for _ in self.outputs]


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


def loop_numbers(chain: Sequence[CellCall], level: Level, *, budget: Budget) -> CallNumbers:
    """Return the numbers of one loop.

    Args:
        chain: its calls, in the order of time.
        level: the cell.
        budget: on how much the costlier numbers are taken.
    """
    course, whole, error = _as_course(chain, level)
    steps, samples = course.after[0].shape[:2]
    readout, subnormal = _readout(course, whole)
    norms = whole.norms[0], whole.state_norms[0]
    found = level_numbers(course, norms, readout, total=samples, budget=budget)
    own = 3 * steps * samples * (level.weight_ih.numel() + level.cell.weight_hh.numel())
    computed = steps * samples * (level.weight_ih.numel() + 3 * level.cell.weight_hh.numel())
    parts = [whole.h[0]] if whole.c is None else [whole.h[0], whole.c[0]]
    pulled, at_drive = course.slopes().pull(tuple(parts))
    return CallNumbers(
        num_steps=steps,
        num_samples=samples,
        batch=samples,
        read_share=_read_share(parts, pulled),
        heard_share=heard_share([at_drive], None, one_way=True),
        state_error=error,
        subnormal_share=subnormal if crawls(chain[0].outputs[0]) else 0.0,
        cost=(computed + found.products * level.cell.weight_hh.numel()) / own,
        levels=[found],
        told=tells(
            torch.stack(_rows([heard.x for heard in chain])), torch.cat(list(parts), -1).sum(0), [at_drive]
        ),
    )


def _as_course(chain: Sequence[CellCall], level: Level) -> tuple[Course, Gradients, float]:
    """Return a loop's states, and the gradients at them, as those of a fused layer, and its state error."""
    dtype = level.weight_ih.dtype

    def stacked(rows: Sequence[Sequence[Tensor]]) -> State:
        return tuple(torch.stack(_rows(part)).detach().to(dtype) for part in zip(*rows, strict=True))

    (x,) = stacked([[heard.x] for heard in chain])
    after = stacked([heard.outputs for heard in chain])
    before = stacked([h.before or [torch.zeros_like(part) for part in h.outputs] for h in chain])
    h, *c = stacked(
        [
            [torch.zeros_like(o) if g is None else g for g, o in zip(h.found, h.outputs, strict=True)]
            for h in chain
        ]
    )
    new, gates = level.cell(level.drive(x), before)
    course = Course(level=level, before=before, after=after, gates=gates)
    whole = Gradients(h=h[None], c=c[0][None] if c else None, drive=None)
    return course, whole, _error(new, after)


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


def _readout(course: Course, whole: Gradients) -> tuple[Floats, float]:
    """Return the profile of the last read step's gradient, sent back through the cell alone.

    No step follows the last one that a gradient arrives at, so that gradient is of what is read there.

    Returns:
        The profile, and the share of subnormal numbers.
    """
    norms = whole.state_norms[0].numpy()
    ends = last_of(norms != 0)
    marks = torch.arange(len(norms))[:, None] == torch.from_numpy(ends)
    marks = marks.to(whole.h.device)[None, ..., None]
    parts = [torch.where(marks, part, 0.0) for part in (whole.h, whole.c) if part is not None]
    (alone,) = scaled(lambda p, exponent: [carried_back(course, tuple(p), exponent=exponent)], parts)
    return profile(alone.state_norms[0].numpy(), ends, norms.shape[1]), alone.subnormal_share
