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

NOTE [Exact and fast]
A magnitude in single precision is a sum of squares, which is what the fast sums give; in double precision it
is a norm, whose square may lie outside of what a number can hold. Who reads one tells which by its dtype.

The square of a float32 below 1e-23 underflows and of one above 1e19 overflows. A double-precision sum holds
the squares of all shorter dtypes, at four times the cost; of double precision itself the elements are
first divided by the largest. A site is measured exactly in the first step, and afterwards wherever a step
was outside a safe range.

The safe range. A square below the smallest normal float32, t = 2⁻¹²⁶ ≈ 1.2e-38, is kept with an error of at
most t: it is rounded to a multiple of 2⁻¹⁴⁹, or to zero. So all n squares of a sum S, however many of them
underflow, are off by at most n·t together, and S by the share n·t / S. Where the sum that was found is above
1e-24·n, that share is below 1.2e-14: rounding aside, S is right. What lies below may have lost anything from
nothing to all of it, so the step is run again with exact sums. Above there is no such loss: a sum that
overflows is infinite. 1e24·n leaves room for the next step to be larger by 1e14.

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradflow.functional.processes.shards import arrived, settled
from gradflow.functional.torch_private import node_class, preserved_writes, transform_level
from gradflow.records import Bools, Floats


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
        total = _in_dtype(magnitude(g, exact=ctx.site.exact), ctx.slot_dtype)
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


def is_custom(node: Any) -> bool:
    """Whether an autograd node is of a function written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def magnitude(x: Tensor, *, exact: bool) -> Tensor:
    """Return how large a tensor is, a scalar on its device: ‖x‖ in double, or Σ|x|² in single precision.

    See NOTE [Exact and fast]. It is in double precision where `exact` is asked for or `x` is so itself, on
    devices that have it.

    Args:
        x: tensor of any shape, floating or complex dtype; a sparse one counts its stored values.
        exact: neither overflow nor underflow.
    """
    x = settled(x)
    if x.layout is not torch.strided:
        x = x.coalesce().values() if x.layout is torch.sparse_coo else x.to_dense()
    if not exact and (flat := _flat_plain(x)) is not None:
        squares = torch.dot(flat, flat)  # four times as fast as a norm on a CPU
        return squares if squares.dtype == torch.float32 else squares.sqrt()
    if x.is_complex():
        return magnitude(torch.view_as_real(x.resolve_conj()), exact=exact)
    if x.dtype == torch.float64:
        return _scaled_norm(x) if exact else torch.linalg.vector_norm(x)
    if exact and x.is_cpu and (flat := _flat(x)) is not None:
        return _double_norm(flat)
    if exact and x.device.type != "mps":
        return _by_pieces(x, lambda piece: torch.linalg.vector_norm(piece, dtype=torch.float64))
    return torch.linalg.vector_norm(x, dtype=torch.float32).square()


def magnitudes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the magnitudes of many tensors, each taken fast; see `magnitude`.

    On a device where a call costs more than the sum, those of one dtype are taken together.

    >>> magnitudes([torch.tensor([3.0, 4.0]), torch.tensor([[3.0, 4.0]], dtype=torch.float64)])
    [tensor(25.), tensor(5., dtype=torch.float64)]
    """
    found: dict[int, Tensor] = {}
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, x in enumerate(tensors):
        if type(x) is not Tensor or x.layout is not torch.strided:
            found[i] = magnitude(x, exact=False)
        elif not x.is_cpu and x.dtype in _SHORT:
            together.setdefault((x.device, x.dtype), []).append(i)
        elif x.is_cpu and x.dtype is torch.float32 and x.is_contiguous():
            flat = x.view(-1)
            found[i] = torch.dot(flat, flat)
        else:
            found[i] = magnitude(x, exact=False)
    for places in together.values():
        found |= zip(places, _squares_of([tensors[i] for i in places]), strict=True)
    return [found[i] for i in range(len(tensors))]


