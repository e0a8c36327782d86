"""Which modules of a model are layers, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.utils.parametrize as parametrize
from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def callable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module of the model that can be called, by qualified name, each once.

    The machinery of `torch.nn.utils.parametrize` is left out: it belongs to the module whose parameter
    it computes.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        hidden = ".parametrizations." in f".{name}." or name.endswith("parametrizations")
        if not hidden and not isinstance(module, _CONTAINERS):
            found[name] = module
    return found


def is_layer(module: nn.Module) -> bool:
    """Whether a module owns a parameter directly, or has no child modules.

    >>> is_layer(nn.Linear(2, 2)), is_layer(nn.ReLU()), is_layer(nn.Sequential(nn.ReLU()))
    (True, True, False)
    """
    if any(True for _ in module.parameters(recurse=False)) or parametrize.is_parametrized(module):
        return True
    return not any(True for _ in module.children())


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model by qualified name, in the order of registration.

    A layer is a module that owns a parameter directly, or has no child modules. (A parent that uses a
    child's parameters without calling the child is found when the model runs.)

    >>> list(layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    ['0', '1']
    """
    return {name: module for name, module in callable_modules(model).items() if is_layer(module)}


def owner(parameter: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the qualified name of the callable module that a parameter belongs to."""
    name = parameter
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return ""


def ancestors(name: str) -> list[str]:
    """Return the qualified names above `name`, nearest first, the model's own `""` last.

    >>> ancestors("a.b.c")
    ['a.b', 'a', '']
    """
    found = []
    while name:
        name = name.rpartition(".")[0]
        found.append(name)
    return found
