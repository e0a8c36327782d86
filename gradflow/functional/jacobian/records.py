"""What is measured of a Jacobian: its gain and its singular values, as plain numbers."""

from __future__ import annotations

import math
from typing import Any

import attrs

from gradflow.records import array_field, float_field


@attrs.frozen(kw_only=True)
class Gain:
    """By how much a Jacobian J amplifies a perturbation of its input, in the mean over directions.

    Args:
        layer: name of the layer, or `source -> target`.
        layer_type: class name of the layer; `""` where there are two.
        gain: ‖J‖_F / √n_in: the root mean square growth of a random perturbation. 1 keeps its norm.
        standard_error: of `gain`, over the probes; NaN with one probe.
        n_in: elements of the input, the whole batch.
        n_out: elements of the output.
        num_probes: random directions used.
    """

    layer: str
    layer_type: str = ""
    gain: float = float_field(math.nan)
    standard_error: float = float_field(math.nan)
    n_in: int = 0
    n_out: int = 0
    num_probes: int = 0

    @property
    def frobenius_norm(self) -> float:
        """‖J‖_F."""
        return self.gain * math.sqrt(self.n_in)


@attrs.frozen(kw_only=True)
class Spectrum:
    """Singular values of a Jacobian.

    Args:
        layer: name of the layer, or `source -> target`.
        layer_type: class name of the layer; `""` where there are two.
        singular_values: descending, shape (min(n_in, n_out),) where `method` is `dense`, else (k,).
        residuals: ‖Jᵀu − σv‖ of each, an upper bound of its error; 0 where `method` is `dense`.
        method: `dense`: all of them, of the whole matrix; `iterative`: the largest, by products.
        converged: whether every residual is within the tolerance.
        n_in: elements of the input.
        n_out: elements of the output.
        sample: index of the sample whose Jacobian it is; None: that of the whole batch.
        num_products: products with J and Jᵀ that it took.
    """

    layer: str
    layer_type: str = ""
    singular_values: Any = array_field()
    residuals: Any = array_field()
    method: str = "dense"
    converged: bool = True
    n_in: int = 0
    n_out: int = 0
    sample: int | None = None
    num_products: int = 0

    @property
    def largest(self) -> float:
        """The largest singular value, the spectral norm; 0 where input or output has no elements."""
        return float(self.singular_values[0]) if len(self.singular_values) else 0.0

    @property
    def smallest(self) -> float:
        """The smallest of min(n_in, n_out) singular values; NaN where it is not known, or there is none."""
        known = self.is_complete and len(self.singular_values)
        return float(self.singular_values[-1]) if known else math.nan

    @property
    def is_complete(self) -> bool:
        """Whether all singular values are known."""
        return len(self.singular_values) == min(self.n_in, self.n_out)

    @property
    def condition_number(self) -> float:
        """Largest over smallest; infinite for a singular Jacobian, NaN where the smallest is not known."""
        if self.smallest == 0:
            return math.inf if self.largest > 0 else math.nan
        return self.largest / self.smallest

    @property
    def stable_rank(self) -> float:
        """Σσ² / σ_max², of the values known: how many directions carry the gain."""
        largest = self.largest  # relative to it, since the square of a small or large one is out of range
        return float(((self.singular_values / largest) ** 2).sum()) if largest else math.nan
