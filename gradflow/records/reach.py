"""The account of reach: did gradient ever arrive at every trainable number, and if not, why."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import attrs

from gradflow.records.fields import NAN, float_field, to_tuple


class Reason(enum.Enum):
    """Why no gradient ever arrived; every unreached number has exactly one."""

    NOT_CALLED = "not called"
    """No step ran the module that owns it."""
    CUT = "cut"
    """The gradient has no way there: nobody uses that output, or an operation ends the graph."""
    ZERO_FACTOR = "zero factor"
    """On the way back, the gradient is multiplied by something that is exactly zero."""
    UNCHOSEN_BY_DATA = "unchosen by data"
    """Something is picked by what the batch holds (a token), and this was never picked."""
    UNCHOSEN_BY_MODEL = "unchosen by model"
    """Something is picked by what the model computes (the nearest code), and this was never picked."""
    OFF = "off"
    """A rectifier, clamp, threshold or spike has slope zero there, for every sample."""
    UNDERFLOW = "underflow"
    """A gradient set out, and became too small for its dtype."""
    NO_LOSS = "no loss"
    """The loss itself hands back exactly zero: an empty mask, a hinge that is met, a clamped value."""
    BY_MATHEMATICS = "by mathematics"
    """The parts cancel, whatever the values are: zero, or rounding noise."""
    UNEXPLAINED = "unexplained"
    """No step could be looked at closely enough: under the transform `vjp` with a model that it alone
    takes, inside reentrant checkpoints, where a second look raised, or where the step that was looked at did
    not use it and others did."""


def _ranges(value: Iterable[Iterable[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(start), int(stop)) for start, stop in value)


@attrs.frozen(kw_only=True)
class ReachRecord:
    """A part of one parameter at which no gradient arrived in any step of the run, for one reason.

    Args:
        parameter: qualified name; those of a loss module as in the optimizer.
        layer: qualified name of the module that owns it.
        shape: of the parameter.
        axis: the axis along which whole slices are unreached; None for the whole parameter, or for single
            elements.
        slices: ranges (start, stop) of these slices along the axis, at most 64 of them; empty where `axis`
            is None.
        num_slices: how many slices there are.
        num_elements: how many elements of the parameter this is about.
        block: name of the block of a fused parameter that the slices are: `k` of `qkv`, `forget gate`.
        reason: why.
        at: the node of the graph where it ends, a layer call or an operation: `layer:relu`; "" if unknown.
        layer_at: the layer call that `at` is, or whose output it takes; "" if there is none.
        op: the operation: `relu`, `embedding`, `detach`, ...; `copy` for a module that is not called, where
            one that is like it and no part of the model ran in the same step.
        whose: what is exactly zero, or chooses: a parameter, a layer call, an operation; "" if unknown.
        source: what that is made of: `constant`, `batch`, `data` (computed from the batch), `parameter` or
            `model`; "" if unknown.
        num_choices: how many were picked at that place in the step that was looked at (0 if none pick).
        moved: whether the parameter changed although no gradient arrived: by the module's own code.
        step: the step that was looked at closely; -1 if none.
        larger: of elements that are off, mean magnitude over that of the elements of the parameter that were
            reached: far above 1 where they lie at bounds or beyond, below 1 where they are cut off as small.
            NaN for other reasons, where nothing was reached, and where less than half of it was not.
    """

    parameter: str
    layer: str
    shape: tuple[int, ...] = attrs.field(converter=to_tuple)
    axis: int | None = None
    slices: tuple[tuple[int, int], ...] = attrs.field(default=(), converter=_ranges)
    num_slices: int = 0
    num_elements: int
    block: str = ""
    reason: Reason
    at: str = ""
    layer_at: str = ""
    op: str = ""
    whose: str = ""
    source: str = ""
    num_choices: int = 0
    moved: bool = False
    step: int = -1
    larger: float = float_field(NAN)

    @property
    def size(self) -> int:
        """Number of elements of the parameter."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def share(self) -> float:
        """The part of the parameter that this is about, in [0, 1]."""
        return self.num_elements / self.size if self.size else 0.0

    @property
    def part(self) -> str:
        """Which part, in words: `all of it`, `rows 4..7 of 16`, `12 of 96 elements`."""
        if self.num_elements == self.size:
            return "all of it"
        if self.axis is None:
            return f"{self.num_elements:,} of {self.size:,} elements"
        word = ("row", "column")[self.axis] if self.axis < 2 else f"slice along axis {self.axis}"
        shown = [str(a) if b == a + 1 else f"{a}..{b - 1}" for a, b in self.slices[:4]]
        more = ", ..." if len(self.slices) > 4 else ""
        plural = word.replace("slice", "slices") if "slice" in word else f"{word}s"
        name = word if self.num_slices == 1 else plural
        block = f" (the {self.block})" if self.block else ""
        return f"{name} {', '.join(shown)}{more} of {self.shape[self.axis]}{block}"


