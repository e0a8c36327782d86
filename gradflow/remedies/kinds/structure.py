"""Remedies of structure: other activations and layers, norms, skip connections, standardised inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import RemedyError
from gradflow.remedies.remedy import Remedy, on_model
from gradflow.remedies.surgery import access, each, for_each, listed, part, put, with_tensors_like

_CONVOLUTIONS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.BatchNorm3d),
)


def _takes_images(layer: nn.Module) -> bool:
    """Whether the features of what enters a layer are axis 1, and not the last one."""
    return isinstance(layer, tuple(convolution for convolution, _ in _CONVOLUTIONS))


def each_put(names: Sequence[str], make: Callable[[nn.Module, str], nn.Module]) -> Any:
    """Return a change of a model that puts what is made of each module in its place."""

    def change(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name in names:
                old = part(model, name)
                model = put(model, name, with_tensors_like(make(old, name), old))
        return model

    return on_model(change)


def norm_behind(names: Sequence[str]) -> Remedy:
    """Return the remedy that puts a norm layer behind each of some layers: a batch norm behind a convolution,
    else a layer norm over the features.

    Ioffe and Szegedy, 2015; Ba et al., "Layer normalization", 2016.
    """

    def make(old: nn.Module, name: str) -> nn.Module:
        for convolution, norm in _CONVOLUTIONS:
            if isinstance(old, convolution):
                return nn.Sequential(old, norm(old.out_channels))  # type: ignore[call-arg, arg-type]
        if isinstance(old, nn.RNNBase):
            return NormedOutput(old, nn.LayerNorm(old.hidden_size * (2 if old.bidirectional else 1)))
        width = _width(old)
        return _Normal(old) if width is None else nn.Sequential(old, nn.LayerNorm(width))

    return Remedy(
        name=f"a norm layer behind {listed(names)}",
        general=True,
        words=f"A norm layer behind {listed(names)}.",
        code="\n".join(
            f"{access(name)} = nn.Sequential({access(name)}, nn.LayerNorm(...))  # nn.BatchNorm2d behind a "
            "convolution"
            for name in names[:3]
        )
        + ("\n# and so on" if len(names) > 3 else ""),
        apply=each_put(names, make),
    )


def _width(layer: nn.Module) -> int | None:
    """How wide the output of a layer is; None where it does not tell."""
    found = (getattr(layer, name, None) for name in ("out_features", "embedding_dim", "nf"))
    return next((width for width in found if isinstance(width, int)), None)


class _Normal(nn.Module):
    """A layer with a norm without gains over the features of its output, or of the first of its outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self.layer(*args, **kwargs)
        return (normed(y[0]), *y[1:]) if isinstance(y, tuple) else normed(y, images=y.dim() == 4)


class NormedOutput(nn.Module):
    """A recurrent layer with a norm behind the outputs of all its steps.

    Args:
        layer: returns its outputs and its last state.
        norm: of the outputs.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer, and normalise its outputs."""
        outputs, state = self.layer(*args, **kwargs)
        return self.norm(outputs), state


class Standardised(nn.Module):
    """A layer behind a standardisation of its input, feature by feature, over the other axes of the batch.

    Args:
        layer: the layer.
        images: whether the features are axis 1, as before a convolution, and not the last one.
    """

    def __init__(self, layer: nn.Module, *, images: bool = False) -> None:
        super().__init__()
        self.layer, self.images = layer, images

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the layer on the standardised input."""
        if not x.is_floating_point():
            raise RemedyError(f"what enters is {str(x.dtype).removeprefix('torch.')}, no measured quantity.")
        feature = 1 if self.images else x.dim() - 1
        axes = [axis for axis in range(x.dim()) if axis != feature]
        with torch.no_grad():
            y = x.double()
            mean, std = y.mean(axes, keepdim=True), y.std(axes, keepdim=True, unbiased=False)
        return self.layer(((x - mean) / (std + 1e-5 + 1e-6 * mean.abs())).to(x.dtype), *args, **kwargs)


class Times(nn.Module):
    """A layer whose output is multiplied by a constant, and shifted by another."""

    def __init__(self, layer: nn.Module, factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.layer, self.factor, self.shift = layer, factor, shift

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer, and scale what comes."""
        return self.factor * self.layer(*args, **kwargs) + self.shift


