"""Norm layers, and what they add to the variance; matrices, their parts, and whether they are as drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradflow.functional.torch_private import BatchNorm, InstanceNorm

_NAMES = ("eps", "epsilon", "variance_epsilon")


def epsilon_of(module: nn.Module) -> float | None:
    """Return what a norm layer adds to the variance; None for other modules and where it is not known."""
    if "norm" not in type(module).__name__.lower() or isinstance(module, nn.modules.container.Sequential):
        return None
    value = next((v for n in _NAMES if isinstance(v := getattr(module, n, None), float | int)), None)
    return None if value is None or isinstance(value, bool) else float(value)


def variance(module: nn.Module, x: Tensor) -> Tensor:
    """Return the variance that a norm layer divides by, the median over what it normalises; a scalar.

    Over the batch for batch norms, over groups, channels or features for the others; the mean square for RMS
    norms.
    """
    x = x.float()
    if isinstance(module, BatchNorm) and x.dim() > 1:
        rows = x.transpose(0, 1).flatten(1)
    elif isinstance(module, nn.GroupNorm) and x.dim() > 1:
        rows = x.reshape(x.shape[0] * module.num_groups, -1)
    elif isinstance(module, InstanceNorm) and x.dim() > 2:
        rows = x.flatten(0, 1).flatten(1)
    else:
        axes = len(getattr(module, "normalized_shape", ())) or 1
        rows = x.flatten(-axes).flatten(0, -2) if x.dim() > axes else x.reshape(1, -1)
    if "rms" in type(module).__name__.lower():
        return rows.square().mean(-1).median()
    return rows.var(-1, unbiased=False).median()


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
