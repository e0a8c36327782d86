"""What the user's function returns: called with `--set`, checked, put on a device and in a dtype."""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradflow.cli.faults import CommandError, explained
from gradflow.cli.target import DEFAULT_NAME, Target

LOOP = ("clip", "accumulate", "scheduler", "scaler", "step_fn")
RETURNS = "(model, batches, loss_fn), or with an optimizer as fourth, or further options of diagnose as fifth"
_KINDS = (bool, int, float)
_TRUTHS = {"true": True, "false": False}


class Built(NamedTuple):
    """What is to be diagnosed.

    Args:
        model, batches, loss_fn: as `diagnose` takes them.
        optimizer: or None.
        loop: what else the training loop does, as options of `diagnose`.
        place: the file and the line at which the function begins; None if it is not known.
    """

    model: Any
    batches: Any
    loss_fn: Any
    optimizer: Any = None
    loop: Mapping[str, Any] = types.MappingProxyType({})
    place: tuple[Path, int] | None = None


def built(module: Any, target: Target, options: Any) -> Built:
    """Return what the function that a target names returns.

    Args:
        module: the user's file, after it ran.
        target: the function's name, and the file's.
        options: of the command: `set`, `device` and `dtype`.

    Raises:
        CommandError: if there is no such function, or it raises, or returns something else.
    """
    build = _function(module, target)
    arguments = builder_arguments(build, options.set, f"{target}()")
    with explained(f"{target}() raised"):
        found = build(**arguments)
    if not isinstance(found, (tuple, list)) or len(found) not in (3, 4, 5):
        raise CommandError(f"{target}() must return {RETURNS}, but returned {_described(found)}")
    loop = found[4] if len(found) == 5 else {}
    if not isinstance(loop, dict) or set(loop) - set(LOOP):
        raise CommandError(
            f"{target}(): the fifth value must be a dict of {', '.join(LOOP)}, but is {loop!r:.100}"
        )
    optimizer = found[3] if len(found) > 3 else None
    given = Built(*found[:3], optimizer=optimizer, loop=loop, place=_place(build))
    wanted = " ".join(filter(None, [options.device, options.dtype]))
    with explained(f"what {target}() returned cannot be made {wanted}"):
        return _placed(given, options.device, options.dtype)


def _place(build: Any) -> tuple[Path, int] | None:
    """Return where a function is written; None for a notebook's, whose lines are not those of its file."""
    code = getattr(inspect.unwrap(build), "__code__", None)
    if code is None or not Path(code.co_filename).is_file():
        return None
    return Path(code.co_filename), code.co_firstlineno


def _function(module: Any, target: Target) -> Any:
    build = getattr(module, target.name, None)
    if callable(build):
        return build
    name, where = target.name, target.place
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    others = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(name, own or others, n=3, cutoff=0.0)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if build is not None:
        raise CommandError(f"{name!r} in {where} is a {type(build).__name__}, not a function{hint}")
    make = f"; write one that returns {RETURNS}" if name == DEFAULT_NAME else ""
    raise CommandError(f"there is no function {name!r} in {where}{hint}{make}")


# ---------------------------------------------------------------------------------- arguments


def builder_arguments(
    build: Callable[..., Any], pairs: Sequence[tuple[str, str]], where: str
) -> dict[str, Any]:
    """Return the arguments of a function from (name, text) pairs, the last of each name.

    Args:
        build: the function.
        pairs: texts are taken as Python literals where they are such, else as they stand.
        where: what messages call the function.

    Raises:
        CommandError: if it has no such parameter, a parameter without a default has no value, or one whose
            default or type is a number or a truth value has something else.
    """
    parameters = _parameters(build)
    if parameters is None:
        return {name: _value(text) for name, text in pairs}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    told = ", ".join(str(p) for p in named.values())
    arguments = {}
    for name, text in pairs:
        if name not in named and not takes_any:
            near = difflib.get_close_matches(name, named, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            has = f"its parameters are {told}" if named else "it has no parameters"
            raise CommandError(f"{where} has no parameter {name!r}; {has}{hint}")
        arguments[name] = _fitting(named[name], text, where) if name in named else _value(text)
    missing = [n for n, p in named.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise CommandError(
            f"{where} needs a value for {', '.join(missing)}: give it by --set {missing[0]}=VALUE; its "
            f"parameters are {told}"
        )
    return arguments


def _parameters(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a function; None for one that was made by other means than `def`."""
    with contextlib.suppress(Exception):  # annotations may be of names that are not there when it runs
        return inspect.signature(build, eval_str=True).parameters
    try:
        return inspect.signature(build).parameters
    except (TypeError, ValueError):
        return None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


def _fitting(parameter: inspect.Parameter, text: str, where: str) -> Any:
    """Return a value that a parameter takes, as far as its default or its type tells."""
    value, kind = _value(text), type(parameter.default)
    if parameter.default is parameter.empty:
        kind = parameter.annotation if parameter.annotation in _KINDS else object
    if kind is bool and isinstance(value, str):
        value = _TRUTHS.get(value.lower(), value)
    if kind is float and isinstance(value, str):  # inf and nan are numbers, but no literals
        with contextlib.suppress(ValueError):
            value = float(text)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {bool: isinstance(value, bool), int: is_number, float: is_number}.get(kind, True)
    if fits or value is None:
        return value
    wanted = "True or False" if kind is bool else "a number"
    raise CommandError(f"{where}: expected {wanted} for the parameter {parameter}, got {text!r}")


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values ({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


# ------------------------------------------------------------------------------ device and dtype


def _placed(given: Built, device: str | None, dtype: str | None) -> Built:
    """Return what is to be diagnosed on a device, which batches follow to by themselves, and in a dtype."""
    import torch

    if device is None and dtype is None:
        return given
    to: dict[str, Any] = {} if device is None else {"device": torch.device(device)}
    if dtype is not None:
        to["dtype"] = getattr(torch, dtype)
    for part in (given.model, given.loss_fn):
        if isinstance(part, torch.nn.Module):
            part.to(**to)  # in place: the optimizer holds these very parameters
    several = given.optimizer if isinstance(given.optimizer, (list, tuple)) else [given.optimizer]
    several = given.optimizer.values() if isinstance(given.optimizer, Mapping) else several
    for optimizer in several:
        if isinstance(optimizer, torch.optim.Optimizer) and optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())  # which puts its state where the parameters are
    return given if dtype is None else given._replace(batches=_cast(given.batches, to["dtype"]))


def _cast(batches: Any, dtype: Any) -> Any:
    """Return a source of the same batches whose floating-point tensors have a dtype."""
    from torch import Tensor

    from gradflow.functional.model.trees import map_floats

    def cast(batch: Any) -> Any:
        return map_floats(lambda position, x: x.to(dtype), batch)

    is_one = isinstance(batches, (Tensor, Mapping, type)) or (
        isinstance(batches, tuple) and any(isinstance(item, Tensor) for item in batches)
    )
    if is_one:  # which `diagnose` refuses, in its own words
        return batches
    source: Any = batches
    if hasattr(source, "__next__"):
        return map(cast, source)
    if hasattr(source, "__iter__") or hasattr(source, "__getitem__"):
        return _Again(lambda: map(cast, iter(source)))
    return (lambda: cast(source())) if callable(source) else source


class _Again:
    """What can be gone through again, as a list or a loader can."""

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return self._start()
