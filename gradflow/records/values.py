"""Values that do not change: plain data made read-only, and the read-only mapping that records hold.

NOTE [Content]
Arrays compare elementwise, a NaN differs from itself, and a `dict` can be changed and has no hash. So
whatever enters a mapping of a record is frozen first: sequences become tuples, mappings `ReadOnlyMapping`,
arrays read-only copies, and every NaN the one object `NAN`. Two mappings are equal, and hash alike, by their
content: arrays by dtype, shape and bytes, records field by field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import attrs
import numpy as np

NAN = float("nan")
"""The one NaN that records hold, so that two of them are equal."""
MAX_DEPTH = 32  # of containers within one another
# Arrays that JSON keeps exactly: by name of the dtype; texts, of any length, besides.
DTYPES = {
    np.dtype(name).name: np.dtype(name)
    for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
}


class ReadOnlyMapping(Mapping[Any, Any]):
    """A mapping that cannot be changed; with a hash where its values have one, and fit for pickle and copies.

    Args:
        items: a mapping, or pairs of key and value; what they hold is frozen too.

    >>> seen = ReadOnlyMapping({"share": [0.1, 0.2]})
    >>> seen, seen["share"], seen == {"share": (0.1, 0.2)}
    ({'share': (0.1, 0.2)}, (0.1, 0.2), True)
    """

    __slots__ = ("_items",)
    _items: dict[Any, Any]

    def __init__(self, items: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = ()) -> None:
        object.__setattr__(self, "_items", {key: frozen(value) for key, value in dict(items).items()})

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self._items)

    def __or__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**self, **other} if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**other, **self} if isinstance(other, Mapping) else NotImplemented

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} is read-only: {name!r} cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} is read-only: {name!r} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        return _content(self) == _content(frozen(other)) if isinstance(other, Mapping) else NotImplemented

    def __hash__(self) -> int:
        return _hash(_content(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._items,)

    def __repr__(self) -> str:
        return repr(self._items)


def one_nan(value: float) -> float:
    """Return a number; `NAN` for any NaN, so that tuples that hold one compare."""
    return NAN if value != value else value


def frozen(value: Any) -> Any:
    """Return a value that cannot be changed: see NOTE [Content]. What is no plain data stays as it is."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return one_nan(value)
    if isinstance(value, np.ndarray):
        return read_only(value)
    if isinstance(value, (list, tuple)):
        return tuple(frozen(entry) for entry in value)
    if isinstance(value, Mapping) and not isinstance(value, ReadOnlyMapping):
        return ReadOnlyMapping(value)
    return value


def read_only(value: Any, dtype: Any = None) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a read-only copy as an array, in which every NaN has the same bits."""
    array = np.array(value, dtype=dtype, order="C")
    kind = array.dtype
    if kind.kind == "U":
        array = np.array(array.tolist(), dtype=str).reshape(array.shape)  # no wider than its longest text
    elif not kind.isnative:
        array = array.astype(kind.newbyteorder("="))
    if kind.kind == "f":
        array[np.isnan(array)] = np.nan  # equal content is equal bytes
    elif kind.kind == "c":
        parts = array.reshape(-1).view(real_dtype(array.dtype))
        parts[np.isnan(parts)] = np.nan
    array.setflags(write=False)
    return array


def real_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the parts of a number: of a complex one, that of its real part."""
    return np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype


def _content(value: Any) -> Any:
    """Return what a frozen value holds, as something that compares."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return {key: _content(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_content, value))
    if isinstance(value, complex):
        return ("complex", one_nan(value.real), one_nan(value.imag))
    if attrs.has(type(value)):
        fields = (field.name for field in attrs.fields(type(value)) if field.eq)
        return (type(value), *(_content(frozen(getattr(value, name))) for name in fields))
    return one_nan(value) if isinstance(value, float) else value


def _hash(content: Any) -> int:
    if isinstance(content, dict):
        return hash(frozenset((key, _hash(value)) for key, value in content.items()))
    return hash(tuple(map(_hash, content))) if isinstance(content, tuple) else hash(content)


def unkept(value: Any, where: str, depth: int = 0) -> str:
    """Return why a record cannot keep a value, or JSON not bring it back; "" where they can.

    Args:
        value: what is to be kept.
        where: how to call it, such as `extras['share']`.
        depth: of containers around it.
    """
    if depth > MAX_DEPTH:
        return f"{where[:60]}... lies in more than {MAX_DEPTH} containers"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return ""
    if isinstance(value, np.ndarray):
        known = value.dtype.kind == "U" or value.dtype.name in DTYPES
        return "" if known else f"{where} is an array of {value.dtype}, expected numbers, booleans or texts"
    parts: Iterable[tuple[str, Any]]
    if isinstance(value, Mapping):
        for key in value:
            if not _is_key(key):
                return f"{where} has the key {key!r}, expected a text, a number or a tuple of such"
        parts = ((f"{where}[{key!r}]", entry) for key, entry in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((f"{where}[{i}]", entry) for i, entry in enumerate(value))
    elif attrs.has(type(value)):
        fields = attrs.fields(type(value))
        parts = ((f"{where}.{f.name}", getattr(value, f.name)) for f in fields if f.init)
    else:
        kind = type(value).__name__
        hint = " A record holds no tensor: tensor.tolist() is plain data." if kind == "Tensor" else ""
        return (
            f"{where} is of class {kind}, expected numbers, texts, NumPy arrays, tuples and mappings of them,"
            f" or records that attrs makes.{hint}"
        )
    return next((found for at, entry in parts if (found := unkept(frozen(entry), at, depth + 1))), "")


def _is_key(key: Any) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_key, key))
    return key is None or (isinstance(key, (bool, int, float, str)) and not _is_nan(key))


def _is_nan(key: Any) -> bool:
    return isinstance(key, float) and math.isnan(key)
