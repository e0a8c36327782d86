"""Copies of a model, its loss and its optimizer that belong together, for a trial to change.

NOTE [One memo]
A loss may hold the model: a closure or a global that calls `model.encode`, a bound method, a module with the
model inside. `copy.deepcopy` takes functions for atoms, so a copy of such a loss would go on calling the
user's own model. Here every function that reaches the model, from the loss or from the model's own
attributes, is made anew with cells, defaults and globals of its own in which the copies stand, and all
copies share one memo. What does not reach the model is shared with the original.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import attrs
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.functional.model.closures import cells_of, globals_of, modules_in, reachable, tensors_in
from gradflow.functional.model.optimizers import copy_optimizer
from gradflow.functional.model.supported import check_supported

Memo = dict[int, Any]


@attrs.frozen(eq=False)
class Copies:
    """A model, its loss and its optimizer, as copies that belong together; see NOTE [One memo].

    Args:
        model, loss_fn, optimizer: the copies.
        memo: the copy of each object that was copied, by the id of the original.
    """

    model: nn.Module
    loss_fn: Any
    optimizer: Optimizer
    memo: Memo


def copies_of(model: nn.Module, loss_fn: Any, optimizer: Optimizer) -> Copies:
    """Return copies of a model, of the optimizer that steps it, and of its loss where that holds the model.

    Args:
        model: the user's; it is left as it is, like the others.
        loss_fn: its loss; None for the model's own.
        optimizer: on its parameters.

    Raises:
        ModelInputError: if the model is of a kind of which a copy cannot be run, such as a sharded one.
        Whatever a part of the model raises that cannot be copied.
    """
    check_supported(model)
    memo: Memo = {}
    reaches = _reaching(model)
    attributes = [value for module in model.modules() for value in vars(module).values()]
    functions = [
        value
        for value in reachable([loss_fn, *attributes])
        if isinstance(value, types.FunctionType) and reaches(value)
    ]
    for function in functions:
        _enter(function, memo)
    model_copy = copy.deepcopy(model, memo)
    for value in reachable([loss_fn]):
        if id(value) not in memo and not reaches(value):
            memo[id(value)] = value
    for function in functions:
        _fill(function, memo, reaches)
    loss_copy = _copied(loss_fn, memo, reaches)
    held = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    stepped = {name: memo.get(id(p), p) for name, p in held.items()}
    return Copies(model_copy, loss_copy, copy_optimizer(optimizer, _Held(held), stepped), memo)


class _Held(nn.Module):
    """Parameters by name, as `copy_optimizer` takes them."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__()
        self._held = parameters

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._held.items()


def _reaching(model: nn.Module) -> Callable[[Any], bool]:
    """Return what tells whether a value reaches the model, a part of it or one of its tensors."""
    ours = {id(module) for module in model.modules()}
    ours |= {id(t) for t in (*model.parameters(), *model.buffers())}

    def reaches(value: Any) -> bool:
        if any(id(part) in ours for module in modules_in(value) for part in module.modules()):
            return True
        return any(id(tensor) in ours for tensor in tensors_in(value))

    return reaches


def _enter(function: types.FunctionType, memo: Memo) -> None:
    """Enter an empty copy of a function in the memo: the same code, with cells and globals of its own."""
    cells = function.__closure__ or ()
    for cell in cells:
        memo.setdefault(id(cell), types.CellType())
    made = types.FunctionType(
        function.__code__,
        dict(function.__globals__),
        function.__name__,
        None,
        tuple(memo[id(cell)] for cell in cells) if cells else None,
    )
    made.__module__, made.__qualname__, made.__doc__ = (
        function.__module__,
        function.__qualname__,
        function.__doc__,
    )
    made.__dict__.update(function.__dict__)
    memo[id(function)] = made


def _fill(function: types.FunctionType, memo: Memo, reaches: Callable[[Any], bool]) -> None:
    """Fill the copy of a function with what the original refers to, copies where that reaches the model."""
    made = memo[id(function)]

    def copied(value: Any) -> Any:
        return _copied(value, memo, reaches)

    for cell, value in cells_of(function):
        memo[id(cell)].cell_contents = copied(value)
    if function.__defaults__:
        made.__defaults__ = tuple(map(copied, function.__defaults__))
    if function.__kwdefaults__:
        made.__kwdefaults__ = {key: copied(value) for key, value in function.__kwdefaults__.items()}
    for name, value in globals_of(function):
        made.__globals__[name] = copied(value)


def _copied(value: Any, memo: Memo, reaches: Callable[[Any], bool]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, (Tensor, types.ModuleType, type)) or not reaches(value):
        return value
    return copy.deepcopy(value, memo)
