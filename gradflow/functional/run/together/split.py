"""Units of layers that are split over processes: each has others, in their place among those of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradflow.functional.processes.group import Processes, Ranks
from gradflow.functional.processes.line import Line
from gradflow.functional.tap.calls import ActivationKey, Call


def numbered(processes: Processes, split: Mapping[Ranks, int]) -> tuple[tuple[int, int], ...]:
    """Return along which axes, by their number, which is the same on all processes, something is split."""
    return tuple((i, split[axis.ranks]) for i, axis in enumerate(processes.axes) if axis.ranks in split)


def split_of(calls: Mapping[str, Call], key: Any, kind: str = "out") -> Mapping[Ranks, int]:
    """Return along which axes the model splits what a number is of: an output, an input, an activation."""
    call = calls.get(key.layer if isinstance(key, ActivationKey) else key)
    if call is None:
        return {}
    return call.entering if kind == "input" and not isinstance(key, ActivationKey) else call.split


def beside(
    line: Line,
    calls: Mapping[str, Call],
    sizes: dict[Any, int],
    found: Mapping[Any, Tensor | None],
    absent: float,
) -> tuple[dict[Any, int], dict[Any, Tensor | None]]:
    """Return vectors over units, of which processes may have others, each in its place among those of all.

    Args:
        line: to the processes.
        calls: of all of them.
        sizes: of the vectors.
        found: those of this process.
        absent: what stands for the units of others.
    """
    sizes, placed = dict(sizes), dict(found)
    for axis in line.processes.model_axes:
        at = axis.ranks.index(dist.get_rank())
        for key, size in sizes.items():
            if size >= 0 and axis.ranks in split_of(calls, key):
                units = placed.get(key)
                whole = torch.full((axis.size, size), absent, dtype=torch.float64)
                if units is not None:
                    whole[at] = units.reshape(-1)
                placed[key], sizes[key] = whole.reshape(-1), size * axis.size
    return sizes, placed
