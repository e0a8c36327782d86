"""Probes: identities whose backward pass turns a gradient into a statistic.

NOTE [Statistics as cotangents]
A probe takes `(x, slot)` and returns `x`. Its backward pass hands the gradient on unchanged for `x`, and for
`slot`, a scalar zero, it returns the magnitude of that gradient. So the gradient with respect to the
slots *is* the statistic of every probed tensor: one forward and one backward pass, nothing retained, and it
composes with `torch.func.grad`, `vjp`, `jvp` and `vmap`.

The output is `x.detach()`: a new tensor over the same storage that shares the version counter. A view
(`x.view_as(x)`) would make PyTorch refuse in-place operations on it; a tensor with a version counter of its
own would hide an in-place change of a tensor that an earlier layer has saved for its backward pass, and the
gradient would be silently wrong where plain PyTorch raises.

NOTE [Captured gradients]
A probe costs some twenty microseconds of Python, on the way there and back. The gradient of a small output
can be asked for by its edge in autograd's graph instead, and be summed when the pass is over: autograd then
hands it out on its way, at no cost. What is captured stays in memory until the end of the pass, so large
outputs are probed. An output that was not made in the call (it is an input handed on) shares its edge with
whoever made it, so it is probed too. So is what a custom function made: in older releases of PyTorch its node
does not keep itself alive, and to ask for the gradient at one that is gone ends the process. An output that
is also used past its probe has both: the probe marks it in the graph, and the edge gathers the whole of its
gradient.

NOTE [Whose probes]
The graph of a training may hold probes of several recorders: two models that are looked into at once, a
hidden state that was kept from an earlier pass. Each knows its own by `whose`, and takes others for what they
are, identities. A measurement beside the training has a graph to itself, and needs no name.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradflow.functional.processes.shards import arrived
from gradflow.functional.tap.sums import careful_magnitude, in_dtype, magnitude
from gradflow.functional.torch_private import node_class, preserved_writes


@attrs.define(eq=False)
class Site:
    """Where a probe stands: output `index` of layer call number `call` of this step."""

    call: int
    index: int
    exact: bool
    slot: Tensor | None = None
    edge: GradientEdge | None = None  # in the place of a slot: see NOTE [Captured gradients]
    whose: Any = None  # see NOTE [Whose probes]


class Probe(torch.autograd.Function):
    """The identity on `x`; the gradient with respect to `slot` is the magnitude of the gradient of `x`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slot: Tensor, site: Site) -> Tensor:
        return arrived(x.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.site = inputs[2]
        ctx.slot_shape = inputs[1].shape
        ctx.slot_dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (g,) = grad_outputs
        total = in_dtype(magnitude(g, exact=ctx.site.exact), ctx.slot_dtype)
        if ctx.slot_shape:  # a slot of two: the second tells "reached, and zero" from "never reached"
            total = torch.stack([total, torch.ones_like(total)])
        return g, total, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return grad_inputs[0].view_as(grad_inputs[0])


class EagerProbe(torch.autograd.Function):
    """`Probe` in the older form, which `torch.func` does not take but which costs a fifth as much to call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, site: Site) -> Tensor:  # type: ignore[override]
        ctx.site = site
        return arrived(x.detach())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (g,) = grad_outputs
        return g, magnitude(g, exact=ctx.site.exact), None


class EagerInPlaceProbe(EagerProbe):
    """`EagerProbe` that takes the place of `x` itself in autograd's books, for whoever holds it.

    The gradient with respect to its slot is the careful magnitude.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, site: Site) -> Tensor:  # type: ignore[override]
        ctx.site = site
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (g,) = grad_outputs
        return g, careful_magnitude(g.detach()), None


class InPlaceProbe(Probe):
    """`Probe` that takes the place of `x` itself in autograd's books, for whoever holds it."""

    @staticmethod
    def forward(x: Tensor, slot: Tensor, site: Site) -> Tensor:
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        Probe.setup_context(ctx, inputs, output)
        ctx.mark_dirty(inputs[0])


