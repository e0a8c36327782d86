"""Where a Jacobian begins and ends: layer calls by name, met in one forward pass of the model.

NOTE [The function of a layer]
The model runs once; at the layer's call its arguments and the random state are kept. The layer's function
then calls the layer alone, with the one argument varied and the others as they were. A layer may depend on
more than its arguments, such as what an earlier call left behind on a module. So its function is tried once,
and where it does not give what the layer gave in the model, the whole model is run up to the layer instead.
The pre-hooks and hooks on a module run, but its function is that of its `forward`: from the arguments as
`forward` gets them to what `forward` returns.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import ModelInputError, ModelNotCalledError, UnknownLayerError
from gradflow.functional.jacobian.products import TensorFunction
from gradflow.functional.model.batches import run_model
from gradflow.functional.model.layers import Forward, ancestors, callable_modules, is_scripted, led
from gradflow.functional.model.purity import RandomState
from gradflow.functional.model.setting import Held, Setting
from gradflow.functional.model.trees import floats, map_tensors, replaced, shapes
from gradflow.functional.torch_private import pytree

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Around = Callable[[int, str, Forward, Args, Kwargs], Any]


@attrs.frozen
class Place:
    """One call of a module: `relu@1` is the second call of `relu`.

    Args:
        name: as the user gave it.
        module: qualified name of the module; `""` is the model.
        number: which of its calls, from 0.
        type: class name of the module.
    """

    name: str
    module: str
    number: int
    type: str

    def is_at(self, module: str, number: int) -> bool:
        """Whether a call is this one."""
        return self.module == module and self.number == number

    def __str__(self) -> str:
        return f"{self.name!r} ({self.type})" if self.name else f"the model ({self.type})"


def find_place(model: nn.Module, name: str) -> Place:
    """Return the place that a name stands for.

    Raises:
        UnknownLayerError: if no module that can be called has this name.
        ModelInputError: if it is a TorchScript module.
    """
    modules = callable_modules(model)
    module, at, number = str(name).rpartition("@")
    if not (at and number.isdecimal()):
        module, number = str(name), "0"
    if module not in modules:
        raise UnknownLayerError.at(name, list(modules))
    if is_scripted(modules[module]):
        raise ModelInputError(
            f"{name!r} is a TorchScript module, whose calls cannot be seen or varied. Build the model "
            "without `torch.jit.script` or `torch.jit.trace` for the measurement."
        )
    return Place(str(name), module, int(number), type(modules[module]).__name__)


def numbered(model: nn.Module, names: set[str], around: Around) -> contextlib.AbstractContextManager[None]:
    """Let `around(number, name, forward, args, kwargs)` run the named modules' forwards, in this context."""
    counts: dict[str, int] = {}

    def lead(name: str) -> Callable[..., Any]:
        counts[name] = counts.get(name, -1) + 1
        return functools.partial(around, counts[name])

    return led({name: model.get_submodule(name) for name in names}, lead)


# ------------------------------------------------------------------------------------ one forward pass


@attrs.frozen(eq=False)
class Seen:
    """What a layer call got and gave.

    Args:
        arguments: (args, kwargs) of its forward; copies.
        output: what forward returned; copies.
        random: the random state when it began.
        began: the place of its beginning among all beginnings and ends.
        ended: the place of its end among them.
    """

    arguments: tuple[Args, Kwargs]
    output: Any
    random: RandomState
    began: int
    ended: int


def observe(setting: Setting, batch: Any, places: list[Place]) -> dict[Place, Seen]:
    """Run the model once and return what was seen at each place.

    Raises:
        ModelNotCalledError: if the model does not make one of these calls.
    """
    seen: dict[Place, Seen] = {}
    clock = 0
    counts: dict[str, int] = {}

    def around(number: int, name: str, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        nonlocal clock
        counts[name] = number + 1
        here = [place for place in places if place.is_at(name, number)]
        if not here:
            return forward(*args, **kwargs)
        clock += 1
        began, random, arguments = clock, RandomState(), _copied((args, kwargs))
        output = forward(*args, **kwargs)
        clock += 1
        seen.update({place: Seen(arguments, _copied(output), random, began, clock) for place in here})
        return output

    names = {place.module for place in places}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        setting.evaluating(),
        numbered(setting.module, names, around),
    ):
        run_model(setting.module, batch)
    for place in places:
        if place not in seen:
            raise _not_called(setting.module, place, counts.get(place.module, 0))
    return seen


def _copied(value: Any) -> Any:
    """Return a copy of a nested value: tensors, and objects such as a cache that a call may change."""
    tensors: dict[int, Tensor] = {}

    def tensor(old: Tensor) -> Tensor:
        if id(old) not in tensors:
            tensors[id(old)] = old.detach().clone()
        return tensors[id(old)]

    leaves, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten([_copied_object(map_tensors(tensor, leaf)) for leaf in leaves], spec)


def _copied_object(leaf: Any) -> Any:
    known = (Tensor, nn.Module, type, str, int, float, type(None))
    if isinstance(leaf, known) or callable(leaf) or not hasattr(leaf, "__dict__"):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # what cannot be copied is shared; the function of the layer is checked anyway
        return leaf


