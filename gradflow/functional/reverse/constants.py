"""What a loss does with single outputs: which of them are constants to the optimizer, which it asks apart.

NOTE [Constants in a loss]
An output without a graph may well be what others are held against: a target, a weight, a baseline. Then the
slopes of the loss at the others change with it. Where no slope does, it is merely added: the loss tells of
it, and nothing is learned by it. Not so where the loss looks at it with weights of its own, as a judge does
that is shown real samples: then it is they that learn by it. Beside outputs that have run away to many times
its size, a target is rounded off: so the others are asked once more where they are smaller than it. And an
output with a graph that is zero for every sample after many steps is no start of one: the second derivative
of a network of rectifiers is zero, whatever its weights. Where the loss is linear in such an output, as in
the logarithm of a volume that a flow keeps, that may be by design. So it may where the loss has no slope
there: what it asks for is met, as a condition on an edge is by a factor that is zero on it. Then only a
derivative through a rectifier tells that no weights could do otherwise.

NOTE [Compared or apart]
Two outputs of one shape may be two views of a sample, which the loss sets against each other, or two numbers
of a distribution, each of which a penalty draws to where it belongs. What noise in both of them does to the
loss is in the latter case the sum of what it does in each, to rounding; in the former it is not, wherever
they are, also where both have collapsed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from gradflow.functional.model.trees import map_floats
from gradflow.functional.tap.nodes import is_leaf, nodes_under

LossOf = Callable[[Sequence[Tensor]], Tensor]
Moved = Callable[[int, Tensor], Tensor]
_EXACT = 1e-5  # of the loss, by which a sum of changes may be off
_HEARD = 1e-3  # of the larger change, that the smaller one must be
_NEAR = 0.01  # of the others, where they are asked once more
_PART = 0.1  # of the largest slope at another output, that the loss must have at one to be about it


def merely_added(loss_of: LossOf, parts: Sequence[Tensor]) -> list[int]:
    """Return which outputs without a graph a loss adds up and does nothing else with.

    It is asked where the others are, and near zero, beside the size of what is held too: sure outputs, a
    margin that is met, and outputs that have run away have slopes that depend on nothing, while a sum is one
    everywhere. Zeros add nothing: they hold the place of a term that is switched off.

    Args:
        loss_of: of outputs in the place of the model's; differentiable.
        parts: the model's outputs; those with a graph require a gradient.

    Raises:
        Exception: what `loss_of` raises for outputs that it does not take.

    >>> a, b, c = torch.ones(4, requires_grad=True), torch.full((4,), 2.0), torch.full((4,), 3.0)
    >>> merely_added(lambda y: (y[0] - y[1]).square().mean() + y[2].square().mean(), [a, b, c])
    [2]
    """
    held = [not part.requires_grad and part.is_floating_point() for part in parts]
    wanted = [i for i, part in enumerate(parts) if held[i] and bool(part.any())]
    if not wanted or len(wanted) == len(parts):
        return []
    own = [part.requires_grad for part in parts]
    slopes = _slopes(loss_of, parts)
    most = max(float(slope.norm()) for slope, has_graph in zip(slopes, own, strict=True) if has_graph)
    found = []
    for i in (i for i in wanted if float(slopes[i].norm()) >= _PART * most > 0):
        size = _size(parts[i])
        near = [_nearer(p, size) if p.requires_grad else p for p in parts]
        if _is_alone(loss_of, parts, i) and _is_alone(loss_of, near, i):
            found.append(i)
    return found


def _nearer(part: Tensor, size: float) -> Tensor:
    """Return an output nearer to zero, and no larger than what another one has of that size."""
    own = _size(part)
    return (_NEAR * min(1.0, size / own) if own > 0 else _NEAR) * part


def _size(part: Tensor) -> float:
    """The root mean square of an output, in double precision: the squares of what has run away overflow."""
    return float(part.detach().abs().double().square().mean().sqrt())


def _is_alone(loss_of: LossOf, parts: Sequence[Tensor], i: int) -> bool:
    """Whether the slopes of a loss at the outputs with a graph are the same with zeros in the place of i."""
    slopes = _slopes(loss_of, parts)
    others = _slopes(loss_of, [torch.zeros_like(p) if k == i else p for k, p in enumerate(parts)])
    pairs = [(a, b) for a, b, part in zip(slopes, others, parts, strict=True) if part.requires_grad]
    return all(torch.allclose(a, b, rtol=1e-5, atol=0.0) for a, b in pairs) and not _is_weighed(
        loss_of, parts, i
    )


def _is_weighed(loss_of: LossOf, parts: Sequence[Tensor], i: int) -> bool:
    """Whether the slopes of a loss at weights of its own change with output i."""
    given = [part.detach().clone() for part in parts]
    loss = loss_of(given)
    nodes = nodes_under([] if loss.grad_fn is None else [loss.grad_fn])
    weights = [node.variable for node in nodes if is_leaf(node)]
    if not weights:
        return False
    slopes = torch.autograd.grad(loss, weights)
    given[i] = torch.zeros_like(given[i])
    others = torch.autograd.grad(loss_of(given), weights, allow_unused=True)
    return not all(
        b is not None and torch.allclose(a, b, rtol=1e-5) for a, b in zip(slopes, others, strict=True)
    )


def _slopes(loss_of: LossOf, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of a loss at every output, as if all had a graph; zeros where there is none."""
    given = [part.detach().clone().requires_grad_(part.is_floating_point()) for part in parts]
    leaves = [part for part in given if part.requires_grad]
    found = iter(torch.autograd.grad(loss_of([p.clone() for p in given]), leaves, allow_unused=True))
    slopes = [next(found) if part.requires_grad else None for part in given]
    return [torch.zeros_like(p) if slope is None else slope for p, slope in zip(parts, slopes, strict=True)]


