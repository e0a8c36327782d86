"""Codes that are drawn: what a model adds random numbers to, and how large it is beside them.

NOTE [Drawn codes]
A variational model draws a code for each sample: a mean, and noise of a size that it chooses. What the code
tells of the sample is told by the mean alone, so what matters is how much means differ between samples beside
the noise: per number, ½ ln(1 + (signal / noise)²) nats at most. The noise is followed by the tensors that
random functions gave, through the products with their scale, to where it is added.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
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
_ADDING = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__", "addcmul"))


@attrs.define(eq=False)
class Draws:
    """Hears where noise is added to what layers give, over the steps."""

    found: dict[str, list[Tensor]] = attrs.field(factory=dict)
    _recorder: Recorder | None = None
    _noise: dict[int, weakref.ref[Tensor]] = attrs.field(factory=dict)
    _heard: list[tuple[str, Tensor]] = attrs.field(factory=list)

    def begin(self, recorder: Recorder) -> None:
        """Start a step, or start it again."""
        self._recorder, self._noise, self._heard = recorder, {}, []

    def hear(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Return what marks the output of a function as noise; None where it is none."""
        name = getattr(func, "__name__", "")
        if name in _RANDOM:
            return self._mark
        if not self._noise or name not in _SCALING | _ADDING:
            return None
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        noise = [t for t in tensors if self._is_noise(t)]
        if not noise:
            return None
        if name in _SCALING:
            return self._mark
        others = [t for t in tensors if not self._is_noise(t)]
        if name == "addcmul" and len(tensors) == 3 and tensors[0] is others[0]:
            self._add(others[0], tensors[1].detach() * tensors[2].detach())
        elif len(tensors) == 2 and len(others) == 1:
            self._add(others[0], noise[0].detach())
        return None

    def _mark(self, out: Any) -> None:
        if isinstance(out, Tensor) and out.is_floating_point():
            self._noise[id(out)] = weakref.ref(out)

    def _is_noise(self, tensor: Tensor) -> bool:
        known = self._noise.get(id(tensor))
        return known is not None and known() is tensor

    def _add(self, mean: Tensor, noise: Tensor) -> None:
        """Keep the sizes of noise, and of what it is added to, where that differs between samples."""
        if not mean.requires_grad or mean.shape != noise.shape or mean.dim() < 2 or len(mean) < 2:
            return
        if (
            self._recorder is None
            or is_distributed(mean)
            or not (layer := source_layer(self._recorder, mean))
        ):
            return
        with torch.no_grad():
            rows = mean.detach().float()
            sizes = [(rows - rows.mean(0)).square().mean().sqrt(), noise.float().square().mean().sqrt()]
            self._heard.append((layer, torch.stack(sizes)))

    def end(self) -> None:
        """Take in what was added in the step, which now counts; of one layer, the largest signal."""
        now: dict[str, Tensor] = {}
        for layer, sizes in self._heard:
            now[layer] = torch.maximum(now[layer], sizes) if layer in now else sizes
        for layer, sizes in now.items():
            self.found.setdefault(layer, []).append(sizes)
        self._recorder, self._noise, self._heard = None, {}, []

    def read(self) -> list[DrawRecord]:
        """Return the numbers, at the end of the run."""
        return [
            DrawRecord(layer=layer, signal=np.array(numbers[0]), noise=np.array(numbers[1]))
            for layer, steps in self.found.items()
            for numbers in [torch.stack(steps, 1).double().tolist()]
        ]
