"""Data of no declared type as JSON, and back as it was: what `Issue.metrics` and `FlowRecord.extras` hold.

NOTE [Marks]
What JSON has no form of its own for is an object with one mark, a key that begins with `$`:

- `{"$array": "float32", "shape": [2, 1], "values": [1.0, 2.0]}`; of complex numbers the real and the
  imaginary part of each; texts are `"text"`;
- `{"$complex": [1.0, "nan"]}`;
- `{"$text": "nan"}`: the text, not the number;
- `{"$pairs": [[key, value], ...]}`: a mapping with a key that is no text, or begins with `$`;
- `{"$record": "NAME", "fields": {...}}`: a record, by the name that its class is registered under.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np

from gradflow.records.saving.numbers import (
    WORDS,
    Wrong,
    array_of,
    exact_float,
    expected,
    named,
    number_word,
    numbers_of,
)
from gradflow.records.saving.registered import arguments, name_of, registered
from gradflow.records.values import DTYPES, MAX_DEPTH, ReadOnlyMapping, real_dtype

_MAX_LEVELS = 4 * MAX_DEPTH  # a mark takes up to three


def to_free(value: Any) -> Any:
    """Return any value of a record as what strict JSON takes."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, np.ndarray):
        return _plain_array(value)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: to_free(entry) for key, entry in value.items()}
        return {"$pairs": [[to_free(key), to_free(entry)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return [to_free(entry) for entry in value]
    if attrs.has(type(value)):
        fields = {name: to_free(entry) for name, entry in arguments(value).items()}
        return {"$record": name_of(type(value)), "fields": fields}
    if isinstance(value, complex):
        return {"$complex": [number_word(value.real), number_word(value.imag)]}
    if isinstance(value, str):
        return {"$text": value} if value in WORDS else value
    return number_word(value) if isinstance(value, float) else value


def _plain_array(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    flat = np.ascontiguousarray(array).reshape(-1)
    name = "text" if array.dtype.kind == "U" else array.dtype.name
    if array.dtype.kind == "c":
        flat = flat.view(real_dtype(flat.dtype))
    return {"$array": name, "shape": list(array.shape), "values": numbers_of(flat)}


def from_free(data: Any, depth: int = 0) -> Any:
    """Return what `to_free` was given; a record whose class is not registered as a mapping of its fields.

    Raises:
        Wrong: if `to_free` gives no such data.
    """
    if depth > _MAX_LEVELS:
        raise Wrong(f"expected at most {_MAX_LEVELS} lists or objects in one another")
    if type(data) is list:
        return tuple(_entries(enumerate(data), depth).values())
    if type(data) is not dict:
        return exact_float(data) if type(data) is float or data in WORDS else data
    mark = next((key for key in data if key.startswith("$")), None)
    if mark is None:
        return ReadOnlyMapping(_entries(data.items(), depth))
    read, keys = _MARKS.get(mark, (None, ()))
    if read is None or data.keys() != {mark, *keys}:
        known = ", ".join(_MARKS)
        raise Wrong(f"expected one mark of {known} with the keys it has, got the keys {list(data)[:5]}")
    return read(data, depth)


def _entries(items: Any, depth: int) -> dict[Any, Any]:
    found = {}
    name: Any = ""
    try:
        for name, entry in items:
            found[name] = from_free(entry, depth + 1)
    except Wrong as error:
        raise error.below(name) from error.__cause__
    return found


def _array(data: dict[str, Any], depth: int) -> Any:
    name, shape, values = data["$array"], data["shape"], data["values"]
    if type(name) is not str or not (name == "text" or name in DTYPES):
        raise expected(f"one of text, {', '.join(DTYPES)}", name).below("$array")
    with named("shape"):
        sizes = array_of(shape, np.dtype(np.int64), 1).tolist()
    dtype = np.dtype(str) if name == "text" else DTYPES[name]
    parts = {"c": 2}.get(dtype.kind, 1)
    with named("values"):
        flat = array_of(values, real_dtype(dtype), 1)
        if any(size < 0 for size in sizes) or math.prod(sizes) * parts != len(flat):
            raise Wrong(f"expected as many numbers as the shape {sizes} has, got {len(flat)}")
    try:
        return (flat.view(dtype) if parts == 2 else flat).reshape(sizes)
    except ValueError as error:  # more axes than NumPy has
        raise Wrong(f"expected a shape of an array, got {len(sizes)} sizes") from error


def _complex(data: dict[str, Any], depth: int) -> complex:
    with named("$complex"):
        real, *rest = array_of(data["$complex"], np.dtype(np.float64), 1).tolist() or [0.0]
        if len(rest) != 1:
            raise expected("two numbers", data["$complex"])
        return complex(real, rest[0])


def _text(data: dict[str, Any], depth: int) -> str:
    text = data["$text"]
    if type(text) is not str or text not in WORDS:
        raise expected("'nan', 'inf' or '-inf'", text).below("$text")
    return text


def _pairs(data: dict[str, Any], depth: int) -> ReadOnlyMapping:
    with named("$pairs"):
        pairs = from_free(data["$pairs"], depth)
        if not isinstance(pairs, tuple) or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            raise expected("a list of pairs of key and value", data["$pairs"])
        try:
            found = dict(pairs)
        except TypeError as error:
            raise Wrong(f"expected keys that have a hash ({error})") from error
        if len(found) != len(pairs):
            raise Wrong("expected every key once")
        return ReadOnlyMapping(found)


def _record(data: dict[str, Any], depth: int) -> Any:
    name, fields = data["$record"], data["fields"]
    if type(name) is not str or type(fields) is not dict:
        raise Wrong("expected the name of a class, and an object of its fields")
    with named("fields"):
        values = _entries(fields.items(), depth)
    cls = registered(name)
    if cls is None:
        return ReadOnlyMapping(values)
    for field in attrs.fields(cls) if attrs.has(cls) else ():
        if "axes" in field.metadata and isinstance(values.get(field.name), tuple):
            # A list would be made an array, of other axes where it holds arrays, and be written as one.
            raise expected("an array", fields[field.name]).below(field.name).below("fields")
    try:
        return cls(**ReadOnlyMapping(values))
    except Exception as error:  # a class of one's own checks its fields as it likes
        raise Wrong(f"expected the fields of the registered {name}, but it says: {error}") from error


_Read = Callable[[dict[str, Any], int], Any]
_MARKS: dict[str, tuple[_Read | None, tuple[str, ...]]] = {
    "$array": (_array, ("shape", "values")),
    "$complex": (_complex, ()),
    "$text": (_text, ()),
    "$pairs": (_pairs, ()),
    "$record": (_record, ("fields",)),
}
