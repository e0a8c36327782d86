"""Loops of operations over the steps of a sequence: tensors that are taken apart one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.tap.recorder import Recorder

FADED = 1e-6  # of the largest gradient of a step: float32 keeps 7 digits
_END = 1e-30  # of float32, whose smallest number is 1e-45
FEWEST = 16  # steps: of fewer, what fades is still heard
MOST = 8  # tensors that are followed: a loop has a handful


@attrs.define(eq=False)
class Scan:
    """A tensor of which every step was taken by itself.

    Args:
        tensor: it.
        axis: along which the steps are.
        module: qualified name of the innermost module that runs.
        calls: how many module calls there were before the first step was taken, and before the last.
        taken: which steps.
    """

    tensor: Tensor
    axis: int
    module: str
    calls: list[int]
    taken: set[int] = attrs.field(factory=set)

    def is_whole(self) -> bool:
        """Whether every step was taken, and none handed to a module, which is measured as such."""
        number = self.tensor.shape[self.axis]
        return len(self.taken) == number and self.calls[1] - self.calls[0] < number // 2


@attrs.define(eq=False)
class Scans:
    """Hears which tensors with a gradient are taken apart along an axis, in one step of a run."""

    _recorder: Recorder
    _heard: dict[tuple[int, int], Scan] = attrs.field(factory=dict)

    def hear(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note a function that takes one step of a tensor."""
        name, x = getattr(func, "__name__", ""), args[0] if args else None
        if name not in ("__getitem__", "select", "unbind") or not isinstance(x, Tensor) or x.dim() < 2:
            return
        if not x.requires_grad or not x.is_floating_point():
            return
        for axis, steps in _taken(name, x, args[1:], kwargs):
            if x.shape[axis] < FEWEST:
                continue
            running, now = self._recorder.running(), len(self._recorder.calls)
            module = running[-1].module if running else ""
            scan = self._heard.setdefault((id(x), axis), Scan(x, axis, module, [now, now]))
            scan.calls[1] = now
            scan.taken.update(steps)

    def whole(self) -> list[Scan]:
        """Return those of which every step was taken, in the order of execution."""
        return [scan for scan in self._heard.values() if scan.is_whole()][:MOST]


def _taken(name: str, x: Tensor, rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[int, range]]:
    """Return the axis along which steps of a tensor are taken one by one, and which; nothing if none are."""
    if name == "unbind":
        axis = (rest[0] if rest else kwargs.get("dim", 0)) % x.dim()
        return [(axis, range(x.shape[axis]))]
    if name == "select":
        if len(rest) != 2 or not all(isinstance(value, int) for value in rest):
            return []
        axis, step = rest[0] % x.dim(), rest[1] % x.shape[rest[0]]
        return [(axis, range(step, step + 1))]
    index = rest[0] if rest else None
    entries = [e for e in (index if isinstance(index, tuple) else (index,)) if e is not None]
    plain = (isinstance(e, int) or e is Ellipsis or _is_all(e) for e in entries)
    if not all(plain):
        return []
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (x.dim() - len(entries) + 1)
    chosen = [(axis, e % x.shape[axis]) for axis, e in enumerate(entries) if isinstance(e, int)]
    return [(axis, range(step, step + 1)) for axis, step in chosen] if len(chosen) == 1 else []


def _is_all(entry: Any) -> bool:
    """Whether an index takes a whole axis; arrays and tensors, which choose, compare element by element."""
    return isinstance(entry, slice) and entry == slice(None)


def faded_share(scan: Scan, gradient: Tensor) -> Tensor:
    """Return the share of a scan's steps whose gradient is next to nothing beside the largest, and not zero.

    Zero it is where a step is not read at all, which is no fading; but where the last one that is not zero
    has come to the end of what float32 holds, the zeros beyond it are its fading too. Of a step the largest
    number is taken: the squares of small ones are zero long before.

    Args:
        scan: of a tensor.
        gradient: of that tensor.
    """
    axes = [axis for axis in range(gradient.dim()) if axis != scan.axis]
    size = gradient.detach().float().abs().amax(axes)
    faded = (size > 0) & (size < FADED * size.max())
    before, behind = (size > 0).cumsum(0) == 0, (size > 0).flip(0).cumsum(0).flip(0) == 0
    steps = torch.arange(len(size), device=size.device)
    known = torch.where(size > 0, steps, -1)
    last, first = known.max(), torch.where(size > 0, steps, len(size)).min().clamp(max=len(size) - 1)
    ended = (before & (size[first] < _END)) | (behind & (size[last] < _END))
    return (faded | ended & (size.max() > _END / FADED)).float().mean()
