"""A row: the numbers of one step on the host, under a layout that says what they are."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype
from gradflow.records import Bools, Floats

Place = tuple[str, Hashable]  # what a number is (`grad`, `out`, ...), and of what

# Norms of tensors that are gone after the step are taken fast or exactly, by what earlier steps gave; see
# NOTE [Exact and fast] in tap/sums.py. Those of parameters and their gradients can be taken again.
SUMS = ("grad", "out", "input")
LASTING_SUMS = ("norm", "pgrad")
NORMS = (*SUMS, *LASTING_SUMS, "mean_row")


@attrs.frozen(eq=False)
class Layout:
    """What the numbers of a row are. Steps that run alike share one.

    Args:
        places: (kind, key) of every number.
        calls: names of the layer calls, in the order of execution.
    """

    places: tuple[Place, ...]
    calls: tuple[str, ...]
    must_be_finite: Bools = attrs.field(init=False)
    norms: Bools = attrs.field(init=False)
    sums: Bools = attrs.field(init=False)
    least_peaks: tuple[int, ...] = attrs.field(init=False)
    of_kind: dict[str, list[tuple[int, Hashable]]] = attrs.field(init=False)  # position and key

    def __attrs_post_init__(self) -> None:
        kinds = [kind for kind, _ in self.places]
        object.__setattr__(self, "must_be_finite", _among(kinds, ("loss", "grad", "pgrad")))
        object.__setattr__(self, "norms", _among(kinds, NORMS))
        object.__setattr__(self, "sums", _among(kinds, SUMS))
        object.__setattr__(self, "least_peaks", tuple(i for i, k in enumerate(kinds) if k == "least_peak"))
        object.__setattr__(self, "of_kind", {})
        for position, (kind, key) in enumerate(self.places):
            self.of_kind.setdefault(kind, []).append((position, key))


def _among(kinds: Sequence[str], wanted: Collection[str]) -> Bools:
    """Return which of some kinds are among others."""
    return np.array([kind in wanted for kind in kinds], bool)


@attrs.frozen(eq=False)
class Row:
    """The numbers of one step.

    Args:
        layout: what they are.
        values: the numbers.
        counts: how many elements are behind each.
        sizes: number of output elements of each layer call.
        safe: whether all numbers are known to be finite.
        broken: whether a number of this step is not finite on another process.
    """

    layout: Layout
    values: Floats
    counts: Floats
    sizes: tuple[int, ...]
    safe: bool = False
    broken: bool = False

    @property
    def loss(self) -> float:
        """The step's loss."""
        return float(self.values[0])

    @property
    def finite(self) -> bool:
        """Whether the loss and every gradient is finite."""
        return not self.broken and (self.safe or self._all_finite)

    @property
    def _all_finite(self) -> bool:
        return bool(np.isfinite(self.values[self.layout.must_be_finite]).all())


class Content(NamedTuple):
    """What the numbers of a step that is no look were taken of.

    Args:
        probed: indices of the calls whose output gradients were measured.
        reached: names of the parameters that had a gradient.
        moved: whether the norms of the parameters were taken.
        sizes: number of output elements of each layer call.
        shapes: of their first outputs.
    """

    probed: tuple[int, ...]
    reached: tuple[str, ...]
    moved: bool
    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


@attrs.frozen(eq=False)
class Form:
    """The form of an ordinary step's row; a later step of the same content reuses it.

    Args:
        content: what its numbers were taken of.
        layout: the layout of its row.
        counts: element counts of its row.
        norms: which of its numbers are norms.
        least: a norm must be above this to be safe, and any other number to be finite.
        most: and below this.
    """

    content: Content
    layout: Layout
    counts: Floats
    norms: list[bool]
    least: list[float]
    most: list[float]


def to_host(values: Sequence[Tensor]) -> list[float]:
    """Return scalars (of shape ()) that may lie on several devices as floats: one transfer a device."""
    if False not in [v.is_cpu for v in values]:
        return [float(v.item()) for v in values]
    found: list[float] = [0.0] * len(values)
    by_device: dict[torch.device, dict[torch.dtype, list[int]]] = {}
    for i, value in enumerate(values):
        by_device.setdefault(value.device, {}).setdefault(value.dtype, []).append(i)
    for device, kinds in by_device.items():
        wide = wide_dtype(device)
        parts = [torch.stack([values[i] for i in positions]).to(wide) for positions in kinds.values()]
        numbers = (torch.cat(parts) if len(parts) > 1 else parts[0]).tolist()
        for i, number in zip((i for positions in kinds.values() for i in positions), numbers, strict=True):
            found[i] = number
    return found
