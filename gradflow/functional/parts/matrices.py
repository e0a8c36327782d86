"""How large the parts of a fused matrix are, and whether a matrix looks as it was drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def is_fused(weight: Tensor) -> bool:
    """Whether a matrix may be queries, keys and values in one: three times as many rows as columns."""
    return weight.dim() == 2 and weight.shape[0] == 3 * weight.shape[1] and weight.is_floating_point()


def thirds(weight: Tensor) -> Tensor:
    """Return the root mean square of each third of the rows, shape (3,)."""
    return weight.detach().unflatten(0, (3, -1)).float().square().mean((1, 2)).sqrt()


def as_drawn(weight: Tensor) -> Tensor:
    """Return kurtosis and dispersion, shape (2,); see `MatrixRecord`. NaN where there is nothing to tell.

    Training leaves some rows or columns larger than others; where elements are independent, squared norms of
    rows of n elements vary by (kurtosis − 1) / n of their mean squared.

    >>> kurtosis, dispersion = as_drawn(torch.randn(200, 100, generator=torch.manual_seed(0)))
    >>> round(float(kurtosis), 1), round(float(dispersion))
    (3.0, 1)
    """
    if weight.dim() < 2 or weight.numel() < 64 or not weight.is_floating_point():
        return torch.full((2,), torch.nan, device=weight.device)
    squares = weight.detach().flatten(1).float().square()
    mean = squares.mean()
    kurtosis = squares.square().mean() / mean.square()
    spread = []
    for axis in (0, 1):
        norms = squares.mean(axis)
        independent = (kurtosis - 1) / squares.shape[axis]
        spread.append(norms.var() / mean.square() / independent)
    return torch.stack([kurtosis, torch.stack(spread).max()])
