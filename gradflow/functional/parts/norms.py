"""Norm layers: what they add to the variance, and the variance of what enters."""

from __future__ import annotations

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
