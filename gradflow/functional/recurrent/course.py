"""A recurrent layer over a whole sequence without a graph: its states, and gradients sent back through them.

NOTE [One pass back]
The gradients that are asked for (of the loss, of what is read at the last step alone) go back together: all
of them, and all samples, are rows of one matrix product a step, by the slopes of the step (`slopes.py`). It
is what `unroll` and `track_gradients` compute by autograd, to rounding, without a node for each operation.

NOTE [Slow numbers on the way back]
A gradient that decays in float32 comes to subnormal numbers, which many processors hand to microcode: the
model's own reverse pass may take ten times as long for them. Here gradients are scaled by a power of two,
which changes no digit, and what has fallen by 48 decades is set to zero before it comes to that. So the
profile reaches further down than the model's own pass, and shows where that one crawls. Where the scaled
gradients overflow, they are sent back once more as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.recurrent.cells import Cell, Level, State, first_state
from gradflow.functional.recurrent.slopes import Slopes, slopes_of

Gates = dict[str, Tensor]
Mask = Callable[[int], Tensor | None]  # index of a level -> what its output is multiplied by, or None

SMALLEST, NORMAL = 2.0**-149, 2.0**-126  # numbers of float32
TOP, BOTTOM = 60, -100  # exponents of two: of the largest scaled gradient, and of what is set to zero


@attrs.frozen(eq=False, kw_only=True)
class Course:
    """One level in one direction over a sequence. The first axis is of steps, in the order of reading.

    Args:
        level: the level.
        before: the state that enters each step, each part (steps, samples, size).
        after: the state that leaves it.
        gates: the gates at each step by name, (steps, samples, hidden).
        alive: which steps count, (steps, samples); None where all do. The others leave the state alone.
    """

    level: Level
    before: State
    after: State
    gates: Mapping[str, Tensor]
    alive: Tensor | None = None

    def slopes(self, *index: Any) -> Slopes:
        """Return the derivatives of the steps at an index of (steps, samples); of all by default."""

        def taken(parts: Sequence[Tensor]) -> State:
            return tuple(part[index] for part in parts) if index else tuple(parts)

        gates = dict(zip(self.gates, taken(tuple(self.gates.values())), strict=True))
        return slopes_of(self.level.cell, gates, taken(self.before), taken(self.after))


def courses(
    levels: Sequence[Level],
    x: Tensor,
    state: State | None = None,
    *,
    alive: Tensor | None = None,
    mask: Mask = lambda index: None,
) -> tuple[Tensor, tuple[Course, ...]]:
    """Return the output of the highest level, and every level's states; the same as of `unroll`.

    Args:
        levels: of the layer, see `levels_of`.
        x: the input, (steps, samples, features).
        state: the first h (and c), each (levels, samples, size); zeros by default.
        alive: which steps belong to each sample, (steps, samples); None where all do.
        mask: of the output of level `index` before it enters the next one (dropout).
    """
    found: list[Course] = []
    directions = 2 if any(level.reverse for level in levels) else 1
    entering = x
    for index in range(len(levels) // directions):
        outputs = []
        for level in levels[index * directions : (index + 1) * directions]:
            first = first_state(level.cell, x, state, len(found))
            found.append(course := _course(level, entering, first, alive))
            outputs.append(_turned(course.after[0], level))
        entering = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        if (index + 1) * directions < len(levels) and (factor := mask(index)) is not None:
            entering = entering * factor
    return entering, tuple(found)


def _turned(values: Tensor, level: Level, axis: int = 0) -> Tensor:
    """Return values by step in the order of the sequence, given that of reading, or the other way round."""
    return values.flip(axis) if level.reverse else values


@torch.no_grad()
def _course(level: Level, x: Tensor, first: Sequence[Tensor], alive: Tensor | None) -> Course:
    drive = level.drive(_turned(x, level))
    alive = None if alive is None else _turned(alive, level)
    states = [torch.cat([part[None], part.new_empty(len(x), *part.shape)]) for part in first]
    gates = _RUNS[level.cell.kind](level.cell, drive, states, alive)
    return Course(
        level=level,
        before=tuple(part[:-1] for part in states),
        after=tuple(part[1:] for part in states),
        gates=gates,
        alive=alive,
    )


def _hold(rows: Sequence[Sequence[Tensor]], t: int, alive: Tensor | None) -> None:
    """Put the state before a step back where a sample has ended (or, in reverse, not begun)."""
    if alive is not None:
        for part in rows:
            part[t + 1].copy_(torch.where(alive[t][:, None], part[t + 1], part[t]))


def _run_plain(cell: Cell, drive: Tensor, states: Sequence[Tensor], alive: Tensor | None) -> Gates:
    act = {"tanh": Tensor.tanh_, "relu": Tensor.relu_, "identity": lambda h: h}[cell.kind]
    weight, h = cell.weight_hh.t(), states[0].unbind(0)
    if cell.bias_hh is not None:
        drive += cell.bias_hh
    for t, entering in enumerate(drive.unbind(0)):
        act(torch.addmm(entering, h[t], weight, out=h[t + 1]))
        _hold([h], t, alive)
    return {"state": states[0][1:]} if cell.kind == "tanh" else {}


def _run_lstm(cell: Cell, drive: Tensor, states: Sequence[Tensor], alive: Tensor | None) -> Gates:
    weight, projection = cell.weight_hh.t(), cell.weight_hr
    if cell.bias_hh is not None:
        drive += cell.bias_hh
    gates = drive.unflatten(-1, (4, -1))
    i, f, g, o = (gates[..., k, :].unbind(0) for k in range(4))
    both = drive[..., : 2 * gates.shape[-1]].unbind(0)
    h, c = (part.unbind(0) for part in states)
    for t, entering in enumerate(drive.unbind(0)):
        entering.addmm_(h[t], weight)
        both[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        torch.mul(f[t], c[t], out=c[t + 1]).addcmul_(i[t], g[t])
        if projection is None:
            torch.mul(o[t], torch.tanh(c[t + 1]), out=h[t + 1])
        else:
            h[t + 1].copy_(nn.functional.linear(o[t] * torch.tanh(c[t + 1]), projection))
        _hold([h, c], t, alive)
    return {name: gates[..., k, :] for k, name in enumerate(("input", "forget", "candidate", "output"))}


def _run_gru(cell: Cell, drive: Tensor, states: Sequence[Tensor], alive: Tensor | None) -> Gates:
    gates, h = drive.unflatten(-1, (3, -1)), states[0].unbind(0)
    size = gates.shape[-1]
    r, z, n = (gates[..., k, :].unbind(0) for k in range(3))
    both = drive[..., : 2 * size].unbind(0)
    for t in range(len(drive)):
        u = cell.recurrent(h[t])
        both[t].add_(u[:, : 2 * size]).sigmoid_()
        n[t].addcmul_(r[t], u[:, 2 * size :]).tanh_()
        torch.lerp(n[t], h[t], z[t], out=h[t + 1])
        _hold([h], t, alive)
    return {name: gates[..., k, :] for k, name in enumerate(("reset", "update", "candidate"))}


_RUNS: Mapping[str, Callable[..., Gates]] = {
    **dict.fromkeys(("tanh", "relu", "identity"), _run_plain),
    "lstm": _run_lstm,
    "gru": _run_gru,
}


# ------------------------------------------------------------------------------------------- the way back


@attrs.frozen(eq=False, kw_only=True)
class Gradients:
    """Gradients at one course, several at once: their first axis. `h` and `c` are in the order of reading.

    Args:
        h: at h_t, (gradients, steps, samples, size).
        c: at c_t, as it comes from later steps; None where there is no c.
        drive: at the drive, (gradients, steps, samples, gates · hidden), in the order of reading; None for
            the upper levels of a layer, once it has been sent on.
        exponent: of two: these are so many times the gradients.
    """

    h: Tensor
    c: Tensor | None
    drive: Tensor | None
    exponent: int = 0

    @property
    def subnormal_share(self) -> float:
        """Share of steps and samples at which the numbers of the first gradient are subnormal in float32."""
        size = sum(part.shape[-1] for part in (self.h, self.c) if part is not None)
        sizes = self.state_norms[0] / math.sqrt(size)
        return float(((sizes > SMALLEST) & (sizes < NORMAL)).double().mean())

    @property
    def norms(self) -> Tensor:
        """‖∂L/∂h_t‖ of every sample, (gradients, steps, samples), float64."""
        return _norm(self.h) * math.ldexp(1.0, -self.exponent)

    @property
    def state_norms(self) -> Tensor:
        """‖∂L/∂s_t‖, s = h or (h, c), of every sample, (gradients, steps, samples), float64."""
        if self.c is None:
            return self.norms
        return torch.hypot(self.norms, _norm(self.c) * math.ldexp(1.0, -self.exponent))


def _norm(tensor: Tensor) -> Tensor:
    wide = wide_dtype(tensor.device)
    return torch.linalg.vector_norm(tensor, dim=-1, dtype=wide).cpu().double()


@torch.no_grad()
def sent_back(
    found: Sequence[Course], output: Tensor, last: State, *, mask: Mask = lambda index: None
) -> list[Gradients]:
    """Return gradients at every state of a layer, by level; see NOTE [One pass back].

    Args:
        found: its courses.
        output: at its output, (gradients, steps, samples, directions · size).
        last: at its last states, each part (gradients, levels, samples, size).
        mask: as for `courses`.
    """

    def send(parts: Sequence[Tensor], exponent: int) -> list[Gradients]:
        return _through_levels(found, parts[0], tuple(parts[1:]), mask, exponent)

    return scaled(send, [output, *last])


def scaled(
    send: Callable[[Sequence[Tensor], int], list[Gradients]], parts: Sequence[Tensor]
) -> list[Gradients]:
    """Return what sending gradients back gives, scaled where that can be; see NOTE [Slow numbers ...].

    Args:
        send: sends them back, given the scaled gradients, and the exponent of two that they are scaled by.
        parts: the gradients.
    """
    if exponent := _exponent(parts):
        found = send([part * math.ldexp(1.0, exponent) for part in parts], exponent)
        if all(bool(g.h.isfinite().all()) for g in found):
            return found
    return send(parts, 0)


def _exponent(parts: Sequence[Tensor]) -> int:
    """Return the power of two that gradients are scaled by; see NOTE [Slow numbers on the way back]."""
    if parts[0].dtype != torch.float32 or wide_dtype(parts[0].device) != torch.float64:
        return 0
    largest = max(float(part.abs().max()) for part in parts if part.numel())
    return TOP - math.frexp(largest)[1] if 0 < largest < math.inf else 0


def _through_levels(
    found: Sequence[Course], output: Tensor, last: State, mask: Mask, exponent: int
) -> list[Gradients]:
    directions = 2 if any(course.level.reverse for course in found) else 1
    gradients: list[Gradients] = []
    for index in reversed(range(len(found) // directions)):
        here = found[index * directions : (index + 1) * directions]
        backs = []
        for d, (course, part) in enumerate(zip(here, output.chunk(directions, -1), strict=True)):
            ends = tuple(end[:, index * directions + d] for end in last)
            backs.append(carried_back(course, (_turned(part, course.level, 1),), ends, exponent=exponent))
        gradients[:0] = [attrs.evolve(back, drive=None) for back in backs] if index else backs
        if index:
            pairs = zip(here, backs, strict=True)
            output = sum(_turned(b.drive, c.level, 1) @ c.level.weight_ih for c, b in pairs)  # type: ignore
            if (factor := mask(index - 1)) is not None:
                output = output * factor
    return gradients


@torch.no_grad()
def carried_back(
    course: Course, arriving: State, last: State | None = None, *, exponent: int = 0
) -> Gradients:
    """Return gradients at every state of a course.

    Args:
        course: the course.
        arriving: what arrives at each h_t (and c_t) from outside, (gradients, steps, samples, size).
        last: what arrives at the last state besides, (gradients, samples, size); zeros by default.
        exponent: by which power of two these are scaled; 0 for none.
    """
    steps = course.slopes().steps()
    sizes, leading = course.level.cell.sizes, (len(arriving[0]), course.after[0].shape[1])
    carried = last or tuple(arriving[0].new_zeros(*leading, n) for n in sizes)
    outside = [part.unbind(1) for part in arriving]
    kept = [part.new_empty(leading[0], len(steps), *part.shape[1:]) for part in carried]
    drive = kept[0].new_empty(leading[0], len(steps), leading[1], course.level.weight_ih.shape[0])
    for t in reversed(range(len(steps))):
        w = [part if k >= len(outside) else part + outside[k][t] for k, part in enumerate(carried)]
        if exponent and t % 4 == 0:
            w = [torch.hardshrink(part, math.ldexp(1.0, BOTTOM)) for part in w]
        if course.alive is not None:
            here = course.alive[t][:, None]
            w = [torch.where(here, part, 0.0) for part in w]
            carried = tuple(torch.where(here, 0.0, part) for part in carried)
        for whole, part in zip(kept, w, strict=True):
            whole[:, t] = part
        pulled, drive[:, t] = steps[t].pull(tuple(w))
        carried = (
            pulled if course.alive is None else tuple(a + b for a, b in zip(pulled, carried, strict=True))
        )
    h, *c = kept
    return Gradients(h=h, c=c[0] if c else None, drive=drive, exponent=exponent)
