"""Remedies of single operations in a forward pass: what they let through, and what is called in their place.

NOTE [Code that cannot be edited]
What a forward pass does between its modules is code, and a trial has no other code. But every function of
PyTorch that is called in it is seen by a `TorchFunctionMode`, which can call something else in its place.
So `sign` becomes its straight-through estimate, `detach` the identity, `log(x)` `log(x.clamp(min=1e-8))`:
what the recommended action says, done in every place of that kind at once.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable, Mapping, Sequence
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


def in_loss(substitutes: dict[str, Substitute], *, with_gradient: bool = False) -> Callable[[Any], Any]:
    """Return the change that has a loss run as `substituted` does; None stays None."""

    def change(loss_fn: Any) -> Any:
        if loss_fn is None:
            return None
        if not isinstance(loss_fn, nn.Module):
            return substituted(loss_fn, substitutes, with_gradient=with_gradient)
        changed: Any = copy.copy(loss_fn)  # the user's own may be shared: see `trials/copies.py`
        changed.forward = substituted(loss_fn.forward, substitutes, with_gradient=with_gradient)
        return changed

    return change


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
        on_loss=in_loss(dict.fromkeys(names, estimate)),
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
        on_loss=in_loss({}, with_gradient=True),
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


def with_inputs(function: Callable[..., Any], change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a function whose floating-point arguments are changed first, those in lists and dicts too."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        def changed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: changed(one) for key, one in value.items()}
            if type(value) in (tuple, list):
                return type(value)(map(changed, value))
            return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return function(*map(changed, args), **{key: changed(value) for key, value in kwargs.items()})

    return run


def wider_precision(dtype: torch.dtype = torch.float32) -> Remedy:
    """Return the remedy that runs model and loss in another precision, casts to a lower one included.

    Args:
        dtype: float32, or float64, whose smallest number is 1e-308 where float32 has 1e-38.
    """
    casts: dict[str, Substitute] = dict.fromkeys(("half", "bfloat16", "float", "to", "type"), _kept_in(dtype))

    def widened(value: Tensor) -> Tensor:
        return value.to(dtype)

    def change(model: Any) -> None:
        model.forward = with_inputs(substituted(model.to(dtype).forward, casts), widened)

    def on_loss(loss_fn: Any) -> Any:
        changed = in_loss(casts)(loss_fn)
        if isinstance(changed, nn.Module):
            changed.forward = with_inputs(changed.forward, widened)  # type: ignore[method-assign]
            return changed
        return None if changed is None else with_inputs(changed, widened)

    told = str(dtype).removeprefix("torch.")
    return Remedy(
        name=told,
        words=f"Model and loss in {told}.",
        code=f"model.to(torch.{told})  # and its inputs and targets, without casts to less in forward()",
        apply=on_model(change),
        on_loss=on_loss,
    )


def _kept_in(dtype: torch.dtype) -> Substitute:
    """Return what stands for a cast, and casts to no lower precision than a dtype."""

    def kept(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = function(x, *args, **kwargs)
        lower = isinstance(y, Tensor) and y.is_floating_point() and y.element_size() < dtype.itemsize
        return x.to(dtype) if lower and x.is_floating_point() else y

    return kept


def inputs_with_gradient() -> Remedy:
    """Return the remedy that has the floating-point inputs of the model, and what frozen embeddings give,
    require a gradient.

    Reentrant checkpointing gives no gradient to a stage none of whose inputs requires one.
    """

    def opened(function: Any, *args: Any, **kwargs: Any) -> Any:
        y = function(*args, **kwargs)
        return y if y.requires_grad else y.requires_grad_()

    def change(model: nn.Module) -> None:
        module: Any = model
        forward = with_inputs(module.forward, lambda x: x.detach().requires_grad_())
        module.forward = substituted(forward, {"embedding": opened})

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


def flattened(modules: Sequence[str], functions: Sequence[str], factor: float) -> Remedy:
    """Return the remedy that divides what enters activations, so that they are not at their ends.

    Args:
        modules: the activation modules.
        functions: those that the forward pass calls as functions, such as `sigmoid`.
        factor: what is divided by, such as the rms of what enters.
    """

    def divided(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return function(x / factor, *args, **kwargs)

    def change(model: nn.Module) -> None:
        for name in modules:
            module: Any = part(model, name)
            module.forward = with_inputs(module.forward, lambda x: x / factor)
        if functions:
            whole: Any = model
            whole.forward = substituted(whole.forward, dict.fromkeys(functions, divided))

    names = [*modules, *functions]
    return Remedy(
        name=f"what enters {listed(names)} / {factor:.3g}",
        words=f"What enters {listed(names)} divided by {factor:.3g}.",
        code=f"x = x / {factor:.3g}  # before {listed(names)}",
        apply=on_model(change),
    )


def left_out(names: Sequence[str]) -> Remedy:
    """Return the remedy that leaves out functions that a forward pass or a loss calls: a last sigmoid.

    Args:
        names: of the functions, such as `sigmoid`; they are left out wherever they are called.
    """

    def as_it_is(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    variants = {variant: as_it_is for name in names for variant in (name, f"{name}_")}
    return Remedy(
        name=f"without {listed(names)}",
        words=f"The forward pass without {listed(names)}.",
        code="\n".join(f"x  # for torch.{name}(x)" for name in names),
        apply=in_model("", variants),
        on_loss=in_loss(variants),
    )


def loss_of_logits() -> Remedy:
    """Return the remedy that takes the binary cross entropy of logits, not of probabilities."""

    def of_logits(function: Any, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        return F.binary_cross_entropy_with_logits(x, y, *args, **kwargs)

    return Remedy(
        name="the loss of logits",
        words="The binary cross entropy of logits in the place of that of probabilities.",
        code="F.binary_cross_entropy_with_logits(x, y)  # for F.binary_cross_entropy(torch.sigmoid(x), y)",
        apply=in_model("", {"binary_cross_entropy": of_logits}),
        on_loss=in_loss({"binary_cross_entropy": of_logits}),
    )


def bounded_exponents(bound: float = 2.0) -> Remedy:
    """Return the remedy that bounds softly what enters every exponential: exp(b tanh(x / b)).

    As for the log-scales of a flow: Dinh et al., "Density estimation using Real NVP", 2017.

    Args:
        bound: b; x itself stays nearly what it is where it is much smaller.
    """

    def softly(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return function(bound * torch.tanh(x / bound), *args, **kwargs)

    return Remedy(
        name=f"exponents within ± {bound:g}",
        words=f"What enters every exponential bounded softly by {bound:g}.",
        code=f"s = {bound:g} * torch.tanh(s / {bound:g})  # before torch.exp(s)",
        apply=in_model("", dict.fromkeys(("exp", "exp_"), softly)),
        on_loss=in_loss(dict.fromkeys(("exp", "exp_"), softly)),
    )


def smooth(names: Sequence[str] = ("sigmoid", "tanh"), *, new: Callable[[Tensor], Tensor] = F.gelu) -> Remedy:
    """Return the remedy that calls another activation where a forward pass calls one as a function.

    Args:
        names: of the functions, such as `relu`.
        new: what is called in their place.
    """
    told = getattr(new, "__name__", "another function")
    variants = {variant: lambda f, x, *a, **k: new(x) for name in names for variant in (name, f"{name}_")}
    return Remedy(
        name=f"F.{told} for {listed(names)}",
        words=f"F.{told} where the forward pass calls {listed(names)}.",
        code="\n".join(f"F.{told}(x)  # for torch.{name}(x)" for name in names),
        apply=in_model("", variants),
        on_loss=in_loss(variants),
    )