def held_at_zero(loss_of: LossOf, parts: Sequence[Tensor], stepped: Collection[int] = ()) -> list[int]:
    """Return which outputs with a graph are zero for all samples, while others are not, in a loss that bends
    with them: and asks for something else, or the zeros are those of a rectifier's derivative.

    Args:
        loss_of: of outputs in the place of the model's.
        parts: the model's outputs; those with a graph require a gradient.
        stepped: which of them are `zero_by_steps`.

    >>> a, b = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    >>> held_at_zero(lambda y: (y[0] + y[1]).square().mean(), [a, b])
    [1]
    >>> held_at_zero(lambda y: y[0].square().mean() + y[1].mean(), [a, b])
    []
    >>> held_at_zero(lambda y: y[0].square().mean() + y[1].square().mean(), [a, b])
    []
    """
    zero = [i for i, part in enumerate(parts) if part.requires_grad and part.numel() > 1 and not part.any()]
    if not zero or not any(bool(part.any()) for part in parts if part.requires_grad):
        return []
    found = []
    with torch.no_grad():
        own = float(loss_of([part.detach().clone() for part in parts]))
        for i in zero:
            up, down = (
                float(loss_of([p.detach() + (sign if k == i else 0) for k, p in enumerate(parts)])) - own
                for sign in (1.0, -1.0)
            )
            if abs(up + down) > 1e-2 * max(abs(up), abs(down)) and abs(up + down) > 1e-5 * abs(own):
                found.append(i)
    with torch.enable_grad():
        slopes = _slopes(loss_of, parts) if found else []
    return [i for i in found if bool(slopes[i].any()) or i in stepped]


def asked_apart(
    loss_of: Callable[[Moved], float], loss: float, output: Any, told: set[int]
) -> dict[int, float]:
    """Return by how much a loss rises as each of two outputs is given noise of size one, by the id of the
    output; empty where it does not ask for the two apart, or there are no two of one shape.

    Args:
        loss_of: the loss of outputs that are changed by a function of their position and value.
        loss: of the outputs as they are.
        output: the model's.
        told: positions of what it tells.

    >>> a, b = torch.ones(4, 2), torch.zeros(4, 2)
    >>> def loss_of(moved, by): return float(by(moved(0, a), moved(1, b)))
    >>> alone = lambda a, b: a.square().mean() + b.exp().mean()
    >>> sorted(asked_apart(lambda m: loss_of(m, alone), 2.0, (a, b), {0, 1})) == sorted((id(a), id(b)))
    True
    >>> asked_apart(lambda m: loss_of(m, lambda a, b: (a - b).square().mean()), 1.0, (a, b), {0, 1})
    {}
    """
    shapes = dict[tuple[int, ...], dict[int, Tensor]]()

    def note(at: int, tensor: Tensor) -> Tensor:
        if at in told and tensor.dim() > 1 and tensor.shape[-1] > 1:
            shapes.setdefault(tuple(tensor.shape), {})[at] = tensor
        return tensor

    map_floats(note, output)
    pairs = [found for found in shapes.values() if len(found) > 1]
    if len(pairs) != 1 or len(pairs[0]) != 2:
        return {}

    def rise(*moved: int) -> float:
        def noisy(at: int, tensor: Tensor) -> Tensor:
            if at not in moved:
                return tensor
            generator = torch.Generator().manual_seed(at)
            return tensor + torch.randn(tensor.shape, generator=generator).to(tensor)

        return loss_of(noisy) - loss

    (one, of_one), (two, of_two) = pairs[0].items()
    alone = rise(one), rise(two)
    both, most = rise(one, two), max(map(abs, alone))
    if not min(map(abs, alone)) > _HEARD * most or not abs(both - sum(alone)) <= _EXACT * (most + abs(loss)):
        return {}
    return {id(of_one): alone[0], id(of_two): alone[1]}


def zero_by_steps(parts: Sequence[Tensor]) -> list[int]:
    """Return which outputs are zero for all samples and made of the derivative of a rectifier, which is
    constant on either side of zero.

    Args:
        parts: the model's outputs, with their graph.

    >>> x = torch.randn(4, requires_grad=True)
    >>> (slope,) = torch.autograd.grad(x.relu().sum(), x, create_graph=True)
    >>> zero_by_steps([x, 0 * slope, 0 * x])
    [1]
    """
    zero = [i for i, p in enumerate(parts) if p.grad_fn is not None and p.numel() > 1 and not p.any()]
    return [i for i in zero if any(n.name().startswith(_STEPS) for n in nodes_under([parts[i].grad_fn]))]


_STEPS = ("ThresholdBackwardBackward", "LeakyReluBackwardBackward", "HardtanhBackwardBackward")
