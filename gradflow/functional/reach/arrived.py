"""At which elements of the trainable parameters a gradient has arrived, over the steps of a run.

After the first step nearly every parameter has been reached everywhere, and is not followed any more. What is
left is followed element by element; when it is settled is asked at looks alone, in one transfer.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

FAINT = 1e-4  # of the largest: rounding noise is below 1e-6 in float32


@attrs.define(eq=False)
class Arrived:
    """Which elements have been reached so far.

    Args:
        trainable: the trainable working parameters by name.
    """

    trainable: Mapping[str, Tensor]
    masks: dict[str, Tensor] = attrs.field(factory=dict)  # of parameters that are not settled, once reached
    settled: set[str] = attrs.field(factory=set)  # reached everywhere
    faint: set[str] = attrs.field(factory=set)  # what arrived in the first step may be rounding noise

    @property
    def open(self) -> list[str]:
        """The names of the parameters that are not reached everywhere."""
        return [name for name in self.trainable if name not in self.settled]

    def doubt(self, norms: Mapping[str, float]) -> None:
        """Hear the norms of the gradients in the first step: what is tiny beside the others may be noise.

        Args:
            norms: by name of the parameter.
        """
        largest = max(norms.values(), default=0.0)
        self.faint = {name for name, norm in norms.items() if norm <= FAINT * largest}

    def doubt_all(self) -> None:
        """Take every gradient of the first step for possible noise, until its norm is known."""
        self.faint = set(self.trainable)

    def settle(self, names: set[str]) -> None:
        """Hear that these were reached everywhere."""
        self.settled |= names
        for name in names:
            self.masks.pop(name, None)

    def add(self, gradients: Mapping[str, Tensor | None], *, look: bool) -> None:
        """Take in the gradients of one step.

        Args:
            gradients: by name of the parameter; None where no path led there.
            look: whether to ask as well which are settled now.
        """
        for name in self.trainable if not self.settled else self.open:
            gradient = gradients.get(name)
            if gradient is not None:
                self._mark(name, gradient)
        if look and self.masks:
            names = list(self.masks)
            left = torch.stack([self.masks[n].all().to("cpu", non_blocking=True) for n in names]).tolist()
            self.settle({name for name, done in zip(names, left, strict=True) if done})

    def _mark(self, name: str, gradient: Tensor) -> None:
        mask = self.masks.get(name)
        if gradient.layout is not torch.strided:
            gradient = _dense_mask(gradient)
        gradient = gradient.detach()
        if mask is None:
            self.masks[name] = gradient != 0
        else:
            mask.logical_or_(gradient)

    def unreached(self) -> dict[str, Tensor | None]:
        """Return by name of every parameter not settled the mask of its unreached elements, on the host;
        None where no path ever led there."""
        found: dict[str, Tensor | None] = {}
        for name in self.open:
            mask = self.masks.get(name)
            found[name] = None if mask is None else mask.logical_not().cpu()
        return {name: mask for name, mask in found.items() if mask is None or bool(mask.any())}


def _dense_mask(gradient: Tensor) -> Tensor:
    """Return where a sparse gradient is not zero, as a dense tensor."""
    if gradient.layout is torch.sparse_coo:
        gradient = gradient.coalesce()
        values = gradient.values() != 0
        mask = torch.zeros(gradient.shape, dtype=torch.bool, device=gradient.device)
        mask[tuple(gradient.indices())] = values
        return mask
    return gradient.to_dense() != 0
