"""Remedies that keep an operation inside its domain: what a clamp or a small constant before it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradflow.remedies.kinds.functions import Substitute, in_loss, in_model
from gradflow.remedies.remedy import Remedy

_SMALL = 1e-8


def _clamped(low: float | None = None, high: float | None = None) -> Substitute:
    def call(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return function(x.clamp(low, high) if isinstance(x, Tensor) else x, *args, **kwargs)

    return call


def _root(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return function(x.clamp(min=0.0) + _SMALL, *args, **kwargs)


def _away_from_zero(y: Tensor) -> Tensor:
    return torch.where(y.abs() < _SMALL, torch.where(y < 0, -_SMALL, _SMALL).to(y.dtype), y)


def _quotient(function: Any, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(y, Tensor) and not y.is_floating_point():
        y = y.clamp(min=1)  # a number of members
    elif isinstance(y, Tensor):
        y = _away_from_zero(y)
    return function(x, y, *args, **kwargs)


def _inverse(function: Any, y: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return function(_away_from_zero(y), x)


def _deviation(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if x.numel() < 2:
        return function(x, **{k: v for k, v in kwargs.items() if k in ("dim", "keepdim")}, correction=0)
    return (x.var(*args, **kwargs) + _SMALL).sqrt()


def _exponential(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return function(x.clamp(max=10.0), *args, **kwargs)


def _length(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return function(torch.where(x == 0, torch.full_like(x, _SMALL), x), *args, **kwargs)


def _power(function: Any, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, Tensor) and not isinstance(y, Tensor) and y < 1:
        return _root(function, x, y)
    return function(x, y, *args, **kwargs)


def _filled_rows(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return function(x.clamp(min=-1e4) if x.is_floating_point() else x, *args, **kwargs)


def _masked(function: Any, x: Any, mask: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return function(x, mask, -1e4 if isinstance(value, float) and value < -1e4 else value, *args, **kwargs)


def _attention(function: Any, q: Any, k: Any, v: Any, mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    mask = kwargs.pop("attn_mask", mask)
    if isinstance(mask, Tensor):
        bare = (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -1e4)
            if mask.dtype is torch.bool
            else mask
        )
        mask = bare.clamp(min=-1e4)
    return function(q, k, v, mask, *args, **kwargs)


def _finite(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    y = function(x, *args, **kwargs)
    # What is NaN before is no mean of nothing, and is not to be hidden here.
    given = [a for a in (x, *args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
    hidden = isinstance(y, Tensor) and y.is_floating_point() and all(a.isfinite().all() for a in given)
    return torch.nan_to_num(y) if hidden else y


def _product(function: Any, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
    """The product, 0 where a factor that is given, and not computed from parameters, is not finite."""
    factors = [
        torch.nan_to_num(f, 0.0, 0.0, 0.0)
        if isinstance(f, Tensor) and f.is_floating_point() and not f.requires_grad
        else f
        for f in (x, y)
    ]
    return function(*factors, *args, **kwargs)


def _scaled_exponential(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return function(x / max(1, x.shape[-1]), *args, **kwargs)


_GUARDS: dict[str, tuple[Substitute, str]] = {
    "sqrt": (_root, "torch.sqrt(x.clamp(min=0) + 1e-8)"),
    "rsqrt": (_root, "torch.rsqrt(x.clamp(min=0) + 1e-8)"),
    "log": (_clamped(low=_SMALL), "torch.log(x.clamp(min=1e-8))"),
    "log1p": (_clamped(low=_SMALL - 1), "torch.log1p(x.clamp(min=1e-8 - 1))"),
    "log2": (_clamped(low=_SMALL), "torch.log2(x.clamp(min=1e-8))"),
    "exp": (_exponential, "torch.exp(x.clamp(max=10))"),
    "expm1": (_exponential, "torch.expm1(x.clamp(max=10))"),
    "div": (_quotient, "x / (y + 1e-8)"),
    "true_divide": (_quotient, "x / (y + 1e-8)"),
    "__truediv__": (_quotient, "x / (y + 1e-8)"),
    "__rdiv__": (_inverse, "x / (y + 1e-8)"),
    "reciprocal": (_length, "1 / (x + 1e-8)"),
    "norm": (_length, "torch.sqrt((x ** 2).sum() + 1e-8)"),
    "vector_norm": (_length, "torch.sqrt((x ** 2).sum() + 1e-8)"),
    "cdist": (_finite, "(x[:, None] - y).square().sum(-1).add(1e-8).sqrt()"),
    "std": (_deviation, "x.var(...).add(1e-8).sqrt()"),
    "pow": (_power, "(x + 1e-8) ** p"),
    "__pow__": (_power, "(x + 1e-8) ** p"),
    "acos": (_clamped(-1 + 1e-7, 1 - 1e-7), "torch.acos(x.clamp(-1 + 1e-7, 1 - 1e-7))"),
    "asin": (_clamped(-1 + 1e-7, 1 - 1e-7), "torch.asin(x.clamp(-1 + 1e-7, 1 - 1e-7))"),
    "atanh": (_clamped(-1 + 1e-7, 1 - 1e-7), "torch.atanh(x.clamp(-1 + 1e-7, 1 - 1e-7))"),
    "softmax": (_filled_rows, "torch.softmax(scores.clamp(min=-1e4), -1)"),
    "log_softmax": (_filled_rows, "torch.log_softmax(scores.clamp(min=-1e4), -1)"),
    "masked_fill": (_masked, "scores.masked_fill(mask, -1e4)"),
    "masked_fill_": (_masked, "scores.masked_fill_(mask, -1e4)"),
    "scaled_dot_product_attention": (_attention, "scaled_dot_product_attention(q, k, v, (~mask) * -1e4)"),
    "mean": (_finite, "x.sum() / max(x.numel(), 1)"),
    "cross_entropy": (_finite, "F.cross_entropy(scores, y, reduction='sum') / max(number, 1)"),
    "nll_loss": (_finite, "F.nll_loss(scores, y, reduction='sum') / max(number, 1)"),
    "mse_loss": (_finite, "F.mse_loss(x, y, reduction='sum') / max(number, 1)"),
    "l1_loss": (_finite, "F.l1_loss(x, y, reduction='sum') / max(number, 1)"),
    "smooth_l1_loss": (_finite, "F.smooth_l1_loss(x, y, reduction='sum') / max(number, 1)"),
    "binary_cross_entropy": (_finite, "F.binary_cross_entropy(x, y, reduction='sum') / max(number, 1)"),
    "mul": (_product, "torch.where(mask, x, 0)  # for x * mask"),
    "__mul__": (_product, "torch.where(mask, x, 0)  # for x * mask"),
    "__rmul__": (_product, "torch.where(mask, x, 0)  # for x * mask"),
    "matrix_exp": (_scaled_exponential, "torch.matrix_exp(x / x.shape[-1])"),
    "kl_div": (_finite, "F.kl_div(input, target.clamp(min=1e-8))"),
}
_FAMILIES = {
    "sqrt": ("sqrt", "rsqrt"),
    "log": ("log", "log1p", "log2"),
    "exp": ("exp", "expm1"),
    "div": ("div", "true_divide", "__truediv__", "__rdiv__", "reciprocal"),
    "norm": ("norm", "vector_norm", "cdist"),
    "pow": ("pow", "__pow__"),
    "acos": ("acos", "asin"),
    "mul": ("mul", "__mul__", "__rmul__"),
    "softmax": ("softmax", "log_softmax", "masked_fill", "masked_fill_", "scaled_dot_product_attention"),
    "mean": (
        "mean",
        "cross_entropy",
        "nll_loss",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "binary_cross_entropy",
    ),
}


def guarded(op: str) -> Remedy:
    """Return the remedy that keeps an operation inside its domain, in the model and in the loss.

    Args:
        op: its name: `sqrt`, `log`, `exp`, `div`, `norm`, `pow`, `acos`, `softmax`, `mean`, ...

    Raises:
        KeyError: if how to guard it is not known.
    """
    family = next((names for names in _FAMILIES.values() if op in names), (op,))
    substitutes = {name: _GUARDS[name][0] for name in family}
    return Remedy(
        name=f"{op} inside its domain",
        words=f"The arguments of {op} kept inside its domain, in the model and in the loss.",
        code=_GUARDS[op][1],
        apply=in_model("", substitutes),
        on_loss=in_loss(substitutes),
    )


def divisors_bounded(share: float = 0.1) -> Remedy:
    """Return the remedy that keeps divisors away from zero at the scale of the data.

    Where a tensor is divided by another one, element by element, what is below a share of that one's mean
    size counts as that much; its sign stays.

    Args:
        share: of the mean of the divisor's absolute values.
    """

    def bounded(function: Any, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel() > 1:
            least = (share * y.detach().abs().mean()).to(y.dtype)
            y = torch.where(y.abs() < least, torch.where(y < 0, -least, least), y)
        return function(x, y, *args, **kwargs)

    substitutes: dict[str, Substitute] = dict.fromkeys(("div", "true_divide", "__truediv__", "div_"), bounded)
    return Remedy(
        name=f"divisors of at least {share:g} of their mean",
        words=f"What divides other tensors kept above {share:g} of its mean absolute value.",
        code=f"x / y.abs().clamp_min({share:g} * y.abs().mean())  # times y.sign(), where that matters",
        apply=in_model("", substitutes),
        on_loss=in_loss(substitutes),
    )


def can_guard(op: str) -> bool:
    """Whether `guarded` knows an operation."""
    return op in _GUARDS


def guard_of(op: str) -> str:
    """Return the operation that guards what a birth of NaN tells, such as `sqrt` for `SqrtBackward0`; "" if
    none is known.

    >>> guard_of("SqrtBackward0"), guard_of("log"), guard_of("ctc_loss")
    ('sqrt', 'log', '')
    """
    told = op.lower()
    if told in _GUARDS:
        return told
    return next((name for name in sorted(_GUARDS, key=len, reverse=True) if name in told), "")
