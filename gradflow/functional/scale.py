"""A gradient scale: the identity forward, a factor backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GradientScale(torch.autograd.Function):
    """Identity in the forward pass; multiplies the gradient by `scale` in the backward pass.

    Use as `GradientScale.apply(x, scale)`. A scale of −1 is the gradient reversal layer of Ganin and
    Lempitsky (2015, arXiv:1409.7495), 0 stops the gradient. Works under `torch.func`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.scale, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        # Forward and reverse mode must be transposes of one another, so the tangent is scaled as well.
        return grad_inputs[0] * ctx.scale


def gradient_scale(x: Tensor, scale: float) -> Tensor:
    """Return `x`, with the gradient that flows back through it multiplied by `scale`.

    Args:
        x: tensor of any shape.
        scale: dimensionless factor; 0 stops the gradient, −1 reverses it.

    >>> x = torch.ones(2, requires_grad=True)
    >>> gradient_scale(x, 0.5).sum().backward()
    >>> x.grad
    tensor([0.5000, 0.5000])
    """
    return GradientScale.apply(x, scale)  # type: ignore[return-value]
