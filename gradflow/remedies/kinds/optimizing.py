"""Remedies of the training: rate, warm-up, clipping, epsilon, weight decay, and the scale of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.errors import RemedyError
from gradflow.functional.torch_private import clear_step_hooks, step_hooks
from gradflow.remedies.remedy import Remedy, on_optimizer
from gradflow.remedies.surgery import listed


def rate_times(factor: float) -> Remedy:
    """Return the remedy that multiplies the learning rates.

    >>> from torch import nn
    >>> weight = nn.Parameter(torch.ones(2))
    >>> remedy = rate_times(0.1)
    >>> _, changed = remedy.apply(nn.Identity(), torch.optim.SGD([weight], lr=0.5))
    >>> remedy.name, changed.param_groups[0]["lr"]
    ('learning rate / 10', 0.05)
    """
    told = f"learning rate / {1 / factor:.4g}" if factor < 1 else f"learning rate × {factor:.4g}"

    def change(optimizer: Optimizer) -> None:
        if not any("lr" in group for group in optimizer.param_groups):
            raise RemedyError(f"{type(optimizer).__name__} has no learning rate.")
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = group["lr"] * factor

    return Remedy(
        name=told,
        words=f"The learning rate, times {factor:.3g}.",
        code=f'for group in optimizer.param_groups:\n    group["lr"] *= {factor:.3g}',
        apply=on_optimizer(change),
    )


def own_rate(names: Sequence[str], factor: float) -> Remedy:
    """Return the remedy that gives some parameters a learning rate of their own, in a group of their own.

    Args:
        names: qualified names of the parameters.
        factor: what the rate of their group is multiplied by.
    """

    def apply(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        held = dict(model.named_parameters())
        for name in names:
            parameter = held.get(name)
            group = next(
                (g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None
            )
            if group is None or "lr" not in group:
                raise RemedyError(f"the optimizer holds no parameter {name!r} with a learning rate.")
            group["params"] = [p for p in group["params"] if p is not parameter]
            optimizer.param_groups.append({**group, "params": [parameter], "lr": group["lr"] * factor})
        return model, optimizer

    return Remedy(
        name=f"learning rate of {listed(names)} × {factor:g}",
        words=f"A learning rate of their own for {listed(names)}, {factor:g} times that of the others.",
        code=f'optimizer.add_param_group({{"params": [{", ".join(f"model.{n}" for n in names)}], '
        f'"lr": {factor:g} * rate}})',
        apply=apply,
    )


def steady_rates() -> Remedy:
    """Return the remedy that leaves the learning rates as they are: without hooks on the optimizer's step."""

    def change(optimizer: Optimizer) -> None:
        if not step_hooks(optimizer):
            raise RemedyError("the optimizer has no hooks on its step.")
        clear_step_hooks(optimizer)

    return Remedy(
        name="learning rates that stay",
        words="No hook on the optimizer's step that changes its rates.",
        code="handle.remove()  # of the hook that changes group['lr'] at every step",
        apply=on_optimizer(change),
    )


def all_held() -> Remedy:
    """Return the remedy that has the optimizer hold all trainable parameters of the model."""

    def apply(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        left = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
        if not left:
            raise RemedyError("the optimizer holds all parameters of the model.")
        optimizer.add_param_group({**optimizer.param_groups[0], "params": left})
        return model, optimizer

    return Remedy(
        name="an optimizer of all parameters",
        words="The parameters that the optimizer has left out, in a group like its first.",
        code="optimizer = type(optimizer)(model.parameters(), **optimizer.defaults)",
        apply=apply,
    )


def plain_adam(factor: float = 1.0) -> Remedy:
    """Return the remedy that lets PyTorch's Adam step instead of an optimizer of one's own.

    Args:
        factor: what the rates are multiplied by.
    """

    def change(optimizer: Optimizer) -> Optimizer:
        groups = optimizer.param_groups
        return torch.optim.Adam([{"params": g["params"], "lr": g.get("lr", 1e-3) * factor} for g in groups])

    rate = "rate" if factor == 1 else f"{factor:g} * rate"
    return Remedy(
        name="torch.optim.Adam" + ("" if factor == 1 else f", learning rate / {1 / factor:.4g}"),
        words="Adam as PyTorch has it, in the place of the optimizer.",
        code=f"optimizer = torch.optim.Adam(model.parameters(), lr={rate})",
        apply=on_optimizer(change),
    )


class Wrapped:
    """An optimizer that does something before another one steps.

    Args:
        inner: the one that steps.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the one that steps."""
        return self.inner.param_groups

    def step(self) -> None:
        """Step, after what is to be done before."""
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.inner.zero_grad(set_to_none)

    def gradients(self) -> list[Tensor]:
        """Return the gradients that are there."""
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]


