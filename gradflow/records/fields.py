"""Fields of frozen records: read-only arrays that compare by content, mappings, numbers that may be NaN."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from gradflow.errors import UnknownLayerError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


# NOTE [Arrays in frozen records]
# `attrs.frozen` compares fields with `==`, which for arrays is elementwise and has no truth value, so
# every array field is declared with `array_field`, which compares by content (NaN equal to NaN). Frozen
# is shallow: the converter copies and clears the write flag, and mappings become `MappingProxyType`.
# A NaN differs from itself, and its sign depends on the processor and the operation that made it; every
# converter puts the one object `NAN` in its place, so that records compare, and survive JSON, all the same.

NAN = float("nan")


def _float(value: float) -> float:
    return NAN if value != value else value


def to_floats(values: Sequence[float]) -> tuple[float, ...]:
    """Return numbers as a tuple in which every NaN is the same one."""
    return tuple(_float(value) for value in values)


def _boxed(value: float) -> tuple[float]:
    return (value,)  # tuples compare their members by identity first


def _read_only(dtype: type, nullable: bool = False) -> Any:
    def convert(value: Any) -> Any:
        if value is None and nullable:
            return None
        array = np.array(value, dtype=dtype)
        if dtype is np.float64:
            array[np.isnan(array)] = np.nan  # one bit pattern, so that equal content is equal bytes
        if np.issubdtype(dtype, np.floating):
            array[np.isnan(array)] = NAN
        array.setflags(write=False)
        return array

    return convert


def _same_array(value: Any) -> Any:
    return None if value is None else (value.shape, value.tobytes())


def array_field(dtype: type = np.float64, *, nullable: bool = False) -> Any:
    """Return an attrs field for a read-only array that is compared by content."""
    if nullable:
        return attrs.field(default=None, converter=_read_only(dtype, True), eq=_same_array, repr=False)
    return attrs.field(converter=_read_only(dtype), eq=_same_array, repr=False)


def float_field(default: Any = attrs.NOTHING) -> Any:
    """Return an attrs field for a float that may be NaN, and then equals another NaN."""
    return attrs.field(default=default, converter=lambda value: _float(float(value)), eq=_boxed)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return _float(value) if isinstance(value, float) else value


def _read_only_mapping(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return types.MappingProxyType({str(k): _plain(v) for k, v in value.items()})


def mapping_field() -> Any:
    """Return an attrs field for a read-only mapping from names to plain values."""
    return attrs.field(factory=dict, converter=_read_only_mapping, eq=dict)


def to_tuple(value: Sequence[Any]) -> tuple[Any, ...]:
    """Return a tuple of the members: the converter of fields that hold several."""
    return tuple(value)


_Named = TypeVar("_Named")


def by_name(records: Sequence[_Named], name: str) -> _Named:
    """Return the record of that name.

    Raises:
        UnknownLayerError: if there is none; the message lists the nearest names.
    """
    for record in records:
        if record.name == name:  # type: ignore[attr-defined]
            return record
    raise UnknownLayerError.at(name, [record.name for record in records])  # type: ignore[attr-defined]


def spread(values: Floats) -> str:
    """Return the range of the known values in words."""
    known = values[~np.isnan(values)]
    if not len(known):
        return "none"
    low, high = float(known.min()), float(known.max())
    return f"{low:.2e}" if low == high else f"{low:.2e} to {high:.2e}"
