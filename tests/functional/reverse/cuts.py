"""A model that is cut where a function says, and what its record says of edges and layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradflow.records import EdgeRecord, FlowRecord, GraphRecord, NodeRecord

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


class Cut(nn.Module):
    """`a` feeds `b` and a way round it; what becomes of `b`'s output is up to the function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c, self.function = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), function
        with torch.no_grad():
            self.b.weight.mul_(5.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(self.function(self.b(h), h))


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


def graph(record: FlowRecord) -> GraphRecord:
    assert record.graph_record is not None
    return record.graph_record


def severed(record: FlowRecord) -> dict[tuple[str, str], EdgeRecord]:
    return {(e.source, e.target): e for e in graph(record).edges if e.severed}


def unreachable(record: FlowRecord) -> dict[str, str]:
    return {n.name: n.reason for n in graph(record).nodes if not n.reachable}


def node(record: FlowRecord, name: str) -> NodeRecord:
    (found,) = [n for n in graph(record).nodes if n.name == name]
    return found