class Clipped(Wrapped):
    """Clips the gradients of all parameters together to a norm before each step."""

    def __init__(self, inner: Any, norm: float) -> None:
        super().__init__(inner)
        self.norm = norm

    def step(self) -> None:
        """Clip, then step."""
        held = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(held, self.norm)
        self.inner.step()


class WarmedUp(Wrapped):
    """Raises the learning rates from nearly zero to their values over the first steps."""

    def __init__(self, inner: Any, steps: int) -> None:
        super().__init__(inner)
        self.steps, self.done = steps, 0

    def step(self) -> None:
        """Step with a part of the rates."""
        self.done += 1
        share = min(1.0, self.done / self.steps)
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate * share
            self.inner.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


class Scaled(Wrapped):
    """Multiplies the gradients by a constant, as a loss times that constant does."""

    def __init__(self, inner: Any, factor: float) -> None:
        super().__init__(inner)
        self.factor = factor

    def step(self) -> None:
        """Scale, then step."""
        for gradient in self.gradients():
            gradient.mul_(self.factor)
        self.inner.step()


def clipped(norm: float = 1.0) -> Remedy:
    """Return the remedy that clips the gradient of all parameters to a norm before each step."""
    return Remedy(
        name=f"clip_grad_norm_ to {norm:g}",
        words=f"Gradients clipped to a norm of {norm:g} before each step.",
        code=f"torch.nn.utils.clip_grad_norm_(model.parameters(), {norm:g})  # before optimizer.step()",
        apply=on_optimizer(lambda optimizer: Clipped(optimizer, norm)),  # type: ignore[arg-type, return-value]
    )


def warmed_up(steps: int = 20) -> Remedy:
    """Return the remedy that raises the learning rate over the first steps."""
    return Remedy(
        name=f"warm-up over {steps} steps",
        words=f"The learning rate rises to its value over the first {steps} steps.",
        code="warm_up = torch.optim.lr_scheduler.LambdaLR(\n"
        f"    optimizer, lambda step: min(1.0, (step + 1) / {steps}))  # warm_up.step() after each step",
        apply=on_optimizer(lambda optimizer: WarmedUp(optimizer, steps)),  # type: ignore[arg-type, return-value]
    )


def loss_times(factor: float) -> Remedy:
    """Return the remedy that multiplies the loss, or what comes to the same, the gradients."""
    return Remedy(
        name=f"loss × {factor:.3g}",
        words=f"The loss, times {factor:.3g}.",
        code=f"loss = {factor:.3g} * loss",
        apply=on_optimizer(lambda optimizer: Scaled(optimizer, factor)),  # type: ignore[arg-type, return-value]
    )


def epsilon(value: float) -> Remedy:
    """Return the remedy that gives Adam and its kin another epsilon."""

    def change(optimizer: Optimizer) -> None:
        groups = [group for group in optimizer.param_groups if "eps" in group]
        if not groups:
            raise RemedyError(f"{type(optimizer).__name__} has no epsilon.")
        for group in groups:
            group["eps"] = value

    return Remedy(
        name=f"eps={value:g} in the optimizer",
        words=f"An epsilon of {value:g} in the optimizer.",
        code=f'for group in optimizer.param_groups:\n    group["eps"] = {value:g}',
        apply=on_optimizer(change),
    )


def no_decay() -> Remedy:
    """Return the remedy that spares biases and gains of norm layers, which have one axis, weight decay."""

    def change(optimizer: Optimizer) -> None:
        if not any(group.get("weight_decay") for group in optimizer.param_groups):
            raise RemedyError("no parameter has a weight decay.")
        for group in list(optimizer.param_groups):
            spared = [p for p in group["params"] if p.dim() < 2]
            kept = [p for p in group["params"] if p.dim() >= 2]
            if group.get("weight_decay") and spared and kept:
                group["params"] = kept
                optimizer.param_groups.append({**group, "params": spared, "weight_decay": 0.0})
            elif spared:
                group["weight_decay"] = 0.0

    return Remedy(
        name="no weight decay for norms and biases",
        words="No weight decay for parameters of one axis: gains of norm layers, and biases.",
        code="optimizer = type(optimizer)(\n"
        '    [{"params": [p for p in model.parameters() if p.dim() >= 2]},\n'
        '     {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],\n'
        "    **optimizer.defaults)",
        apply=on_optimizer(change),
    )
