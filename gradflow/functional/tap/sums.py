"""How large tensors are, and how many of their elements are zero: the sums that are taken of every gradient.

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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradflow.functional.processes.shards import settled
from gradflow.functional.torch_private import norms_of, transform_level
from gradflow.records import Bools, Floats


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
    single, strided, dot = torch.float32, torch.strided, torch.dot
    for i, x in enumerate(tensors):
        plain = type(x) is Tensor and x.layout is strided
        if plain and x.is_cpu and x.dtype is single and x.is_contiguous():
            flat = x.view(-1)
            found[i] = dot(flat, flat)
        elif plain and not x.is_cpu and x.dtype in _SHORT:
            together.setdefault((x.device, x.dtype), []).append(i)
        else:
            found[i] = magnitude(x, exact=False)
    if not together:
        return list(found.values())
    for places in together.values():
        found |= zip(places, squares_of([tensors[i] for i in places]), strict=True)
    return [found[i] for i in range(len(tensors))]


def squares_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return Σ|x|² of each tensor in single precision, all in a few calls."""
    return torch.stack(norms_of(tensors)).square().unbind()


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


def in_dtype(found: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a magnitude in another dtype."""
    if found.dtype == dtype:
        return found
    return found.double().sqrt() if dtype == torch.float64 else found.square().to(dtype)


def _double_norm(flat: Tensor) -> Tensor:
    """Return the norm of a vector in double precision, of a shorter dtype, whose squares it holds all."""
    if flat.numel() <= _CACHED:
        wide = flat.double()
        return torch.dot(wide, wide).sqrt()
    sums = []
    for piece in flat.split(_CACHED):
        wide = piece.double()
        sums.append(torch.dot(wide, wide))
    return torch.stack(sums).sum().sqrt()


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


def num_zero(x: Tensor) -> Tensor:
    """Return how many elements of a tensor are zero, as a scalar on its device; a NaN may count as zero.

    On a CPU bytes are counted, a piece at a time: of 400 000 elements in a third of the time of
    `count_nonzero`.
    """
    if not _is_plain(x):
        return x.numel() - torch.count_nonzero(x)
    x = x.detach()
    if x.numel() <= _PIECE:
        others = np.count_nonzero(x.numpy() != 0 if x.dtype in _PLAIN else x.bool().numpy())
        return torch.full((), x.numel() - int(others))  # `torch.tensor` takes twice as long
    flat = _flat(x)
    pieces = (x.reshape(-1) if flat is None else flat).split(_PIECE)
    return torch.tensor(x.numel() - sum(np.count_nonzero(piece.bool().numpy()) for piece in pieces))


def num_positive(x: Tensor) -> Tensor:
    """Return how many elements of a tensor are above zero, as a scalar on its device."""
    if _is_plain(x) and x.dtype in _PLAIN:
        return torch.full((), int(np.count_nonzero(x.detach().numpy() > 0)))
    return torch.count_nonzero(x > 0)


def _is_plain(x: Tensor) -> bool:
    """Whether NumPy can take a tensor: a dense one on the CPU, and no stand-in of a transform's."""
    return x.is_cpu and x.layout is torch.strided and type(x) is Tensor and not transform_level()


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
    plain = isinstance(num_elements, int)
    root = math.sqrt(max(num_elements, 1)) if plain else np.sqrt(np.maximum(num_elements, 1))
    return 1e-12 * root, 1e12 * root


def is_safe(norms: Floats, num_elements: Floats) -> Bools:
    """Return whether the sums may be taken in single precision."""
    least, most = safe_range(num_elements)
    return (norms > least) & (norms < most)


def statistics_dtype(x: Tensor, *, exact: bool) -> torch.dtype:
    """Return the dtype in which the magnitude of a tensor comes."""
    wide = exact or x.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide and x.device.type != "mps" else torch.float32
