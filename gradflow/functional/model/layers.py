"""Which modules of a model are layers, what they are called, and how their calls are led past a function.

NOTE [Where a tap sits]
A model may copy its own modules while it runs: a target network, the skeleton of an ensemble, the learner of
a meta-learning step. A copy is no part of the model. So a tap sits where copies do not take it along: on the
class that defines `forward`, where it looks up which module it was called on, and leaves all but those that
are named alone. Nothing is put into the modules themselves. Where a module has a `forward` of its own, put on
it by the user, or one that is no plain function (TorchScript), the tap stands in for it in the module, and
hands the original to whoever copies or pickles it.

Classes, modules, hooks and `__call__` are as they were afterwards, exceptions included; the hooks of the user
run as ever.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from typing import Any

import torch.nn.utils.parametrize as parametrize
from torch import nn

from gradflow.functional.torch_private import stores

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
    if owns_parameters(module) or parametrize.is_parametrized(module):
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


def owner(parameter: str, modules: Container[str]) -> str:
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


# ------------------------------------------------------------------------- calls led past a function

Forward = Callable[..., Any]
Choice = Callable[[str], Callable[[str, Forward, tuple[Any, ...], dict[str, Any]], Any] | None]


@contextlib.contextmanager
def led(
    modules: Mapping[str, nn.Module],
    lead: Choice,
    strange: Callable[[nn.Module], None] = lambda module: None,
    whole: Collection[str] = (),
) -> Iterator[None]:
    """Have a function run the forwards of some modules, for the length of the context.

    A call is one frame deeper on Python's stack than without, and those of that function.

    Args:
        modules: by name.
        lead: from a module's name to the function that runs this call, as `run(name, forward, args, kwargs)`
            in the place of `forward(*args, **kwargs)`; None for `forward` itself.
        strange: told of every call of another module of one of their classes.
        whole: names of those whose hooks are run as a part of the call.

    >>> net, calls = nn.Sequential(nn.Identity(), nn.Identity()), []
    >>> with led({"first": net[0]}, calls.append):
    ...     net(1.0), calls
    (1.0, ['first'])
    """
    names: dict[tuple[type, str], dict[int, str]] = {}
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            forward = getattr(module, "forward", None)
            if name in whole:
                key = type(module), "__call__"
                if key not in names:
                    names[key] = {}
                    stack.enter_context(_on_class(lead, lambda module: None, *key, names[key]))
                names[key][id(module)] = name
                continue
            if forward is None or forward == types.MethodType(nn.Module.forward, module):
                continue  # it only holds parameters, or exports other methods
            owner = _definer(module)
            if owner is None:
                stack.enter_context(_on_module(lead, name, module))
                continue
            key = owner, "forward"
            if key not in names:
                names[key] = {}
                stack.enter_context(_on_class(lead, strange, *key, names[key]))
            names[key][id(module)] = name
        yield


def _definer(module: nn.Module) -> type | None:
    """Return the class whose `forward` a module runs; None where that is not a plain function of a class."""
    if "forward" in vars(module):
        return None
    for kind in type(module).__mro__:
        if "forward" in vars(kind):
            plain = isinstance(vars(kind)["forward"], types.FunctionType)
            return kind if plain and type(kind) is type else None
    return None


@contextlib.contextmanager
def _on_class(
    lead: Choice, strange: Callable[[nn.Module], None], kind: type, method: str, names: dict[int, str]
) -> Iterator[None]:
    """Put a tap on a method of a class; `names` tells the modules that it is meant for, by their ids."""
    forward: Forward = getattr(kind, method)
    own = method in vars(kind)

    @functools.wraps(forward)
    def tapped_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = names.get(id(self))
        if name is None:
            strange(self)
        elif (run := lead(name)) is not None:
            return run(name, types.MethodType(forward, self), args, kwargs)
        return forward(self, *args, **kwargs)

    setattr(kind, method, tapped_forward)
    try:
        yield
    finally:
        if own:
            setattr(kind, method, forward)
        else:
            delattr(kind, method)


@contextlib.contextmanager
def _on_module(lead: Choice, name: str, module: nn.Module) -> Iterator[None]:
    """Put a tap in a module's own attributes."""
    missing = object()
    old = vars(module).get("forward", missing)
    vars(module)["forward"] = tap = _OwnForward(lead, name, module.forward)
    try:
        yield
    finally:
        tap.rest()  # a copy that shares the module's attributes may keep it
        if old is missing:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = old


class _OwnForward:
    """Stands in for the `forward` in a module's attributes; a copy of it is a copy of the original."""

    def __init__(self, lead: Choice, name: str, forward: Forward) -> None:
        functools.update_wrapper(self, forward, updated=())
        self._name, self._forward = name, forward
        self._lead: Choice | None = lead

    def rest(self) -> None:
        """Lead calls nowhere from now on."""
        self._lead = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = None if self._lead is None else self._lead(self._name)
        if run is None:
            return self._forward(*args, **kwargs)
        return run(self._name, self._forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (self._forward,)


def holders(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the classes of the modules that hold others with parameters, by name."""
    return {
        name: f"{type(module).__module__}.{type(module).__qualname__}"
        for name, module in modules.items()
        if any(owns_parameters(child) for child in list(module.modules())[1:])
    }


def held_by(model: nn.Module) -> dict[str, str]:
    """Return by name of a module its class, if it holds others with parameters, or "", if it is a layer."""
    modules = dict(model.named_modules())
    layers = [name for name, m in modules.items() if owns_parameters(m) or not list(m.children())]
    return {**holders(modules), **dict.fromkeys(layers, "")}


def owns_parameters(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, not only those of modules in it."""
    return any(parameter is not None for parameter in stores(module)[0].values())
