"""Where a probe sits, the slot that its statistic goes to, and tensors that span many powers of ten."""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.functional.tap.probes import Site


def slot(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, requires_grad=True)


def site(*, exact: bool = True) -> Site:
    return Site(0, 0, exact)


def spread(dtype: torch.dtype, low: float, high: float, number: int, seed: int) -> Tensor:
    """Return numbers whose logarithms are even between two powers of ten, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.rand(number, generator=generator, dtype=torch.float64) * (high - low) + low
    signs = torch.randint(0, 2, (number,), generator=generator) * 2 - 1
    return (10.0**power * signs).to(dtype)
