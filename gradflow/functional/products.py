"""Products with the Jacobian of a tensor function, forward and reverse, in several ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradflow.errors import GradflowError, ModelCallError

TensorFunction = Callable[[Tensor], Tensor]

# NOTE [Ways to a product]
# vᵀ ↦ J v is taken in forward mode. Where an operation has none, or a custom autograd Function lacks its
# `jvp`, it is the pullback of the pullback: u ↦ Jᵀ u is linear, and its own transpose is J. Some models
# (old-style autograd Functions, activation checkpointing) are rejected by `torch.func` altogether; then the
# same is done with `torch.autograd.grad` on the same pure function. The first way that works is kept.


def _forward_mode(function: TensorFunction, point: Tensor) -> TensorFunction:
    return lambda v: torch.func.jvp(function, (point,), (v,))[1]


def _pullback(function: TensorFunction, point: Tensor) -> TensorFunction:
    pull: Any = torch.func.vjp(function, point)[1]
    return lambda u: pull(u)[0]


def _pullback_of_pullback(function: TensorFunction, point: Tensor) -> TensorFunction:
    value = function(point)
    return _pullback(lambda u: torch.func.vjp(function, point)[1](u)[0], torch.zeros_like(value))


def _autograd_pullback(function: TensorFunction, point: Tensor) -> TensorFunction:
    x = point.detach().requires_grad_()
    y = function(x)
    if not y.requires_grad:
        return lambda u: torch.zeros_like(x)
    return lambda u: torch.autograd.grad(y, x, u, retain_graph=True, materialize_grads=True)[0]


def _autograd_pullback_of_pullback(function: TensorFunction, point: Tensor) -> TensorFunction:
    x = point.detach().requires_grad_()
    y = function(x)
    u = torch.zeros_like(y, requires_grad=True)
    if not y.requires_grad:
        return lambda v: torch.zeros_like(y)
    g = torch.autograd.grad(y, x, u, create_graph=True, materialize_grads=True)[0]
    if not g.requires_grad:
        return lambda v: torch.zeros_like(y)
    return lambda v: torch.autograd.grad(g, u, v, retain_graph=True, materialize_grads=True)[0]


PUSHES = (_forward_mode, _pullback_of_pullback, _autograd_pullback_of_pullback)
PULLS = (_pullback, _autograd_pullback)


def first_way(
    ways: Sequence[Callable[[TensorFunction, Tensor], TensorFunction]],
    function: TensorFunction,
    point: Tensor,
    vector: Tensor,
    name: str,
) -> tuple[TensorFunction, Tensor]:
    """Return the first way to a product that works, and its product; see NOTE [Ways to a product].

    Args:
        ways: `PUSHES` or `PULLS`.
        function: what is differentiated.
        point: where.
        vector: tangent or cotangent to try it on.
        name: of the function, for the message.

    Raises:
        ModelCallError: if none does.
    """
    errors: list[Exception] = []
    for way in ways:
        try:
            product = way(function, point)
            return product, product(vector)
        except (GradflowError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError) as error:
            errors.append(error)
    raise ModelCallError(
        f"no derivative of {name} can be taken: {errors[0]} An operation in it lacks the derivative that this "
        "product needs, in forward mode and in reverse. Give a custom autograd Function its `jvp`, and a "
        "`backward` of differentiable operations; or choose layers that leave this operation out."
    ) from errors[0]