def standardised(names: Sequence[str]) -> Remedy:
    """Return the remedy that standardises what enters some layers, feature by feature."""

    def make(old: nn.Module, name: str) -> nn.Module:
        return Standardised(old, images=_takes_images(old))

    return Remedy(
        name=f"standardised inputs of {listed(names)}",
        general=True,
        words=f"What enters {listed(names)} standardised, feature by feature.",
        code="x = (x - x.mean(0)) / (x.std(0) + 1e-6)  # feature by feature, over the training data, before "
        f"{listed(names)}",
        apply=each_put(names, make),
    )


def norm_before(names: Sequence[str]) -> Remedy:
    """Return the remedy that puts a layer norm, without gains of its own, before each of some layers."""

    def make(old: nn.Module, name: str) -> nn.Module:
        return _Normed(old, images=_takes_images(old))

    return Remedy(
        name=f"a norm layer before {listed(names)}",
        general=True,
        words=f"A norm layer before {listed(names)}.",
        code="\n".join(f"{access(n)} = nn.Sequential(nn.LayerNorm(...), {access(n)})" for n in names[:3]),
        apply=each_put(names, make),
    )


class _Normed(nn.Module):
    """A layer behind a norm over the features of its input; attention normalises keys and values too."""

    def __init__(self, layer: nn.Module, *, images: bool) -> None:
        super().__init__()
        self.layer, self.images = layer, images

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.layer, nn.MultiheadAttention):
            rest = [normed(a) if i < 2 and isinstance(a, Tensor) else a for i, a in enumerate(args)]
            return self.layer(normed(x), *rest, **kwargs)
        return self.layer(normed(x, images=self.images), *args, **kwargs)


def normed(x: Tensor, *, images: bool = False) -> Tensor:
    """Return a tensor with a norm over its features: the last axis, or all but the first of images."""
    return nn.functional.layer_norm(x, list(x.shape[1:] if images else x.shape[-1:]))


def output_times(names: Sequence[str], factor: float, shift: float = 0.0) -> Remedy:
    """Return the remedy that multiplies the outputs of layers, as a temperature does, and shifts them.

    Args:
        names: of the layers.
        factor: that it is multiplied by.
        shift: that is added then.
    """
    return Remedy(
        name=f"output of {listed(names)} × {factor:.3g}" + (f" + {shift:.3g}" if shift else ""),
        words=f"The output of {listed(names)} times {factor:.3g}"
        + (f", plus {shift:.3g}." if shift else "."),
        code=f"output = {factor:.3g} * output" + (f" + {shift:.3g}" if shift else ""),
        apply=each_put(names, lambda old, _: Times(old, factor, shift)),
    )


def activation(names: Sequence[str], new: type[nn.Module] = nn.GELU) -> Remedy:
    """Return the remedy that puts another activation in the place of some activation modules.

    Args:
        names: of the activation modules.
        new: the class of what takes their place, such as `nn.GELU`.
    """
    kind = new.__name__
    return Remedy(
        name=f"{kind} for {listed(names)}",
        words=f"{kind} in the place of {listed(names)}.",
        code="\n".join(f"{access(name)} = nn.{kind}()" for name in names),
        apply=each_put(names, lambda old, _: new()),
    )


def without(names: Sequence[str]) -> Remedy:
    """Return the remedy that leaves modules out, such as an activation at the end."""
    return Remedy(
        name=f"without {listed(names)}",
        words=f"{listed(names)} left out.",
        code="\n".join(f"{access(name)} = nn.Identity()" for name in names),
        apply=each_put(names, lambda old, _: nn.Identity()),
    )


