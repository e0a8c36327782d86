"""Messages between two processes of an analysis, as the stages of a pipeline send them.

A message is announced through the store, and its tensors are sent when both sides are ready: a process may
compute as long as it likes, and one that fails is known to those who wait for it.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from gradflow.functional.processes.line import Line
from gradflow.functional.processes.packing import device_of

Message = tuple[list[Tensor], Any]


@attrs.define(eq=False)
class Messages:
    """The messages of this process to others and from them.

    Args:
        line: to all processes of the analysis, which counts what is sent.
        group: of those that messages go to.
    """

    line: Line = attrs.field(factory=Line)
    group: Any = None
    _sent: dict[str, int] = attrs.field(factory=dict)  # number of messages by where they go

    def send(self, to: int, tensors: Sequence[Tensor] | None, more: Any = None) -> None:
        """Send something to a process; None says that there is nothing."""
        key = self._key(dist.get_rank(), to)
        if tensors is None:
            self.line.post(key, pickle.dumps(None))
            return
        dense = [t.to_dense() if t.layout is not torch.strided else t for t in tensors]
        dense = [tensor.to(device_of(self.group)) for tensor in dense]  # gloo exchanges what is on the CPU
        self.line.post(key, pickle.dumps(([(tuple(t.shape), t.dtype) for t in dense], more)))
        if dense:
            self.line.fetch(f"{key}/ready")
            self.line.counts.sent(sum(tensor.nbytes for tensor in dense))
        for tensor in dense:
            whole = tensor.contiguous()
            self.line.moved(lambda whole=whole: dist.send(whole, to, group=self.group))

    def receive(self, source: int) -> Message | None:
        """Return what a process has sent; None where there is nothing."""
        key = self._key(source, dist.get_rank())
        found = pickle.loads(self.line.fetch(key))
        if found is None:
            return None
        forms, more = found
        if forms:
            self.line.post(f"{key}/ready")
        device = device_of(self.group)
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in forms]
        for tensor in tensors:
            self.line.moved(lambda tensor=tensor: dist.recv(tensor, source, group=self.group))
        return tensors, more

    def _key(self, source: int, to: int) -> str:
        way = f"{source}-{to}"
        self._sent[way] = self._sent.get(way, -1) + 1
        return f"{way}/{self._sent[way]}"
