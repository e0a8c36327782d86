"""A batch, a loss, and what it means that two records are the same."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradflow.records import FlowRecord

X = torch.randn(5, 4)


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


def assert_same(a: FlowRecord, b: FlowRecord, *, rtol: float = 1e-6) -> None:
    assert [layer.name for layer in a] == [layer.name for layer in b]
    np.testing.assert_allclose(a.losses, b.losses, rtol=rtol)
    for x, y in zip((*a, *a.parameters), (*b, *b.parameters), strict=True):
        np.testing.assert_array_equal(x.reached, y.reached, err_msg=x.name)
        np.testing.assert_allclose(x.grad_norm, y.grad_norm, rtol=rtol, err_msg=x.name)
