"""Numbers and arrays of numbers as JSON has them, and back without loss; and what is wrong where."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gradflow.records.values import NAN

WORDS = {"nan": NAN, "inf": math.inf, "-inf": -math.inf}  # numbers that JSON has no word for
_FEW = 64
_SHOWN = 40  # letters of a value in a message


class Wrong(Exception):
    """What is wrong with data; the path to it is put together on the way out."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.path: list[str | int] = []

    def below(self, name: str | int) -> Wrong:
        """Return the same error, seen from one level further out."""
        self.path.insert(0, name)
        return self

    def __str__(self) -> str:
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        where = "".join(parts).removeprefix(".")
        return f"{where}: {self.detail}" if where else self.detail


@contextlib.contextmanager
def named(name: str | int) -> Iterator[None]:
    """Add a name to the path of what is wrong inside."""
    try:
        yield
    except Wrong as error:
        raise error.below(name) from error.__cause__


def expected(what: str, data: Any) -> Wrong:
    """Return the error for data that is not what was expected."""
    shown = repr(data) if isinstance(data, (str, bool, float)) else ""
    if type(data) is int:
        shown = str(data) if abs(data) < 10**_SHOWN else "with dozens of digits"
    if len(shown) > _SHOWN:
        shown = shown[: _SHOWN - 3] + "..."
    kind = "null" if data is None else type(data).__name__
    return Wrong(f"expected {what}, got {kind}{' ' if shown else ''}{shown}")


def number_word(value: float) -> float | str:
    """Return a float as JSON takes it: one that is not finite as a word."""
    return value if math.isfinite(value) else repr(float(value))


def exact_float(data: Any) -> float:
    """Return a float from a number or one of the words.

    Raises:
        Wrong: if it is none of these, or no float is equal to it.
    """
    if type(data) is float and math.isfinite(data):  # one that is too large for a float is read as infinite
        return data
    if type(data) is str and data in WORDS:
        return WORDS[data]
    if type(data) is int and _is_float(data):
        return float(data)
    raise expected("a number, 'nan', 'inf' or '-inf'", data)


def _is_float(value: int) -> bool:
    try:
        return float(value) == value
    except OverflowError:
        return False


def numbers_of(array: np.ndarray[Any, Any]) -> list[Any]:
    """Return an array as nested lists that JSON takes."""
    values = array.tolist()
    if array.dtype.kind != "f":
        return values
    # Where the sum is finite, so is each; of few numbers it is had faster than by NumPy.
    few = array.ndim == 1 and len(values) <= _FEW
    return values if (few and math.isfinite(sum(values))) or np.isfinite(array).all() else _worded(values)


def _worded(values: Any) -> Any:
    return [_worded(v) for v in values] if isinstance(values, list) else number_word(values)


def array_of(data: Any, dtype: np.dtype[Any], axes: int) -> np.ndarray[Any, Any]:
    """Return the array that nested lists stand for, without loss.

    Args:
        data: lists of numbers in lists, as deep as there are axes.
        dtype: of the elements: floats, integers, booleans or texts.
        axes: how many the array has; an empty list stands for size 0 along all of them.

    Raises:
        Wrong: if it is no such list, the rows differ in length, or a number does not fit the dtype.
    """
    if type(data) is np.ndarray:  # of an archive
        if data.dtype.kind != dtype.kind or data.ndim != axes or not data.dtype.isnative:
            raise Wrong(f"expected an array of {dtype.name} with {axes} axes, got {data.dtype}, {data.ndim}")
        return data
    if type(data) is not list:
        raise expected("a list" if axes == 1 else f"lists in lists, {axes} deep", data)
    if axes == 1:
        return _row(data, dtype)
    rows = []
    for i, row in enumerate(data):
        with named(i):
            rows.append(array_of(row, dtype, axes - 1))
            if rows[i].shape != rows[0].shape:
                raise Wrong(f"expected {len(rows[0])} entries, as in the rows before, got {len(rows[i])}")
    return np.array(rows, dtype=dtype) if rows else np.empty((0,) * axes, dtype)


_ENTRIES = {
    "f": frozenset({float, int, str}),
    "i": frozenset({int}),
    "u": frozenset({int}),
    "b": frozenset({bool}),
    "U": frozenset({str}),
}
_ENTRY = {"f": "a number, 'nan', 'inf' or '-inf'", "b": "true or false", "U": "a text"}


def _row(data: list[Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    kinds, known = set(map(type, data)), _ENTRIES[dtype.kind]
    what = _ENTRY.get(dtype.kind, "a whole number")
    if not kinds <= known:
        at = next(i for i, entry in enumerate(data) if type(entry) not in known)
        raise expected(what, data[at]).below(at)
    if dtype.kind == "f":
        return _floats(data, dtype, kinds)
    try:
        array = np.array(data, dtype=dtype if dtype.kind != "U" else str)
    except OverflowError:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        at = next(i for i, entry in enumerate(data) if not low <= entry <= high)
        raise expected(f"a whole number from {low} to {high}", data[at]).below(at) from None
    if dtype.kind == "U" and array.tolist() != data:  # NumPy drops zeros at the end of a text
        raise Wrong("expected texts that do not end in a zero character")
    return array


def _floats(data: list[Any], dtype: np.dtype[Any], kinds: set[type]) -> np.ndarray[Any, Any]:
    """Return floats from numbers, all of them finite, and words."""
    exact = data
    if kinds == {float} and dtype == np.float64 and math.isfinite(sum(data)):
        return np.array(data, dtype=dtype)
    if kinds != {float}:
        exact = []
        try:
            for entry in data:
                exact.append(exact_float(entry))
        except Wrong as error:
            raise error.below(len(exact)) from None
    with np.errstate(over="ignore"):
        array = np.array(exact, dtype=dtype)
    lost = [] if str in kinds else np.flatnonzero(~np.isfinite(array))
    if len(lost):
        raise expected("a finite number", data[lost[0]]).below(int(lost[0]))
    if dtype != np.float64 and not np.array_equal(array.astype(np.float64), exact, equal_nan=True):
        raise Wrong(f"expected numbers that {dtype.name} holds exactly")
    return array
