"""Jacobians of a model's layers at a batch: products, gain, singular values, and from layer to layer."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import ModelInputError
from gradflow.functional.jacobian.endpoints import (
    Place,
    Start,
    find_place,
    first_output,
    is_reproduced,
    layer_alone,
    observe,
    through_model,
    varied_positions,
)
from gradflow.functional.jacobian.jacobian import Jacobian, Method
from gradflow.functional.jacobian.products import TensorFunction
from gradflow.functional.jacobian.records import Gain, Spectrum
from gradflow.functional.jacobian.singular import Distribution, make_generator, probe_vector
from gradflow.functional.model.batches import private_batch
from gradflow.functional.model.setting import Setting
from gradflow.functional.model.supported import check_model
from gradflow.functional.model.threads import measuring
from gradflow.functional.model.trees import floats


@attrs.frozen(eq=False, repr=False)
class LayerFunction:
    """What a layer computes at a batch, as a pure function of its input tensor.

    Call it: `function(x)`. It may be given to `torch.func.jvp`, `vjp`, `grad` and `jacrev`, and to `vmap` and
    `jacfwd` where PyTorch can batch the layer (it cannot, for recurrent ones). It works on copies of the
    layer's parameters and buffers of the moment it was made, in the modes of that moment and from the same
    random state each time, and leaves the model as it is.

    Args:
        layer: name of the layer.
        layer_type: its class name.
        point: the input tensor at the batch.
        value: the output tensor at the batch.
        function: the function itself.
    """

    layer: str
    layer_type: str
    point: Tensor
    value: Tensor
    function: TensorFunction

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output for an input shaped as `point`."""
        return self.function(x)

    def __repr__(self) -> str:
        shapes = f"{tuple(self.point.shape)} -> {tuple(self.value.shape)}"
        return f"LayerFunction({self.layer!r}, {self.layer_type}, {shapes})"

    def jacobian(self) -> Jacobian:
        """Return the Jacobian at the batch, as a linear map."""
        return Jacobian(self.function, self.point, name=self.layer, type=self.layer_type)


@measuring()
def layer_function(
    model: nn.Module,
    layer: str,
    batch: Any,
    *,
    argument: int | str | None = None,
    seed: int | None = None,
) -> LayerFunction:
    """Return what a layer or a block computes at a batch, as a pure function of its input.

    The model runs once on the batch. What the layer gets besides the input (masks, states, a memory) stays as
    it was then. Pure: everything of the model's and every random state is put back, also when it raises.

    Args:
        model: the model, in the modes that it is to be measured in; they are not changed. In training,
            dropout draws the same mask in every call, and BatchNorm mixes the samples of the batch.
        layer: qualified name of a module; `relu@1` is the second call of `relu`, `""` the model itself.
        batch: what the model takes, without a target: a tensor, a tuple `model(*batch)` or a mapping.
        argument: position or name of the argument to vary; by default that with the first floating-point
            tensor. Where the same tensor is passed several times, as to self-attention, all of them vary.
        seed: seeds torch, numpy and Python for the run; None goes on from the present states.

    Returns:
        The function, with `point`, the layer's input at the batch, and `value`, its output: the first
        floating-point tensor of it, where it returns several.

    Raises:
        ModelInputError: if the model is none, or the layer has no floating-point tensor on one side.
        UnknownLayerError: if the model has no module of this name.
        ModelNotCalledError: if the module is not called on this batch, or not that often.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    >>> function = layer_function(model, "1", torch.zeros(1, 2))
    >>> function
    LayerFunction('1', Tanh, (1, 3) -> (1, 3))
    >>> torch.equal(function(function.point), function.value)
    True
    """
    check_model(model)
    place = find_place(model, layer)
    batch = private_batch(model, batch)
    setting = Setting.of(model, parameters={}, seed=seed)
    seen = observe(setting, batch, [place])[place]
    module = model.get_submodule(place.module)
    positions = varied_positions(place, module, seen, argument)
    point, value = floats(seen.arguments)[positions[0]], first_output(place, seen.output)
    function = layer_alone(Setting.of(module, random=seen.random), place, seen, positions)
    try:
        alone = is_reproduced(function, point, value)
    except Exception:  # the layer cannot run without the model around it
        alone = False
    if not alone:
        setting = Setting.of(model, random=setting.random)
        function = through_model(setting, batch, Start(place, positions, "input"), place)
        _check_reproduced(function, point, value, place)
    return LayerFunction(str(layer), place.type, point, value, function)


def _check_reproduced(function: TensorFunction, point: Tensor, value: Tensor, place: Place) -> None:
    if not is_reproduced(function, point, value):
        raise ModelInputError(
            f"{place} gives another output when it is run again with the same input, parameters, buffers and "
            "random state, so it is no function of its input. Likely causes: a generator or a counter that "
            "lives outside the model, or a clock. Take it out for the measurement."
        )


