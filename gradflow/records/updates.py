"""What the optimizer's steps did to the parameters, and how the loss bends along them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import attrs
import numpy as np

from gradflow.records.fields import NAN, Bools, Floats, array_field, by_name, float_field, to_floats, to_tuple


@attrs.frozen(kw_only=True)
class UpdateRecord:
    """What the updates did to one parameter p, in one entry for each of `UpdatesRecord.steps`.

    u is the update as applied, p after it minus p before it, rounding included; g the gradient that the
    optimizer was handed: averaged, unscaled and clipped. NaN where a number is not known.

    Args:
        name: qualified name, as in `model.named_parameters()`.
        layer: qualified name of the module that owns it.
        held: whether an optimizer holds it.
        group: the number of the parameter group that does, over all optimizers; −1 without one.
        rate: the learning rate of its group.
        epsilon: the ε of its group, as the step compares it with √v̂; NaN where there is none.
        weight_rms: root mean square of p before the update.
        rms: root mean square of u.
        gradient_rms: root mean square of g.
        slope: g·u, by how much the loss should change to first order, in units of the loss.
        shrink: −p·u / p·p, the part of p that u takes away along p itself: rate times decay of a decoupled
            decay, next to nothing of what a gradient asks for.
        unchanged: of the entries whose gradient is not zero, the share that the update left as they were.
        second_moment: mean of v̂ over mean of g², where v̂ is the running mean of squared gradients that the
            step divided by (bias corrected where the optimizer does so); 1 in an optimizer's first step.
        under_epsilon: of the entries whose gradient is not zero, the share with √v̂ < ε.
        age: how many steps the optimizer's state of it had taken before; 0 is cold.
        finite: whether the update left every number finite.
        undone: of the entries that are not zero and that the update changed, the share that the model's own
            code has put back by the end of the next forward pass, to the bit; 0 where it writes to none.
        levels: how many different values are among the entries that were looked at, per entry, where some
            were put back: next to 0 on a grid, near 1 for numbers of full precision.
    """

    name: str
    layer: str = ""
    held: bool = True
    group: int = -1
    rate: Floats = array_field()
    epsilon: float = float_field(NAN)
    weight_rms: Floats = array_field()
    rms: Floats = array_field()
    gradient_rms: Floats = array_field()
    slope: Floats = array_field()
    shrink: Floats = array_field()
    unchanged: Floats = array_field()
    second_moment: Floats = array_field()
    under_epsilon: Floats = array_field()
    age: Floats = array_field()
    finite: Bools = array_field(np.bool_)
    undone: Floats = array_field()
    levels: float = float_field(NAN)

    @property
    def ratio(self) -> Floats:
        """Root mean square of the update over that of the weight before it; NaN for a weight of zeros."""
        return _over(self.rms, self.weight_rms)

    @property
    def effective_rate(self) -> Floats:
        """Root mean square of the update over that of the gradient: the rate itself for plain descent."""
        return _over(self.rms, self.gradient_rms)


def _over(a: Floats, b: Floats) -> Floats:
    with np.errstate(all="ignore"):
        return np.where(b > 0, a / b, np.nan)


@attrs.frozen(kw_only=True)
class CurvatureRecord:
    """How the loss of one batch bends along the update u that the optimizer made on it.

    To second order, the loss changes by g·u + ½ uᵀHu.

    Args:
        step: the step whose batch, random state and parameters it was taken at; the run's end is the number
            of steps that it has.
        how: `hessian-vector product`, or `central difference` of the gradient where none is to be had.
        why: why there was none.
        loss: before the update.
        slope: g·u; negative where the update goes downhill.
        bend: uᵀHu.
        actual: by how much the loss of the same batch, at the same random state, changed.
        factors: lengths, in units of the update, at which the loss along it was taken.
        changes: by how much the loss changed there; not finite where it was not.
    """

    step: int
    how: str = "hessian-vector product"
    why: str = ""
    loss: float = float_field()
    slope: float = float_field()
    bend: float = float_field()
    actual: float = float_field(NAN)
    factors: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    changes: tuple[float, ...] = attrs.field(default=(), converter=to_floats)

    @property
    def predicted(self) -> float:
        """g·u + ½ uᵀHu, by how much the loss should change."""
        return self.slope + 0.5 * self.bend

    @property
    def sharpness(self) -> float:
        """uᵀHu / −g·u: sharpness times rate along the update; above 2, the step climbs the other side.

        For plain descent, u = −ηg, it is η gᵀHg / gᵀg; for Adam and its kin, the preconditioned one.
        """
        return self.bend / -self.slope if self.slope < 0 else NAN

    @property
    def best(self) -> float:
        """The factor of those tried at which the loss is lowest; 0 where it falls at none."""
        known = [(c, f) for c, f in zip(self.changes, self.factors, strict=True) if math.isfinite(c)]
        change, factor = min(known, default=(0.0, 0.0))
        return factor if change < 0 else 0.0


def _by_group(rates: Iterable[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(to_floats(of_one) for of_one in rates)


@attrs.frozen(kw_only=True)
class UpdatesRecord:
    """What the optimizer really did in a run.

    Args:
        steps: the steps after which the updates were looked at.
        parameters: one record per trainable parameter.
        clipping: by step of the run, what clipping multiplied the gradient by before the update; 1 where it
            left it alone, NaN where no update followed, or nothing clips.
        rates: by step of the run, the learning rate of the first parameter group at the update.
        group_rates: the same of every parameter group of all optimizers, in their order.
        loss_scale: by step of the run, that of the scaler; NaN without one.
        num_updates: how many updates were made.
        num_skipped: how many were not, because the loss or a gradient was not finite.
        stale: what the optimizer holds that belongs to no module of the model or the loss.
        scheduled: whether a scheduler has set the rates that the optimizer came with; or they are zero, and
            hooks on its step that may set them were left out of the run, or a scheduler holds it.
        left_alone: whether a scheduler has set all rates of an optimizer to zero, and none that holds it is
            left that could raise them.
        curves: how the loss bends along an update, where that was asked for.
    """

    steps: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)
    parameters: tuple[UpdateRecord, ...] = attrs.field(default=(), converter=to_tuple)
    clipping: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    rates: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    group_rates: tuple[tuple[float, ...], ...] = attrs.field(default=(), converter=_by_group)
    loss_scale: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    num_updates: int = 0
    num_skipped: int = 0
    stale: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    scheduled: bool = False
    left_alone: bool = False
    curves: tuple[CurvatureRecord, ...] = attrs.field(default=(), converter=to_tuple)

    def __getitem__(self, name: str) -> UpdateRecord:
        """Return the record of the parameter of that qualified name.

        Raises:
            UnknownLayerError: if there is none; the message lists the nearest names.
        """
        return by_name(self.parameters, name)
