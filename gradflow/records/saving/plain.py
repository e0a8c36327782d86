"""Records as plain data that strict JSON takes, and back, checked field by field.

NOTE [The form of the data]
A record is an object of its fields; their types need not be written, for the class tells them. Numbers that
JSON has no word for are the words `nan`, `inf` and `-inf`. Where a field may hold anything (`metrics`,
`extras`), the data tells its own types: what JSON has is itself, a list stands for a tuple, and an object
with a key that begins with `$` for what else there is (`gradflow.records.saving.free`).

NOTE [What is checked]
Only what `to_plain` can have written is accepted: every field is read by its type hint, an array also by its
number of axes and by the number of steps, which is the length of its first axis. That number is told by the
innermost record around the array that has a field `measured_steps` or `steps`. Errors tell the path of the
field.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import attrs
import numpy as np

from gradflow.errors import PipelineError, RecordFormatError
from gradflow.records.issues import OwnIssueType, issue_type
from gradflow.records.saving.free import from_free, to_free
from gradflow.records.saving.numbers import (
    Wrong,
    array_of,
    exact_float,
    expected,
    named,
    number_word,
    numbers_of,
)

FORMAT_VERSION = 1
"""Of the JSON files that are written; a file of a later one is refused."""

_T = TypeVar("_T")
_Reader = Callable[[Any, int | None], Any]  # (data, number of steps around it if known) → value


# ----------------------------------------------------------------------------------- to JSON


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile: millions of small objects are made, and none of them is any."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def write(value: Any, path: str | Path | None) -> str:
    """Return a record, or plain data, as strict JSON, and write it to `path` where one is given."""
    with uncollected():
        text = json.dumps(value if type(value) is dict else to_plain(value), allow_nan=False)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def to_plain(value: Any) -> Any:
    """Return a record as dicts, lists, strings and numbers that strict JSON takes.

    Non-finite numbers become the strings `nan`, `inf` and `-inf`. A class with a `format_version` has it
    written down under `format`, and is read back only from that version.
    """
    kind = type(value)
    if kind in AS_THEY_ARE:
        return value
    if kind is np.ndarray:
        return numbers_of(value)
    if kind is tuple:
        return [to_plain(v) for v in value]
    if isinstance(value, OwnIssueType):
        return value.value
    if (writers := field_writers(kind)) is not None:
        version = getattr(kind, "format_version", None)
        plain: dict[str, Any] = {} if version is None else {"format": version}
        for name, writer in writers:
            plain[name] = writer(getattr(value, name))
        return plain
    if isinstance(value, np.ndarray):
        return numbers_of(value)
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, np.generic):
        value = value.item()
    return number_word(value) if isinstance(value, float) else value


AS_THEY_ARE = frozenset({str, int, bool, type(None)})


@functools.cache
def field_writers(cls: type) -> list[tuple[str, Callable[[Any], Any]]] | None:
    """Return the fields of a record, and what writes each of them; None for another class."""
    if not attrs.has(cls):
        return None
    hints = typing.get_type_hints(cls)
    free = {f.name for f in attrs.fields(cls) if typing.get_args(hints[f.name])[1:] == (Any,)}
    return [(f.name, to_free if f.name in free else to_plain) for f in attrs.fields(cls)]


# --------------------------------------------------------------------------------- from JSON


def parsed(text: str | bytes) -> Any:
    """Return the data of strict JSON.

    Raises:
        RecordFormatError: if it is none, or holds a key twice.
    """
    try:
        with uncollected():
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecordFormatError:
        raise
    except RecursionError as error:
        raise RecordFormatError.at("expected a record, got lists or objects nested without end") from error
    except ValueError as error:  # besides what is no JSON: integers of thousands of digits, undecodable bytes
        raise RecordFormatError.at(f"expected JSON, but the text is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RecordFormatError.at(f"expected every key of an object once, got {twice!r} twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise RecordFormatError.at(f'expected strict JSON, got {word}, which stands as "nan", "inf" or "-inf"')


def from_plain(cls: type[_T], data: Any) -> _T:
    """Return the record of class `cls` from what `to_plain` gave.

    Raises:
        RecordFormatError: if anything in the data is not what `to_plain` gives for such a record; the message
            tells the path of the field, what was expected and what came.
    """
    try:
        with uncollected():
            return _record_reader(cls)(data, None)
    except Wrong as error:
        raise RecordFormatError.at(str(error)) from error
    except RecursionError as error:
        raise RecordFormatError.at("expected a record, got lists or objects nested without end") from error


@functools.cache
def _record_reader(cls: Any) -> _Reader:
    fields = {f.name: f for f in attrs.fields(cls)}
    hints = typing.get_type_hints(cls)
    readers = {name: _reader(hints[name], f.metadata.get("axes", 1)) for name, f in fields.items()}
    needed = [name for name, f in fields.items() if f.default is attrs.NOTHING]
    version = getattr(cls, "format_version", None)
    steps_field = next((name for name in ("measured_steps", "steps") if name in fields), None)

    def read(data: Any, steps: int | None) -> Any:
        if type(data) is not dict:
            raise expected(f"an object for {cls.__name__}", data)
        if version is not None:
            data = dict(data)
            found = data.pop("format", None)
            if type(found) is not int or found != version:
                raise Wrong(f"expected format {version}, got {found!r}")
        if not data.keys() <= fields.keys() or not all(name in data for name in needed):
            missing, unknown = [n for n in needed if n not in data], [n for n in data if n not in fields]
            raise Wrong(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}")
        if steps_field is not None:
            with named(steps_field):
                own = readers[steps_field](data[steps_field], None) if steps_field in data else ()
            steps = own if isinstance(own, int) else len(own)
        values = {}
        name = ""
        try:
            for name, value in data.items():
                values[name] = readers[name](value, steps)
        except Wrong as error:
            raise error.below(name) from error.__cause__
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:  # what a converter or validator of the class refuses
            raise Wrong(f"expected the fields of {cls.__name__}: {error}") from error

    return read


def _reader(hint: Any, axes: int) -> _Reader:
    """Return the function that reads a field of this type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return _union_reader(args, axes)
    if origin is np.ndarray:
        dtype = np.dtype(typing.get_args(args[1])[0])
        return functools.partial(_array, dtype=dtype, axes=axes)
    if origin is tuple:
        return functools.partial(_tuple, entry=_reader(args[0], 1))
    if origin in (Mapping, dict):
        return _free_mapping if args[1] is Any else functools.partial(_mapping, entry=_reader(args[1], 1))
    if origin is None and isinstance(hint, type):
        if attrs.has(hint):
            return lambda data, steps: _record_reader(hint)(data, steps)
        if hint is float:
            return lambda data, steps: exact_float(data)
        if hint in _SCALARS:
            return functools.partial(_scalar, kind=hint)
        return functools.partial(_member, enumeration=hint)
    raise TypeError(f"from_plain: no way to read a field of type {hint!r}")


