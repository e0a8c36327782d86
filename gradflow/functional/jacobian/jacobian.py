"""The Jacobian of a tensor function at a point, as a linear map: products with it, never the matrix."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradflow.functional.jacobian.products import PULLS, PUSHES, TensorFunction, evaluating, first_way
from gradflow.functional.jacobian.records import Gain, Spectrum
from gradflow.functional.jacobian.singular import (
    MAX_DENSE_ELEMENTS,
    MAX_DENSE_SIDE,
    Distribution,
    is_small,
    make_generator,
    probe_vector,
    singular_values,
    top_singular_values,
)
from gradflow.functional.model.setting import Setting
from gradflow.functional.model.supported import check_plain
from gradflow.functional.model.threads import measuring
from gradflow.functional.torch_private import outside_transforms

Method = Literal["auto", "dense", "iterative"]
logger = logging.getLogger("gradflow")


class Jacobian:
    """The Jacobian J of a tensor function at a point: `jvp`, `vjp`, singular values; never the matrix.

    Products are by `torch.func`. Nothing of size n_out × n_in is made but by `dense`, and by
    `singular_values` where it is small. The graph of one reverse pass is kept after the first `vjp`.
    Modules that the function holds, and the random states, are in every evaluation what they are now, and
    are left as they are.

    Args:
        function: of one floating-point tensor, returns one.
        point: where it is differentiated.
        name: of the function, for records and messages.
        type: class name of the layer, for records.

    >>> J = Jacobian(torch.sin, torch.zeros(3))
    >>> J.shape, J.jvp(torch.ones(3)), J.singular_values()
    ((3, 3), tensor([1., 1., 1.]), tensor([1., 1., 1.], dtype=torch.float64))
    """

    def __init__(self, function: TensorFunction, point: Tensor, *, name: str = "f", type: str = "") -> None:
        own = hasattr(function, "evaluating")
        self.function = function = function if own else Setting.of(nn.Module(), function).held(function)
        self.name, self.type = name, type
        self._shown = name or "the model"
        check_plain([point])
        with outside_transforms(), torch.inference_mode(False):
            self.point = point.detach().clone()
            with torch.no_grad():
                self.value = function(self.point).detach()
        self._push: TensorFunction | None = None
        self._pull: TensorFunction | None = None

    def __repr__(self) -> str:
        return f"Jacobian({self._shown}, {tuple(self.point.shape)} -> {tuple(self.value.shape)})"

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in), the numbers of elements."""
        return self.value.numel(), self.point.numel()

    @measuring()
    def jvp(self, tangent: Tensor) -> Tensor:
        """Return J v, shaped as the output, for a tangent v shaped as the input.

        Raises:
            ValueError: if the tangent has another shape.
            ModelCallError: if the function cannot be differentiated.
        """
        tangent = _fitting(tangent, self.point, "tangent", "input", self._shown)
        with torch.inference_mode(False), torch.enable_grad():
            if self._push is None:
                self._push, product = first_way(PUSHES, self.function, self.point, tangent, self._shown)
            else:
                product = self._push(tangent)
        return product.detach()

    @measuring()
    def vjp(self, cotangent: Tensor) -> Tensor:
        """Return Jᵀ u, shaped as the input, for a cotangent u shaped as the output.

        Raises:
            ValueError: if the cotangent has another shape.
            ModelCallError: if the function cannot be differentiated.
        """
        cotangent = _fitting(cotangent, self.value, "cotangent", "output", self._shown)
        with torch.inference_mode(False), torch.enable_grad():
            if self._pull is None:
                self._pull, product = first_way(PULLS, self.function, self.point, cotangent, self._shown)
            else:
                product = self._pull(cotangent)
        return product.detach()

    # ---------------------------------------------------------------------------- what products tell

    @measuring()
    def gain(
        self, *, num_probes: int = 8, seed: int | None = None, distribution: Distribution = "rademacher"
    ) -> Gain:
        """Return ‖J‖_F / √n_in by random products; see `layer_gain`."""
        check_count("num_probes", num_probes)
        generator = make_generator(seed)
        squares = torch.stack(
            [
                self.jvp(probe_vector(self.point, distribution, generator)).double().square().sum().cpu()
                for _ in range(num_probes)
            ]
        )
        n_out, n_in = self.shape
        gain = math.sqrt(float(squares.mean()) / n_in) if n_in else math.nan
        error = math.nan
        if num_probes > 1:  # by the delta method, from that of the mean square
            spread = float(squares.std()) / math.sqrt(num_probes) / max(n_in, 1)
            error = spread / (2 * gain) if gain else 0.0
        return Gain(
            layer=self.name, layer_type=self.type, gain=gain, standard_error=error, n_in=n_in, n_out=n_out,
            num_probes=num_probes,
        )  # fmt: skip

    @measuring()
    def spectrum(
        self,
        k: int = 5,
        *,
        method: Method = "auto",
        tolerance: float = 1e-3,
        max_products: int = 2000,
        seed: int | None = None,
        sample: int | None = None,
    ) -> Spectrum:
        """Return singular values; see `layer_spectrum`."""
        check_count("k", k)
        if method not in ("auto", "dense", "iterative"):
            raise ValueError(f"method must be 'auto', 'dense' or 'iterative', got {method!r}.")
        n_out, n_in = self.shape
        common: dict[str, Any] = {
            "layer": self.name, "layer_type": self.type, "n_in": n_in, "n_out": n_out, "sample": sample,
        }  # fmt: skip
        if method == "dense" or not min(n_out, n_in) or (method == "auto" and is_small(n_out, n_in)):
            values = singular_values(self.dense())
            return Spectrum(
                singular_values=values.numpy(),
                residuals=torch.zeros_like(values).numpy(),
                converged=bool(torch.isfinite(values).all()),
                num_products=min(n_out, n_in),
                **common,
            )
        found = top_singular_values(
            lambda v: self.jvp(v.reshape(self.point.shape)).reshape(-1),
            lambda u: self.vjp(u.to(self.value.dtype).reshape(self.value.shape)).reshape(-1),
            self.point.reshape(-1),
            k=min(k, n_out, n_in),
            generator=make_generator(seed),
            tolerance=tolerance,
            max_products=max_products,
        )
        return Spectrum(
            singular_values=found.values.numpy(),
            residuals=found.residuals.numpy(),
            method="iterative",
            converged=found.converged,
            num_products=found.num_products,
            **common,
        )

    @measuring()
    def singular_values(self, k: int | None = None, **options: Any) -> Tensor:
        """Return the k largest singular values, descending, float64; all of them without k.

        Args:
            k: how many. Without it the whole matrix is made, which must be small.
            options: as for `spectrum`.

        Raises:
            ValueError: if all are asked for and the Jacobian is not small.
        """
        if k is None:
            self._check_small("all singular values of", "Ask for the largest, `singular_values(k=5)`.")
            return singular_values(self.dense())
        found = self.spectrum(k, **options)
        if not found.converged:
            logger.warning(
                "the singular values of %s have not converged: residuals %s", self, found.residuals
            )
        return torch.tensor(found.singular_values[:k])

    @measuring()
    def condition_number(self) -> float:
        """Return the largest over the smallest singular value; the Jacobian must be small.

        Raises:
            ValueError: if it is not.
        """
        self._check_small("the condition number of", "Take `of_sample(0)`, or narrower layers.")
        return self.spectrum(method="dense").condition_number

    @measuring()
    def dense(self, *, max_elements: int = 2**24) -> Tensor:
        """Return the matrix, shape (n_out, n_in), by as many products as its shorter side has.

        Args:
            max_elements: a larger one is refused.

        Raises:
            ValueError: if it has more elements.
        """
        n_out, n_in = self.shape
        if n_out * n_in > max_elements:
            raise ValueError(
                f"dense: the matrix of {self} has {n_out} × {n_in} = {n_out * n_in:.2e} elements, more than "
                f"max_elements={max_elements}. Use products instead, `jvp`, `vjp`, `gain()`, `spectrum(k)`; "
                "take one sample, `of_sample(0)`; or raise max_elements."
            )
        if n_out <= n_in:
            return self._rows()
        basis = torch.eye(n_in, dtype=self.point.dtype, device=self.point.device)
        columns = [self.jvp(row.reshape(self.point.shape)).reshape(-1) for row in basis]
        return torch.stack(columns, dim=1) if columns else self.value.new_zeros(n_out, 0)

    def _rows(self, chunk: int = 64) -> Tensor:
        """Return the matrix by reverse products, a chunk at a time where they can be vectorised."""
        n_out, n_in = self.shape
        if n_out == 0:
            return self.point.new_zeros(0, n_in)
        basis = torch.eye(n_out, dtype=self.value.dtype, device=self.value.device)
        basis = basis.reshape(n_out, *self.value.shape)
        rows = [self.vjp(basis[0]).reshape(1, -1)]  # chooses the way
        pull = self._pull
        assert pull is not None
        for start in range(1, n_out, chunk):
            part = basis[start : start + chunk]
            try:
                with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    found = torch.func.vmap(pull)(part)
            except (RuntimeError, TypeError):  # an operation without a batching rule
                found = torch.stack([self.vjp(u) for u in part])
            rows.append(found.detach().reshape(len(part), -1))
        return torch.cat(rows)

    def _check_small(self, what: str, fix: str) -> None:
        n_out, n_in = self.shape
        if not is_small(n_out, n_in):
            raise ValueError(
                f"{what} {self}: {n_out} × {n_in} is too large to take whole (at most {MAX_DENSE_SIDE} on "
                f"the shorter side and {MAX_DENSE_ELEMENTS} elements). {fix}"
            )

    # ---------------------------------------------------------------------------- one sample of a batch

    @measuring()
    def sample_axis(self, axes: tuple[int, ...] = (0,)) -> int | None:
        """Return the axis along which J treats every sample on its own, or None.

        It is found by products: a cotangent on one sample alone must come back on that sample alone, and one
        on all the others must leave it exactly zero.

        Args:
            axes: those that may hold the samples, in the order they are tried, but for axes of length 1,
                which always pass and are tried last. (0, 1) is for a module with `batch_first=False`; in
                others axis 1 may hold channels, which could pass as well.
        """
        sizes = dict(zip(range(self.value.dim()), self.point.shape, strict=False))
        fitting = [axis for axis in axes if sizes.get(axis) and sizes[axis] == self.value.shape[axis]]
        fitting.sort(key=lambda axis: sizes[axis] == 1)
        return next((axis for axis in fitting if self._is_separate(axis, sizes[axis] // 2)), None)

    def _is_separate(self, axis: int, index: int) -> bool:
        cotangent = probe_vector(self.value, "gaussian", torch.Generator().manual_seed(0))
        own = torch.zeros_like(cotangent)
        own.select(axis, index).copy_(cotangent.select(axis, index))
        back, rest = self.vjp(own), self.vjp(cotangent - own)
        stray = back.clone()
        stray.select(axis, index).zero_()
        return not bool(stray.any()) and not bool(rest.select(axis, index).any())

    @measuring()
    def of_sample(self, index: int, *, axis: int | None = None) -> Jacobian:
        """Return the Jacobian of one sample's output with respect to the same sample's input.

        Args:
            index: of the sample.
            axis: of the samples, in input and output; found by `sample_axis` if None.

        Raises:
            ValueError: if the function mixes the samples, or has no sample of this index.
        """
        axis = self.sample_axis() if axis is None else axis
        if axis is None:
            raise ValueError(
                f"of_sample: {self} mixes the samples of the batch, as BatchNorm does in training, or has no "
                "batch axis, so one sample has no Jacobian of its own. Take that of the whole batch; for "
                "BatchNorm, call `model.eval()` first."
            )
        size = self.point.shape[axis]
        if not 0 <= index < size:
            raise ValueError(f"of_sample: sample {index} of {self}; there are {size}, numbered from 0.")
        function, point = self.function, self.point

        def restricted(x: Tensor) -> Tensor:
            before, after = point.narrow(axis, 0, index), point.narrow(axis, index + 1, size - index - 1)
            return function(torch.cat([before, x, after], axis)).narrow(axis, index, 1)

        restricted.evaluating = lambda: evaluating(function)  # type: ignore[attr-defined]
        return Jacobian(restricted, point.narrow(axis, index, 1), name=self.name, type=self.type)


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def _fitting(vector: Any, like: Tensor, name: str, side: str, function: str) -> Tensor:
    if not isinstance(vector, Tensor) or vector.shape != like.shape:
        got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(
            f"the {name} must be shaped as the {side} of {function}, {tuple(like.shape)}; got {got}. "
            f"Make one with `torch.randn({', '.join(map(str, like.shape))})`."
        )
    check_plain([vector])
    return vector.detach().to(dtype=like.dtype, device=like.device)
