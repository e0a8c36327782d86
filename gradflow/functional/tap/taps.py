"""Taps: for the length of a context, the `forward` of every module is led past the recorder of the step.

NOTE [Where a tap sits]
A model may copy its own modules while it runs: a target network, the skeleton of an ensemble, the learner of
a meta-learning step. A copy is no part of the model. So a tap sits where copies do not take it along: on the
class that defines `forward`, where it looks up which module it was called on, and leaves all but those of the
run alone. Nothing is put into the modules themselves. Where a module has a `forward` of its own, put on it by
the user, or one that is no plain function (TorchScript), the tap stands in for it in the module, and hands
the original to whoever copies or pickles it.

Classes, modules, hooks and `__call__` are as they were afterwards, exceptions included; the hooks of the user
run as ever.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from gradflow.functional.tap.tapped import TappedModel

Forward = Callable[..., Any]


@contextlib.contextmanager
def tapped(model: TappedModel) -> Iterator[None]:
    """Lead the calls of a model's modules past the recorder that it has, for the length of the context.

    The model is also told when a hook is put on a tensor.

    Raises:
        OtherThreadError: if a module is called in another thread while a recorder listens.
    """
    names: dict[type, dict[int, str]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_told_of_hooks(model))
        for name, module in model.modules.items():
            forward = getattr(module, "forward", None)
            if forward is None or forward == types.MethodType(nn.Module.forward, module):
                continue  # it only holds parameters, or exports other methods
            owner = _definer(module)
            if owner is None:
                stack.enter_context(_on_module(model, name, module))
                continue
            if owner not in names:
                names[owner] = {}
                stack.enter_context(_on_class(model, owner, names[owner]))
            names[owner][id(module)] = name
        stack.enter_context(model.thread.insisted())
        yield


@contextlib.contextmanager
def _told_of_hooks(model: TappedModel) -> Iterator[None]:
    register_hook = Tensor.register_hook

    @functools.wraps(register_hook)
    def told_register_hook(self: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        model.saw_hook()
        return register_hook(self, hook)

    Tensor.register_hook = told_register_hook
    try:
        yield
    finally:
        Tensor.register_hook = register_hook


def _definer(module: nn.Module) -> type | None:
    """Return the class whose `forward` a module runs; None where that is not a plain function of a class."""
    if "forward" in vars(module):
        return None
    for kind in type(module).__mro__:
        if "forward" in vars(kind):
            plain = isinstance(vars(kind)["forward"], types.FunctionType)
            return kind if plain and type(kind) is type and kind is not nn.Module else None
    return None


@contextlib.contextmanager
def _on_class(model: TappedModel, kind: type, names: dict[int, str]) -> Iterator[None]:
    """Put a tap on a class; `names` tells the modules that it is meant for, by their ids."""
    forward: Forward = vars(kind)["forward"]

    @functools.wraps(forward)
    def tapped_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = names.get(id(self))
        recorder = model.recorder
        if name is None or recorder is None:
            return forward(self, *args, **kwargs)
        model.thread.check(name, model.types[name])
        return recorder.run(name, types.MethodType(forward, self), args, kwargs)

    setattr(kind, "forward", tapped_forward)  # noqa: B010 (a class of the user's declares no such attribute)
    try:
        yield
    finally:
        setattr(kind, "forward", forward)  # noqa: B010


@contextlib.contextmanager
def _on_module(model: TappedModel, name: str, module: nn.Module) -> Iterator[None]:
    """Put a tap in a module's own attributes."""
    missing = object()
    old = vars(module).get("forward", missing)
    vars(module)["forward"] = _OwnForward(model, name, module.forward)
    try:
        yield
    finally:
        if old is missing:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = old


class _OwnForward:
    """Stands in for the `forward` in a module's attributes; a copy of it is a copy of the original."""

    def __init__(self, model: TappedModel, name: str, forward: Forward) -> None:
        functools.update_wrapper(self, forward, updated=())
        self._model, self._name, self._forward = model, name, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self._model.recorder
        if recorder is None:
            return self._forward(*args, **kwargs)
        self._model.thread.check(self._name, self._model.types[self._name])
        return recorder.run(self._name, self._forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (self._forward,)
