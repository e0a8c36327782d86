"""Modules that functions hold are found, whatever holds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradflow.functional import analyze
from gradflow.functional.model.closures import is_plain, modules_in, plain_copy

GLOBAL = nn.Linear(1, 1)


def _by_name(y: Any) -> Any:
    return GLOBAL(y)


def _decorated(module: nn.Module) -> Any:
    @functools.wraps(_by_name)
    def inner(y: Any) -> Any:
        return module(y)

    return inner


class Trainer:
    """An object with modules and methods."""

    def __init__(self, module: nn.Module) -> None:
        self.nets = {"net": (module, 1)}

    def loss(self, y: Any) -> Any:
        return y

    def __call__(self, y: Any) -> Any:
        return y


def _closed(module: nn.Module) -> Any:
    def outer() -> Any:
        return module

    return lambda y: outer()(y)


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda m: m,
    "closure": lambda m: lambda y: m(y),
    "closure of a closure": _closed,
    "default": lambda m: lambda y, net=m: net(y),
    "keyword default": lambda m: lambda y, *, net=m: net(y),
    "partial": lambda m: functools.partial(lambda net, y: net(y), m),
    "partial by keyword": lambda m: functools.partial(lambda y, net: net(y), net=m),
    "method": lambda m: Trainer(m).loss,
    "forward": lambda m: m.forward,
    "object": Trainer,
    "decorated": _decorated,
    "list": lambda m: lambda y, nets=({"a": [m]},): nets,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_it_is_found(kind: str) -> None:
    module = nn.Sequential(nn.Linear(1, 1))
    assert module in modules_in(HOLDERS[kind](module))


def test_globals_are_found_by_the_names_in_the_code() -> None:
    assert modules_in(_by_name) == (GLOBAL,)
    assert modules_in(lambda y: (lambda z: _by_name(z))(y)) == (GLOBAL,)
    assert modules_in(lambda y: y.GLOBAL) == ()  # an attribute of that name is another thing


def test_what_lies_in_another_is_not_named_again() -> None:
    outer = nn.Sequential(nn.Linear(1, 1))
    assert modules_in(outer[0], outer) == (outer,)


def test_cycles_and_unfilled_cells_end() -> None:
    def early() -> Any:
        return late

    assert modules_in(early) == ()
    late: list[Any] = []
    late.append(late)
    assert modules_in(early) == ()


def test_functions_of_libraries_and_data_sets_are_left_alone() -> None:
    assert modules_in(nn.functional.cross_entropy, [nn.Linear(1, 1)] * 1001, None, 3) == ()


@pytest.mark.parametrize(
    "made", ["lambda y: net(y)", "type('Loss', (), {'__call__': lambda self, y: net(y)})()"]
)
def test_what_was_made_in_no_module_is_looked_into(made: str) -> None:
    """As in `exec` with names of its own: a function there has no module, and a class the one of builtins."""
    net = nn.Linear(4, 1)
    loss = eval(made, {"net": net})
    if isinstance(loss, type(lambda: None)):
        assert loss.__module__ is None
    assert modules_in(loss) == (net,)
    record = analyze(nn.Linear(3, 4), [torch.ones(2, 3)], lambda y: loss(y).square().mean(), steps=1)
    assert record.steps == 1


def _counting(step: int = 1) -> tuple[Callable[[], None], Callable[[], list[float]]]:
    number, seen = 0, [0.0]

    def count() -> None:
        nonlocal number
        number += step
        seen.append(float(number))

    def counted(start: float = 0.0) -> list[float]:
        return [start + number, *seen]

    return count, counted


def test_a_plain_function_is_copied_with_the_cells_that_it_shares() -> None:
    count, counted = _counting()
    count()
    assert is_plain(count, ())
    assert is_plain(counted, ())
    memo: dict[int, Any] = {}
    mine, told = plain_copy(count, memo), plain_copy(counted, memo)
    mine()
    assert told() == [2, 0, 1, 2]
    assert counted() == [1, 0, 1]


def test_what_is_known_stands_for_itself() -> None:
    net, other = nn.Linear(1, 1), nn.Linear(1, 1)

    def touch() -> nn.Module:
        return net

    assert not is_plain(touch, ())
    assert is_plain(touch, {id(net)})
    assert plain_copy(touch, {id(net): other})() is other


def _writes() -> None:
    global GLOBAL
    GLOBAL = nn.Linear(1, 1)


def _imports() -> Any:
    import os

    return os


@pytest.mark.parametrize(
    "function",
    [
        _by_name,
        _writes,
        _imports,
        _decorated(GLOBAL),
        lambda: vars(),
        lambda: [open for _ in range(2)],
        lambda value=GLOBAL: value,
        functools.partial(_writes),
        Trainer(GLOBAL).loss,
        torch.ones(1),
        [lambda: 0],
    ],
)
def test_functions_that_may_touch_more_are_not_plain(function: Any) -> None:
    assert not is_plain(function, ())