def _union_reader(args: tuple[Any, ...], axes: int) -> _Reader:
    if OwnIssueType in args:
        return _issue_type
    (inner,) = (_reader(arg, axes) for arg in args if arg is not type(None))
    return lambda data, steps: None if data is None else inner(data, steps)


_SCALARS = {int: "a whole number", bool: "true or false", str: "a text"}


def _scalar(data: Any, steps: int | None, *, kind: type) -> Any:
    if type(data) is not kind:
        raise expected(_SCALARS[kind], data)
    return data


def _member(data: Any, steps: int | None, *, enumeration: Any) -> Any:
    known = {member.value: member for member in enumeration}
    if type(data) is not str or data not in known:
        raise expected(f"one of {', '.join(known)}", data)
    return known[data]


def _issue_type(data: Any, steps: int | None) -> Any:
    try:
        return issue_type(_scalar(data, steps, kind=str))
    except PipelineError as error:
        raise expected("a type of issue: a name in capitals", data) from error


def _tuple(data: Any, steps: int | None, *, entry: _Reader) -> tuple[Any, ...]:
    if type(data) is not list:
        raise expected("a list", data)
    values = []
    try:
        for value in data:
            values.append(entry(value, steps))
    except Wrong as error:
        raise error.below(len(values)) from error.__cause__
    return tuple(values)


def _mapping(data: Any, steps: int | None, *, entry: _Reader) -> dict[str, Any]:
    if type(data) is not dict:
        raise expected("an object", data)
    values = {}
    for key, value in data.items():
        with named(key):
            values[key] = entry(value, steps)
    return values


def _free_mapping(data: Any, steps: int | None) -> Any:
    found = from_free(data)
    if not isinstance(found, Mapping):
        raise expected("an object", data)
    return found


def _array(data: Any, steps: int | None, *, dtype: np.dtype[Any], axes: int) -> np.ndarray[Any, Any]:
    array = array_of(data, dtype, axes)
    if steps is not None and len(array) != steps:
        raise Wrong(f"expected {steps} entries, one for each step, got {len(array)}")
    return array
