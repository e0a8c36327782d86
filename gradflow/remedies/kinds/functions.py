"""Remedies of single operations in a forward pass: what they let through, and what is called in their place.

NOTE [Code that cannot be edited]
What a forward pass does between its modules is code, and a trial has no other code. But every function of
PyTorch that is called in it is seen by a `TorchFunctionMode`, which can call something else in its place.
So `sign` becomes its straight-through estimate, `detach` the identity, `log(x)` `log(x.clamp(min=1e-8))`:
what the recommended action says, done in every place of that kind at once.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from gradflow.remedies.remedy import Remedy, on_model
from gradflow.remedies.surgery import listed, part

Substitute = Callable[..., Any]  # (the function itself, *its arguments) → what stands for its result


class _Substituting(TorchFunctionMode):
    """Calls other functions in the place of some, by their last names.

    Calls that are made within one, and those of gradflow's own probes, are not looked at.
    """

    def __init__(self, substitutes: dict[str, Substitute]) -> None:
        super().__init__()
        self._substitutes = substitutes

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property, such as `.data`
            name = f"{(resolve_name(func) or '').split('.')[-2:][0]}.get"
        substitute = self._substitutes.get(name)
        if substitute is None or _is_ours(sys._getframe(1)):
            return func(*args, **(kwargs or {}))
        return substitute(func, *args, **(kwargs or {}))


def _is_ours(frame: types.FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith("gradflow.") and not name.startswith("gradflow.remedies.")


class _WithGradient(_Substituting):
    """Runs every operation with gradients on as well, whatever context it stands in."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_ours(sys._getframe(1)):
            return func(*args, **(kwargs or {}))
        with torch.enable_grad():
            return super().__torch_function__(func, kinds, args, kwargs)


def substituted(
    function: Callable[..., Any], substitutes: dict[str, Substitute], *, with_gradient: bool = False
) -> Callable[..., Any]:
    """Return a function that runs with other operations in the place of some.

    Args:
        function: a forward pass or a loss.
        substitutes: by name of an operation, what is called in its place, with the operation first.
        with_gradient: whether gradients are on throughout, `no_grad` or not.

    >>> half = substituted(lambda x: torch.relu(x) + 1, {"relu": lambda relu, x: relu(x) / 2})
    >>> half(torch.tensor([2.0]))
    tensor([2.])
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with (_WithGradient if with_gradient else _Substituting)(substitutes):
            return function(*args, **kwargs)

    return run


def in_model(name: str, substitutes: dict[str, Substitute], *, with_gradient: bool = False) -> Any:
    """Return the change that has the forward pass of a module run as `substituted` does."""

    def change(model: nn.Module) -> None:
        module: Any = part(model, name)
        module.forward = substituted(module.forward, substitutes, with_gradient=with_gradient)

    return on_model(change)


def straight_through() -> Remedy:
    """Return the remedy that lets the gradient through sign, round, floor and the like as it is.

    Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013.
    """

    def estimate(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = function(x, *args, **kwargs)
        if not (isinstance(x, Tensor) and x.requires_grad and isinstance(y, Tensor)):
            return y
        return x + (y - x).detach() if y.is_floating_point() else y

    names = ("sign", "sgn", "round", "floor", "ceil", "trunc", "heaviside", "sign_", "round_", "floor_")
    return Remedy(
        name="straight-through estimates",
        words="sign, round, floor and the like let the gradient through as it is.",
        code="y = x + (torch.round(x) - x).detach()  # for torch.round(x); sign, floor likewise",
        apply=in_model("", dict.fromkeys(names, estimate)),
    )


def attached(name: str = "") -> Remedy:
    """Return the remedy that ignores detach, .data and no_grad in the forward pass of a module.

    Args:
        name: of the module; "" is the whole model.
    """

    def as_it_is(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    return Remedy(
        name=f"without detach in {name or 'model'}",
        words=f"detach(), .data and no_grad() are ignored in {name or 'the model'}.",
        code="# remove detach(), .data and torch.no_grad() from forward()",
        apply=in_model(name, dict.fromkeys(("detach", "detach_", "data.get"), as_it_is), with_gradient=True),
    )


def reparametrised() -> Remedy:
    """Return the remedy that draws normal numbers as mean + std × noise, through which a gradient flows.

    Kingma and Welling, "Auto-encoding variational Bayes", 2014.
    """

    def drawn(function: Any, mean: Any, std: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(mean, Tensor) and isinstance(std, Tensor)):
            return function(mean, *(() if std is None else (std,)), *args, **kwargs)
        return mean + std * torch.randn_like(mean)

    return Remedy(
        name="rsample for sample",
        words="Normal numbers drawn as mean + std × noise, so that mean and std get a gradient.",
        code="z = distribution.rsample()  # for distribution.sample()",
        apply=in_model("", {"normal": drawn}, with_gradient=True),
    )


def _with_inputs(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Have a model's floating-point inputs changed before each forward pass."""
    forward = model.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return forward(*map(changed, args), **{key: changed(value) for key, value in kwargs.items()})

    model.forward = run


