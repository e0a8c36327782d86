"""The recorder of a pass that is the training's own, in which a probe must change nothing.

NOTE [Probes in a pass that counts]
A pass beside the training may be run again where a probe turns out to stand in the way. The training's own
may not: its gradients are stepped with. So nothing ever comes between two tensors on one memory.

What a call has made afresh is probed in place: the very object stays, with the probe as its last operation,
for whoever holds it. A view that a call has made (the output of an attention, transposed; `nn.Flatten`) is
left alone, and its node in autograd's graph tells of the gradient that it is handed: the graph is gone after
the pass, and that with it. So does the node of what a call hands on as it was given it (`nn.Identity`,
dropout of nothing): that is one tensor with what was given, and has one gradient, from all who use either.
A leaf has no node, and nothing is told of one that is handed on.

A probe hands on the very gradient that it is given, and autograd runs its nodes in the reverse order of their
making, with or without others between them: so every sum of gradients is taken in the order in which it would
be taken anyway, and the weights come out the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.model.trees import is_differentiable
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.probes import Site, eager_in_place_probe, mark
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.sums import careful_magnitude, statistics_dtype
from gradflow.functional.torch_private import is_view, node_number


@attrs.define(eq=False)
class OwnRecorder(Recorder):
    """A recorder whose probes are safe in a pass that counts; see NOTE [Probes in a pass that counts]."""

    whose: object = attrs.field(factory=object)  # by which it knows its probes
    untold: set[str] = attrs.field(factory=set)  # names of calls that hand on a leaf
    _read: dict[int, Tensor] = attrs.field(factory=dict)  # magnitudes that nodes have told, by site
    _told: list[Any] = attrs.field(factory=list)  # handles of what nodes tell

    def _probe(self, call: Call, y: Tensor, *, in_place: bool = False) -> Tensor:
        if not y.requires_grad or not is_differentiable(y) or not torch.is_grad_enabled():
            return y
        node = y.grad_fn
        if node is None:
            self.untold.add(call.name)
            return y
        # a checkpoint may run a call again in a thread with numbers of its own
        own = self.in_backward or node_number(node) >= call.start
        if own and not is_view(y):
            dtype = statistics_dtype(y, exact=True)
            slot = torch.zeros((), dtype=dtype, device=y.device, requires_grad=True)
            site = Site(call.index, len(call.sites), exact=True, slot=slot, whose=self.whose)
            eager_in_place_probe(y, slot, site)
        else:
            site = Site(call.index, len(call.sites), exact=True, whose=self.whose)
            if own:
                mark(node, site)
            hear = functools.partial(self._hear, len(self.sites), y.output_nr)
            self._told.append(node.register_prehook(hear))
        call.sites.append(site)
        self.sites.append(site)
        return y

    def _hear(self, position: int, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Hear of the gradients that a node is handed, and leave them as they are."""
        gradient = gradients[number]
        if gradient is not None:
            with torch.no_grad():
                self._read[position] = careful_magnitude(gradient.detach())

    def _size(self, call: Call, kind: str, x: Tensor) -> Tensor:
        return careful_magnitude(x)

    def slots(self) -> list[Tensor]:
        """Return the slots of the probes, into whose `.grad` a reverse pass writes."""
        return [site.slot for site in self.sites if site.slot is not None]

    def arrived(self) -> list[Tensor | None]:
        """Return the magnitude of the gradient at every site in the last reverse pass, and forget it."""
        found: list[Tensor | None] = []
        for position, site in enumerate(self.sites):
            if site.slot is None:
                found.append(self._read.pop(position, None))
            else:
                found.append(site.slot.grad)
                site.slot.grad = None
        return found

    def rest(self) -> None:
        """Let the nodes tell no more: a graph may be kept for longer than the pass."""
        for handle in self._told:
            handle.remove()
        self._told.clear()