class Arrival(torch.autograd.Function):
    """The identity on `x`; the gradient with respect to `mark` is one where a gradient of `x` arrives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mark: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark = inputs[1].dtype, inputs[1].device

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        dtype, device = ctx.mark
        return grad_outputs[0], torch.ones((), dtype=dtype, device=device)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return grad_inputs[0].view_as(grad_inputs[0])


def arrival(x: Tensor, mark: Tensor) -> Tensor:
    """Return `x` in a form that tells, by the gradient of the scalar `mark`, whether its gradient arrives."""
    return Arrival.apply(x, mark)  # type: ignore[return-value]


def probe(x: Tensor, slot: Tensor, site: Site) -> Tensor:
    """Return `x` with a probe on its gradient; works under `torch.func`.

    The gradient with respect to the slot is the norm of the gradient at `x` where the slot is in double
    precision, and its square in single precision. See NOTE [Statistics as cotangents].

    Args:
        x: tensor of any shape and floating or complex dtype.
        slot: a zero of shape (), or of shape (2,) to be told as well whether the gradient arrived.
        site: where it stands, and how to sum.

    >>> site = Site(0, 0, exact=True)
    >>> x, slot = torch.tensor([3.0, 4.0]), torch.zeros((), dtype=torch.float64)
    >>> loss = lambda x, slot: (probe(x, slot, site) * torch.tensor([3.0, 4.0])).sum()
    >>> torch.func.grad(loss, argnums=(0, 1))(x, slot)
    (tensor([3., 4.]), tensor(5., dtype=torch.float64))
    """
    return Probe.apply(x, slot, site)  # type: ignore[return-value]


def eager_probe(x: Tensor, slot: Tensor, site: Site) -> Tensor:
    """Return `x` with a probe on its gradient, for use under plain autograd."""
    return EagerProbe.apply(x, slot, site)  # type: ignore[return-value]


def in_place_probe(x: Tensor, slot: Tensor, site: Site) -> Tensor:
    """Return `x`, the very object, with a probe on its gradient.

    For a layer that returns the tensor it was given and has written to: whether its caller goes on with what
    it returned or with what it was given, the gradient passes the probe. Nothing is written, so the count of
    writes is kept, or autograd would hold what the layer saved for spoilt.
    """
    with preserved_writes(x):
        return InPlaceProbe.apply(x, slot, site)  # type: ignore[return-value]


def eager_in_place_probe(x: Tensor, slot: Tensor, site: Site) -> Tensor:
    """Return `x`, the very object, with a probe on its gradient, for use under plain autograd.

    As `in_place_probe` does; `x` is neither a leaf nor a view.
    """
    with preserved_writes(x):
        return EagerInPlaceProbe.apply(x, slot, site)  # type: ignore[return-value]


_NODES = tuple(node_class(kind) for kind in (EagerProbe, EagerInPlaceProbe, Probe, InPlaceProbe))


_whose: contextvars.ContextVar[Any] = contextvars.ContextVar("whose probes are looked for", default=None)


@contextlib.contextmanager
def probes_of(whose: Any) -> Iterator[None]:
    """Look for somebody's own probes, for the length of the context; see NOTE [Whose probes]."""
    token = _whose.set(whose)
    try:
        yield
    finally:
        _whose.reset(token)


def is_probe(node: Any) -> bool:
    """Whether an autograd node is a probe, and one of those that are looked for."""
    return isinstance(node, _NODES) and node.site.whose is _whose.get()


_MARK = "gradflow"


def mark(node: Any, site: Site) -> None:
    """Have an autograd node tell that it makes an output, where no probe can stand behind it."""
    node.metadata[_MARK] = site


def site_of(node: Any) -> Site | None:
    """Return the site of a probe, or of the output that a node is marked to make; else None."""
    site = node.site if isinstance(node, _NODES) else node.metadata.get(_MARK)
    return site if site is not None and site.whose is _whose.get() else None


def tells_split(node: Any) -> bool:
    """Whether an autograd node tells how what it made was split: a probe, or the way out of a DTensor."""
    return site_of(node) is not None or hasattr(node, "dtensor_spec") or hasattr(node, "grad_placements")


def is_custom(node: Any) -> bool:
    """Whether an autograd node is of a function written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)
