"""Calls of modules, what is noted of them, and small questions about the modules and tensors of a step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.model.layers import is_scripted
from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.processes.shards import Ranks, is_distributed, local, split_of
from gradflow.functional.tap.nodes import nodes_under
from gradflow.functional.tap.probes import Site, site_of, tells_split
from gradflow.functional.torch_private import checkpoint_segment, num_writes, sequence_number
from gradflow.functional.torch_sharded import unsharded_class


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
    split: Mapping[Ranks, int] = attrs.field(factory=dict)  # see `note_split`
    entering: Mapping[Ranks, int] = attrs.field(factory=dict)  # the same of its first input

    def begin(self, args: Any) -> None:
        """Note what is so at the start of the call."""
        self.grad_enabled = torch.is_grad_enabled()
        self.segment = 0 if self.grad_enabled else checkpoint_segment()
        if self.is_layer:
            self.versions = [version(a) for a in args]
        self.start = sequence_number()

    def begin_again(self, args: Any) -> None:
        """Forget an earlier, like call, and note the start of this one."""
        self.sites, self.num_elements = [], 0
        if self.is_layer:
            self.versions = [version(args[0])] if len(args) == 1 else [version(a) for a in args]
        self.start = sequence_number()

    def note_inputs(self, inputs: Any) -> None:
        """Note whether any tensor that enters the call requires a gradient."""
        self.differentiable = any(t.requires_grad for t in iter_tensors(inputs))

    def note_child(self) -> None:
        """Note that a layer is called in this call."""
        self.has_children = True

    def note_output(self, y: Tensor) -> None:
        """Note the size of an output, and the shape of the first."""
        here = local(y)
        if not self.num_elements:  # the record of an earlier step may be used again
            self.shape = self._whole(tuple(here.shape))
        self.num_elements += here.numel()

    def note_size(self, number: int) -> None:
        """Note the size of the only output, whose shape is known."""
        self.num_elements = number

    def note_entering(self, split: Mapping[Ranks, int]) -> None:
        """Note over which processes its first input is split."""
        self.entering = split

    def note_split(self, split: Mapping[Ranks, int], size: tuple[int, ...]) -> None:
        """Note over which processes an output is split, each of them having a part; see `split_of`.

        Args:
            split: by the processes, the axis of the output.
            size: of the part that this process has.
        """
        self.split = {**split, **self.split}
        self.shape = self._whole(size)

    def _whole(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of an output of which this process has a part of some size."""
        whole = list(size)
        for ranks, axis in self.split.items():
            if axis < len(whole):
                whole[axis] *= len(ranks)
        return tuple(whole)

    def finish(self) -> None:
        """Note the end of the call."""
        self.end = sequence_number()

    def take_over(self, first: Call) -> None:
        """Take over from the same call of an earlier step what only the first step shows."""
        self.differentiable, self.has_children = first.differentiable, first.has_children
        if not self.split and first.split:
            self.split = first.split
            self.shape = self._whole(self.shape)
        self.shape, self.entering = self.shape or first.shape, self.entering or first.entering


@attrs.frozen
class ActivationKey:
    """Which activation an observation is about."""

    name: str
    op: str
    kind: str
    functional: bool
    layer: str


@attrs.frozen(eq=False)
class Observation:
    """A number about a call (or an activation), or a vector of them, that is still on its device.

    Args:
        kind: what it is.
        key: the index of the call, or the key of the activation.
        value: the number.
        number: of elements behind it.
    """

    kind: str
    key: Any
    value: Tensor
    number: int


@attrs.frozen(eq=False)
class Given:
    """What a layer has handed on, and its magnitude: most of it is what comes to a layer next."""

    output: weakref.ref[Tensor]
    version: int
    size: Tensor
    exact: bool

    @classmethod
    def of(cls, output: Tensor, size: Tensor, *, exact: bool) -> Given:
        """Return what is known of an output; it is not kept alive."""
        return cls(weakref.ref(output), version(output), size, exact)

    def size_of(self, x: Tensor, *, exact: bool) -> Tensor | None:
        """Return the magnitude of a tensor, taken so, if it is the output and was not written to since."""
        same = self.output() is x and exact == self.exact and 0 <= self.version == version(x)
        return self.size if same else None


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
_CHANNELS_SECOND = ("Conv", "BatchNorm", "SyncBatchNorm", "InstanceNorm", "GroupNorm")


def unit_axis(y: Tensor, feeding: str) -> int:
    """Return the axis of `y` whose indices are its units: channels behind a convolution, else features."""
    if y.dim() <= 2 or feeding in _CHANNELS_LAST:
        return -1
    if feeding.startswith(_CHANNELS_SECOND) or "Pool" in feeding:
        return 1
    return 1 if y.dim() >= 4 else -1


def type_name(module: nn.Module) -> str:
    """Return the name of a module's class; of the class that it was made from, where it is TorchScript."""
    return str(module.original_name) if is_scripted(module) else unsharded_class(module).__name__


def version(value: Any) -> int:
    """Return how often a tensor has been written to; -1 for what keeps no count."""
    try:
        return num_writes(value) if isinstance(value, Tensor) else -1
    except RuntimeError:  # a tensor of inference mode
        return -1


def split_of_output(calls: Sequence[Call], y: Tensor) -> dict[Ranks, int]:
    """Return over which processes a layer's output is split; see NOTE [Tensor parallel].

    A plain tensor is split as the DTensors were that it was made of.
    """
    if is_distributed(y):
        return split_of(y.device_mesh, y.placements)  # type: ignore[attr-defined]
    found: dict[Ranks, int] = {}
    for node in nodes_under([] if y.grad_fn is None else [y.grad_fn], stops=tells_split):
        if (site := site_of(node)) is not None:
            found |= calls[site.call].split
        elif hasattr(node, "dtensor_spec"):
            found |= split_of(node.dtensor_spec.mesh, node.dtensor_spec.placements)
    return found


def counter(y: Tensor) -> Tensor:
    """Return an empty tensor that shares the count of writes with `y`, and does not keep its memory."""
    empty = y.detach()
    empty.data = empty.new_empty(0)
    return empty
