"""One call of a fused recurrent layer: computed again beside the model, and measured.

NOTE [Computed again beside the model]
The model runs its own kernels. Of each recurrent call it is kept what went in and what came out, and the
loss's gradient at what came out. Beside the model, the layer is computed again with the same weights
(`course.py`), and that gradient is sent back through it. The states are held against those that the model has
computed; where they are not the same, a note says so. Dropout between the levels is drawn again from the
random state at the call's start, by a generator of our own: on a CPU these are the masks of the model's call.
Other devices draw other numbers; there dropout is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradflow.functional.recurrent.cells import Level, levels_of, work_dtype
from gradflow.functional.recurrent.cotangents import Cotangents, heard_share, still_end, tells
from gradflow.functional.recurrent.course import Course, Gradients, Mask, courses, sent_back
from gradflow.functional.recurrent.numbers import (
    Budget,
    CallNumbers,
    LevelNumbers,
    Told,
    level_numbers,
    profile,
    spread,
)
from gradflow.functional.recurrent.unroll import Layout, given_state
from gradflow.functional.reverse.flushing import flushes
from gradflow.functional.tap.calls import Call

FOREIGN = 0.1  # relative difference of the first states beyond which a layer computes something else


@attrs.define(eq=False, kw_only=True)
class FusedCall:
    """One call of a fused layer, until the step has ended.

    Args:
        call: the call.
        module: the layer.
        x: its input, as it was given.
        hx: its first state, as it was given.
        random: CPU state before it, where it will draw dropout masks.
        levels: its levels, as they were.
        outputs: output (a packed one's data), h_n and c_n.
        found: the loss's gradient at these.
    """

    call: Call
    module: nn.RNNBase
    x: Any
    hx: Any
    random: Tensor | None
    levels: tuple[Level, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    found: list[Tensor | None] = attrs.field(factory=list)

    def gives(self, output: Any) -> bool:
        """Take what the layer returns; False if that is not what its class returns."""
        try:
            sequence, last = output
            parts = last if isinstance(last, tuple) else (last,)
            self.outputs = (_data(sequence), *parts)
            self.levels = levels_of(self.module, work_dtype(_data(self.x), *self.module.parameters()))
        except (TypeError, ValueError, AttributeError):  # a subclass with a forward of its own
            return False
        return True

    def receives(self, found: Iterator[Tensor | None]) -> None:
        """Take the gradients at the outputs, which come next, and let go of how these were made."""
        self.outputs = tuple(tensor.detach() for tensor in self.outputs)
        self.found = [next(found) for _ in self.outputs]

    @property
    def masks_known(self) -> bool:
        """Whether the call's dropout masks can be drawn again, or there are none."""
        return self.random is None or draws_on_cpu(self.outputs[0])

    def mask(self, layout: Layout, chosen: Sequence[int]) -> Mask:
        """Return the dropout masks of the call between its levels, of some of its samples."""
        if self.random is None or not self.masks_known:
            return lambda index: None
        p, data = self.module.dropout, self.outputs[0]
        generator = torch.Generator()
        generator.set_state(self.random)
        packed = layout.batch_sizes is not None
        places = (data if packed else layout.steps(data.detach())).shape[:-1]  # as the kernel has them
        width, dtype = data.shape[-1], self.levels[0].weight_ih.dtype
        drawn: list[Tensor] = []

        def mask(index: int) -> Tensor:
            while len(drawn) <= index:
                values = torch.empty((*places, width), dtype=data.dtype)
                if p == 1:
                    values.zero_()
                else:
                    values.bernoulli_(1 - p, generator=generator).div_(1 - p)
                drawn.append((layout.steps(values) if packed else values)[:, chosen].to(dtype))
            return drawn[index]

        return mask


def _data(sequence: Any) -> Any:
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def crawls(tensor: Tensor) -> bool:
    """Whether subnormal numbers of a tensor are taken as they are, and slow."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and not flushes()


def draws_on_cpu(tensor: Tensor) -> bool:
    """Whether random numbers for a tensor are drawn on the CPU."""
    return tensor.device.type == "cpu"


def fused_numbers(heard: FusedCall, budget: Budget) -> CallNumbers | None:
    """Return the numbers of one call; None if it computes something else than its class does.

    Args:
        heard: the call, with what it gave and the gradients there.
        budget: on how much the costlier numbers are taken.
    """
    layout, levels = Layout.of(heard.module, heard.x), heard.levels
    dtype = levels[0].weight_ih.dtype
    x = layout.steps(_data(heard.x).detach()).to(dtype)
    total = x.shape[1]
    chosen = _chosen(levels, x, budget)
    alive = layout.alive
    lengths = torch.full((total,), len(x)) if alive is None else alive.sum(0)
    alive = None if alive is None else alive[:, chosen].to(x.device)
    state = given_state(layout, heard.hx, dtype)
    state = None if state is None else tuple(part[:, chosen] for part in state)
    mask = heard.mask(layout, chosen)
    output, found = courses(levels, x[:, chosen].contiguous(), state, alive=alive, mask=mask)
    real = layout.steps(heard.outputs[0].detach()).to(dtype)[:, chosen]
    first = _error(output[:4], real[:4], None if alive is None else alive[:4])
    if first > FOREIGN and heard.masks_known:
        return None
    at = (torch.zeros_like(t) if g is None else g for t, g in zip(heard.outputs, heard.found, strict=True))
    at_output, *last = (t.detach() for t in at)
    cotangents = Cotangents(
        output=layout.steps(at_output).to(dtype)[:, chosen],
        last=tuple(layout.states(part).to(dtype)[:, chosen] for part in last),
        lengths=lengths[chosen],
    )
    read = cotangents.read_steps
    back, per_level = _level_numbers(found, cotangents, mask, total, budget)
    drives = [
        gradients.drive[0].flip(0) if course.level.reverse else gradients.drive[0]
        for course, gradients in zip(found, back, strict=True)
        if gradients.drive is not None
    ]
    told = tells(x[:, chosen], cotangents.asked, drives) if drives and alive is None else Told()
    return CallNumbers(
        num_steps=len(x),
        num_samples=len(chosen),
        batch=total,
        read_share=float(read.mean() if alive is None else read[alive.cpu().numpy()].mean()),
        heard_share=heard_share(drives, alive, one_way=len(drives) == 1),
        state_error=_error(output, real, alive),
        subnormal_share=sum(g.subnormal_share for g in back) / len(back) if crawls(heard.outputs[0]) else 0.0,
        cost=_cost(levels, len(x), total, len(chosen), len(back[0].h), per_level),
        levels=per_level,
        unmasked=not heard.masks_known,
        still_end=still_end(x[:, chosen], read),
        told=told,
    )


def _chosen(levels: Sequence[Level], x: Tensor, budget: Budget) -> list[int]:
    """Return the samples to compute again: all, unless that takes too much memory."""
    per_sample = len(x) * sum(level.weight_ih.shape[0] for level in levels)
    return spread(x.shape[1], int(min(max(budget.numbers // per_sample, 8), budget.samples)))


def _level_numbers(
    found: Sequence[Course], cotangents: Cotangents, mask: Mask, total: int, budget: Budget
) -> tuple[list[Gradients], list[LevelNumbers]]:
    """Return the gradients at every level, those of the loss first, and the numbers of the levels.

    Args:
        found: the levels over the sequence.
        cotangents: the loss's gradients at what the layer returned.
        mask: of dropout.
        total: number of samples that these stand for.
        budget: on how much the costlier numbers are taken.
    """
    asked, alone = [cotangents], []
    for reverse in (False, True)[: cotangents.directions]:
        of_last, place = cotangents.of_last_read(reverse)
        if not of_last.same(cotangents):
            asked.append(of_last)
        steps = len(of_last.output)
        ends = torch.from_numpy(place)
        ends = torch.where(ends >= 0, steps - 1 - ends, -1) if reverse else ends
        alone.append((0 if of_last.same(cotangents) else len(asked) - 1, ends.numpy()))
    last = tuple(torch.stack(parts) for parts in zip(*(c.last for c in asked), strict=True))
    back = sent_back(found, torch.stack([c.output for c in asked]), last, mask=mask)
    numbers = []
    for course, gradients in zip(found, back, strict=True):
        which, ends = alone[int(course.level.reverse)]
        norms, both = gradients.norms, gradients.state_norms
        readout = profile(both[which].numpy(), ends, total)
        numbers.append(level_numbers(course, (norms[0], both[0]), readout, total=total, budget=budget))
    return back, numbers


def _cost(
    levels: Sequence[Level],
    steps: int,
    total: int,
    samples: int,
    gradients: int,
    numbers: Sequence[LevelNumbers],
) -> float:
    """Return `RecurrenceRecord.cost`: multiplications in products with weights."""
    sizes = [(level.weight_ih.numel(), level.cell.weight_hh.numel()) for level in levels]
    own = 3 * steps * total * sum(i + h for i, h in sizes)
    forward = sum(i + h for i, h in sizes)
    backward = sum(h + (i if level.index else 0) for level, (i, h) in zip(levels, sizes, strict=True))
    moments = sum(n.products * h for n, (_, h) in zip(numbers, sizes, strict=True))
    return (steps * samples * (forward + gradients * backward) + moments) / own


def _error(found: Tensor, real: Tensor, alive: Tensor | None) -> float:
    """Return the relative difference of states, over the steps that count."""
    difference = (found - real).square().sum(-1)
    size = real.square().sum(-1)
    if alive is not None:
        difference, size = difference[alive], size[alive]
    total = float(size.sum())
    return math.sqrt(float(difference.sum()) / total) if total else float(difference.sum().sqrt())
