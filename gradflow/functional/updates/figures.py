"""What a step did to parameters, in numbers: the values before it held against those after it.

NOTE [Some of the entries]
A root mean square or a share over ten thousand entries is known to a percent. So of a larger parameter some
entries stand for all, evenly spaced, with a stride that shares no factor with the length of its last axis:
one that did would always pick the same columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.updates.moments import Moments, moments
from gradflow.records import Floats

MOST = 2**14  # entries of a parameter that are looked at


@attrs.frozen(kw_only=True)
class UpdateFigures:
    """What one step did to one parameter; see `gradflow.records.UpdateRecord` for each number."""

    held: bool
    rate: float
    epsilon: float
    weight_rms: float
    rms: float
    gradient_rms: float
    slope: float
    unchanged: float
    second_moment: float
    under_epsilon: float
    age: float
    finite: bool


def sampled(tensor: Tensor, most: int | None = MOST) -> Tensor:
    """Return some of a tensor's entries as a vector, always the same ones; see NOTE [Some of the entries].

    Args:
        tensor: of any shape.
        most: how many entries, about; None takes all.

    >>> sampled(torch.arange(6.0).view(2, 3), most=3)
    tensor([0., 2., 4.])
    """
    flat = (tensor if tensor.layout is torch.strided else tensor.to_dense()).detach().reshape(-1)
    if most is None or flat.numel() <= most:
        return flat
    stride, last = flat.numel() // most, max(int(tensor.shape[-1]) if tensor.dim() else 1, 1)
    while math.gcd(stride, last) > 1:
        stride += 1
    return flat[::stride]


def remembered(parameters: Mapping[str, Tensor], most: int | None = MOST) -> dict[str, Tensor]:
    """Return copies of the entries of parameters that `update_figures` will look at, taken before a step.

    Args:
        parameters: by name.
        most: how many entries of each, about; None takes all.
    """
    return {name: sampled(p, most).clone() for name, p in parameters.items()}


def ages(optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how many steps the optimizers' states of parameters have seen: 0 where there is no state yet.

    Args:
        optimizers: which hold the very tensors of `parameters`.
        parameters: by name.
    """
    found = {}
    for name, (optimizer, group) in _holders(optimizers, parameters).items():
        state = _state(optimizer, parameters[name])
        found[name] = moments(state, group, parameters[name].dtype).age if state else 0.0
    return found


def update_figures(
    optimizers: Iterable[torch.optim.Optimizer],
    before: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    *,
    aged: Mapping[str, float] | None = None,
    most: int | None = MOST,
) -> dict[str, UpdateFigures]:
    """Return what a step did to each parameter; a pure function of what was and what is.

    Let u = p_after − p_before, in the precision of the parameter. What is read off the optimizer's state
    (v̂, ε) is as the step used it; weight decay, where it is added to the gradient, is left out of g.

    Args:
        optimizers: which have made the step, and hold the very tensors of `parameters`.
        before: what `remembered` returned before the step, with the same `most`.
        parameters: as they are after the step, by name.
        gradients: what the optimizers were handed: averaged, unscaled and clipped; None where there was none.
        aged: what `ages` returned before the step; None reckons that every state has grown by one step.
        most: how many entries of each are looked at, about; None looks at all.

    Returns:
        The figures by name, of all that are in `before`.

    >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> sgd, was = torch.optim.SGD([p], lr=0.1), remembered({"p": p})
    >>> p.grad = torch.tensor([1.0, 1.0])
    >>> sgd.step()
    >>> found = update_figures([sgd], was, {"p": p}, {"p": p.grad})["p"]
    >>> round(found.rms, 6), round(found.slope, 6)
    (0.1, -0.2)
    """
    holders = _holders(optimizers, parameters)
    found = {}
    for name, was in before.items():
        parameter, held = parameters[name], holders.get(name)
        known, rate, age = Moments(None, math.nan, math.nan), math.nan, math.nan
        if held is not None:
            state = _state(held[0], parameter)
            known = moments(state, held[1], parameter.dtype)
            rate = float(held[1].get("lr", math.nan))
            age = known.age - 1 if aged is None else aged.get(name, math.nan)
        second = None if known.second is None or known.second.shape != parameter.shape else known.second
        found[name] = UpdateFigures(
            held=held is not None, rate=rate, epsilon=known.epsilon, age=age,
            **_numbers(
                _wide(was), _wide(sampled(parameter, most)), _entries(gradients.get(name), most),
                _entries(second, most), epsilon=known.epsilon, size=parameter.numel(),
            ),
        )  # fmt: skip
    return found


def _numbers(
    was: Floats, now: Floats, g: Floats | None, v: Floats | None, *, epsilon: float, size: int
) -> dict[str, Any]:
    """Return the numbers of one parameter from its entries, those of its gradient, and of its v̂."""
    with np.errstate(all="ignore"):
        u = now - was
        moving = None if g is None else g != 0
        found = {
            "weight_rms": _rms(was),
            "rms": _rms(u),
            "finite": bool(np.isfinite(now).all()),
            "gradient_rms": math.nan if g is None else _rms(g),
            "slope": math.nan if g is None else float(g @ u) * size / max(len(u), 1),
            "unchanged": _share(u == 0, moving),
            "second_moment": math.nan,
            "under_epsilon": math.nan,
        }
        if v is not None and g is not None:
            found["second_moment"] = float(v.mean() / np.square(g).mean()) if g.any() else math.nan
            found["under_epsilon"] = _share(np.sqrt(np.maximum(v, 0.0)) < epsilon, moving)
    return found


def _rms(values: Floats) -> float:
    """Return the root mean square, scaled so that no square over- or underflows."""
    most = float(np.abs(values).max()) if len(values) else math.nan
    if not 0 < most < math.inf:
        return most
    scaled = values / most
    return most * math.sqrt(float(scaled @ scaled) / len(values))


def _share(what: Any, of: Any) -> float:
    return float(what[of].mean()) if of is not None and of.any() else math.nan


def _entries(tensor: Tensor | None, most: int | None) -> Floats | None:
    return None if tensor is None else _wide(sampled(tensor, most))


def _wide(entries: Tensor) -> Floats:
    if entries.is_complex():
        entries = torch.view_as_real(entries.resolve_conj()).reshape(-1)
    return entries.to("cpu").double().numpy()


def _holders(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, Tensor]
) -> dict[str, tuple[torch.optim.Optimizer, Mapping[str, Any]]]:
    """Return the optimizer and the group that hold each parameter, by name."""
    groups = {
        id(p): (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {name: groups[id(p)] for name, p in parameters.items() if id(p) in groups}


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    """Return what an optimizer keeps of a parameter, without making an entry for it."""
    state = getattr(optimizer, "state", None)
    found = state[parameter] if isinstance(state, Mapping) and parameter in state else {}
    return found if isinstance(found, Mapping) else {}