def _squares_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return Σ|x|² of each tensor in single precision, all in a few calls."""
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.stack(list(norms)).square().unbind()


def careful_magnitude(x: Tensor) -> Tensor:
    """Return what `magnitude` does where it is exact, for whom no second try is left.

    It is a fast sum where that lies in the safe range, which on a CPU can be asked at once.

    Args:
        x: as for `magnitude`.

    >>> [f"{float(careful_magnitude(torch.tensor(x))):.4g}" for x in ([3.0, 4.0], [3e-30, 4e-30])]
    ['5', '5e-30']
    """
    x = settled(x)
    flat = _flat_plain(x)
    if flat is not None and flat.dtype == torch.float32:
        square = torch.dot(flat, flat)
        least, most = safe_range(flat.numel())
        if least**2 < float(square) < most**2:
            return square.double().sqrt()
    return magnitude(x, exact=True)


def as_norm(found: Tensor) -> Tensor:
    """Return the norm that a magnitude tells."""
    return found if found.dtype == torch.float64 else found.sqrt()


def _in_dtype(found: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a magnitude in another dtype."""
    if found.dtype == dtype:
        return found
    return found.double().sqrt() if dtype == torch.float64 else found.square().to(dtype)


def _double_norm(flat: Tensor) -> Tensor:
    """Return the norm of a vector in double precision, of a shorter dtype, whose squares it holds all."""
    sums = []
    for piece in flat.split(_CACHED):
        wide = piece.double()
        sums.append(torch.dot(wide, wide))
    return (sums[0] if len(sums) == 1 else torch.stack(sums).sum()).sqrt()


def _scaled_norm(x: Tensor) -> Tensor:
    """Return the norm of a tensor in double precision, of which no square leaves the range of a number."""
    if not x.numel():
        return x.new_zeros(())
    return _by_pieces(x, _of_scaled)


def _of_scaled(x: Tensor) -> Tensor:
    largest = torch.linalg.vector_norm(x, float("inf"))
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    return torch.linalg.vector_norm(x / unit) * unit


def _by_pieces(x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a norm, of a large tensor by that of its pieces: in double precision they are copied."""
    if x.numel() <= _LARGE:
        return norm(x)
    flat = _flat(x)
    pieces = (x.reshape(-1) if flat is None else flat).split(_LARGE)
    return norm(torch.stack([norm(piece) for piece in pieces]))


def num_nonzero(x: Tensor) -> Tensor:
    """Return how many elements of a tensor are not zero, as a scalar on its device; a NaN may count as zero.

    On a CPU bytes are counted, a piece at a time: of 400 000 elements in a third of the time of
    `count_nonzero`.
    """
    if not x.is_cpu or x.layout is not torch.strided or type(x) is not Tensor or transform_level():
        return torch.count_nonzero(x)
    x = x.detach()
    if x.numel() <= _PIECE:
        return torch.tensor(np.count_nonzero(x.bool().numpy()))
    flat = _flat(x)
    pieces = (x.reshape(-1) if flat is None else flat).split(_PIECE)
    return torch.tensor(sum(np.count_nonzero(piece.bool().numpy()) for piece in pieces))


_PLAIN = (torch.float32, torch.float64)
_SHORT = (torch.float32, torch.float16, torch.bfloat16)
_LARGE = 2**17  # elements; on a CPU a norm in double precision copies what it is taken of
_CACHED = 2**15  # elements: as double-precision numbers they stay in the cache
_PIECE = 2**18  # elements: bytes for these stay in the cache


def _flat_plain(x: Tensor) -> Tensor | None:
    """Return the elements as a vector, without a copy, of a tensor that a CPU's fast sums take; else None."""
    return _flat(x) if x.dtype in _PLAIN and x.is_cpu and x.layout is torch.strided else None


def _flat(x: Tensor) -> Tensor | None:
    """Return a dense tensor's elements as a vector, in the order of its memory, without a copy."""
    if x.is_contiguous():
        return x.view(-1)
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: -strides[d])
    x = x.permute(order)
    return x.view(-1) if x.is_contiguous() else None


def safe_range(num_elements: Any) -> tuple[Any, Any]:
    """Return the norms between which a sum in single precision is right, or an array of each.

    See NOTE [Exact and fast].
    """
    root = np.sqrt(np.maximum(num_elements, 1))
    return 1e-12 * root, 1e12 * root


def is_safe(norms: Floats, num_elements: Floats) -> Bools:
    """Return whether the sums may be taken in single precision."""
    least, most = safe_range(num_elements)
    return (norms > least) & (norms < most)


def statistics_dtype(x: Tensor, *, exact: bool) -> torch.dtype:
    """Return the dtype in which the magnitude of a tensor comes."""
    wide = exact or x.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide and x.device.type != "mps" else torch.float32
