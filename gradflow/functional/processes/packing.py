"""How tensors are packed for an exchange, where they are for it, and what was exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 25 * 2**20  # bytes, as DistributedDataParallel's


@attrs.define(eq=False)
class Counts:
    """What was exchanged in an analysis.

    Args:
        gradients: all-reduces of gradients, as the trainer makes them too.
        others: all others.
        num_bytes: that this process has put into the others.
        gradient_bytes: that it has put into those of gradients.
        gathered_bytes: of `num_bytes`, those that every process gets from every other.
        messages: to another process alone, those without a tensor left out.
        message_bytes: of their tensors.
    """

    gradients: int = 0
    others: int = 0
    num_bytes: int = 0
    gradient_bytes: int = 0
    gathered_bytes: int = 0
    messages: int = 0
    message_bytes: int = 0

    def sent(self, num_bytes: int) -> None:
        """Count a message."""
        self.messages += 1
        self.message_bytes += num_bytes

    def note(self, num_bytes: int, *, gradients: bool = False, gathered: bool = False) -> None:
        """Count an exchange into which this process puts so many bytes."""
        self.gathered_bytes += num_bytes if gathered else 0
        if gradients:
            self.gradients += 1
            self.gradient_bytes += num_bytes
        else:
            self.others += 1
            self.num_bytes += num_bytes


def device_of(group: Any) -> torch.device:
    """Return the device on which a group exchanges numbers."""
    known = str(dist.get_backend(group))
    cpu = "gloo" in known or "mpi" in known
    return torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the places of tensors of one dtype and device, some of them at a time."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(i)
    for places in kinds.values():
        bucket: list[int] = []
        size = 0
        for i in places:
            number = tensors[i].numel() * tensors[i].element_size()
            if bucket and size + number > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(i)
            size += number
        if bucket:
            yield bucket
