"""Codes that are drawn: what a model adds random numbers to, and how large it is beside them.

NOTE [Drawn codes]
A variational model draws a code for each sample: a mean, and noise of a size that it chooses. What the code
tells of the sample is told by the mean alone, so what matters is how much means differ between samples beside
the noise: per number, ½ ln(1 + (signal / noise)²) nats at most. The noise is followed by the tensors that
random functions gave, through the products with their scale, to where it is added. It may also come with the
batch: then it is what has no gradient and is multiplied by what has one, of its shape. The pull to a prior is
that of the mean itself, times a constant: the cosine of the gradient at the means and the means tells whether
it is all that comes to them. Where the loss sees the means by the codes alone there is none.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.processes.shards import is_distributed
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import source_layer
from gradflow.records import DrawRecord

_RANDOM = frozenset(("randn", "randn_like", "normal", "normal_", "rand", "rand_like", "uniform_"))
_SCALING = frozenset(("mul", "mul_", "multiply", "__mul__", "__rmul__", "div", "__truediv__"))
_ROUNDING = 1e-5
_ADDING = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__", "addcmul"))


@attrs.define(eq=False)
class Draws:
    """Hears where noise is added to what layers give, over the steps."""

    found: dict[tuple[str, bool], list[Tensor]] = attrs.field(factory=dict)
    _recorder: Recorder | None = None
    _noise: dict[int, tuple[weakref.ref[Tensor], bool]] = attrs.field(factory=dict)  # and whether given
    _heard: list[tuple[tuple[str, bool], tuple[Tensor, Tensor], Tensor]] = attrs.field(factory=list)
    _pulls: list[Tensor] = attrs.field(factory=list)

    def begin(self, recorder: Recorder) -> None:
        """Start a step, or start it again."""
        self._recorder, self._noise, self._heard, self._pulls = recorder, {}, [], []

    def hear(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Return what marks the output of a function as noise; None where it is none."""
        name = getattr(func, "__name__", "")
        if name in _RANDOM:
            return self._mark
        if name not in _SCALING and not (self._noise and name in _ADDING):
            return None
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        noise = [t for t in tensors if self._is_noise(t)]
        if not noise:
            return self._mark_given if name in _SCALING and _is_scaled(tensors) else None
        if name in _SCALING:
            return self._mark_given if self._is_given(noise[0]) else self._mark
        others = [t for t in tensors if not self._is_noise(t)]
        if name == "addcmul" and len(tensors) == 3 and tensors[0] is others[0]:
            return self._add(others[0], tensors[1].detach() * tensors[2].detach(), self._is_given(noise[0]))
        if name != "addcmul" and len(tensors) == 2 and len(others) == 1:
            return self._add(others[0], noise[0].detach(), self._is_given(noise[0]))
        return None

    def _mark(self, out: Any, *, given: bool = False) -> None:
        if isinstance(out, Tensor) and out.is_floating_point():
            self._noise[id(out)] = weakref.ref(out), given

    def _mark_given(self, out: Any) -> None:
        self._mark(out, given=True)

    def _is_noise(self, tensor: Tensor) -> bool:
        known = self._noise.get(id(tensor))
        return known is not None and known[0]() is tensor

    def _is_given(self, tensor: Tensor) -> bool:
        return self._noise[id(tensor)][1]

    def _add(self, mean: Tensor, noise: Tensor, given: bool) -> Callable[[Any], None] | None:
        """Take the sizes of noise, and of what it is added to, where that differs between samples; return
        what keeps them with the code."""
        if not mean.requires_grad or mean.shape != noise.shape or mean.dim() < 2 or len(mean) < 2:
            return None
        if (
            self._recorder is None
            or is_distributed(mean)
            or not (layer := source_layer(self._recorder, mean))
        ):
            return None
        with torch.no_grad():
            rows = mean.detach().float()
            sizes = [(rows - rows.mean(0)).square().mean().sqrt(), noise.float().square().mean().sqrt()]
            heard = torch.stack(sizes)

        def keep(code: Any) -> None:
            self._heard.append(((layer, given), (mean, code), heard))

        return keep

    def codes(self) -> list[Tensor]:
        """Return means and what they are with noise, by turns, of which the gradients are wanted."""
        return [tensor for _, pair, _ in self._heard for tensor in pair]

    def weigh(self, found: Sequence[Tensor | None]) -> None:
        """Take what the gradients say: at the means there is a pull where more comes than from the codes."""
        for at, (_, (mean, _), sizes) in enumerate(self._heard):
            whole, by_code = found[2 * at : 2 * at + 2]
            cosine = sizes.new_tensor(math.nan)
            if whole is not None:
                one, other = mean.detach().flatten().float(), whole.flatten().float()
                cosine = one @ other / (one.norm() * other.norm())
                if by_code is not None:
                    apart = (whole - by_code).flatten().float().norm() > _ROUNDING * other.norm()
                    cosine = torch.where(apart, cosine, math.nan)
            self._pulls.append(cosine)

    def end(self) -> None:
        """Take in what was added in the step, which now counts; of one layer, the largest signal."""
        now: dict[tuple[str, bool], Tensor] = {}
        for at, (place, _, sizes) in enumerate(self._heard):
            pull = self._pulls[at] if at < len(self._pulls) else sizes.new_tensor(math.nan)
            numbers = torch.cat([sizes, pull[None]])
            now[place] = torch.fmax(now[place], numbers) if place in now else numbers
        for place, numbers in now.items():
            self.found.setdefault(place, []).append(numbers)
        self._recorder, self._noise, self._heard, self._pulls = None, {}, [], []

    def read(self) -> list[DrawRecord]:
        """Return the numbers, at the end of the run."""
        return [
            DrawRecord(
                layer=layer,
                given=given,
                signal=np.array(numbers[0]),
                noise=np.array(numbers[1]),
                pull=np.array(numbers[2]),
            )
            for (layer, given), steps in self.found.items()
            for numbers in [torch.stack(steps, 1).double().tolist()]
        ]


def _is_scaled(tensors: Sequence[Tensor]) -> bool:
    """Whether two tensors of one shape are multiplied of which one alone has a gradient: noise of the batch,
    maybe, and the size that the model gives it."""
    if len(tensors) != 2 or tensors[0].shape != tensors[1].shape or tensors[0].dim() < 2:
        return False
    return tensors[0].requires_grad != tensors[1].requires_grad
