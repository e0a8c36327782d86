"""The transition A_t = ∂s_{t+1}/∂s_t of a recurrent cell: Jacobian, spectral radius, Lyapunov exponent.

All by `torch.func` on the pure cell, with s = h, or (h, c) for an LSTM. It is the true transition, with the
slopes of the gates and nonlinearities where they stand, and not a weight matrix.

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
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradflow.functional.model.setting import load_forward_mode
from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.recurrent.cells import Cell, State

DENSE_SIZE = 256  # its eigenvalues take some hundredths of a second; those of 1 024, seconds
TOLERANCE = 1e-2
MOST_VECTORS = 120


def state_jacobians(cell: Cell, drive: Tensor, state: State) -> Tensor:
    """Return A = ∂s'/∂s of every sample, by `torch.func.jacrev`.

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

    def one(d: Tensor, s: Tensor) -> Tensor:
        return cell.flat(d.unsqueeze(0), s.unsqueeze(0)).squeeze(0)

    with torch.inference_mode(False):  # in which transforms lose the gradient in older releases
        parts = {name: _ordinary(getattr(cell, name)) for name in ("weight_hh", "bias_hh", "weight_hr")}
        cell = attrs.evolve(cell, **parts)
        at = _ordinary(drive), _ordinary(torch.cat(state, -1))
        return torch.func.vmap(torch.func.jacrev(one, argnums=1))(*at)


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
    if sum(cell.sizes) <= DENSE_SIZE:
        jacobians = state_jacobians(cell, drive, state).cpu().double()
        radii = _per_matrix(jacobians)
        return radii, torch.where(radii.isnan(), radii, 0.0)
    return _arnoldi(cell, drive, state, generator or torch.Generator().manual_seed(0))


def _per_matrix(matrices: Tensor) -> Tensor:
    """Return the spectral radius of each matrix of a batch; NaN for one that is not finite."""
    finite = matrices.isfinite().flatten(1).all(1)
    radii = torch.full((len(matrices),), math.nan, dtype=torch.float64)
    if finite.any():
        radii[finite] = torch.linalg.eigvals(matrices[finite]).abs().amax(-1)
    return radii


def _arnoldi(cell: Cell, drive: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return radius and residual of every sample at once; see NOTE [Largest eigenvalue ...]."""
    load_forward_mode()
    s = torch.cat(state, -1)
    most = min(s.shape[1], MOST_VECTORS)
    basis = [_unit(_random_like(s, generator))]
    h = torch.zeros(len(s), most + 1, most, dtype=torch.float64)
    radii = residuals = torch.full((len(s),), math.nan, dtype=torch.float64)
    for k in range(most):
        w = _pushed(cell, drive, s, basis[k].to(s.dtype))[1].to(basis[k].dtype)
        stacked = torch.stack(basis, 1)
        for _ in range(2):  # once is not enough in floating point
            along = torch.einsum("pks,ps->pk", stacked, w)
            w = w - torch.einsum("pks,pk->ps", stacked, along)
            h[:, : k + 1, k] += along.cpu().double()
        h[:, k + 1, k] = w.norm(dim=-1).cpu().double()
        basis.append(_unit(w))
        if k + 1 == most or k % 10 == 9:
            radii, residuals = _largest(h, k + 1)
            if not (residuals > TOLERANCE).any():
                break
    return radii, residuals


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
    load_forward_mode()
    s = torch.cat(state, -1)
    v = _unit(_random_like(s, generator or torch.Generator().manual_seed(0))).to(s.dtype)
    total = torch.zeros(len(s), dtype=torch.float64)
    for t, step in enumerate(drive):
        new, tangent = _pushed(cell, step, s, v)
        growth = tangent.norm(dim=-1).cpu().double().log()
        if alive is None:
            s, v, total = new, _unit(tangent), total + growth
        else:
            here = alive[t].to(s.device)[:, None]
            s, v = torch.where(here, new, s), torch.where(here, _unit(tangent), v)
            total = total + torch.where(alive[t].cpu(), growth, 0.0)
    counts = torch.full_like(total, len(drive)) if alive is None else alive.sum(0).cpu().double()
    return total / counts


def _pushed(cell: Cell, drive: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next state and A v, by dual numbers: `torch.func.jvp` at a third of its overhead."""
    with torch.inference_mode(False), forward_ad.dual_level():
        pair = forward_ad.unpack_dual(cell.flat(drive, forward_ad.make_dual(_ordinary(s), _ordinary(v))))
    assert pair.tangent is not None
    return pair.primal, pair.tangent


def _ordinary(tensor: Any) -> Any:
    """Return a tensor, or a copy of one that was made in inference mode, which takes no tangent."""
    return tensor.clone() if isinstance(tensor, Tensor) and tensor.is_inference() else tensor


def _random_like(s: Tensor, generator: torch.Generator) -> Tensor:
    wide = wide_dtype(s.device)
    return torch.randn(s.shape, generator=generator, dtype=torch.float64).to(device=s.device, dtype=wide)


def _unit(v: Tensor) -> Tensor:
    norm = v.norm(dim=-1, keepdim=True)
    return v / norm.clamp(min=torch.finfo(v.dtype).tiny)
