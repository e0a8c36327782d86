"""The transition A_t = ∂s_{t+1}/∂s_t of a recurrent cell: Jacobian, spectral radius, Lyapunov exponent.

All by the cell's slopes in closed form (`slopes.py`), with s = h, or (h, c) for an LSTM. It is the true
transition, with the slopes of the gates and nonlinearities where they stand, and not a weight matrix.

NOTE [Largest eigenvalue of a large transition]
Up to `DENSE_SIZE` numbers in s the Jacobian is taken whole and its eigenvalues by LAPACK. Beyond, Arnoldi's
method finds the largest from Jacobian-vector products alone: it builds an orthonormal basis V of the Krylov
space of a random vector, H = Vᵀ A V, and takes the eigenvalue of H of largest modulus, θ with eigenvector y.
Its residual ‖A V y − θ V y‖ = |h_{k+1,k}| |y_k| is known without another product; the basis grows until that
is `TOLERANCE` of |θ|, or to `MOST_VECTORS` vectors. (Saad, Numerical Methods for Large Eigenvalue Problems,
chapter 6.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.recurrent.cells import Cell, State
from gradflow.functional.recurrent.slopes import Slopes, slopes_at

DENSE_SIZE = 256  # its eigenvalues take some hundredths of a second; those of 1 024, seconds
TOLERANCE = 1e-2
MOST_VECTORS = 120
_CHECKED = 1.4  # the basis grows by this factor between two looks at its eigenvalues


def state_jacobians(cell: Cell, drive: Tensor, state: State) -> Tensor:
    """Return A = ∂s'/∂s of every sample, in closed form.

    Args:
        cell: the cell.
        drive: W_ih x + b_ih, (samples, gates · hidden).
        state: (h,) or (h, c), each (samples, size).

    Returns:
        (samples, state size, state size); rows are of the next state. An LSTM's state is h, then c.

    >>> from gradflow.functional.recurrent.cells import Cell
    >>> cell = Cell(kind="identity", weight_hh=torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    >>> state_jacobians(cell, torch.zeros(1, 2), (torch.ones(1, 2),))
    tensor([[[0., 2.],
             [1., 0.]]])
    """
    return slopes_at(cell, drive, state)[1].jacobian


def spectral_radii(
    cell: Cell, drive: Tensor, state: State, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue modulus of A = ∂s'/∂s of every sample, and its relative residual.

    Args:
        cell: the cell.
        drive: W_ih x + b_ih, (samples, gates · hidden).
        state: (h,) or (h, c), each (samples, size).
        generator: of the first vectors of the iteration; a seeded one by default.

    Returns:
        Both (samples,), float64. The residual is 0 where the Jacobian was taken whole; see NOTE [Largest
        eigenvalue of a large transition]. NaN where the Jacobian is not finite.

    >>> cell = Cell(kind="identity", weight_hh=torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    >>> spectral_radii(cell, torch.zeros(1, 2), (torch.ones(1, 2),))[0].round(decimals=6)
    tensor([2.], dtype=torch.float64)
    """
    found = radii_of(slopes_at(cell, drive, state)[1], generator=generator)
    return found.radii, found.residuals


@attrs.frozen(eq=False, kw_only=True)
class Radii:
    """Largest eigenvalue moduli, and how they were had.

    Args:
        radii: (samples,), float64.
        residuals: relative, (samples,), float64; 0 where the Jacobian was taken whole.
        products: Jacobian-vector products that it took, for each sample.
    """

    radii: Tensor
    residuals: Tensor
    products: int


def radii_of(
    slopes: Slopes,
    *,
    dense: int | None = None,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> Radii:
    """Return the largest eigenvalue modulus of each of some transitions; see `spectral_radii`.

    Args:
        slopes: of the steps, (samples, ...).
        dense: the largest state whose Jacobian is taken whole; `DENSE_SIZE` by default.
        tolerance: relative residual at which the iteration ends; `TOLERANCE` by default.
        generator: of the first vectors; a seeded one by default.
    """
    size = sum(slopes.cell.sizes)
    if size <= (DENSE_SIZE if dense is None else dense):
        radii = _per_matrix(slopes.jacobian.cpu().double())
        return Radii(radii=radii, residuals=torch.where(radii.isnan(), radii, 0.0), products=size)
    generator = generator or torch.Generator().manual_seed(0)
    return _arnoldi(slopes, TOLERANCE if tolerance is None else tolerance, generator)


def _per_matrix(matrices: Tensor) -> Tensor:
    """Return the spectral radius of each matrix of a batch; NaN for one that is not finite."""
    finite = matrices.isfinite().flatten(1).all(1)
    radii = torch.full((len(matrices),), math.nan, dtype=torch.float64)
    if finite.any():
        radii[finite] = torch.linalg.eigvals(matrices[finite]).abs().amax(-1)
    return radii


@torch.no_grad()
def _arnoldi(slopes: Slopes, tolerance: float, generator: torch.Generator) -> Radii:
    """Return radius and residual of every sample at once; see NOTE [Largest eigenvalue ...]."""
    like = slopes.into
    number, size = like.shape[0], sum(slopes.cell.sizes)
    most, check = min(size, MOST_VECTORS), 10.0
    first = _unit(_random(number, size, like.device, generator)).to(like.dtype)
    basis = first.new_zeros(number, most + 1, size)
    basis[:, 0] = first
    h = torch.zeros(number, most + 1, most, dtype=torch.float64)
    radii, residuals = torch.full((2, number), math.nan, dtype=torch.float64)
    for k in range(most):
        w = _pushed(slopes, basis[:, k]).unsqueeze(1)
        known = basis[:, : k + 1]
        along = torch.bmm(w, known.transpose(1, 2))
        w = torch.baddbmm(w, along, known, alpha=-1)
        rest = torch.bmm(w, known.transpose(1, 2))  # once is not enough in floating point
        w = torch.baddbmm(w, rest, known, alpha=-1)
        h[:, : k + 1, k] = (along + rest).squeeze(1).cpu().double()
        h[:, k + 1, k] = w.norm(dim=-1).squeeze(1).cpu().double()
        basis[:, k + 1] = _unit(w.squeeze(1))
        if k + 1 == most or k + 1 >= check:
            check = _CHECKED * (k + 1)
            left = ~(residuals <= tolerance)  # the others are found
            radii[left], residuals[left] = _largest(h[left], k + 1)
            if not (residuals > tolerance).any():
                return Radii(radii=radii, residuals=residuals, products=k + 1)
    return Radii(radii=radii, residuals=residuals, products=most)


def _largest(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue modulus of each Hessenberg matrix, and its relative residual."""
    if not bool(h.isfinite().all()):
        nan = torch.full((len(h),), math.nan, dtype=torch.float64)
        return nan, nan
    pair: Any = torch.linalg.eig(h[:, :k, :k])
    values, vectors = pair[0], pair[1]
    radii, place = values.abs().amax(-1), values.abs().argmax(-1)
    y = vectors.gather(2, place[:, None, None].expand(-1, k, 1)).squeeze(2)
    gap = h[:, k, k - 1] * y[:, -1].abs() / torch.linalg.vector_norm(y, dim=-1)
    return radii, torch.where(radii > 0, gap / radii, 0.0)


def lyapunov_exponents(
    cell: Cell,
    drive: Tensor,
    state: State,
    *,
    generator: torch.Generator | None = None,
    alive: Tensor | None = None,
) -> Tensor:
    """Return the mean log growth per step of a random tangent vector, carried along a sequence.

    The vector is multiplied by A_t at every step and scaled back to length one; the mean of the logarithms of
    these lengths tends to the largest Lyapunov exponent of the driven state: above zero, near states part.
    (Benettin et al., Meccanica 15, 1980; for recurrent networks Engelken, Wolf and Abbott, 2023.)

    Args:
        cell: the cell.
        drive: W_ih x + b_ih, (steps, samples, gates · hidden), in the order in which it reads.
        state: the first state, (h,) or (h, c), each (samples, size).
        generator: of the first vector; a seeded one by default.
        alive: which steps count, (steps, samples); None where all do.

    Returns:
        Per sample, (samples,), float64; -inf where a step takes all of the vector.

    >>> cell = Cell(kind="identity", weight_hh=torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))  # twice a rotation
    >>> lyapunov_exponents(cell, torch.zeros(8, 1, 2), (torch.ones(1, 2),)).exp().round(decimals=5)
    tensor([2.], dtype=torch.float64)
    """

    def steps() -> Iterable[Slopes]:
        now = state
        for t, entering in enumerate(drive):
            new, slopes = slopes_at(cell, entering, now)
            yield slopes
            here = None if alive is None else alive[t].to(entering.device)[:, None]
            now = (
                new
                if here is None
                else tuple(torch.where(here, *pair) for pair in zip(new, now, strict=True))
            )

    return growth_rates(steps(), state[0].shape[0], alive=alive, generator=generator)


def growth_rates(
    steps: Iterable[Slopes],
    number: int,
    *,
    alive: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean log growth per step of a random tangent vector; see `lyapunov_exponents`.

    Args:
        steps: the derivative of each step, in the order of reading.
        number: of samples.
        alive: which steps count, (steps, samples); None where all do.
        generator: of the first vector; a seeded one by default.
    """
    v: Tensor | None = None
    lengths = []
    for t, slopes in enumerate(steps):
        if v is None:
            generator = generator or torch.Generator().manual_seed(0)
            v = _unit(_random(number, sum(slopes.cell.sizes), slopes.into.device, generator))
            v = v.to(slopes.into.dtype)
        new = _pushed(slopes, v)
        length = new.norm(dim=-1, keepdim=True)
        lengths.append(length)
        new = new / length.clamp(min=torch.finfo(new.dtype).tiny)
        v = new if alive is None else torch.where(alive[t].to(new.device)[:, None], new, v)
    growth = torch.stack(lengths).squeeze(-1).cpu().double().log()
    if alive is None:
        return growth.mean(0)
    alive = alive.cpu()
    return torch.where(alive, growth, 0.0).sum(0) / alive.sum(0).double()


def _pushed(slopes: Slopes, v: Tensor) -> Tensor:
    return torch.cat(slopes.push(tuple(v.split(slopes.cell.sizes, -1))), -1)


def _random(number: int, size: int, device: torch.device, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(number, size, generator=generator, dtype=torch.float64)
    return drawn.to(device=device, dtype=wide_dtype(device))


def _unit(v: Tensor) -> Tensor:
    norm = v.norm(dim=-1, keepdim=True)
    return v / norm.clamp(min=torch.finfo(v.dtype).tiny)