def _not_called(model: nn.Module, place: Place, count: int) -> ModelNotCalledError:
    if count:
        return ModelNotCalledError(
            f"{place.name!r} asks for call number {place.number} of {place.module!r}, but on this batch the "
            f"model calls it {count} time{'s' if count > 1 else ''}, numbered from 0. Ask for "
            f"{f'{place.module}@{count - 1}' if count > 1 else place.module!r} at most."
        )
    above = ancestors(place.module)[0] if place.module else ""
    parent = f"{above!r} ({type(model.get_submodule(above)).__name__})" if above else "the model"
    return ModelNotCalledError(
        f"{place} is not called on this batch. Its parent, {parent}, may use its parameters without calling "
        f"it, as nn.MultiheadAttention does with its out_proj: then ask for {above!r}. Or the batch takes "
        "another branch, or the module is left over and unused."
    )


# ------------------------------------------------------------------------------------ which tensors vary


def varied_positions(
    place: Place, module: nn.Module, seen: Seen, argument: int | str | None
) -> tuple[int, ...]:
    """Return the positions of the input tensor among the floating-point tensors in the arguments.

    There are several where the same tensor is passed more than once, as in self-attention.

    Raises:
        ModelInputError: if there is no such argument, or no floating-point tensor in it.
    """
    args, kwargs = seen.arguments
    asked: Any = (args, kwargs)
    if argument is not None:
        asked = _bound(place, module, args, kwargs, argument)
    candidates = floats(asked)
    if not candidates:
        where = "its arguments" if argument is None else f"its argument {argument!r}"
        raise ModelInputError(
            f"{place} has no floating-point tensor among {where} ({shapes(asked)}), so it has no Jacobian "
            "with respect to them. Begin at its output instead: `jacobian_between(model, "
            f"{place.name!r}, target, batch)`."
        )
    return tuple(i for i, tensor in enumerate(floats((args, kwargs))) if tensor is candidates[0])


def _bound(place: Place, module: nn.Module, args: Args, kwargs: Kwargs, argument: int | str) -> Any:
    if isinstance(argument, int) and 0 <= argument < len(args):
        return args[argument]
    named = dict(kwargs)
    with contextlib.suppress(TypeError, ValueError):
        named |= inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if argument in named:
        return named[str(argument)]
    raise ModelInputError(
        f"argument {argument!r} of {place}: the model passes it {len(args)} positional arguments and those "
        f"named {', '.join(named) or '(none)'}. Give a position, or one of these names."
    )


def first_output(place: Place, output: Any) -> Tensor:
    """Return the first floating-point tensor of an output.

    Raises:
        ModelInputError: if there is none.
    """
    found = floats(output)
    if not found:
        raise ModelInputError(
            f"{place} returns no floating-point tensor ({shapes(output)}), so it has no Jacobian. Choose a "
            "layer before it."
        )
    return found[0]


# ------------------------------------------------------------------------------------ pure functions


def layer_alone(setting: Setting, place: Place, seen: Seen, positions: tuple[int, ...]) -> Held:
    """Return the function of a layer that calls the layer alone; see NOTE [The function of a layer]."""
    held = seen.arguments

    def function(x: Tensor) -> Tensor:
        outputs: list[Any] = []

        def around(number: int, name: str, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
            args, kwargs = replaced(_copied(held), positions, x.clone())
            outputs.append(forward(*args, **kwargs))
            return outputs[0]

        with setting.evaluating(), numbered(setting.module, {""}, around):
            args, kwargs = _copied(held)
            setting.module(*args, **kwargs)
        return first_output(place, outputs[0])

    return Held(function, setting)


@attrs.frozen(eq=False)
class Start:
    """Where a function of the whole model begins.

    Args:
        place: the call.
        positions: of the varied tensor among the floating-point ones.
        side: whether those are of the call's arguments or of its output.
    """

    place: Place
    positions: tuple[int, ...]
    side: str


class _Reached(BaseException):
    """The target has returned, and the rest of the model need not run; never seen by a user."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def through_model(setting: Setting, batch: Any, start: Start, target: Place) -> Held:
    """Return the function from a tensor at `start` to the output of `target`, by running the model."""

    def function(x: Tensor) -> Tensor:
        def around(number: int, name: str, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
            here = start.place.is_at(name, number)
            if here and start.side == "input":
                args, kwargs = replaced((args, kwargs), start.positions, x.clone())
            output = forward(*args, **kwargs)
            if here and start.side == "output":
                output = replaced(output, start.positions, x.clone())
            if target.is_at(name, number):
                raise _Reached(first_output(target, output))
            return output

        names = {start.place.module, target.module}
        with setting.evaluating(), numbered(setting.module, names, around):
            return _run_until_reached(setting.module, batch, target)

    return Held(function, setting)


def _run_until_reached(model: nn.Module, batch: Any, target: Place) -> Tensor:
    try:
        run_model(model, batch)
    except _Reached as reached:
        return reached.value
    raise ModelNotCalledError(
        f"{target} was called in the first pass of the model but not in a later one, which differs in the "
        "tensor at the source alone: the model branches on its values, or on state that is not put back. "
        "Measure layer by layer, with layer_gain or layer_spectrum."
    )


def is_reproduced(function: TensorFunction, point: Tensor, expected: Tensor) -> bool:
    """Whether the function gives, up to rounding, what the layer gave in the model; raises what it raises."""
    with torch.no_grad():
        got = function(point)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    share = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    return torch.allclose(got, expected, rtol=0.0, atol=share * scale, equal_nan=True)
