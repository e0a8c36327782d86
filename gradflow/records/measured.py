"""What is measured at layer calls, parameters and activations, and where a NaN was born."""

from __future__ import annotations

import math

import attrs
import numpy as np

from gradflow.records.fields import NAN, Bools, Floats, Ints, array_field, float_field, spread, to_tuple


@attrs.frozen(kw_only=True)
class LayerRecord:
    """What was measured at one layer call, over all steps.

    All arrays have shape (steps,). `grad_*` are about the output gradient, ∂L/∂(output), in units of
    loss per unit of activation.

    Args:
        name: name of the layer call: the module's qualified name, then `@1`, `@2`, ... for later calls
            in the same step. The model itself is `""`.
        module: qualified name of the module.
        type: class name of the module.
        call: 0 for the first call in a step.
        order: position in the order of execution.
        composite: whether other layers are called inside it.
        parameters: names of the parameters it owns (all calls of a module share them).
        shape: shape of its (first) output at the last step it ran.
        inputs_differentiable: whether any input required a gradient, in the first step.
        called: whether it ran in this step.
        reached: whether a path leads from the loss to its output in this step.
        grad_norm: ‖g‖₂; 0 is exactly zero, NaN where not reached, or where the gradient holds a NaN.
        grad_finite: whether every element of the gradient is finite (True where not reached).
        num_elements: number of elements of its differentiable outputs.
        output_rms: root mean square of the output.
        output_finite: whether every element of the output is finite (True where not called).
        output_zero_share: share of output elements that are exactly zero, NaN where not looked at.
        output_variation: ‖Y − mean row‖_F / ‖Y‖_F of the output as a matrix (rows × features): 0 where all
            samples (and positions) look alike; NaN where not looked at.
        input_rms: root mean square of its first floating-point input; NaN where not looked at.
    """

    name: str
    module: str
    type: str
    call: int
    order: int
    composite: bool = False
    parameters: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    shape: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)
    inputs_differentiable: bool = True
    called: Bools = array_field(np.bool_)
    reached: Bools = array_field(np.bool_)
    grad_norm: Floats = array_field()
    grad_finite: Bools = array_field(np.bool_)
    num_elements: Ints = array_field(np.int64)
    output_rms: Floats = array_field()
    output_finite: Bools = array_field(np.bool_)
    output_zero_share: Floats = array_field()
    output_variation: Floats = array_field()
    input_rms: Floats = array_field()

    @property
    def grad_rms(self) -> Floats:
        """‖g‖₂ / √(number of elements), shape (steps,)."""
        return self.grad_norm / np.sqrt(np.maximum(self.num_elements, 1))

    @property
    def grad_zero(self) -> Bools:
        """Whether the output gradient was there and exactly zero, shape (steps,)."""
        return self.reached & (self.grad_norm == 0.0)

    def __str__(self) -> str:
        return f"{self.name or '(model)'} ({self.type}): grad_rms {spread(self.grad_rms)}"


@attrs.frozen(kw_only=True)
class ParameterRecord:
    """What was measured at one parameter, over all steps. Arrays have shape (steps,).

    Args:
        name: qualified name, as in `model.named_parameters()`.
        layer: qualified name of the module that owns it.
        shape: its shape.
        dtype: its dtype, such as `float32`.
        trainable: whether it requires a gradient.
        optimized: whether the optimizer steps it (True where no optimizer was given).
        reached: whether a path leads from the loss to it in this step.
        grad_norm: ‖∂L/∂p‖₂; NaN where not reached.
        grad_finite: whether every element of the gradient is finite.
        grad_zero_share: share of gradient elements that are exactly zero; NaN where not looked at.
        norm: ‖p‖₂ before the step.
    """

    name: str
    layer: str
    shape: tuple[int, ...] = attrs.field(converter=to_tuple)
    dtype: str
    trainable: bool
    optimized: bool = True
    reached: Bools = array_field(np.bool_)
    grad_norm: Floats = array_field()
    grad_finite: Bools = array_field(np.bool_)
    grad_zero_share: Floats = array_field()
    norm: Floats = array_field()

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return int(math.prod(self.shape))


def num_last(steps: int) -> int:
    """Return in how many steps at the end of a run units of rectifiers are followed: see `fell_silent`.

    >>> num_last(20), num_last(200)
    (5, 16)
    """
    return min(steps // 4, 16)


@attrs.frozen(kw_only=True)
class ActivationRecord:
    """What was measured at one use of an activation, module or functional alike.

    A unit is one index of the channel axis (the last axis, or axis 1 behind a convolution). A rectifier
    unit *fires* where its output is above zero; a bounded unit (sigmoid, tanh, softmax, hard bounds) is
    *saturated* where its local derivative is below 1 percent of the largest one it can have.

    Args:
        name: the activation module's layer call, or `OP` behind the feeding layer: `fc1:relu`.
        op: `relu`, `sigmoid`, `tanh`, `softmax`, ...
        kind: `rectifier` (can be off), `bounded` (can saturate) or `softmax`.
        functional: whether it was applied as a function and not as a module.
        layer: the layer call at fault if it is sick: the module itself, or the layer whose output
            feeds the function (`""` if none does).
        num_units: number of units; 0 if it changed between steps.
        fired_share: share of elements that fire, shape (steps,); NaN where not looked at.
        saturated_share: share of elements that are saturated, shape (steps,); NaN where not looked at.
        never_fired: share of units that fired in no batch of the run (rectifiers), else NaN.
        fell_silent: share of units that have fired, and in no batch of the last quarter of the run (16 steps
            at most); NaN where fewer than two of these were seen, as in a run whose end was not known.
        always_saturated: share of units saturated for every sample looked at (bounded), else NaN.
        input_rms: root mean square of what enters, shape (steps,); NaN where not looked at.
        width: number of alternatives of a softmax (last step); 0 for others.
    """

    name: str
    op: str
    kind: str
    functional: bool
    layer: str
    num_units: int
    fired_share: Floats = array_field()
    saturated_share: Floats = array_field()
    input_rms: Floats = array_field()
    never_fired: float = float_field(NAN)
    fell_silent: float = float_field(NAN)
    always_saturated: float = float_field(NAN)
    width: int = 0


@attrs.frozen(kw_only=True)
class NumericalRecord:
    """Where a NaN or an Inf was born: found by running the step again with every operation watched.

    Args:
        step: the step it appeared in.
        layer: the layer call it was born in, or whose output feeds the function it was born in.
        layer_type: class name of that layer.
        op: the operation: `sqrt`, `exp`, `div`, ... or the name of the autograd node in a backward pass.
        phase: `input`, `parameter`, `forward` or `backward`.
        value: `nan` or `inf`.
        input_min: smallest value that entered the operation (NaN if unknown).
        input_max: largest value that entered the operation (NaN if unknown).
        line: `file:line` of the user's code that called the operation, if it was seen.
        loss_finite: whether the loss of that step is finite.
        swallowed_by: the operation that made finite numbers of it again, in a step whose loss and gradients
            are finite and that hands nothing back; "" where it spread.
    """

    step: int
    layer: str
    layer_type: str
    op: str
    phase: str
    value: str
    input_min: float = float_field(NAN)
    input_max: float = float_field(NAN)
    line: str = ""
    loss_finite: bool = True
    swallowed_by: str = ""
