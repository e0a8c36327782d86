"""What number formats hold of a run's gradients and activations: `PrecisionRecord`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np

from gradflow.records.fields import (
    NAN,
    Bools,
    Floats,
    Ints,
    array_field,
    by_name,
    float_field,
    to_floats,
    to_tuple,
)
from gradflow.records.formats import BORDERS, NUM_BINS, exponent_of, number_format


def _to_ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple([int(value) for value in values])


@attrs.frozen(kw_only=True)
class ExponentHistogram:
    """How the magnitudes of a tensor's entries are spread, at every look: exact for what a cast makes of it.

    Shares are over the *present* entries: those that are finite and not zero. NaN where there are none.

    Args:
        dtype: what the entries were computed in, without `torch.`.
        num_elements: entries at each look, shape (looks,).
        num_zero: of them exact zeros.
        num_infinite: of them NaN or infinite.
        bins: the bins that hold something at some look, ascending: 9 · exponent + place;
            see NOTE [Bins that answer for every format and scale] in `formats.py`.
        counts: entries in each, shape (looks, bins).
    """

    dtype: str
    num_elements: Ints = array_field(np.int64)
    num_zero: Ints = array_field(np.int64)
    num_infinite: Ints = array_field(np.int64)
    bins: tuple[int, ...] = attrs.field(converter=_to_ints)
    counts: Ints = array_field(np.int64, axes=2)

    def underflow(self, format: Any, *, scale: float = 1.0, look: int | None = None) -> float:
        """Return the share of the present entries that a cast makes zero.

        Args:
            format: name of a format, `float16`, or PyTorch's dtype.
            scale: what the entries are multiplied by before, a power of two.
            look: which look, as an index; None for all of them together.

        Raises:
            ValueError: if the format is unknown, or the scale no power of two.
        """
        return self._share(self._zero(format, scale), look)

    def subnormal(self, format: Any, *, scale: float = 1.0, look: int | None = None) -> float:
        """Return the share of the present entries that a cast makes subnormal; see `underflow`."""
        return self._share(self._subnormal(format, scale), look)

    def overflow(self, format: Any, *, scale: float = 1.0, look: int | None = None) -> float:
        """Return the share of the present entries that a cast takes out of the range; see `underflow`."""
        return self._share(self._infinite(format, scale), look)

    def norm_lost(self, format: Any, *, scale: float = 1.0, look: int | None = None) -> float:
        """Return what underflow takes of the norm, ‖lost‖ / ‖all‖, to within the width of the bins (2)."""
        squares = self._counts(look) * self._squares()
        total = squares.sum()
        return math.sqrt(squares[self._zero(format, scale)].sum() / total) if total > 0 else NAN

    def num_present(self, look: int | None = None) -> int:
        """Return the number of entries that are finite and not zero."""
        return int(self._counts(look).sum())

    @property
    def smallest(self) -> float:
        """The power of two at or below the smallest present entry; NaN where there is none."""
        return math.ldexp(1.0, self.bins[0] // NUM_BINS) if len(self.bins) else NAN

    @property
    def largest(self) -> float:
        """The power of two at or below the largest present entry; NaN where there is none."""
        return math.ldexp(1.0, self.bins[-1] // NUM_BINS) if len(self.bins) else NAN

    def _zero(self, format: Any, scale: float) -> Bools:
        known, k = number_format(format), exponent_of(scale)
        return self._bins <= NUM_BINS * (known.least - known.mantissa - 1 - k)

    def _subnormal(self, format: Any, scale: float) -> Bools:
        known, k = number_format(format), exponent_of(scale)
        below = self._bins < NUM_BINS * (known.least - 1 - k) + known.subnormal_bin
        return below & ~self._zero(format, scale)

    def _infinite(self, format: Any, scale: float) -> Bools:
        known, k = number_format(format), exponent_of(scale)
        return self._bins >= NUM_BINS * (known.most - k) + known.infinite_bin

    @property
    def _bins(self) -> Ints:
        return np.array(self.bins, np.int64)

    def _counts(self, look: int | None) -> Ints:
        return self.counts.sum(axis=0) if look is None else self.counts[look]

    def _share(self, chosen: Bools, look: int | None) -> float:
        counts = self._counts(look)
        total = int(counts.sum())
        return int(counts[chosen].sum()) / total if total else NAN

    def _squares(self) -> Floats:
        """Return the square of a number in each bin, relative to the largest one."""
        place, octave = self._bins % NUM_BINS, self._bins // NUM_BINS
        middle = np.where(place == 1, 1.375, np.array(BORDERS)[place])
        return middle**2 * np.exp2(2.0 * (octave - (octave[-1] if len(octave) else 0)))


def joined(histograms: list[ExponentHistogram]) -> ExponentHistogram:
    """Return one histogram of all entries of several, looks together."""
    bins = sorted(set().union(*(h.bins for h in histograms)))
    counts = np.zeros((1, len(bins)), np.int64)
    for h in histograms:
        counts[0, np.searchsorted(bins, h.bins)] += h.counts.sum(axis=0)
    return ExponentHistogram(
        dtype="",
        num_elements=np.array([sum(int(h.num_elements.sum()) for h in histograms)]),
        num_zero=np.array([sum(int(h.num_zero.sum()) for h in histograms)]),
        num_infinite=np.array([sum(int(h.num_infinite.sum()) for h in histograms)]),
        bins=tuple(bins),
        counts=counts,
    )


@attrs.frozen(kw_only=True)
class LayerPrecision:
    """The numbers that pass a layer call.

    Args:
        name: name of the layer call.
        type: class name of the layer.
        activation: its outputs; None where none was seen.
        gradient: the gradient of its outputs, of the loss as it is, as far as any scale shows it; None
            where none arrives.
        computed: the same as it was computed under the loss scale in use, multiplied by that scale. Equal to
            `gradient` where nothing was near the end of its format.
    """

    name: str
    type: str
    activation: ExponentHistogram | None = None
    gradient: ExponentHistogram | None = None
    computed: ExponentHistogram | None = None

    def lost(self, look: int = -1) -> float:
        """Return the share of the gradient's entries that became zero on the way; NaN where there is none."""
        return _lost(self.gradient, self.computed, look)


