"""Products with the Jacobian of a tensor function, forward and reverse, in several ways."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradflow.errors import GradflowError, ModelCallError
from gradflow.functional.jacobian.singular import probe_vector
from gradflow.functional.model.setting import load_forward_mode

TensorFunction = Callable[[Tensor], Tensor]

# NOTE [Ways to a product]
# v ↦ J v is taken in forward mode. Where an operation has none, or a custom autograd Function lacks its
# `jvp`, it is the pullback of the pullback: u ↦ Jᵀ u is linear, and its own transpose is J. Some models
# (old-style autograd Functions, activation checkpointing) are rejected by `torch.func` altogether; then the
# same is done with `torch.autograd.grad` on the same pure function. The first way that works is kept.
# A backward that is not made of differentiable operations cuts the second reverse pass silently, so what
# comes of it is held against the first: ⟨u, J v⟩ = ⟨Jᵀ u, v⟩ on a few random pairs.
# Checkpointing runs parts of the function again in the reverse pass. A function may therefore have an
# attribute `evaluating`, a context in which its model is as it was; `torch.autograd.grad` is called in it.


def _forward_mode(function: TensorFunction, point: Tensor) -> TensorFunction:
    load_forward_mode()
    return lambda v: torch.func.jvp(function, (point,), (v,))[1]


def _pullback(function: TensorFunction, point: Tensor) -> TensorFunction:
    pull: Any = torch.func.vjp(function, point)[1]
    return lambda u: pull(u)[0]


def _pullback_of_pullback(function: TensorFunction, point: Tensor) -> TensorFunction:
    value = function(point)
    push = _pullback(lambda u: torch.func.vjp(function, point)[1](u)[0], torch.zeros_like(value))
    _check_transposed(push, _pullback(function, point), point, value)
    return push


def _autograd_pullback(function: TensorFunction, point: Tensor) -> TensorFunction:
    x = point.detach().requires_grad_()
    y = function(x)

    def pull(u: Tensor) -> Tensor:
        if not y.requires_grad:
            return torch.zeros_like(point)
        with evaluating(function):
            return torch.autograd.grad(y, x, u, retain_graph=True, materialize_grads=True)[0]

    return pull


def _autograd_pullback_of_pullback(function: TensorFunction, point: Tensor) -> TensorFunction:
    x = point.detach().requires_grad_()
    y = function(x)
    u = torch.zeros_like(y, requires_grad=True)
    g = torch.zeros_like(point)
    if y.requires_grad:
        with evaluating(function):
            g = torch.autograd.grad(y, x, u, create_graph=True, materialize_grads=True)[0]

    def push(v: Tensor) -> Tensor:
        if not g.requires_grad:
            return torch.zeros_like(u)
        with evaluating(function):
            return torch.autograd.grad(g, u, v, retain_graph=True, materialize_grads=True)[0]

    _check_transposed(push, _autograd_pullback(function, point), point, y)
    return push


def evaluating(function: TensorFunction) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a function's model is as it was, if it has one."""
    return getattr(function, "evaluating", contextlib.nullcontext)()


def _check_transposed(push: TensorFunction, pull: TensorFunction, point: Tensor, value: Tensor) -> None:
    """Raise unless the two are transposes of one another; see NOTE [Ways to a product]."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        v, u = probe_vector(point, "gaussian", generator), probe_vector(value.detach(), "gaussian", generator)
        pushed, pulled = push(v).detach().double(), pull(u).detach().double()
        difference = float((pushed * u).sum() - (pulled * v).sum())
        if abs(difference) > 0.05 * max(float(pushed.norm()), float(pulled.norm())):
            raise RuntimeError("a backward in it is not made of differentiable operations.")


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
        f"no derivative of {name} can be taken: {errors[0]} An operation in it lacks the derivative that "
        "this product needs, in forward mode and in reverse. Give a custom autograd Function its `jvp`, and "
        "a `backward` of differentiable operations; or choose layers that leave this operation out."
    ) from errors[0]
