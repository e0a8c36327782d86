"""Remedies of single parameters and of the scale of a network: codes, rows, step sizes, layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import RemedyError
from gradflow.remedies.kinds.structure import Times
from gradflow.remedies.remedy import Remedy, on_model
from gradflow.remedies.surgery import access, listed, part, put

_STEP_SIZES = re.compile(r"(^|[._])(dt|delta|log_dt|dt_bias|log_step|step_size|timescale)($|[._])|dt_proj")


def scale_kept(factors: Mapping[str, float], *, outputs: bool = False) -> Remedy:
    """Return the remedy that lets each layer give what it gets, by multiplying its weights, or its outputs.

    The start that Mishkin and Matas propose ("All you need is a good init", 2016), by the scales measured.

    Args:
        factors: by name of a layer, what its weights are multiplied by.
        outputs: whether outputs are multiplied: where a layer scales its weights itself, they alone count.
    """
    what = "outputs" if outputs else "weights"

    def change(model: nn.Module) -> nn.Module:
        for name, factor in factors.items():
            layer = part(model, name)
            if outputs:
                model = put(model, name, Times(layer, factor))
                continue
            found = [p for p in layer.parameters(recurse=False) if p.dim() >= 2]
            if not found:
                raise RemedyError(f"{name or 'the model'} has no weights.")
            with torch.no_grad():
                for parameter in found:
                    parameter.mul_(factor)
        return model

    told = ", ".join(f"{name} × {factor:.2g}" for name, factor in list(factors.items())[:3])
    lines = [
        f"x = {f:.3g} * {access(n)}(x)" if outputs else f"{access(n)}.weight.data.mul_({f:.3g})"
        for n, f in factors.items()
    ]
    return Remedy(
        name=f"the scale kept by {what} of {listed(list(factors))}",
        words=f"The {what} of {listed(list(factors))} multiplied so that each gives what it gets: {told}.",
        code="\n".join(lines),
        apply=on_model(change),
    )


def parameters_times(names: Sequence[str], factor: float) -> Remedy:
    """Return the remedy that multiplies single parameters.

    Args:
        names: qualified names of the parameters.
        factor: what they are multiplied by.
    """

    def change(model: nn.Module) -> None:
        held = dict(model.named_parameters())
        with torch.no_grad():
            for name in names:
                if name not in held:
                    raise RemedyError(f"the model has no parameter {name!r}.")
                held[name].mul_(factor)

    return Remedy(
        name=f"{listed(names)} × {factor:.2g}",
        words=f"{listed(names)}, times {factor:.3g}.",
        code="with torch.no_grad():\n" + "\n".join(f"    model.{n}.mul_({factor:.3g})" for n in names),
        apply=on_model(change),
    )


def rows_revived(name: str, rows: Sequence[int]) -> Remedy:
    """Return the remedy that starts rows of a parameter anew, at rows that do get a gradient.

    A row is one member (a code, a splat), and what else its module holds of it moves along: dead-code
    revival, as in Zeghidour et al., "SoundStream", 2021.

    Args:
        name: qualified name of the parameter.
        rows: those that got no gradient.
    """

    def change(model: nn.Module) -> None:
        owner = part(model, name.rpartition(".")[0])
        held = dict(owner.named_parameters(recurse=False))
        own: Any = held.get(name.rpartition(".")[2])
        if own is None or not rows or max(rows) >= len(own):
            raise RemedyError(f"the model has no such rows of {name!r}.")
        dead = set(rows)
        alive = torch.tensor([i for i in range(len(own)) if i not in dead])
        if not len(alive):
            raise RemedyError(f"no row of {name!r} gets a gradient, so none can be copied.")
        source = alive[torch.randint(len(alive), (len(rows),))]
        with torch.no_grad():
            for parameter in held.values():
                if parameter.dim() and len(parameter) == len(own):
                    taken = parameter[source]
                    noise = 0.1 * parameter[alive].std() * torch.randn_like(taken)
                    parameter[list(rows)] = taken + noise

    return Remedy(
        name=f"{len(rows)} rows of {name} started anew",
        words=f"The rows of {name} that got no gradient started anew, near rows that do.",
        code=f"with torch.no_grad():\n    model.{name}[idle] = model.{name}[picked] + noise",
        apply=on_model(change),
    )


def small_steps(name: str) -> Remedy:
    """Return the remedy that draws the step sizes of a state space layer between 0.001 and 0.1.

    Gu and Dao, "Mamba", 2023: the bias is what softplus makes of to such a step.

    Args:
        name: of the module, in which a parameter tells by its name that it holds step sizes.
    """

    def change(model: nn.Module) -> None:
        module = part(model, name)
        found = [(n, p) for n, p in module.named_parameters() if p.dim() <= 1 and _STEP_SIZES.search(n)]
        if not found:
            raise RemedyError(
                f"what makes the step sizes of {name or 'the model'} cannot be told by its name."
            )
        with torch.no_grad():
            for key, parameter in found:
                step = torch.exp(torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(1e-1)))
                parameter.copy_(step.log() if "log" in key else _before_softplus(step))

    return Remedy(
        name=f"step sizes of {name or 'model'} between 0.001 and 0.1",
        words=f"The step sizes of {name or 'the model'} drawn between 0.001 and 0.1.",
        code="dt = torch.exp(torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1)))\n"
        "dt_proj.bias.data = dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt",
        apply=on_model(change),
    )


def _before_softplus(step: Tensor) -> Tensor:
    return step + torch.log(-torch.expm1(-step))
