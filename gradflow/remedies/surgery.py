"""Changing a model by the names of its parts: what every remedy of structure does, and the names it tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.errors import RemedyError

_MOST_NAMED = 3  # layers that a remedy's name tells


def part(model: nn.Module, name: str) -> nn.Module:
    """Return the module of that name.

    Raises:
        RemedyError: if there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise RemedyError(f"the model has no module {name!r}, so nothing can be changed there.") from error


def put(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put a module in the place of the one of that name, everywhere it stands, and return the model.

    Raises:
        RemedyError: if there is none.
    """
    old = part(model, name)
    new.train(old.training)
    if old is model:
        return new
    for holder in list(model.modules()):
        for key, child in list(holder._modules.items()):
            if child is old:
                holder._modules[key] = new
        for value in list(vars(holder).values()):
            if isinstance(value, list):
                value[:] = [new if item is old else item for item in value]
    return model


def with_tensors_like(new: nn.Module, old: nn.Module) -> nn.Module:
    """Return a new module on the device and in the dtype of an old one."""
    like = next((t for t in old.parameters() if t.is_floating_point()), None)
    return new if like is None else new.to(device=like.device, dtype=like.dtype)


def each(names: Iterable[str], change: Callable[[nn.Module, str], None]) -> Callable[[nn.Module], nn.Module]:
    """Return what changes several parts of a model in place, without a record of it for autograd."""
    chosen = tuple(names)

    def changed(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name in chosen:
                change(model, name)
        return model

    return changed


def adopted(model: nn.Module, optimizer: Optimizer, before: Iterable[Tensor]) -> None:
    """Let parameters that a model has and had not before join the first group of its optimizer.

    Args:
        model: the model as it is.
        optimizer: holds the parameters that it had; one that a remedy has put in already is left there.
        before: the parameters that the model had.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in before}
    new = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    if new:
        optimizer.param_groups[0]["params"].extend(new)


def listed(names: Sequence[str]) -> str:
    """Return names in a few words: all of up to three, else the first, the last and how many.

    >>> listed(["fc1", "fc2"]), listed([f"fc{i}" for i in range(9)])
    ('fc1 and fc2', 'fc0 to fc8 (9 layers)')
    """
    shown = [name or "(model)" for name in names]
    if len(shown) > _MOST_NAMED:
        return f"{shown[0]} to {shown[-1]} ({len(shown)} layers)"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def for_each(names: Sequence[str], line: str) -> str:
    """Return code for several layers: a line for one, a loop for more; `{}` stands for the layer.

    >>> print(for_each(["a", "b"], "nn.init.zeros_({}.bias)"))
    for layer in (model.a, model.b):
        nn.init.zeros_(layer.bias)
    """
    if len(names) == 1:
        return line.format(access(names[0]))
    listed_names = ", ".join(access(name) for name in names)
    return f"for layer in ({listed_names}):\n    {line.format('layer')}"


def access(name: str) -> str:
    """Return how a part of that name is reached in code.

    >>> access("layers.0.fc"), access("")
    ('model.layers[0].fc', 'model')
    """
    text = "model"
    for key in name.split(".") if name else ():
        text += f"[{key}]" if key.isdigit() else f".{key}"
    return text
