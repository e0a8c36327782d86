"""The lowest loss that any outputs could have, and that outputs within a range could.

NOTE [Out of reach]
An activation at the end of a model bounds what it gives: a sigmoid from 0 to 1, a tanh from −1 to 1, a
rectifier or an exponential from 0 on, a clamp to bounds of its own, which show in what it gives. Where
targets lie beyond, or where a cross entropy takes such outputs as its scores, no weights meet the loss.
Whether that is so is a question about the loss alone: outputs in the place of the model's are moved
downhill, once freely and once as what a function of that range gives, and what is left of the loss tells.
It is asked only of losses that take each number by itself (the slope at one does not change with the
others), and of cross entropies of the outputs: what judges outputs together, a critic or a simulator, has a
range of its own that outputs are to keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_RANGES: dict[str, tuple[float, float, Callable[[Tensor], Tensor]]] = {
    "0 to 1": (0.0, 1.0, torch.sigmoid),
    "-1 to 1": (-1.0, 1.0, torch.tanh),
    "above 0": (0.0, math.inf, torch.nn.functional.softplus),
}
AT_BOUNDS = "as clamped"
_MANY = 0.05  # of the outputs that lie at the ends of what a clamp gives, for these to be its bounds
_MOST = 2**20  # numbers; beyond, the question costs more than it is worth
_EVALUATIONS = 40
LossOf = Callable[[Tensor], Tensor]


def floors(loss_of: LossOf, output: Tensor, *, scored: bool, clamped: bool = False) -> dict[str, float]:
    """Return the lowest losses found for outputs that are free, under "", and for those within each range
    that the outputs at hand keep; empty where they keep none, or where the question is not one of ranges.

    Args:
        loss_of: of an output in the place of the model's; differentiable.
        output: the model's.
        scored: whether a cross entropy takes it as scores.
        clamped: whether a clamp made it; its bounds are a range of their own, `AT_BOUNDS`.

    Raises:
        Exception: what `loss_of` raises for outputs that it does not take.

    >>> x = torch.tensor([[0.2], [0.7]])
    >>> found = floors(lambda y: (y - torch.tensor([[2.0], [0.5]])).square().mean(), x, scored=False)
    >>> {name: round(value, 3) for name, value in found.items()}
    {'': 0.0, '0 to 1': 0.5, '-1 to 1': 0.5, 'above 0': 0.0}
    """
    output = output.detach().float()
    low, high = (float(x) for x in output.aminmax())
    kept = {name: made for name, (least, most, made) in _RANGES.items() if least <= low and high <= most}
    if clamped and low < high and float(((output == low) | (output == high)).float().mean()) >= _MANY:
        kept[AT_BOUNDS] = lambda z: low + (high - low) * torch.sigmoid(z)
    if not kept or output.numel() > _MOST or not math.isfinite(low + high):
        return {}
    if not scored and not _by_number(loss_of, output):
        return {}
    zeros = torch.zeros_like(output)
    within = {name: _lowest(lambda z, made=made: loss_of(made(z)), zeros) for name, made in kept.items()}
    return {"": _lowest(loss_of, output), **within}


def _lowest(loss_of: LossOf, start: Tensor) -> float:
    """Return the lowest loss on a way downhill, on which each number has a step of its own.

    The step grows while the slope keeps its sign, and is halved where that changes: iRprop− of Igel and
    Hüsken, "Improving the Rprop Learning Algorithm" (2000), which fits losses that take numbers one by one.
    """
    at, step = start.clone(), 0.1 * (1 + start.abs())
    before, best = torch.zeros_like(at), math.inf
    for _ in range(_EVALUATIONS):
        leaf = at.detach().requires_grad_()
        loss = loss_of(leaf)
        (slope,) = torch.autograd.grad(loss, [leaf])
        value = float(loss.detach())
        if not math.isfinite(value):
            break
        best = min(best, value)
        turned = slope.sign() * before.sign()
        step = torch.where(turned > 0, 1.6 * step, torch.where(turned < 0, 0.5 * step, step))
        before = torch.where(turned < 0, 0.0, slope)
        at = at - before.sign() * step
    return best


def _by_number(loss_of: LossOf, output: Tensor) -> bool:
    """Whether a loss takes each number of an output by itself: its slope at one is the same whatever the
    others are."""
    even = (torch.arange(output.numel(), device=output.device) % 2 == 0).view(output.shape)
    slopes = []
    for moved in (output, torch.where(even, 0.5 * output, output)):
        at = moved.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(at), [at])
        slopes.append(slope[~even])
    return (
        bool((slopes[0] - slopes[1]).abs().max() <= 1e-4 * slopes[0].abs().max()) if len(slopes[0]) else False
    )
