"""Gradients of single samples by `vmap`, and what they tell of the noise in a batch's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import ModelInputError
from gradflow.functional.jacobian.sample_losses import SampleLosses
from gradflow.functional.model.layers import callable_modules, owner
from gradflow.functional.model.state import Tensors
from gradflow.functional.model.threads import measuring
from gradflow.functional.model.trees import shapes, wide_dtype
from gradflow.records.fields import by_name, float_field

SampleMethod = Literal["vmap", "loop"]
_CHUNK_ELEMENTS = 2**25  # of gradient held at once, where no chunk size is given


@attrs.frozen(kw_only=True)
class LayerNoise:
    """The noise in the gradient of one layer's parameters, over the samples of a batch.

    With G the mean and Σ the covariance of the gradients of single samples, both estimated without bias:

    Args:
        name: name of the layer; `""` is the model itself, or stands for all parameters together.
        num_parameters: elements of its parameters.
        squared_norm: |G|². May come out at zero or below where the batch is too small to tell G from noise.
        trace: tr Σ, the noise of a single sample.
    """

    name: str
    num_parameters: int
    squared_norm: float = float_field(math.nan)
    trace: float = float_field(math.nan)

    @property
    def noise_scale(self) -> float:
        """tr Σ / |G|²: the batch size at which noise and signal are equal. ∞ where |G|² is not above 0."""
        if self.squared_norm > 0:
            return self.trace / self.squared_norm
        return math.nan if self.squared_norm != self.squared_norm or self.trace == 0 else math.inf

    @property
    def signal_to_noise(self) -> float:
        """|G| / √(tr Σ), of one sample's gradient; that of a batch of B is √B times as large.

        0 where |G|² is not above 0, ∞ without noise.
        """
        if self.squared_norm > 0:
            return math.sqrt(self.squared_norm / self.trace) if self.trace > 0 else math.inf
        return math.nan if self.squared_norm != self.squared_norm or self.trace == 0 else 0.0


@attrs.frozen(kw_only=True)
class GradientNoise(Sequence[LayerNoise]):
    """The noise in a batch's gradient: a sequence of layers, and a mapping from their names.

    Args:
        layers: by layer, in the order of the parameters.
        total: of all parameters together.
        num_samples: samples in the batch.
    """

    layers: tuple[LayerNoise, ...]
    total: LayerNoise
    num_samples: int

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerNoise]:
        return iter(self.layers)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return self.layers[key]
        return by_name(self.layers, key)

    @property
    def noise_scale(self) -> float:
        """That of all parameters together."""
        return self.total.noise_scale

    @property
    def signal_to_noise(self) -> float:
        """That of all parameters together."""
        return self.total.signal_to_noise


# ------------------------------------------------------------------------------------ the two functions


@measuring()
def per_sample_gradients(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    chunk_size: int | None = None,
    method: SampleMethod = "vmap",
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of every sample's own loss, by parameter.

    `vmap` over `torch.func.grad`: model and loss see one sample at a time, as a batch of one, so a loss that
    takes the mean or the sum over the batch gives that sample's. The mean of the result over samples is the
    gradient of the mean loss.

    Args:
        model: the model, in the modes that it is to be measured in. Dropout draws another mask for each
            sample.
        batch: what `analyze` takes: a tensor, `model(x)`; a tuple, `model(*x)`; a mapping, `model(**x)`; for
            a loss of two arguments the pair (inputs, target). Tensors whose first axis is as long as that of
            the first one are split along it; anything else is shared by all samples.
        loss_fn: output → scalar, or (output, target) → scalar, or None for the loss that the model computes.
        chunk_size: samples at once; bounds the memory of the pass. By default all of them.
        method: `vmap`, or `loop`: one sample after the other, for models that `vmap` rejects.
        seed: seeds torch, numpy and Python for the run; None goes on from the present states.

    Returns:
        A tensor of shape (samples, *parameter's shape) for every parameter that requires a gradient.

    Raises:
        ModelInputError: if the model, the batch or the loss cannot be used as such, or BatchNorm is in
            training, in which no gradient of one sample exists.
        LossError: if the loss of a sample is no scalar or carries no gradient.
        NoTrainableParametersError: if no parameter requires a gradient.
        ModelCallError: if `vmap` rejects the model.
        ValueError: if `chunk_size` or `method` is none of those above.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> x = torch.arange(6.0).reshape(2, 3)
    >>> per_sample_gradients(model, x, lambda y: y.sum())["weight"]
    tensor([[[0., 1., 2.]],
            [[3., 4., 5.]]])
    """
    program = SampleLosses.of(model, batch, loss_fn, method=method, seed=seed)
    chunks = list(program.gradients(program.num_samples if chunk_size is None else chunk_size))
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in program.trainable}


