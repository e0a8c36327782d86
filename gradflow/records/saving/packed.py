"""Records as a compressed NumPy archive: arrays as such, and JSON for what is no array.

NOTE [The form of the archive]
The entry `json` is the text of what `to_plain` gives, in which two things are written otherwise. An array is
`{"$array": n}`, the entry of that number. A tuple of records of one class is told field by field, since
thousands of small arrays of one shape are one array: `{"$columns": {field: [value, ...]}, "number": n}`,
where the arrays of a field, if all have one shape and dtype, are `{"$array": n}`, stacked. Nothing is
pickled. When it is read, the arrays are put back, and everything is checked as that of JSON is.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from gradflow.errors import RecordFormatError
from gradflow.records.saving.free import to_free
from gradflow.records.saving.plain import (
    AS_THEY_ARE,
    field_writers,
    from_plain,
    parsed,
    to_plain,
    uncollected,
)

_T = TypeVar("_T")
_Arrays = list[np.ndarray[Any, Any]]
# Another file of NumPy's, one that is cut off, damaged, encrypted, or packed as NumPy packs none.
_UNREADABLE = (
    ValueError, OSError, TypeError, MemoryError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_NEITHER = AS_THEY_ARE | {float}  # lists nor objects


def to_npz(record: Any, path: str | os.PathLike[str]) -> None:
    """Write a record to a compressed archive; see NOTE [The form of the archive].

    Args:
        record: the record.
        path: of the file, as it is: no ending is added.
    """
    arrays: _Arrays = []
    with uncollected():
        text = json.dumps(_packed(record, arrays), allow_nan=False)
    entries: dict[str, Any] = {str(i): array for i, array in enumerate(arrays)}
    with Path(path).open("wb") as file:
        np.savez_compressed(file, json=np.frombuffer(text.encode(), dtype=np.uint8), **entries)


def from_npz(cls: type[_T], path: str | os.PathLike[str]) -> _T:
    """Return the record of class `cls` from what `to_npz` wrote.

    Raises:
        RecordFormatError: if the file is no such archive, or anything in it is not what `to_npz` writes.
        FileNotFoundError: if there is no such file.
    """
    with Path(path).open("rb") as file:
        content = io.BytesIO(
            file.read()
        )  # what cannot be read is refused as it is; the rest is the archive's
    try:
        with np.load(content, allow_pickle=False) as archive:
            entries = {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise RecordFormatError.at(f"expected a NumPy archive without pickled objects: {error}") from error
    data = entries.pop("json", None)
    if data is None or data.dtype != np.uint8:
        raise RecordFormatError.at("expected a record, got an archive without the entry 'json'")
    with uncollected():
        return from_plain(cls, _unpacked(parsed(data.tobytes()), entries))


def _packed(value: Any, arrays: _Arrays) -> Any:
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"$array": len(arrays) - 1}
    if isinstance(value, tuple):
        kinds = set(map(type, value))
        if len(value) > 1 and len(kinds) == 1 and (writers := field_writers(kinds.pop())) is not None:
            columns = {name: _column([getattr(v, name) for v in value], w, arrays) for name, w in writers}
            return {"$columns": columns, "number": len(value)}
        return [_packed(v, arrays) for v in value]
    if (writers := field_writers(type(value))) is not None:
        plain = {
            name: (to_free if writer is to_free else lambda v: _packed(v, arrays))(getattr(value, name))
            for name, writer in writers
        }
        version = getattr(type(value), "format_version", None)
        return plain if version is None else {"format": version, **plain}
    return to_plain(value)


def _column(values: list[Any], writer: Any, arrays: _Arrays) -> Any:
    """Return the values of one field of several records."""
    if writer is to_free:
        return [to_free(value) for value in values]
    kinds = set(map(type, values))
    if kinds <= AS_THEY_ARE:
        return values
    if kinds == {np.ndarray} and len({(value.shape, value.dtype.kind) for value in values}) == 1:
        return _packed(np.stack(values), arrays)
    return [_packed(value, arrays) for value in values]


def _unpacked(value: Any, entries: dict[str, np.ndarray[Any, Any]]) -> Any:
    """Return plain data with arrays in it."""
    if isinstance(value, list):
        if set(map(type, value)) <= _NEITHER:
            return value
        return [_unpacked(v, entries) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$array"} and type(value["$array"]) is int:
        return _entry(value, entries)
    if value.keys() == {"$columns", "number"}:
        return _rows(value["$columns"], value["number"], entries)
    return {key: _unpacked(v, entries) for key, v in value.items()}


def _entry(value: dict[str, Any], entries: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    found = entries.get(str(value["$array"]))
    return _wrong(f"expected an array {value['$array']}, which is not there") if found is None else found


def _rows(columns: Any, number: Any, entries: dict[str, np.ndarray[Any, Any]]) -> list[dict[str, Any]]:
    """Return records of one class as plain data, from their fields."""
    if type(columns) is not dict or type(number) is not int:
        _wrong("expected the fields of several records, and their number")
    found = {name: _unpacked(column, entries) for name, column in columns.items()}
    if any(not isinstance(column, (list, np.ndarray)) or len(column) != number for column in found.values()):
        _wrong(f"expected {number} values of each field")
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _wrong(detail: str) -> NoReturn:
    raise RecordFormatError.at(detail)