def bounded_output(names: Sequence[str], low: float, high: float) -> Remedy:
    """Return the remedy that keeps outputs within bounds softly: middle + half × tanh of what they were.

    As for the logarithm of a standard deviation: Haarnoja et al., "Soft actor-critic", 2018.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    return Remedy(
        name=f"output of {listed(names)} within [{low:g}, {high:g}]",
        words=f"The output of {listed(names)} kept softly between {low:g} and {high:g}.",
        code=f"output = {middle:g} + {half:g} * torch.tanh((output - {middle:g}) / {half:g})",
        apply=each_put(names, lambda old, _: _Within(old, middle, half)),
    )


class _Within(nn.Module):
    """A layer whose output is bounded softly."""

    def __init__(self, layer: nn.Module, middle: float, reach: float) -> None:
        super().__init__()
        self.layer, self.middle, self.reach = layer, middle, reach

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.middle + self.reach * torch.tanh((self.layer(*args, **kwargs) - self.middle) / self.reach)


def norm_epsilon(names: Sequence[str], value: float = 1e-5) -> Remedy:
    """Return the remedy that gives norm layers a usual epsilon."""

    def change(model: nn.Module, name: str) -> None:
        norm: Any = part(model, name)
        for attribute in ("eps", "epsilon", "variance_epsilon"):
            if hasattr(norm, attribute):
                setattr(norm, attribute, value)
                return
        raise RemedyError(f"{name or 'the model'} has no epsilon.")

    return Remedy(
        name=f"eps={value:g} in {listed(names)}",
        words=f"An epsilon of {value:g} in {listed(names)}.",
        code=for_each(names, f"{{}}.eps = {value:g}"),
        apply=on_model(each(names, change)),
    )


def group_norm(names: Sequence[str]) -> Remedy:
    """Return the remedy that puts a group norm, which does not depend on the batch, for a batch norm.

    Wu and He, "Group normalization", 2018.
    """

    def make(old: nn.Module, name: str) -> nn.Module:
        width = getattr(old, "num_features", None)
        if not isinstance(width, int):
            raise RemedyError(f"{name or 'the model'} is no batch norm.")
        return nn.GroupNorm(math.gcd(8, width) if width > 8 else 1, width)

    return Remedy(
        name=f"GroupNorm for {listed(names)}",
        words=f"A group norm in the place of {listed(names)}.",
        code="\n".join(f"{access(n)} = nn.GroupNorm(8, {access(n)}.num_features)" for n in names),
        apply=each_put(names, make),
    )


def gated(name: str) -> Remedy:
    """Return the remedy that puts a GRU that starts by keeping its state for a plain recurrence.

    Cho et al., 2014.
    """

    def make(old: nn.Module, name: str) -> nn.Module:
        if isinstance(old, nn.RNNCell):
            new: Any = nn.GRUCell(old.input_size, old.hidden_size, old.bias)
        elif isinstance(old, nn.RNN):
            new = nn.GRU(
                old.input_size, old.hidden_size, old.num_layers, old.bias, old.batch_first, old.dropout,
                old.bidirectional,
            )  # fmt: skip
        else:
            raise RemedyError(f"{name or 'the model'} is a {type(old).__name__}, no plain recurrence.")
        size = old.hidden_size
        for key, parameter in new.named_parameters():
            if key.startswith("bias_ih"):
                parameter.data[size : 2 * size] = 2.0  # keeps 0.88 of the state in a step
        return new

    return Remedy(
        name=f"nn.GRU for {name or 'model'}",
        words=f"A GRU in the place of {name or 'the model'}, whose update gate starts at a bias of 2.",
        code=f"{access(name)} = nn.GRU(...)  # as {name or 'it'} was, the update gate's bias at 2",
        apply=each_put([name], make),
    )


def less_dropout(name: str, share: float) -> Remedy:
    """Return the remedy that drops less in a dropout layer."""

    def change(model: nn.Module, name: str) -> None:
        layer: Any = part(model, name)
        if not hasattr(layer, "p"):
            raise RemedyError(f"{name or 'the model'} is no dropout layer.")
        layer.p = share

    return Remedy(
        name=f"dropout {share:g} in {name or 'model'}",
        words=f"{name or 'The model'} drops {share:.0%}.",
        code=f"{access(name)}.p = {share:g}",
        apply=on_model(each([name], change)),
    )
