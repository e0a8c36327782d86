"""Masks of elements as slices: whole rows, columns, blocks of fused parameters, and what is left."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
from torch import Tensor, nn

from gradflow.functional.reach.masks import every_in_rows, some
from gradflow.records import Bools


@attrs.frozen
class Part:
    """A part of a parameter.

    Args:
        axis: along which it is made of whole slices; None for all of it, or for single elements.
        slices: ranges (start, stop) along the axis.
        num_slices: how many slices.
        num_elements: how many elements.
    """

    axis: int | None
    slices: tuple[tuple[int, int], ...]
    num_slices: int
    num_elements: int


_MOST = 64  # ranges that are kept


def parts(mask: Tensor, unreached: Tensor) -> Iterator[Part]:
    """Yield the parts that a mask is made of, each of its elements in exactly one.

    Args:
        mask: the elements, of the parameter's shape, on the host.
        unreached: all of the parameter's unreached elements, of which these are some: a column counts as
            whole where the rest of it lies in rows that are wholly unreached themselves.
    """
    here, other = mask.numpy(), unreached.numpy()
    total = int(np.count_nonzero(here))
    if not total:
        return
    if total == here.size or here.ndim == 0:
        yield Part(None, (), 0, total)
        return
    rest, covered = here.copy(), np.zeros_like(here)
    for axis in range(here.ndim):
        if not rest.any():
            return
        others = tuple(a for a in range(here.ndim) if a != axis)
        chosen = np.asarray((rest | covered).all(axis=others) & rest.any(axis=others))
        if chosen.any():
            inside = rest & np.expand_dims(chosen, others)
            number = int(np.count_nonzero(chosen))
            yield Part(axis, ranges(chosen)[:_MOST], number, int(np.count_nonzero(inside)))
            rest &= ~inside
        covered |= np.expand_dims(other.all(axis=others), others)
    if left := int(np.count_nonzero(rest)):
        yield Part(None, (), 0, left)


def by_rows(labels: Tensor, unreached: Tensor) -> Tensor:
    """Return labels in which every row that is wholly unreached has one alone, the most frequent in it.

    Args:
        labels: of the elements.
        unreached: which of them were not reached, of the same shape.
    """
    if labels.dim() < 2 or not labels.numel():
        return labels
    flat = labels.flatten(1)
    whole = every_in_rows(unreached.flatten(1))
    if some(whole):
        chosen = flat[whole]
        whole[whole.clone()] = ~every_in_rows(~(chosen ^ chosen[:, :1]).bool())
    if not some(whole):
        return labels
    flat = flat.clone()
    flat[whole] = flat[whole].mode(1, keepdim=True).values.expand(-1, flat.shape[1])
    return flat.reshape(labels.shape)


def ranges(chosen: Bools) -> tuple[tuple[int, int], ...]:
    """Return the runs of True in a vector.

    >>> ranges(np.array([True, True, False, True]))
    ((0, 2), (3, 4))
    """
    found: list[tuple[int, int]] = []
    for index in np.flatnonzero(chosen).tolist():
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return tuple(found)


_GATES = {
    nn.LSTM: ("input gate", "forget gate", "cell gate", "output gate"),
    nn.LSTMCell: ("input gate", "forget gate", "cell gate", "output gate"),
    nn.GRU: ("reset gate", "update gate", "new gate"),
    nn.GRUCell: ("reset gate", "update gate", "new gate"),
}
_FUSED = {"qkv": ("q", "k", "v"), "in_proj": ("q", "k", "v"), "c_attn": ("q", "k", "v"), "kv": ("k", "v")}


def block_names(module: nn.Module | None, name: str) -> tuple[str, ...]:
    """Return the names of the equal blocks that a parameter is fused of; () if it is not known to be.

    Args:
        module: that owns it.
        name: its qualified name.
    """
    for kind, gates in _GATES.items():
        if isinstance(module, kind):
            return gates
    words = name.lower().split(".")[-2:]
    found = (blocks for word, blocks in _FUSED.items() if any(word in w for w in words))
    return next(found, ())


def block(part: Part, shape: tuple[int, ...], names: tuple[str, ...]) -> str:
    """Return which blocks of a fused parameter a part is, in words; "" if it is no whole blocks.

    >>> block(Part(0, ((4, 8),), 4, 32), (12, 8), ("q", "k", "v"))
    'k block'
    """
    if part.axis is None or not names or shape[part.axis] % len(names):
        return ""
    size = shape[part.axis] // len(names)
    if any(start % size or stop % size for start, stop in part.slices):
        return ""
    found = [names[i] for start, stop in part.slices for i in range(start // size, stop // size)]
    word = "block" if len(found) == 1 else "blocks"
    return f"{' and '.join(found)} {word}" if found else ""
