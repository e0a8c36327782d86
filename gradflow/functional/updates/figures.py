"""What a step did to parameters, in numbers: the values before it held against those after it.

NOTE [Some of the entries]
A root mean square or a share over some thousands of entries is known to a percent or two. So of a larger
parameter some entries stand for all, evenly spaced, with a stride that shares no factor with the length of
its last axis: one that did would always pick the same columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.processes.shards import local
from gradflow.functional.updates.moments import Moments, age_of, moments
from gradflow.records import Floats

MOST = 2**12  # entries of a parameter that are looked at


@attrs.frozen(kw_only=True)
class UpdateFigures:
    """What one step did to one parameter; see `gradflow.records.UpdateRecord` for each number."""

    held: bool
    group: int
    rate: float
    epsilon: float
    weight_rms: float
    rms: float
    gradient_rms: float
    slope: float
    shrink: float
    unchanged: float
    second_moment: float
    under_epsilon: float
    age: float
    finite: bool


def sampled(tensor: Tensor, most: int | None = MOST) -> Tensor:
    """Return some of a tensor's entries as a vector, always the same ones; see NOTE [Some of the entries].

    Args:
        tensor: of any shape; of a sharded one, what this process holds.
        most: how many entries, about; None takes all.

    >>> sampled(torch.arange(6.0).view(2, 3), most=3)
    tensor([0., 2., 4.])
    """
    tensor = local(tensor)
    flat = (tensor if tensor.layout is torch.strided else tensor.to_dense()).detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    if most is None or flat.numel() <= most:
        return flat
    stride, last = flat.numel() // most, max(int(tensor.shape[-1]) if tensor.dim() else 1, 1)
    while math.gcd(stride, last) > 1:
        stride += 1
    return flat[::stride]


def remembered(parameters: Mapping[str, Tensor], most: int | None = MOST) -> dict[str, Tensor]:
    """Return copies of the entries of parameters that `update_figures` will look at, taken before a step.

    Args:
        parameters: by name; those without any entry are left out.
        most: how many entries of each, about; None takes all.
    """
    return {name: sampled(p, most).clone() for name, p in parameters.items() if p.numel()}


def ages(optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how many steps the optimizers' states of parameters have seen: 0 where there is no state yet.

    Args:
        optimizers: which hold the very tensors of `parameters`.
        parameters: by name.
    """
    found = {}
    for name, (optimizer, _) in _holders(optimizers, parameters).items():
        state = _state(optimizer, parameters[name])
        found[name] = age_of(state) if state else 0.0
    return found


def update_figures(
    optimizers: Iterable[torch.optim.Optimizer],
    before: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    *,
    aged: Mapping[str, float] | None = None,
    most: int | None = MOST,
    total: Callable[[Floats], Floats] = lambda sums: sums,
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
        total: sums over this process's entries → sums over those of all processes.

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
    if not before:
        return {}
    optimizers = list(optimizers)
    groups = [id(group) for optimizer in optimizers for group in optimizer.param_groups]
    holders, knowing = _holders(optimizers, parameters), dict[str, Moments]()
    for name, (optimizer, group) in holders.items():
        if name in before:
            knowing[name] = moments(_state(optimizer, parameters[name]), group, parameters[name].dtype)
    found = _numbers(before, parameters, gradients, knowing, most, total)
    numbers = {key: v.tolist() for key, v in found.items()}
    lengths, found = numbers.pop("length"), {}
    for place, name in enumerate(before):
        known = knowing.get(name, Moments(None, 1.0, math.nan, math.nan))
        age = known.age - 1 if aged is None else aged.get(name, math.nan)
        of_one = {key: values[place] for key, values in numbers.items()}
        of_one["slope"] *= parameters[name].numel() * (1 + parameters[name].is_complex()) / lengths[place]
        found[name] = UpdateFigures(
            held=name in holders,
            group=groups.index(id(holders[name][1])) if name in holders else -1,
            rate=float(holders[name][1].get("lr", math.nan)) if name in holders else math.nan,
            epsilon=known.epsilon,
            age=age,
            **of_one,
        )
    return found


def _numbers(
    before: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    knowing: Mapping[str, Moments],
    most: int | None,
    total: Callable[[Floats], Floats],
) -> dict[str, Any]:
    """Return the numbers of all parameters, shape (parameters,), from one long vector of their entries."""
    missing = {name: torch.full_like(entries, math.nan) for name, entries in before.items()}

    def some(tensor: Tensor | None, name: str) -> Tensor:
        fits = tensor is not None and tensor.shape == parameters[name].shape
        return sampled(tensor, most) if tensor is not None and fits else missing[name]

    lengths = np.array([len(entries) for entries in before.values()])
    there = lengths > 0  # a slice of a sharded parameter may be empty
    starts = (np.cumsum(lengths) - lengths)[there]
    was, now = _joined(before.values()), _joined(sampled(parameters[name], most) for name in before)
    g = _joined(some(gradients.get(name), name) for name in before)
    v = _joined(some(known.kept if (known := knowing.get(name)) else None, name) for name in before)
    corrections = np.array([known.correction if (known := knowing.get(name)) else 1.0 for name in before])
    epsilons = np.array([known.epsilon if (known := knowing.get(name)) else math.nan for name in before])

    def summed(values: Floats) -> Floats:
        sums = np.zeros(len(lengths))
        if there.any():
            sums[there] = np.add.reduceat(values, starts)
        return sums

    with np.errstate(all="ignore"):
        v = v / np.repeat(corrections, lengths)
        u, moving = now - was, (g != 0) & ~np.isnan(g)
        under = moving & (np.sqrt(np.maximum(v, 0.0)) < np.repeat(epsilons, lengths))
        values = (
            was * was,
            u * u,
            now,
            g * g,
            g * u,
            -was * u,
            v,
            moving * 1.0,
            (moving & (u == 0)) * 1.0,
            under * 1.0,
        )
        sums = total(np.stack([lengths * 1.0, *map(summed, values)]))
        length = sums[0]
        weight, square, ends, power, slope, inward, second, share, still, low = sums[1:] / length
        return {
            "length": length,
            "weight_rms": np.sqrt(weight),
            "rms": np.sqrt(square),
            "finite": np.isfinite(ends),
            "gradient_rms": np.sqrt(power),
            "slope": slope * length,
            "shrink": np.where(weight > 0, inward / weight, np.nan),
            "unchanged": still / share,
            "second_moment": second / power,
            "under_epsilon": np.where(np.isnan(second) | np.isnan(epsilons), np.nan, low / share),
        }


def _joined(entries: Iterable[Tensor]) -> Floats:
    return torch.cat([part if part.is_cpu else part.cpu() for part in entries]).double().numpy()


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
