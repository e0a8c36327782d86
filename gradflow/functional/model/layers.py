"""Which modules of a model are layers, and what they are called."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Collection, Iterator, Mapping

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

    Parameters in a `ParameterList` or `ParameterDict`, or in lists of those, belong to the module that holds
    the list.

    >>> is_layer(nn.Linear(2, 2)), is_layer(nn.ReLU()), is_layer(nn.Sequential(nn.ReLU()))
    (True, True, False)
    """
    if any(True for _ in module.parameters(recurse=False)) or parametrize.is_parametrized(module):
        return True
    children = list(module.children())
    return not children or any(map(_holds_parameters, children))


def _holds_parameters(module: nn.Module) -> bool:
    """Whether a module is a container of parameters, or of such containers, and holds any."""
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)) and any(True for _ in module.parameters()):
        return True
    return isinstance(module, _CONTAINERS) and any(map(_holds_parameters, module.children()))


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is TorchScript, whose inside cannot be seen or varied.

    TorchScript is deprecated: it is only looked at where the program has loaded it.
    """
    jit = sys.modules.get("torch.jit")
    return jit is not None and isinstance(module, jit.ScriptModule)


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


def passed_by(idle: Collection[str], called: Collection[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules that did not run although the forward of a module that ran names them.

    Such a module belongs to another kind of input (a vision tower, cross-attention) and is called under a
    condition; a forgotten one is named nowhere. A part of a list counts only if nothing of the list ran,
    since the code names the list alone.

    Args:
        idle: names of modules that did not run.
        called: names of those that did, containers included.
        modules: the callable modules by qualified name.

    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.used, self.other, self.forgotten = (nn.Linear(1, 1) for _ in range(3))
    ...     def forward(self, x, y=None):
    ...         return self.used(x) if y is None else self.other(y)
    >>> passed_by(["other", "forgotten"], ["", "used"], callable_modules(Model()))
    ['other']
    """
    found = []
    for name in idle:
        above = next((a for a in ancestors(name) if a in called), None)
        if above is None or above not in modules:
            continue
        attribute = name.removeprefix(above).lstrip(".").partition(".")[0]
        whole = f"{above}.{attribute}" if above else attribute
        if not any(c == whole or c.startswith(f"{whole}.") for c in called):
            found += [name] if attribute in _names_in_forward(type(modules[above])) else []
    return found


def _names_in_forward(kind: type[nn.Module]) -> set[str]:
    """Return the names in the code of a class's forward and in the methods that it uses."""
    names: set[str] = set()
    methods = ["forward"]
    while methods:
        function = inspect.unwrap(getattr(kind, methods.pop(), None) or (lambda: None))
        new = set(_names_in(function.__code__)) - names if hasattr(function, "__code__") else set()
        names |= new
        methods += [name for name in new if callable(getattr(kind, name, None))]
    return names


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a comprehension, a function within
            yield from _names_in(constant)
