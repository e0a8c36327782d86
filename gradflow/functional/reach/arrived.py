"""At which elements of the trainable parameters a gradient has arrived, over the steps of a run.

After the first step nearly every parameter has been reached everywhere, and is not followed any more. Of the
others a short list of the elements that are left is followed, or, where many are left, a mask of all. When
they are settled is asked at looks alone, in one transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.processes.shards import local
from gradflow.functional.reach.masks import is_plain, nonzero_at, number, places, some
from gradflow.functional.reverse.passing import Gradient, Passed

FAINT = 1e-4  # of the largest: rounding noise is below 1e-6 in float32
_FEW = 0.25  # of the elements: up to here, they are listed


@attrs.define(eq=False)
class Arrived:
    """Which elements have been reached so far.

    Args:
        trainable: the trainable working parameters by name.
    """

    trainable: Mapping[str, Tensor]
    settled: set[str] = attrs.field(factory=set)  # reached everywhere
    faint: set[str] = attrs.field(factory=set)  # what arrived in the first step may be rounding noise
    _masks: dict[str, Tensor] = attrs.field(factory=dict)  # of elements that were reached
    _left: dict[str, Tensor] = attrs.field(factory=dict)  # places of those that were not, where few
    _since: dict[str, Tensor] = attrs.field(factory=dict)  # of these, which were since the last look
    _marks: dict[str, tuple[Any, Any]] = attrs.field(factory=dict)  # both, as arrays on the same memory

    @property
    def open(self) -> list[str]:
        """The names of the parameters that are not reached everywhere."""
        return [name for name in self.trainable if name not in self.settled]

    @property
    def partly(self) -> set[str]:
        """The names of those to which a path has led, and that are not reached everywhere."""
        return {*self._masks, *self._left}

    def doubt(self, norms: Mapping[str, float], largest: float) -> None:
        """Hear the norms of the gradients in the first step: what is tiny beside the others may be noise.

        Args:
            norms: by name of the parameter.
            largest: of all parameters, those of other stages of a pipeline included.
        """
        self.faint = {name for name, norm in norms.items() if norm <= FAINT * largest}

    def doubt_all(self) -> None:
        """Take every gradient of the first step for possible noise, until its norm is known."""
        self.faint = set(self.trainable)

    def settle(self, names: set[str]) -> None:
        """Hear that these were reached everywhere."""
        self.settled |= names
        for kept in (self._masks, self._left, self._since, self._marks):
            for name in names & kept.keys():
                del kept[name]

    def add(self, gradients: Mapping[str, Gradient | None], *, look: bool) -> None:
        """Take in the gradients of one step.

        Args:
            gradients: by name of the parameter; None where no path led there.
            look: whether to ask as well which are settled now.
        """
        if len(self.settled) == len(self.trainable):
            return
        for name in self.open:
            gradient, marks = gradients.get(name), self._marks.get(name)
            if isinstance(gradient, Tensor):
                gradient = local(gradient)
            if marks is not None and type(gradient) is Tensor and is_plain(gradient):
                left, since = marks
                np.logical_or(since, gradient.detach().numpy().reshape(-1).take(left), out=since)
            elif isinstance(gradient, Passed) and gradient.mask is None:
                self.settle({name})
            elif gradient is not None:
                self._mark(name, gradient if isinstance(gradient, Passed) else gradient.detach())
        if look:
            self._ask()

    def _mark(self, name: str, gradient: Gradient) -> None:
        left = self._left.get(name)
        if left is not None and isinstance(gradient, Tensor) and gradient.layout is torch.strided:
            found = nonzero_at(gradient, left)
            since = self._since.get(name)
            self._since[name] = since = found if since is None else since.logical_or_(found)
            if since.is_cpu:
                self._marks[name] = left.numpy(), since.numpy()
            return
        if left is not None:
            self._masks[name] = self._mask(name)
            for kept in (self._left, self._since, self._marks):
                kept.pop(name, None)
        found = _mask_of(gradient)
        mask = self._masks.get(name)
        self._masks[name] = found if mask is None else mask.logical_or_(found)

    def _ask(self) -> None:
        """Ask which parameters are settled, and make short lists of what is left."""
        for name, since in self._since.items():
            self._left[name] = self._left[name][~since]
        self._since, self._marks = {}, {}
        names = list(self._masks)
        if names:
            for name, left in zip(names, self._numbers_left(names), strict=True):
                if left <= _FEW * self._masks[name].numel():
                    self._left[name] = places(~self._masks.pop(name))
        self.settle({name for name, left in self._left.items() if not left.numel()})

    def _numbers_left(self, names: list[str]) -> list[int]:
        """Return how many elements of some parameters are not reached, in one transfer from a device."""
        masks = [self._masks[name] for name in names]
        if all(mask.is_cpu for mask in masks):
            return [mask.numel() - number(mask) for mask in masks]
        return torch.stack([(~mask).sum().cpu() for mask in masks]).tolist()

    def _mask(self, name: str) -> Tensor:
        """Return which elements of a listed parameter were reached."""
        left, parameter = self._left[name], self.trainable[name]
        mask = torch.ones(parameter.numel(), dtype=torch.bool, device=left.device)
        mask[left] = self._since.get(name, torch.zeros(left.shape, dtype=torch.bool, device=left.device))
        return mask.reshape(parameter.shape)

    def unreached(self) -> dict[str, Tensor | None]:
        """Return by name of every parameter not settled the mask of its unreached elements, on the host;
        None where no path ever led there."""
        found: dict[str, Tensor | None] = {}
        for name in self.open:
            known = self._masks.get(name) if name in self._masks else None
            if name in self._left:
                known = self._mask(name)
            found[name] = None if known is None else known.logical_not().cpu()
        return {name: mask for name, mask in found.items() if mask is None or some(mask)}


def _mask_of(gradient: Gradient) -> Tensor:
    """Return where a gradient is not zero, as a dense tensor."""
    if isinstance(gradient, Passed):
        assert gradient.mask is not None  # one without zeros is settled
        return gradient.mask
    if gradient.layout is torch.strided:
        return gradient.bool()
    if gradient.layout is torch.sparse_coo:
        gradient = gradient.coalesce()
        mask = torch.zeros(gradient.shape, dtype=torch.bool, device=gradient.device)
        mask[tuple(gradient.indices())] = gradient.values().bool()
        return mask
    return gradient.to_dense().bool()