@measuring()
def layer_jvp(
    model: nn.Module,
    layer: str,
    batch: Any,
    tangent: Tensor | None = None,
    *,
    argument: int | str | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a layer's output at a batch, and J v: how the output changes when the input moves along v.

    Like `torch.func.jvp`, for a layer inside a model. One forward-mode pass, J never made.

    Args:
        model, layer, batch, argument, seed: as for `layer_function`.
        tangent: v, shaped as the layer's input; by default a random one of norm 1.

    Returns:
        The output, and J v, shaped as the output.

    Raises:
        ValueError: if the tangent has another shape.
        ModelCallError: if an operation in the layer has no derivative.
        GradflowError: those that `layer_function` raises.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> output, product = layer_jvp(model, "1", torch.ones(1, 2), torch.ones(1, 2))
    >>> torch.equal(product, (output > 0).float())
    True
    """
    function = layer_function(model, layer, batch, argument=argument, seed=seed)
    if tangent is None:
        tangent = _random_direction(function.point, seed)
    return function.value, function.jacobian().jvp(tangent)


@measuring()
def layer_vjp(
    model: nn.Module,
    layer: str,
    batch: Any,
    cotangent: Tensor | None = None,
    *,
    argument: int | str | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a layer's output at a batch, and Jᵀ u: the gradient at its input for a gradient u at its output.

    Like the pullback of `torch.func.vjp`, for a layer inside a model.

    Args:
        model, layer, batch, argument, seed: as for `layer_function`.
        cotangent: u, shaped as the layer's output; by default a random one of norm 1.

    Returns:
        The output, and Jᵀ u, shaped as the input.

    Raises:
        ValueError: if the cotangent has another shape.
        ModelCallError: if an operation in the layer has no derivative.
        GradflowError: those that `layer_function` raises.

    >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU())
    >>> _, product = layer_vjp(model, "0", torch.ones(1, 2), torch.ones(1, 3))
    >>> torch.allclose(product, model[0].weight.sum(0))
    True
    """
    function = layer_function(model, layer, batch, argument=argument, seed=seed)
    if cotangent is None:
        cotangent = _random_direction(function.value, seed)
    return function.value, function.jacobian().vjp(cotangent)


def _random_direction(like: Tensor, seed: int | None) -> Tensor:
    drawn = probe_vector(like, "gaussian", make_generator(seed))
    norm = torch.linalg.vector_norm(drawn)
    return drawn / norm if norm > 0 else drawn


@measuring()
def layer_gain(
    model: nn.Module,
    layer: str,
    batch: Any,
    *,
    num_probes: int = 8,
    seed: int | None = None,
    distribution: Distribution = "rademacher",
    argument: int | str | None = None,
) -> Gain:
    """Return by how much a layer amplifies a perturbation of its input, in the mean over directions.

    gain = ‖J‖_F / √n_in = √(E‖J v‖² / E‖v‖²) for v with independent entries of mean 0 and variance 1: each
    probe is one forward-mode product, and the mean of their squares is unbiased for ‖J‖_F² (Hutchinson,
    1990). 1 keeps the norm of a random perturbation. Depth multiplies gains, so those far from 1 at every
    layer make gradients vanish or explode.

    Args:
        model, layer, batch, argument: as for `layer_function`.
        num_probes: random directions; the standard error falls with their square root.
        seed: for the run and the probes.
        distribution: of the entries: `rademacher`, ±1, has the smaller variance; or `gaussian`.

    Returns:
        The gain with its standard error; n_in and n_out count the whole batch.

    Raises:
        ValueError: if `num_probes` or `distribution` is none of those above.
        ModelCallError: if an operation in the layer has no derivative.
        GradflowError: those that `layer_function` raises.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = nn.init.orthogonal_(model[0].weight)
    >>> found = layer_gain(model, "0", torch.zeros(8, 4))
    >>> round(found.gain, 4), found.standard_error < 1e-4, found.n_in
    (1.0, True, 32)
    """
    function = layer_function(model, layer, batch, argument=argument, seed=seed)
    return function.jacobian().gain(num_probes=num_probes, seed=seed, distribution=distribution)


@measuring()
def layer_spectrum(
    model: nn.Module,
    layer: str,
    batch: Any,
    *,
    k: int = 5,
    sample: int | Literal["auto", "all"] = "auto",
    method: Method = "auto",
    tolerance: float = 1e-3,
    max_products: int = 2000,
    seed: int | None = None,
    argument: int | str | None = None,
) -> Spectrum:
    """Return singular values of a layer's Jacobian: how much it stretches the directions of its input.

    Where the Jacobian is small, all of them, of the whole matrix. Else the k largest, by block Lanczos with
    thick restarts on forward-mode and reverse products, until each residual ‖Jᵀu − σv‖ is within the
    tolerance; the error of a singular value is at most its residual, and mostly far smaller.

    Args:
        model, layer, batch, argument: as for `layer_function`.
        k: how many, where they are found by iteration.
        sample: `auto`: the Jacobian of the first sample of the batch where the layer treats each on its own,
            else of the whole batch; `all`: of the whole batch; or the index of a sample. The samples lie
            along the first axis, or the second in a module with `batch_first=False`.
        method: `dense` takes the whole matrix, `iterative` never does, `auto` where its shorter side is at
            most 512.
        tolerance: of the residuals, as a share of the largest singular value; no less than 16 times the
            rounding of the dtype.
        max_products: after about this many the iteration stops, and `converged` is False.
        seed: for the run and the first vectors.

    Returns:
        The singular values, descending, with their residuals.

    Raises:
        ValueError: if `k`, `sample` or `method` is none of those above, or the layer mixes the samples and
            one was asked for.
        ModelCallError: if an operation in the layer has no derivative.
        GradflowError: those that `layer_function` raises.

    >>> model = nn.Sequential(nn.Linear(3, 3, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
    >>> found = layer_spectrum(model, "0", torch.zeros(8, 3))
    >>> found.singular_values, found.condition_number, found.sample
    (array([4., 2., 1.]), 4.0, 0)
    """
    if not (sample in ("auto", "all") or (isinstance(sample, int) and not isinstance(sample, bool))):
        raise ValueError(f"sample must be 'auto', 'all' or the index of a sample, got {sample!r}.")
    jacobian = layer_function(model, layer, batch, argument=argument, seed=seed).jacobian()
    index = None
    if sample != "all":
        parts = model.get_submodule(find_place(model, layer).module).modules()
        second = any(getattr(part, "batch_first", True) is False for part in parts)
        axis = jacobian.sample_axis((0, 1) if second else (0,))
        index = sample if isinstance(sample, int) else None if axis is None else 0
        if index is not None:
            jacobian = jacobian.of_sample(index, axis=axis)
    return jacobian.spectrum(
        k, method=method, tolerance=tolerance, max_products=max_products, seed=seed, sample=index
    )


@measuring()
def jacobian_between(
    model: nn.Module, source: str | None, target: str, batch: Any, *, seed: int | None = None
) -> Jacobian:
    """Return the end-to-end Jacobian from one layer's output to another's, as a linear map.

    J = ∂(output of target) / ∂(output of source), all paths between them taken together; what bypasses the
    source is held fixed. A deep network trains fast where the singular values of this map are all near 1,
    dynamical isometry (Pennington, Schoenholz and Ganguli, 2017, arXiv:1711.04735); their spread grows with
    depth for random weights, and does not for orthogonal ones.

    Each product with J runs the model up to the target. The parameters are copied, so the result stays what
    it is while the model trains on.

    Args:
        model: the model, in the modes that it is to be measured in.
        source: qualified name of a module; `relu@1` is its second call. None: the model's own first
            floating-point input.
        target: qualified name of a module; `""` is the model's output.
        batch: what the model takes, without a target.
        seed: seeds torch, numpy and Python for the run; None goes on from the present states.

    Returns:
        The map, of the whole batch, with `jvp`, `vjp`, `gain`, `spectrum`, `singular_values`,
        `condition_number`, `dense`, and `of_sample` for one sample of the batch.

    Raises:
        ModelInputError: if the model is none, an endpoint has no floating-point tensor, the target has
            returned before the source does, or the model is no function of the tensor at the source.
        UnknownLayerError: if the model has no module of such a name.
        ModelNotCalledError: if a module is not called on this batch.

    >>> model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(10)])
    >>> for layer in model:
    ...     _ = nn.init.orthogonal_(layer.weight)
    >>> J = jacobian_between(model, "0", "9", torch.randn(4, 8))
    >>> J
    Jacobian(0 -> 9, (4, 8) -> (4, 8))
    >>> J.of_sample(0).singular_values().round(decimals=3).unique()
    tensor([1.], dtype=torch.float64)
    """
    check_model(model)
    begin, end = find_place(model, source or ""), find_place(model, target)
    batch = private_batch(model, batch)
    setting = Setting.of(model, seed=seed)
    seen = observe(setting, batch, [begin, end])
    if source is None:
        positions = varied_positions(begin, model, seen[begin], None)
        point = floats(seen[begin].arguments)[positions[0]]
    else:
        point = first_output(begin, seen[begin].output)
        positions = tuple(i for i, tensor in enumerate(floats(seen[begin].output)) if tensor is point)
        _check_order(begin, end, seen[begin].ended, seen[end].ended)
    start = Start(begin, positions, "input" if source is None else "output")
    function = through_model(setting, batch, start, end)
    _check_reproduced(function, point, first_output(end, seen[end].output), end)
    name = f"{'input' if source is None else begin.name} -> {end.name or 'output'}"
    return Jacobian(function, point, name=name)


def _check_order(source: Place, target: Place, source_ended: int, target_ended: int) -> None:
    if source == target or source_ended < target_ended:
        return
    raise ModelInputError(
        f"jacobian_between: the target {target} has returned before the source {source} does, so nothing "
        "flows from source to target. Swap the two; or name a later call of the target, such as "
        f"{target.module + '@1'!r}."
    )
