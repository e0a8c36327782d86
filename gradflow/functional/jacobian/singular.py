"""Singular values of a linear map that is known by its products alone, and probe vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype

Distribution = Literal["rademacher", "gaussian"]
Product = Callable[[Tensor], Tensor]

MAX_DENSE_SIDE = 512
MAX_DENSE_ELEMENTS = 2**22
_MAX_BASIS = 64  # vectors kept, where the blocks are small


class TopValues(NamedTuple):
    """What an iteration found.

    Args:
        values: the largest singular values, descending, float64.
        residuals: ‖Jᵀu − σv‖ of each.
        converged: whether every residual is within the tolerance.
        num_products: products with J and with Jᵀ together.
    """

    values: Tensor
    residuals: Tensor
    converged: bool
    num_products: int


def is_small(n_out: int, n_in: int) -> bool:
    """Whether a Jacobian of this size is taken whole where nothing else was asked for."""
    return min(n_out, n_in) <= MAX_DENSE_SIDE and n_out * n_in <= MAX_DENSE_ELEMENTS


def probe_vector(like: Tensor, distribution: str, generator: torch.Generator) -> Tensor:
    """Return a random vector with independent entries of mean 0 and variance 1, shaped as `like`.

    It is drawn on the CPU, so that a seed gives the same vector on every device.

    Raises:
        ValueError: if the distribution is unknown.
    """
    if distribution == "rademacher":
        drawn = torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1)
    elif distribution == "gaussian":
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    else:
        raise ValueError(f"distribution must be 'rademacher' or 'gaussian', got {distribution!r}.")
    return drawn.to(dtype=like.dtype, device=like.device)


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values of a matrix, descending, in float64; NaN where it is not finite."""
    matrix = matrix.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        return torch.full((min(matrix.shape),), float("nan"), dtype=torch.float64)
    return torch.linalg.svdvals(matrix)


# NOTE [Block Lanczos with thick restarts]
# V holds orthonormal input vectors and W = J V. The singular values of W (Rayleigh-Ritz) approach those of J
# from below. Each round appends the part of Jᵀ W_last that is orthogonal to V, W_last being the columns of
# the last block. Since Jᵀ W_rest lies in the span of V already, that part, R, gives the residual of every
# approximate singular vector without a further product: Jᵀ J V y − σ² V y = R y_last. When V is full, it
# is replaced by the better half of its directions; the relation still holds, as R is appended to them. Blocks
# rather than vectors, for a Krylov space grown from one vector holds but one direction of every eigenspace,
# and a Jacobian near an isometry has all its values in one. (Golub and Van Loan, Matrix Computations,
# section 10.3; Wu and Simon, 2000, for the restarts.)


def top_singular_values(
    forward: Product,
    reverse: Product,
    like: Tensor,
    *,
    k: int,
    generator: torch.Generator,
    tolerance: float,
    max_products: int,
) -> TopValues:
    """Return the k largest singular values of a map; see NOTE [Block Lanczos with thick restarts].

    Args:
        forward: x ↦ J x, for flat vectors.
        reverse: y ↦ Jᵀ y.
        like: a flat vector of the input's length, dtype and device.
        k: how many, at most the input's length.
        generator: of the first block.
        tolerance: largest residual allowed, as a share of the largest singular value.
        max_products: stop after about this many products.
    """
    n_in, block = like.numel(), min(k + 2, like.numel())
    limit = min(n_in, max(_MAX_BASIS, 4 * block))
    tolerance = max(tolerance, 16 * torch.finfo(like.dtype).eps)
    start = torch.stack([probe_vector(like, "gaussian", generator) for _ in range(block)], dim=1)
    basis = torch.linalg.qr(_precise(start)).Q
    image = _apply(forward, basis, like)
    gram = image.mT @ image
    last, products = block, block
    while True:
        if not bool(torch.isfinite(gram).all()):
            nan = torch.full((k,), float("nan"), dtype=torch.float64)
            return TopValues(nan, nan, False, products)
        sigma, right = _small_svd(gram)
        pulled = _apply(reverse, image[:, -last:], like)
        products += last
        rest = _orthogonal_to(basis, pulled)
        residuals = torch.linalg.vector_norm(rest @ right[-last:, :k], dim=0)
        found = _judged(sigma[:k], residuals, tolerance, products)
        if found.converged or products >= max_products or basis.shape[1] == n_in:
            return found
        new = _orthonormal(basis, rest, float(sigma[0]) ** 2 * torch.finfo(basis.dtype).eps)
        if new.shape[1] == 0:  # the space is closed under JᵀJ: what it holds is exact
            return found._replace(converged=True)
        new = new[:, : n_in - basis.shape[1]]
        if basis.shape[1] + new.shape[1] > limit:
            basis, image = basis @ right[:, : limit // 2], image @ right[:, : limit // 2]
            gram = image.mT @ image
        added = _apply(forward, new, like)
        gram = _extended(gram, image.mT @ added, added.mT @ added)
        basis, image = torch.cat([basis, new], dim=1), torch.cat([image, added], dim=1)
        last = new.shape[1]
        products += last


def _judged(sigma: Tensor, gaps: Tensor, tolerance: float, products: int) -> TopValues:
    """Return the values with their residuals, given ‖JᵀJv − σ²v‖."""
    top = float(sigma[0])
    residuals = gaps / sigma.clamp(min=max(tolerance * top, torch.finfo(sigma.dtype).tiny))
    converged = bool((residuals <= tolerance * top).all())
    return TopValues(sigma.cpu().double(), residuals.cpu().double(), converged, products)


def _precise(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype of the linear algebra: float64, where the device has it."""
    return tensor.to(wide_dtype(tensor.device))


def _apply(product: Product, columns: Tensor, like: Tensor) -> Tensor:
    results = [product(column.to(like.dtype)) for column in columns.unbind(1)]
    return _precise(torch.stack(results, dim=1))


def _extended(gram: Tensor, cross: Tensor, corner: Tensor) -> Tensor:
    return torch.cat([torch.cat([gram, cross], dim=1), torch.cat([cross.mT, corner], dim=1)])


def _small_svd(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values, descending, and right singular vectors, as columns, of W given WᵀW."""
    squares, right = torch.linalg.eigh(gram)
    return squares.flip(0).clamp(min=0).sqrt(), right.flip(1)


def _orthogonal_to(basis: Tensor, columns: Tensor) -> Tensor:
    for _ in range(2):
        columns = columns - basis @ (basis.mT @ columns)
    return columns


def _orthonormal(basis: Tensor, columns: Tensor, negligible: float) -> Tensor:
    """Return an orthonormal basis of what the columns add to `basis`, rounding left out."""
    left, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    kept = left[:, sizes > max(negligible * columns.shape[0] ** 0.5, torch.finfo(sizes.dtype).tiny)]
    if kept.shape[1] == 0:
        return kept
    return torch.linalg.qr(_orthogonal_to(basis, kept)).Q


def make_generator(seed: int | None) -> torch.Generator:
    """Return a generator for probe vectors; without a seed it follows from the present random state.

    Its stream is another one than the model's own random layers draw from, so that a probe and a dropout
    mask are independent.
    """
    generator = torch.Generator()
    if seed is None:
        generator.set_state(torch.get_rng_state())
        seed = int(torch.randint(2**62, (), generator=generator))
    return generator.manual_seed((seed + 0x9E3779B97F4A7C15) % 2**63)