@attrs.frozen(kw_only=True)
class OutsideRecord:
    """A tensor that requires a gradient, leads to the loss, and belongs to no registered parameter.

    Args:
        name: where a module holds it, such as `blocks[0].weight`; "" if that was not found.
        shape: its shape.
        optimized: whether the optimizer, where one was given, holds it.
    """

    name: str
    shape: tuple[int, ...] = attrs.field(converter=to_tuple)
    optimized: bool = False


@attrs.frozen(kw_only=True)
class TermRecord:
    """A term of the loss that hands nothing back, while others do.

    Args:
        op: the operation that takes it into the loss.
        made_by: the operation that made it, or that ended its graph.
        layer: the layer call that it was computed from.
        reason: `no graph`, where it was computed from the model and carries no gradient; `zero`, where its
            gradient is exactly zero.
    """

    op: str
    made_by: str
    layer: str = ""
    reason: str


@attrs.frozen(kw_only=True)
class DeafRecord:
    """A `torch.autograd.Function` whose backward pass gives the same, whatever gradient it is handed.

    What it gave was equal to the bit for the gradient of the step, for minus that, and for three times it.

    Args:
        name: of the class.
        at: the node of the graph that it is in, a layer call or an operation.
        layer_at: the layer call that `at` is, or whose output it takes; "" if there is none.
        least: the smallest number of the gradient that it was handed and did not heed.
        largest: the largest.
    """

    name: str
    at: str = ""
    layer_at: str = ""
    least: float
    largest: float


@attrs.frozen(kw_only=True)
class ReachAccount:
    """For every trainable number: did gradient ever arrive in the run, and if not, why.

    `num_reached` and the elements of all `unreached` parts add up to `num_elements`.

    Args:
        num_elements: number of trainable elements, those of a loss module included.
        num_reached: at how many of them a gradient other than zero arrived in some step.
        unreached: the parts of parameters that were not reached, each element in exactly one.
        outside: tensors that require a gradient and belong to no registered parameter.
        terms: terms of the loss that hand nothing back.
        deaf: functions whose backward pass does not heed what it is handed.
        step: the step that was looked at closely to find the reasons; -1 if that was not needed, or not
            possible.
    """

    num_elements: int
    num_reached: int
    unreached: tuple[ReachRecord, ...] = attrs.field(default=(), converter=to_tuple)
    outside: tuple[OutsideRecord, ...] = attrs.field(default=(), converter=to_tuple)
    terms: tuple[TermRecord, ...] = attrs.field(default=(), converter=to_tuple)
    deaf: tuple[DeafRecord, ...] = attrs.field(default=(), converter=to_tuple)
    step: int = -1

    def of(self, parameter: str) -> tuple[ReachRecord, ...]:
        """Return the unreached parts of one parameter."""
        return tuple(record for record in self.unreached if record.parameter == parameter)

    def totals(self) -> dict[Reason, int]:
        """Return the number of unreached elements by reason; together with the reached ones it is all."""
        found: dict[Reason, int] = {}
        for record in self.unreached:
            found[record.reason] = found.get(record.reason, 0) + record.num_elements
        return found
