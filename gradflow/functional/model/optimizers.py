"""A copy of the user's optimizer that steps the working copies of the parameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import OptimizerMismatchError


def copy_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, parameters: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """Return a copy of `optimizer`, its state included, that holds the working copies.

    Args:
        optimizer: any optimizer on the model's parameters; it is left as it was.
        model: the model, whose parameters the optimizer holds.
        parameters: working copies by qualified name.

    Raises:
        OptimizerMismatchError: if it holds none of the model's parameters.
    """
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise OptimizerMismatchError(
            f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer. "
            "Pass the optimizer itself: `optimizer=torch.optim.Adam(model.parameters())`."
        )
    memo: dict[int, Any] = {id(p): parameters[name] for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    ours = [p for p in held if id(p) in memo]
    if not ours:
        raise OptimizerMismatchError(
            f"none of the optimizer's {len(held)} parameters belongs to the model. It may have been built "
            "for another model, or before the model was replaced (a deep copy, say). "
            "Build it on this one: `torch.optim.Adam(model.parameters())`."
        )
    clone = copy.deepcopy(optimizer, memo)
    # Optimizers that wrap another keep it in an attribute of their own, which `Optimizer.__getstate__` drops.
    # Callables are left out: a learning-rate scheduler puts a `step` there that steps the user's optimizer.
    for name, value in optimizer.__dict__.items():
        if name not in clone.__dict__ and not callable(value) and "hook" not in name:
            clone.__dict__[name] = copy.deepcopy(value, memo)
    return clone


def optimized(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    """Return the qualified names of the model's parameters that an optimizer steps."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held}


def learning_rates(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Return the learning rate of every parameter group."""
    return tuple(float(group["lr"]) for group in optimizer.param_groups if "lr" in group)


def clip_gradients(gradients: Iterable[Tensor | None], max_norm: float) -> None:
    """Scale gradients, in place, so that their norm over all of them is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` does: by max_norm / (norm + 1e-6), where that is below 1.
    """
    known = [gradient for gradient in gradients if gradient is not None]
    if known:
        norms = [torch.linalg.vector_norm(gradient.detach()).to(known[0].device) for gradient in known]
        share = (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        for gradient in known:
            gradient.detach().mul_(share.to(gradient.device))


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    again: Callable[[], Any],
    loss: Tensor,
) -> None:
    """Step the working copies with the gradients of the step that was measured.

    Args:
        optimizer: the copy.
        parameters: working copies by qualified name.
        gradients: their gradients; None where there is none.
        again: evaluates loss and gradients anew, for optimizers that search along a line (LBFGS).
        loss: the loss that was measured, which the first evaluation returns.
    """
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    first = True

    def closure() -> Any:
        nonlocal first
        if first:
            first = False
            return loss.detach()
        return again()

    required = inspect.signature(type(optimizer).step).parameters.get("closure")
    try:
        if required is not None and required.default is required.empty:
            optimizer.step(closure)  # type: ignore[call-overload]
        else:
            optimizer.step()
    finally:
        for parameter in parameters.values():
            parameter.grad = None
