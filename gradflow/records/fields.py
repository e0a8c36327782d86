"""Fields of frozen records: read-only arrays that compare by content, mappings, numbers that may be NaN."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import numpy as np

from gradflow.errors import MeasurementError, UnknownLayerError
from gradflow.records.values import NAN as NAN
from gradflow.records.values import ReadOnlyMapping, frozen, one_nan, read_only, unkept

# Written out: what `numpy.typing.NDArray` stands for cannot be read off it in every release.
Floats = np.ndarray[Any, np.dtype[np.float64]]
"""An array of float64."""
Ints = np.ndarray[Any, np.dtype[np.int64]]
"""An array of whole numbers of 64 bits."""
Bools = np.ndarray[Any, np.dtype[np.bool_]]
"""An array of booleans."""


# NOTE [Arrays in frozen records]
# `attrs.frozen` compares fields with `==`, which for arrays is elementwise and has no truth value, so
# every array field is declared with `array_field`, which compares by content (NaN equal to NaN). Frozen
# is shallow: the converter copies and clears the write flag, and mappings become `ReadOnlyMapping`.
# A NaN differs from itself, and its sign depends on the processor and the operation that made it; every
# converter puts the one object `NAN` in its place, so that records compare, and survive JSON, all the same.


def to_floats(values: Sequence[float]) -> tuple[float, ...]:
    """Return numbers as a tuple in which every NaN is the same one."""
    return tuple(one_nan(value) for value in values)


def _boxed(value: float) -> tuple[float]:
    return (one_nan(value),)  # tuples compare their members by identity first


def _same_array(value: Any) -> Any:
    return (value.shape, value.tobytes())


def array_field(dtype: type = np.float64, *, axes: int = 1, unknown: str = "") -> Any:
    """Return an attrs field for a read-only array that is compared by content.

    Args:
        dtype: of its elements.
        axes: how many it has; the first is the step.
        unknown: name of a field before it: without a value it is NaN, as often as that one has entries.
    """

    def nan(record: Any) -> Any:
        return np.full(len(getattr(record, unknown)), np.nan)

    return attrs.field(
        default=attrs.Factory(nan, takes_self=True) if unknown else attrs.NOTHING,
        converter=lambda value: _array(value, dtype),
        eq=_same_array,
        repr=False,
        metadata={"axes": axes},
    )


def _array(value: Any, dtype: type) -> Any:
    if value is None:  # NumPy would make a NaN of it
        raise TypeError("expected an array or a sequence of numbers, got None")
    return read_only(value, dtype)


def float_field(default: Any = attrs.NOTHING) -> Any:
    """Return an attrs field for a float that may be NaN, and then equals another NaN."""
    return attrs.field(default=default, converter=lambda value: one_nan(float(value)), eq=_boxed)


def _by_text(value: Mapping[str, Any]) -> ReadOnlyMapping:
    return ReadOnlyMapping({str(key): entry for key, entry in value.items()})


def mapping_field() -> Any:
    """Return an attrs field for a read-only mapping from names to plain values."""
    return attrs.field(factory=dict, converter=_by_text)


def _kept(value: Mapping[str, Any]) -> ReadOnlyMapping:
    for name, entry in value.items():
        if problem := unkept(frozen(entry), f"extras[{name!r}]"):
            raise MeasurementError(f"FlowRecord: {problem}")
    return _by_text(value)


def extras_field() -> Any:
    """Return an attrs field for a mapping of values that JSON brings back; others are refused."""
    return attrs.field(factory=dict, converter=_kept)


def to_tuple(value: Sequence[Any]) -> tuple[Any, ...]:
    """Return a tuple of the members: the converter of fields that hold several."""
    return tuple(value)


def text_lines(value: Any) -> tuple[str, ...] | None:
    """Return the lines of a text or of several; None if it is neither."""
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    lines = [line for text in texts if isinstance(text, str) for line in text.splitlines() or [""]]
    return tuple(lines) if all(isinstance(text, str) for text in texts) else None


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
