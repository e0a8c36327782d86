"""Effective ranks of gradients, and the Gram matrices by which those of parts of a batch are joined."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradflow.functional.tap.calls import unit_axis


def effective_rank(gradient: Tensor, layer_type: str = "Linear") -> float:
    """Return the effective rank of a gradient as a matrix (samples × features).

    exp of the entropy of the normalised squared singular values (Roy and Vetterli, 2007, with squared
    values). 1 for a rank-one matrix, the width for an orthogonal one, NaN where it is zero or not finite.

    Args:
        gradient: output gradient of a layer, samples first.
        layer_type: class name of the layer; tells where its features are.
    """
    if gradient.dim() < 2:
        return 1.0 if bool(gradient.any()) else float("nan")
    matrix = _matrix(gradient, layer_type)
    top = matrix.abs().max()
    if not torch.isfinite(top) or top == 0:
        return float("nan")
    matrix = matrix / top
    gram = matrix.mH @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mH
    return rank_of(gram)


def _matrix(gradient: Tensor, layer_type: str) -> Tensor:
    matrix = gradient.detach().movedim(unit_axis(gradient, layer_type), -1).flatten(0, -2)
    return matrix.to(device="cpu", dtype=torch.complex128 if matrix.is_complex() else torch.float64)


def gram_matrix(gradient: Tensor, layer_type: str, most: int = 256) -> Tensor:
    """Return GᵀG of a gradient G as a matrix (samples × features), which adds up over parts of a batch.

    Of more features than `most`, random combinations are taken, the same wherever there are as many (Halko,
    Martinsson and Tropp, 2011, "Finding structure with randomness").

    Args:
        gradient: output gradient of a layer, of two axes at least.
        layer_type: class name of the layer; tells where its features are.
        most: rows of what is returned.
    """
    matrix = _matrix(gradient, layer_type)
    features = matrix.shape[1]
    if features > most:
        generator = torch.Generator().manual_seed(features)
        matrix = matrix @ torch.randn(features, most, generator=generator, dtype=torch.float64).to(
            matrix.dtype
        )
    return matrix.mH @ matrix


def packed(gram: Tensor) -> Tensor:
    """Return the lower triangle of a Gram matrix as a vector, which is half of it and tells all.

    >>> packed(torch.tensor([[1.0, 2.0], [2.0, 5.0]]))
    tensor([1., 2., 5.])
    """
    rows, columns = torch.tril_indices(*gram.shape)
    return gram[rows, columns]


def rank_of_packed(triangle: Tensor) -> float:
    """Return the effective rank of a matrix by its packed Gram matrix; see `packed`."""
    size = math.isqrt(2 * triangle.numel())
    gram = triangle.new_zeros(size, size)
    rows, columns = torch.tril_indices(size, size)
    gram[rows, columns] = triangle
    return rank_of(gram)


def rank_of(gram: Tensor) -> float:
    """Return the effective rank of a matrix by its Gram matrix, of which the lower triangle is read."""
    top = gram.abs().max()
    if not torch.isfinite(top) or top == 0:
        return float("nan")
    values = torch.linalg.eigvalsh(gram / top).clamp(min=0)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))
