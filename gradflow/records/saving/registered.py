"""Classes of records by name: what JSON writes down of them, and how pickle and copies make them anew.

NOTE [Made anew]
A record that pickle or `copy` rebuilt field by field would hold writable arrays, as NumPy's copies are; so a
registered record is rebuilt by calling its class, whose converters make arrays read-only. gradflow's own
records are registered in the same way.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any, TypeVar, overload

import attrs

from gradflow.errors import MeasurementError

_T = TypeVar("_T")
_BY_NAME: dict[str, type] = {}


@overload
def register_record(cls: type[_T], *, name: str | None = None) -> type[_T]: ...


@overload
def register_record(cls: None = None, *, name: str | None = None) -> Callable[[type[_T]], type[_T]]: ...


def register_record(cls: Any = None, *, name: str | None = None) -> Any:
    """Register a record of one's own, so that it comes back from JSON as what it was; a decorator.

    Where a class is not registered when JSON is read, what it held comes back as a read-only mapping. A class
    that is defined again, as in a notebook, takes the place of the former one.

    Args:
        cls: a class made by `attrs.frozen`; None where the decorator is called with `name=`.
        name: what JSON calls it; by default the name of the class. Other processes must use the same.

    Raises:
        MeasurementError: if it is no frozen attrs class, or the name is another class's.

    >>> @register_record(name="Share of outliers")
    ... @attrs.frozen
    ... class Share:
    ...     layer: str
    ...     share: float
    """
    if cls is None:
        return lambda decorated: register_record(decorated, name=name)
    if not isinstance(cls, type) or not attrs.has(cls) or cls.__setattr__ is not _Frozen.__setattr__:
        raise MeasurementError(
            f"register_record: expected a frozen attrs class, got {cls!r}. Put @attrs.frozen below "
            "@register_record."
        )
    name = cls.__name__ if name is None else name
    other = _BY_NAME.get(name, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise MeasurementError(
            f"register_record: {name!r} is the name of {other.__module__}.{other.__qualname__}. Give "
            f"{cls.__module__}.{cls.__qualname__} another one: @register_record(name=...)."
        )
    _BY_NAME[name] = cls
    copyreg.pickle(cls, _reduced)
    return cls


@attrs.frozen
class _Frozen:
    """Shows what attrs puts in the place of `__setattr__` in a frozen class."""


def registered(name: str) -> type | None:
    """Return the class that is registered under a name, or None."""
    return _BY_NAME.get(name)


def name_of(cls: type) -> str:
    """Return what JSON calls a class: the name it is registered under, else its own."""
    return next((name for name, known in _BY_NAME.items() if known is cls), cls.__name__)


def arguments(record: Any) -> dict[str, Any]:
    """Return the arguments that make a record anew."""
    return {field.alias: getattr(record, field.name) for field in attrs.fields(type(record)) if field.init}


def _made(cls: type[_T], values: dict[str, Any]) -> _T:
    return cls(**values)


def _reduced(record: Any) -> tuple[Any, ...]:
    return _made, (type(record), arguments(record))
