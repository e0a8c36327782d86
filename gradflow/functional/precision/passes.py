"""Reverse passes beside the step's own, under a loss scale of choice; gradients are counted as they pass.

NOTE [What was lost]
A gradient that has become zero in a short format is not in the format any more. Under a larger loss scale it
is: the same graph is differentiated once more, with as much as the largest gradient leaves room for in place
of the loss's gradient 1. The factor is a power of two, so apart from what was lost at the ends of the format
every digit is the same, and the difference of the two gradients is the loss.

The gradients of layer outputs are counted where autograd hands them to the node that stands there, and are
not kept. What is put on the node is taken off with the pass; it is a node of this step's own graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from gradflow.functional.measurement import gradients
from gradflow.functional.precision.counts import Counts, counted
from gradflow.functional.tap.nodes import Node
from gradflow.records.formats import NUM_BINS, NumberFormat, number_format

NARROW = frozenset((torch.float16, torch.float8_e4m3fn, torch.float8_e5m2))  # lose gradients of usual size
_NEAR = 20  # octaves from the smallest normal number, from which on a wider format may have lost some
_ROOM = 2  # octaves that are left above the largest gradient
_UNKNOWN = 16  # the exponent of the scale to try where nothing at all is left
_TRIES = 4
_FURTHER = 24  # octaves, for what is all zero
_LESS = 8  # octaves, after a pass that was not finite

Output = tuple[str, Node, int]  # name of a layer call, and the node and number that its output is of


@attrs.frozen(eq=False)
class Pass:
    """What one reverse pass gave.

    Args:
        exponent: k of the loss scale 2^k.
        layers: counts of the gradients of layer outputs, by name of the call, at that scale.
        parameters: the gradients of the parameters by name, at that scale.
        counts: their counts.
    """

    exponent: int
    layers: Mapping[str, Counts]
    parameters: Mapping[str, Tensor]
    counts: Mapping[str, Counts]

    @property
    def all_counts(self) -> list[Counts]:
        """The counts of all that was seen."""
        return [*self.layers.values(), *self.counts.values()]

    @property
    def finite(self) -> bool:
        """Whether all that was seen is finite."""
        return not any(int(found.counts[-1]) for found in self.all_counts)


def run_pass(
    loss: Tensor, outputs: Iterable[Output], parameters: Mapping[str, Tensor], *, exponent: int
) -> Pass | None:
    """Differentiate a loss times 2^exponent, and count; None where no gradient arrives at any parameter.

    Args:
        loss: with its graph, which is kept.
        outputs: where the layers' outputs stand in it.
        parameters: by name.
        exponent: k of the loss scale.
    """
    layers: dict[str, Counts] = {}

    def hear(name: str, gradient: Tensor) -> None:
        seen = counted(gradient)
        if name in layers and layers[name].first == seen.first:
            seen = layers[name] + seen
        layers[name] = seen

    with torch.no_grad(), listening([(n, i, _named(hear, name)) for name, n, i in outputs]):
        cotangent = torch.full_like(loss, math.ldexp(1.0, exponent))
        given = gradients(loss, list(parameters.values()), cotangent)
    found = {name: g for name, g in zip(parameters, given, strict=True) if g is not None}
    if not found:
        return None
    return Pass(exponent, layers, found, {name: counted(g) for name, g in found.items()})


def _named(hear: Callable[[str, Tensor], None], name: str) -> Callable[[Tensor], None]:
    return lambda gradient: hear(name, gradient)


@contextlib.contextmanager
def listening(places: Iterable[tuple[Node, int, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Have functions called with the gradient that a node is handed, for the length of the context.

    Args:
        places: a node, which of its outputs the gradient is of, and the function.
    """
    handles = [node.register_prehook(_telling(number, hear)) for node, number, hear in places]
    del places  # it holds the nodes, and they hold what the forward pass saved
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _telling(number: int, hear: Callable[[Tensor], None]) -> Callable[[Sequence[Tensor | None]], None]:
    def tell(gradients: Sequence[Tensor | None]) -> None:
        if (gradient := gradients[number]) is not None:
            hear(gradient.detach())

    return tell