@attrs.frozen(kw_only=True)
class ParameterPrecision:
    """The gradient of a parameter.

    Args:
        name: name of the parameter.
        layer: the module that it belongs to.
        gradient: of the loss as it is, as far as any scale shows it.
        computed: as it was computed under the loss scale in use, multiplied by it; see `LayerPrecision`.
        error: ‖g − g*‖ / ‖g*‖ of the gradient as computed, g, and the one without underflow, g*, both over
            their loss scales, shape (looks,): 1 where all of it was lost. NaN where none can have been.
        norm: ‖g*‖, shape (looks,).
    """

    name: str
    layer: str
    gradient: ExponentHistogram | None = None
    computed: ExponentHistogram | None = None
    error: Floats = array_field()
    norm: Floats = array_field(unknown="error")

    def lost(self, look: int = -1) -> float:
        """Return the share of the gradient's entries that became zero; NaN where there is none."""
        return _lost(self.gradient, self.computed, look)


def _lost(gradient: ExponentHistogram | None, computed: ExponentHistogram | None, look: int) -> float:
    if gradient is None or not gradient.num_present(look):
        return NAN
    kept = 0 if computed is None else computed.num_present(look)
    return max(1.0 - kept / gradient.num_present(look), 0.0)


@attrs.frozen(kw_only=True)
class SubnormalRecord:
    """Numbers below the smallest normal one that operations in a layer call were handed in the reverse pass.

    Args:
        layer: name of the layer call; `""` where it was between layers.
        dtype: of the numbers.
        num_elements: numbers that were handed to its operations.
        num_subnormal: of them subnormal.
    """

    layer: str
    dtype: str
    num_elements: int
    num_subnormal: int


@attrs.frozen(kw_only=True)
class ScalerRecord:
    """The state of a GradScaler over some updates, oldest first.

    Args:
        steps: the updates.
        scale: its loss scale after each, shape (updates,).
        skipped: whether the update was left out, since a gradient was not finite, shape (updates,).
        growth_interval: updates in a row without a skip after which it doubles the scale.
    """

    steps: tuple[int, ...] = attrs.field(converter=to_tuple)
    scale: Floats = array_field()
    skipped: Bools = array_field(np.bool_)
    growth_interval: int = 2000


@attrs.frozen(kw_only=True)
class PrecisionRecord:
    """What number formats hold of a run's gradients and activations, by layer call and by parameter.

    Args:
        steps: the steps that were looked at.
        loss_scale: what the loss is multiplied by in use; 1 where nothing is.
        reference_scales: what it was multiplied by for the gradient without underflow, one for each look; NaN
            where the pass in use lost nothing.
        layers: in the order of execution.
        parameters: in the order of `model.named_parameters()`.
        subnormals: where operations met subnormal numbers; empty where none did.
        flushes: whether the processor was set to flush them to zero.
        device: type of the device, such as `cpu`.
        scaler: the GradScaler in use over the last updates; None where none is known.
    """

    steps: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)
    loss_scale: float = float_field(1.0)
    reference_scales: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    layers: tuple[LayerPrecision, ...] = attrs.field(default=(), converter=to_tuple)
    parameters: tuple[ParameterPrecision, ...] = attrs.field(default=(), converter=to_tuple)
    subnormals: tuple[SubnormalRecord, ...] = attrs.field(default=(), converter=to_tuple)
    flushes: bool = False
    device: str = "cpu"
    scaler: ScalerRecord | None = None

    def __getitem__(self, name: str) -> LayerPrecision:
        """Return the layer call of that name.

        Raises:
            UnknownLayerError: if there is none; the message lists the nearest names.
        """
        return by_name(self.layers, name)

    def parameter(self, name: str) -> ParameterPrecision:
        """Return the parameter of that name.

        Raises:
            UnknownLayerError: if there is none; the message lists the nearest names.
        """
        return by_name(self.parameters, name)

    def gradients(self) -> ExponentHistogram:
        """Return one histogram of all gradients, of layers and of parameters, over all looks."""
        return joined(
            [part.gradient for part in (*self.layers, *self.parameters) if part.gradient is not None]
        )

    def best_scale(self, format: Any = "float16") -> float:
        """Return the loss scale, a power of two, at which a format loses the fewest entries of all gradients.

        One entry that leaves the range spoils a whole step, so at none of the looks may there be any. Among
        the scales that are left it is the one with the fewest zeros, then the fewest subnormal numbers; then
        the nearest to 1. NaN where there is no gradient.

        Args:
            format: name of a format, or PyTorch's dtype.

        Raises:
            ValueError: if the format is unknown.
        """
        known, seen = number_format(format), self.gradients()
        if not len(seen.bins):
            return NAN
        # Below `low` all is zero; above `high` something leaves the range.
        high = (NUM_BINS * known.most + known.infinite_bin - seen.bins[-1] - 1) // NUM_BINS
        low = min(known.least - known.mantissa - seen.bins[-1] // NUM_BINS, high)

        def lost(k: int) -> tuple[float, float, int]:
            scale = math.ldexp(1.0, k)
            return seen.underflow(format, scale=scale), seen.subnormal(format, scale=scale), abs(k)

        return math.ldexp(1.0, min(range(max(low, -1022), min(high, 1023) + 1), key=lost))
