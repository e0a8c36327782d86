"""What functions of the user's hold: a loss a layer of its own, a closure a critic or a tensor."""

from __future__ import annotations

import copy
import dis
import functools
import math
import types
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gradflow.functional.model.undo import python_module

_LIBRARIES = ("torch", "numpy", "builtins", "gradflow")
MOST_ITEMS = 1000  # of a container: a longer one is a data set
_NUMBERS = (int, float, complex, str, bytes, type(None))
_BUILTINS = frozenset(
    (
        "abs", "all", "any", "bool", "dict", "divmod", "enumerate", "float", "int", "isinstance", "len",
        "list", "max", "min", "pow", "range", "reversed", "round", "sorted", "sum", "tuple", "zip",
    )
)  # fmt: skip
_BEYOND = frozenset(("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME", "IMPORT_FROM"))


def modules_in(*values: Any) -> tuple[nn.Module, ...]:
    """Return the modules that functions and objects can reach by what they hold, each once.

    It looks into closures, defaults, the globals that a function names, `functools.partial`, bound methods,
    the attributes of objects of the user's classes, and short containers. A submodule of a module that was
    found is not returned as well.

    >>> norm = nn.BatchNorm1d(4)
    >>> modules_in(functools.partial(norm.forward)) == (norm,)
    True
    """
    found = [value for value in reachable(values) if isinstance(value, nn.Module)]
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    return tuple(module for module in found if id(module) not in inner)


def stateful_in(*values: Any) -> tuple[Any, ...]:
    """Return what else functions and objects can reach that has a state to save: optimizers, scalers, ..."""
    return tuple(
        value
        for value in reachable(values)
        if not isinstance(value, (nn.Module, type))
        and hasattr(value, "state_dict")
        and hasattr(value, "load_state_dict")
    )


def tensors_in(*values: Any) -> tuple[Tensor, ...]:
    """Return the tensors that functions and objects can reach by what they hold, those of modules excepted.

    >>> import torch
    >>> weight = torch.ones(2)
    >>> tensors_in(functools.partial(torch.dot, weight))
    (tensor([1., 1.]),)
    """
    return tuple(value for value in reachable(values) if isinstance(value, Tensor))


def reachable(values: Iterable[Any]) -> Iterator[Any]:
    """Yield all that some values hold, themselves included, each once; into modules it does not go.

    It looks where `modules_in` does.
    """
    seen: dict[int, Any] = {}  # keeps what it has seen alive, so that ids stay unique
    todo = list(values)[::-1]
    while todo:
        value = todo.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            yield value
            if not isinstance(value, (nn.Module, Tensor)):
                todo.extend(_held(value))


def _held(value: Any) -> Iterator[Any]:
    """Yield what a value holds directly, as far as modules may be in it."""
    if isinstance(value, types.FunctionType):
        if is_the_users(value):
            yield from _held_by_function(value)
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, (tuple, list, set, Mapping)):
        if len(value) <= MOST_ITEMS:
            yield from value.values() if isinstance(value, Mapping) else value
    elif not isinstance(value, (type, types.ModuleType)):
        wrapped = getattr(value, "__wrapped__", None)
        yield from () if wrapped is None else (wrapped,)
        if is_the_users(type(value)):
            yield from (f for c in type(value).__mro__ if (f := vars(c).get("__call__")) is not None)
            yield from getattr(value, "__dict__", {}).values()


def _held_by_function(function: types.FunctionType) -> Iterator[Any]:
    yield from (value for _, value in cells_of(function))
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if wrapped := getattr(function, "__wrapped__", None):
        yield wrapped
    yield from (value for _, value in globals_of(function))


def is_the_users(what: Any) -> bool:
    """Whether a function or class is none of a library's, so that it may hold what is the user's."""
    return python_module(what).split(".")[0] not in _LIBRARIES


def cells_of(function: types.FunctionType) -> Iterator[tuple[types.CellType, Any]]:
    """Yield the cells of a function's closure that are filled, with what is in them."""
    for cell in function.__closure__ or ():
        try:
            yield cell, cell.cell_contents
        except ValueError:  # not filled yet
            continue


def globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the names of the globals that a function loads, inner functions included, with what they are."""
    for name in _globals_named(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


@functools.lru_cache(maxsize=256)
def _globals_named(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals that a function's code loads, inner functions included."""
    own = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _globals_named(c)]
    return tuple(dict.fromkeys([*own, *inner]))


def is_plain(value: Any, known: Container[int]) -> bool:
    """Whether a value can be copied whole: numbers, containers of them, and functions of the user's that can
    touch nothing else but what they are handed.

    A function may hold such values in its closure and its defaults; of globals and builtins it may name
    numbers, `math`, and what only computes.

    Args:
        value: any.
        known: ids of objects that are copied by other means, with which it may do as it likes.

    >>> is_plain(lambda x, rate=0.1: max(x, rate), ()), is_plain(lambda x: print(x), ())
    (True, False)
    """
    seen: dict[int, Any] = {}
    todo = [(value, True)]
    while todo:
        value, whole = todo.pop()
        if id(value) in known or id(value) in seen or isinstance(value, _NUMBERS):
            continue
        seen[id(value)] = value
        if type(value) in (list, tuple, set, dict) and len(value) <= MOST_ITEMS:
            todo += [(v, False) for v in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, types.FunctionType) and whole and _keeps_to_itself(value):
            todo += [(held, True) for _, held in cells_of(value)]
            todo += [(value.__defaults__, False), (value.__kwdefaults__, False)]
        else:
            return False
    return True


def _keeps_to_itself(function: types.FunctionType) -> bool:
    """Whether a function names nothing outside of itself but numbers and what only computes."""
    codes = [function.__code__]
    for code in codes:  # grows while it is walked
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    if any(step.opname in _BEYOND for code in codes for step in dis.get_instructions(code)):
        return False
    held = function.__globals__
    return not vars(function) and all(
        held[name] is math or isinstance(held[name], _NUMBERS) if name in held else name in _BUILTINS
        for name in _globals_named(function.__code__)
    )


def plain_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a plain value, one cell of functions that share it for all of them.

    Args:
        value: of which `is_plain` holds.
        memo: copies by the id of what they are of, as of `copy.deepcopy`; it is added to.
    """
    if id(value) in memo:
        return memo[id(value)]
    if not isinstance(value, types.FunctionType):
        return copy.deepcopy(value, memo)
    cells = tuple(memo.setdefault(id(cell), types.CellType()) for cell in value.__closure__ or ())
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = made
    made.__defaults__ = copy.deepcopy(value.__defaults__, memo)
    made.__kwdefaults__ = copy.deepcopy(value.__kwdefaults__, memo)
    for cell, held in cells_of(value):
        memo[id(cell)].cell_contents = plain_copy(held, memo)
    return made
