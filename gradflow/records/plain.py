"""Records as plain data that strict JSON takes, and back."""

from __future__ import annotations

import enum
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import numpy as np

from gradflow.errors import RecordFormatError

FORMAT_VERSION = 1


_T = TypeVar("_T")


def write(data: Any, path: str | Path | None) -> str:
    """Return plain data as strict JSON, and write it to `path` where one is given."""
    text = json.dumps(data, allow_nan=False)
    if path is not None:
        Path(path).write_text(text)
    return text


def _number(value: float) -> float | str:
    return value if np.isfinite(value) else repr(float(value))  # "nan", "inf", "-inf"


def to_plain(value: Any) -> Any:
    """Return a record as dicts, lists, strings and numbers that strict JSON takes.

    Non-finite numbers become the strings `nan`, `inf` and `-inf`. A class with a `format_version` has it
    written down under `format`, and is read back only from that version.
    """
    if attrs.has(type(value)):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in attrs.fields(type(value))}
        version = getattr(type(value), "format_version", None)
        return plain if version is None else {"format": version, **plain}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, np.ndarray):
        return [to_plain(v) for v in value.tolist()]
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return _number(value) if isinstance(value, float) else value


def from_plain(cls: type[_T], data: Any) -> _T:
    """Return the record of class `cls` from what `to_plain` gave.

    Raises:
        RecordFormatError: if a field is missing or unknown, or the format's version is another.
    """
    if not isinstance(data, Mapping):
        raise RecordFormatError.at(f"expected an object for {cls.__name__}, got {type(data).__name__}")
    data = dict(data)
    expected = getattr(cls, "format_version", None)
    if expected is not None and (version := data.pop("format", None)) != expected:
        raise RecordFormatError.at(f"expected format {expected}, got {version!r}")
    hints = typing.get_type_hints(cls, localns={"LayerGraph": object})
    known = {f.name: f for f in attrs.fields(typing.cast(Any, cls))}
    missing = [n for n, f in known.items() if n not in data and f.default is attrs.NOTHING]
    unknown = [n for n in data if n not in known]
    if missing or unknown:
        raise RecordFormatError.at(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}")
    return cls(**{name: _value(hints[name], value) for name, value in data.items()})


def _value(hint: Any, value: Any) -> Any:
    """Rebuild one field from its type hint."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        inner = [a for a in args if a is not type(None)]
        return None if value is None else _value(inner[0], value)
    if isinstance(hint, type) and attrs.has(hint):
        return from_plain(hint, value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if origin is np.ndarray:
        return [float(v) if isinstance(v, str) else v for v in value]
    if origin is tuple:
        return tuple(_value(args[0], v) for v in value)
    if origin in (Mapping, dict):
        return {k: _free(v) for k, v in value.items()}
    if hint is float:
        return float(value)
    return value


def _free(value: Any) -> Any:
    """Rebuild a value of no declared type: numbers that JSON has no word for come back as floats."""
    if isinstance(value, list):
        return tuple(_free(v) for v in value)
    return float(value) if value in ("nan", "inf", "-inf") else value
