"""Gradients of parameters that are let go as they arrive: all that is kept of each are a few numbers.

NOTE [Gradients that pass]
Where no update follows, a gradient is only read: its norm, its zeros, and where it is zero. Beside a
training, whose own gradients stand as well, it need not wait for the others until the pass is over. Autograd
hands each to the hooks of its leaf when it is whole, and goes on with what they return, so a hook on our
working copy reads it and returns zeros of its shape that take no memory. Hooks of the user's, which were put
on the copy before, come first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from gradflow.functional.tap.sums import magnitude, magnitudes, num_zero, safe_range

_register_hook = Tensor.register_hook  # taps tell of what others put on tensors


@attrs.frozen(eq=False)
class Passed:
    """What was read off a gradient that is gone.

    Args:
        size: its magnitude.
        exact: the same in double precision, where the one above may have over- or underflowed.
        zeros: how many of its elements are zero.
        mask: which elements are not, where that was asked; None if all.
        number: of its elements.
        layout: of the gradient that it was: dense.
    """

    size: Tensor
    exact: Tensor | None
    zeros: Tensor
    mask: Tensor | None
    number: int
    layout: torch.layout = torch.strided

    def numel(self) -> int:
        """Return the number of elements, as a tensor does."""
        return self.number

    @property
    def finite(self) -> bool:
        """Whether every element is finite."""
        return bool(torch.isfinite(size_of(self, exact=True)))

    @classmethod
    def of(cls, gradient: Tensor, *, closely: bool) -> Passed:
        """Read a gradient.

        Args:
            gradient: dense.
            closely: whether its magnitude is taken exactly, and it is asked where the gradient is zero.
        """
        number, size = gradient.numel(), magnitude(gradient, exact=closely)
        zeros = zeros_in(gradient)
        # Off the CPU each question would wait for the device, and memory is asked for instead.
        least, most = safe_range(number)
        safe = closely or (size.is_cpu and least < _norm(size) < most)
        wanted = closely and not (zeros.is_cpu and not zeros)
        return cls(
            size=size,
            exact=None if safe else magnitude(gradient, exact=True),
            zeros=zeros,
            mask=gradient.bool() if wanted else None,
            number=number,
        )


Gradient = Tensor | Passed


def size_of(gradient: Gradient, *, exact: bool) -> Tensor:
    """Return the magnitude of a gradient; see NOTE [Exact and fast] in tap/sums.py."""
    if isinstance(gradient, Tensor):
        return magnitude(gradient, exact=exact)
    return gradient.size if gradient.exact is None or not exact else gradient.exact


def sizes_of(gradients: Sequence[Gradient]) -> list[Tensor]:
    """Return the magnitudes of gradients, taken fast."""
    tensors = [g for g in gradients if isinstance(g, Tensor)]
    if len(tensors) == len(gradients):
        return magnitudes(tensors)
    sizes = iter(magnitudes(tensors))
    return [next(sizes) if isinstance(g, Tensor) else g.size for g in gradients]


def zeros_in(gradient: Gradient) -> Tensor:
    """Return how many elements of a gradient are zero."""
    return num_zero(gradient) if isinstance(gradient, Tensor) else gradient.zeros


def _norm(size: Tensor) -> float:
    return float(size) if size.dtype == torch.float64 else math.sqrt(float(size))


@contextlib.contextmanager
def passing(
    parameters: Mapping[str, Tensor], *, closely: bool
) -> Iterator[Callable[[str, Gradient | None], Gradient | None]]:
    """Let the gradients of parameters go as they arrive, for the length of the context.

    It gives a function: name, what a reverse pass in the context returned → what is known of the gradient.
    One that is sparse, or of a class of its own, is kept as it is.

    Args:
        parameters: leaves by name.
        closely: as for `Passed.of`.

    >>> x = torch.tensor([3.0, 0.0, 4.0], requires_grad=True)
    >>> with passing({"x": x}, closely=True) as known:
    ...     (found,) = torch.autograd.grad((x * x).sum() / 2, x)
    >>> found, float(known("x", found).size), int(known("x", found).zeros)
    (tensor([0., 0., 0.]), 5.0, 1)
    """
    read: dict[str, Passed] = {}

    def hook(name: str) -> Callable[[Tensor], Tensor | None]:
        def let_go(gradient: Tensor) -> Tensor | None:
            if type(gradient) is not Tensor or gradient.layout is not torch.strided:
                return None
            read[name] = Passed.of(gradient, closely=closely)
            return gradient.new_zeros(()).expand(gradient.shape)

        return let_go

    handles = [_register_hook(parameter, hook(name)) for name, parameter in parameters.items()]
    try:
        yield lambda name, found: found if found is None else read.get(name, found)
    finally:
        for handle in handles:
            handle.remove()