def wider_precision() -> Remedy:
    """Return the remedy that runs the whole model in float32, casts to half precision included."""

    def kept(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = function(x, *args, **kwargs)
        return x if isinstance(y, Tensor) and y.dtype in (torch.float16, torch.bfloat16) else y

    def change(model: Any) -> None:
        _with_inputs(model.float(), Tensor.float)
        model.forward = substituted(model.forward, dict.fromkeys(("half", "bfloat16", "to", "type"), kept))

    return Remedy(
        name="float32",
        words="The whole model in float32.",
        code="model.float()  # and its inputs, without .half() in forward()",
        apply=on_model(change),
    )


def inputs_with_gradient() -> Remedy:
    """Return the remedy that has the floating-point inputs of the model, and what frozen embeddings give,
    require a gradient.

    Reentrant checkpointing gives no gradient to a stage none of whose inputs requires one.
    """

    def opened(function: Any, *args: Any, **kwargs: Any) -> Any:
        y = function(*args, **kwargs)
        return y if y.requires_grad else y.requires_grad_()

    def change(model: nn.Module) -> None:
        _with_inputs(model, lambda x: x.detach().requires_grad_())
        module: Any = model
        module.forward = substituted(module.forward, {"embedding": opened})

    return Remedy(
        name="inputs that require a gradient",
        words="The inputs of the model require a gradient, so that checkpointed stages get theirs.",
        code="checkpoint(stage, x, use_reentrant=False)",
        apply=on_model(change),
    )


def cooled(name: str, factor: float) -> Remedy:
    """Return the remedy that divides what enters every softmax of a module, attention included.

    Args:
        name: of the module; "" is the whole model.
        factor: what the scores are divided by: a temperature.
    """

    def divided(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return function(x / factor, *args, **kwargs)

    names = ("softmax", "log_softmax", "scaled_dot_product_attention")
    return Remedy(
        name=f"scores of {name or 'model'} / {factor:.3g}",
        words=f"What enters the softmax of {name or 'the model'}, divided by {factor:.3g}.",
        code=f"torch.softmax(scores / {factor:.3g}, -1)  # in {name or 'the model'}",
        apply=in_model(name, dict.fromkeys(names, divided)),
    )


def smooth(names: Sequence[str] = ("sigmoid", "tanh"), *, new: Callable[[Tensor], Tensor] = F.gelu) -> Remedy:
    """Return the remedy that calls another activation where a forward pass calls one as a function.

    Args:
        names: of the functions, such as `relu`.
        new: what is called in their place.
    """
    told = getattr(new, "__name__", "another function")
    return Remedy(
        name=f"F.{told} for {listed(names)}",
        words=f"F.{told} where the forward pass calls {listed(names)}.",
        code="\n".join(f"F.{told}(x)  # for torch.{name}(x)" for name in names),
        apply=in_model(
            "", {variant: lambda f, x, *a, **k: new(x) for name in names for variant in (name, f"{name}_")}
        ),
    )
