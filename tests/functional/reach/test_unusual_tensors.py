"""What a run follows is not disturbed by tensors whose elements cannot be looked at."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf


def ragged() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says PyTorch
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


KINDS = {
    "nested": ragged,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "empty": lambda: torch.empty(0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dead", [False, True])
def test_they_are_passed_by(kind: str, dead: bool) -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.held = KINDS[kind]()

        def forward(self, x: Tensor) -> Tensor:
            _ = self.held.clone()
            gate = 0.0 if dead else 1.0
            return self.head(gate * self.inner(x).relu())

    record = gf.analyze(Holding(), [torch.randn(8, 4)] * 3, lambda y: y.square().mean())
    assert record.reach is not None
    if dead:
        assert {part.parameter for part in record.reach.unreached} >= {"inner.weight", "inner.bias"}
