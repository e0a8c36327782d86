"""Subnormal numbers in a reverse pass: how many of them the operations of each layer call are handed.

NOTE [Slow numbers]
A number below the smallest normal one (1.2e-38 in float32) has fewer digits, and many processors hand it to
microcode: an operation on it then takes ten to a hundred times as long. A gradient that decays on a long way
is subnormal over the last seven decades before it is zero. A few nodes, spread over the graph in the order in
which they were made, show whether it comes to that; only then all of them are asked.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.processes.shards import local
from gradflow.functional.tap.nodes import Node, is_leaf, nodes_under
from gradflow.functional.tap.probes import is_probe
from gradflow.functional.torch_private import node_number
from gradflow.records import SubnormalRecord

SAMPLED = 64  # nodes that are asked first
ENTRIES = 2**11  # of each, that are looked at
_LAYOUTS = {  # whole numbers of the same size, all bits but the sign, and the smallest normal number
    torch.float32: (torch.int32, 2**31 - 1, 1 << 23),
    torch.bfloat16: (torch.int16, 2**15 - 1, 1 << 7),
    torch.float64: (torch.int64, 2**63 - 1, 1 << 52),
}

Span = tuple[int, int, str]  # autograd's numbers at the start and the end of a layer call, and its name


def num_subnormal(x: Tensor) -> int:
    """Return how many entries are subnormal, by their bits: the processor may take them for zeros.

    >>> num_subnormal(torch.tensor([0.0, 1.0, 1e-40]))
    1
    """
    if x.dtype not in _LAYOUTS or x.layout is not torch.strided:
        return 0
    ints, unsigned, normal = _LAYOUTS[x.dtype]
    bits: Any = x.detach().view(ints)
    plain = bits.is_cpu and type(bits) is Tensor
    bits, count = (bits.numpy(), np.count_nonzero) if plain else (bits, torch.count_nonzero)
    bits = bits & unsigned
    return int(count((bits > 0) & (bits < normal)))


def _some_entries(x: Tensor, stride: int) -> Tensor:
    """Return every so many entries of a tensor, in its own order; the others are not copied."""
    if x.is_contiguous():
        return x.view(-1)[::stride]
    return x.take(torch.arange(0, x.numel(), stride, device=x.device))


def graph_nodes(loss: Tensor) -> list[Node]:
    """Return the nodes under a loss that compute something, in the order in which they were made."""
    if loss.grad_fn is None:
        return []
    found = [node for node in nodes_under([loss.grad_fn]) if not is_leaf(node) and not is_probe(node)]
    return sorted(found, key=node_number)


def sample(nodes: Sequence[Node]) -> Sequence[Node]:
    """Return some of the nodes, spread evenly."""
    return nodes[:: max(len(nodes) // SAMPLED, 1)]


@attrs.define(eq=False)
class Tally:
    """Counts the subnormal numbers that nodes are handed; made for one pass.

    Args:
        nodes: those to ask.
        spans: of the layer calls, in the order of their starts.
        most: of a gradient with more entries than that, so many are looked at, spread evenly; 0 for all.
    """

    nodes: Sequence[Node]
    spans: Sequence[Span] = ()
    most: int = 0
    _found: dict[tuple[str, torch.dtype], list[int]] = attrs.field(factory=dict)

    def places(self) -> Iterable[tuple[Node, int, Callable[[Tensor], None]]]:
        """Return what `listening` takes, and let go of the nodes."""
        starts = [start for start, _, _ in self.spans]
        places = [(node, 0, self._hearing(self._owner(node, starts))) for node in self.nodes]
        self.nodes = ()
        return places

    @property
    def any(self) -> bool:
        """Whether there was one."""
        return any(subnormal for _, subnormal in self._found.values())

    def records(self) -> list[SubnormalRecord]:
        """Return what was found, by layer call, those without a subnormal number included."""
        return [
            SubnormalRecord(
                layer=name, dtype=str(dtype).removeprefix("torch."), num_elements=number, num_subnormal=below
            )
            for (name, dtype), (number, below) in self._found.items()
        ]

    def _owner(self, node: Node, starts: list[int]) -> str:
        number = node_number(node)
        before = self.spans[: bisect.bisect_right(starts, number)]
        return next((name for _, end, name in reversed(before) if number < end), "")

    def _hearing(self, name: str) -> Callable[[Tensor], None]:
        def hear(gradient: Tensor) -> None:
            gradient = local(gradient)  # each process counts what it holds
            entry = self._found.setdefault((name, gradient.dtype), [0, 0])
            if 0 < self.most < gradient.numel() and gradient.layout is torch.strided:
                gradient = _some_entries(gradient, gradient.numel() // self.most)
            entry[0] += gradient.numel()
            entry[1] += num_subnormal(gradient)

        return hear