def references(
    used: Pass, loss: Tensor, outputs: Sequence[Output], parameters: Mapping[str, Tensor]
) -> list[Pass]:
    """Return passes that lost less than the one in use; none where that one can have lost nothing.

    Args:
        used: the pass under the loss scale in use.
        loss, outputs, parameters: as for `run_pass`.

    Returns:
        One pass in which all is finite; and where some gradient is all zero in it, one under a scale so large
        that others need not be.
    """
    if used.finite and not may_have_lost(used):
        return []
    limit = number_format(loss.dtype).most - 1
    best = _largest(used, loss, outputs, parameters, limit)
    kept = used if best is None else best
    exponent = min(kept.exponent + _FURTHER, limit)
    found = [] if best is None else [best]
    if exponent > kept.exponent and any(not counts.num_present for counts in kept.all_counts):
        further = run_pass(loss, outputs, parameters, exponent=exponent)
        found += [] if further is None else [further]
    return found


def _largest(
    used: Pass, loss: Tensor, outputs: Sequence[Output], parameters: Mapping[str, Tensor], limit: int
) -> Pass | None:
    """Return the pass under the largest scale at which all is finite; None where that is the one in use."""
    exponent = used.exponent + (_UNKNOWN if (room := _room(used)) is None else room)
    if not used.finite:  # then it is a smaller scale that shows more
        exponent = used.exponent - _LESS
    best: Pass | None = None
    for _ in range(_TRIES):
        exponent = min(exponent, limit)
        before = used if best is None and used.finite else best
        if before is not None and exponent <= before.exponent:
            break
        found = run_pass(loss, outputs, parameters, exponent=exponent)
        if found is None:
            break
        if not found.finite:  # inside of an operation something was larger than at any layer
            limit, exponent = exponent - 1, exponent - _LESS
            continue
        best = found
        room = _room(found)
        if room is not None and room < _LESS:
            break
        exponent += _UNKNOWN if room is None else room
    return best


def fullest(passes: Sequence[Pass], kind: Callable[[Pass], Mapping[str, Counts]], name: str) -> Pass | None:
    """Return the pass in which most of a gradient is present, of those in which it is finite."""
    known = [p for p in passes if name in kind(p) and not int(kind(p)[name].counts[-1])]
    return max(known, key=lambda p: kind(p)[name].num_present, default=None)


def may_have_lost(used: Pass) -> bool:
    """Whether some gradient may have become zero where the format of its numbers ends."""
    return any(
        found.dtype in NARROW or _is_near(_octave(found, 0), _format(found).least)
        for found in used.all_counts
    )


def _is_near(lowest: int | None, least: int) -> bool:
    return lowest is not None and lowest <= least + _NEAR


def _room(used: Pass) -> int | None:
    """Return by how many octaves all may grow; None where nothing is there that could."""
    tops = [(_format(found), _octave(found, -1)) for found in used.all_counts]
    rooms = [known.most - top - _ROOM for known, top in tops if top is not None]
    return min(rooms, default=None)


def _format(found: Counts) -> NumberFormat:
    return number_format(found.dtype)


def _octave(found: Counts, which: int) -> int | None:
    """Return the octave of the smallest present entry (0) or the largest (−1)."""
    at = torch.nonzero(found.counts[:-2])
    return (int(at[which]) + found.first) // NUM_BINS if len(at) else None


def error(name: str, used: Pass, better: Pass) -> tuple[float, float]:
    """Return ‖g − g*‖ / ‖g*‖ of a parameter's gradient in two passes, each over its loss scale, and ‖g*‖."""
    if name not in used.parameters or name not in better.parameters:
        return math.nan, math.nan
    g, right = (p.parameters[name].to_dense().double() for p in (used, better))
    g = g * math.ldexp(1.0, better.exponent - used.exponent)
    size, off = float(torch.linalg.vector_norm(right)), float(torch.linalg.vector_norm(g - right))
    if not (0 < size < math.inf and off < math.inf):
        return math.nan, math.nan
    return off / size, size * math.ldexp(1.0, -better.exponent)