@measuring()
def gradient_noise(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    chunk_size: int | None = None,
    method: SampleMethod = "vmap",
    seed: int | None = None,
) -> GradientNoise:
    """Return the gradient's noise scale and signal-to-noise ratio, for every layer and altogether.

    With g_i the gradients of n samples and ḡ their mean, tr Σ ≈ Σ|g_i − ḡ|² / (n − 1) and
    |G|² ≈ |ḡ|² − tr Σ / n, both unbiased. Their ratio is the simple noise scale of McCandlish, Kaplan and
    Amodei (2018, arXiv:1812.06162): batches much smaller are mostly noise, much larger ones gain little. No
    more than one chunk of gradients is held.

    Args:
        model, batch, loss_fn, method, seed: as for `per_sample_gradients`.
        chunk_size: samples at once. By default as many as keep the gradients held below 2²⁵ elements.

    Raises:
        ModelInputError: also if the batch holds fewer than two samples.
        GradflowError: those that `per_sample_gradients` raises.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> x = torch.tensor([[1.0], [3.0]])  # these are the gradients themselves
    >>> noise = gradient_noise(model, x, lambda y: y.sum())
    >>> noise.total.trace, noise.total.squared_norm, round(noise.noise_scale, 3)
    (2.0, 3.0, 0.667)
    """
    program = SampleLosses.of(model, batch, loss_fn, method=method, seed=seed)
    number = program.num_samples
    if number < 2:
        raise ModelInputError(
            f"gradient_noise: the batch holds {number} sample, and a variance needs two at least "
            f"({shapes(batch)}). Pass a larger batch, samples along the first axis."
        )
    size = sum(p.numel() for p in program.trainable.values())
    means: Tensors = {}
    scatter = dict.fromkeys(program.trainable, 0.0)  # Σ|g_i − ḡ|²
    done = 0
    if chunk_size is None:
        chunk_size = min(number, max(1, _CHUNK_ELEMENTS // max(size, 1)))
    for chunk in program.gradients(chunk_size):
        for name, gradients in chunk.items():
            scatter[name] += _merge(means, name, gradients, done)
        done += len(next(iter(chunk.values())))
    modules = callable_modules(model)
    owned: dict[str, list[str]] = {}
    for name in program.trainable:
        owned.setdefault(owner(name, modules), []).append(name)
    layers = tuple(_noise(layer, names, means, scatter, number) for layer, names in owned.items())
    return GradientNoise(
        layers=layers, total=_noise("", list(program.trainable), means, scatter, number), num_samples=number
    )


def _merge(means: Tensors, name: str, gradients: Tensor, done: int) -> float:
    """Take a chunk into the running mean; return what it adds to Σ|g_i − ḡ|² (Chan et al., 1983)."""
    precise = wide_dtype(gradients.device)
    gradients = gradients.to(precise)
    new = len(gradients)
    mean = gradients.mean(0)
    added = float((gradients - mean).square().sum())
    if name in means:
        step = mean - means[name]
        added += float(step.square().sum()) * done * new / (done + new)
        mean = means[name] + step * (new / (done + new))
    means[name] = mean
    return added


def _noise(
    layer: str, names: list[str], means: Tensors, scatter: dict[str, float], number: int
) -> LayerNoise:
    trace = sum(scatter[name] for name in names) / (number - 1)
    squared = sum(float(means[name].square().sum()) for name in names)
    return LayerNoise(
        name=layer,
        num_parameters=sum(means[name].numel() for name in names),
        squared_norm=squared - trace / number,
        trace=trace,
    )
