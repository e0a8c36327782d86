"""Calls of modules, what is noted of them, and small questions about the modules and tensors of a step."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.tap.probes import Site
from gradflow.functional.torch_private import num_writes


@attrs.define(eq=False)
class Call:
    """One execution of a module in the present step."""

    index: int
    name: str
    module: str
    type: str
    number: int
    parent: int
    is_layer: bool
    start: int = 0  # autograd sequence numbers: the nodes made in [start, end) are this call's
    end: int = 0
    has_children: bool = False
    differentiable: bool = False
    grad_enabled: bool = True
    segment: int = 0  # tells the reentrant checkpoint that it runs in from others of the step
    shape: tuple[int, ...] = ()
    num_elements: int = 0
    versions: list[int] = attrs.field(factory=list)  # of the positional arguments, before it ran
    sites: list[Site] = attrs.field(factory=list)


@attrs.frozen(eq=False)
class Observation:
    """A number about a call (or an activation) that is still on its device."""

    kind: str
    key: Any
    number: int  # of elements behind the value


# Layers that keep the units of the layer before them.
PASSING = frozenset(
    [
        "ReLU",
        "ReLU6",
        "LeakyReLU",
        "ELU",
        "SELU",
        "CELU",
        "GELU",
        "SiLU",
        "Mish",
        "Sigmoid",
        "Tanh",
        "Softmax",
        "Softplus",
        "Hardtanh",
        "Dropout",
        "Identity",
        "LogSoftmax",
        "Hardsigmoid",
        "Hardswish",
        "Threshold",
        "Flatten",
    ]
)
_CHANNELS_LAST = frozenset(
    ("Linear", "LayerNorm", "Embedding", "RMSNorm", "MultiheadAttention", "LSTM", "GRU")
)


def unit_axis(y: Tensor, feeding: str) -> int:
    """Return the axis of `y` whose indices are its units: channels behind a convolution, else features."""
    if y.dim() <= 2 or feeding in _CHANNELS_LAST:
        return -1
    if feeding.startswith(("Conv", "BatchNorm", "InstanceNorm", "GroupNorm")) or "Pool" in feeding:
        return 1
    return 1 if y.dim() >= 4 else -1


def type_name(module: nn.Module) -> str:
    """Return the name of a module's class; of the class that it was made from, where it is TorchScript."""
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def version(value: Any) -> int:
    """Return how often a tensor has been written to; -1 for what keeps no count."""
    return num_writes(value) if isinstance(value, Tensor) and not value.is_inference() else -1
