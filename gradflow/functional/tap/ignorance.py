"""The loss of a step against what it costs to answer every sample alike, by the loss functions called.

NOTE [What ignorance costs]
A saturated gate, a sharp attention or a gradient that is gone means one thing in a model that knows the
answers and another in one that does not. So the loss functions of PyTorch are listened for, in the loss as in
a model that computes its own. Of each, the mean loss is set against that of the best answer which looks at no
input: of classes, their shares among the targets, or all alike where there are too few targets to tell
(fewer than four a class); of numbers, their mean over the samples. Where several are called, the one that is
known worst counts. Other losses are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.torch_private import num_writes

_CLASSES = ("cross_entropy", "nll_loss")
_ODDS = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_NUMBERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mse_loss": torch.square,
    "l1_loss": torch.abs,
    "smooth_l1_loss": torch.square,  # alike in both where errors are small, and a share of them where not
    "huber_loss": torch.square,
}
_FEW = 4  # targets a class below which their shares are not known


@attrs.frozen(eq=False)
class _Heard:
    """A call of a loss function: its arguments, and how often they had been written to."""

    name: str
    output: Tensor
    target: Tensor
    ignored: int
    versions: tuple[int, int]

    @property
    def intact(self) -> bool:
        return (num_writes(self.output), num_writes(self.target)) == self.versions


class Ignorance:
    """Collects the loss functions of one step; see NOTE [What ignorance costs]."""

    def __init__(self) -> None:
        self._heard: list[_Heard] = []

    def hear(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note a call of a loss function; any other is passed over."""
        name = getattr(func, "__name__", "")
        if name not in _CLASSES and name not in _ODDS and name not in _NUMBERS:
            return
        given = {**dict(zip(("input", "target"), args, strict=False)), **kwargs}
        output, target = given.get("input"), given.get("target")
        if not isinstance(output, Tensor) or not isinstance(target, Tensor) or not output.requires_grad:
            return
        versions = (num_writes(output), num_writes(target))
        self._heard.append(
            _Heard(name, output.detach(), target.detach(), int(kwargs.get("ignore_index", -100)), versions)
        )

    def share(self) -> float:
        """Return the loss over what ignorance costs: 1 guesses, 0 knows; NaN where it is not known."""
        return max(_known(self._shares()), default=math.nan)

    def _shares(self) -> Iterator[float]:
        with torch.no_grad():
            for heard in self._heard:
                if heard.intact and heard.output.numel() and heard.target.numel():
                    yield _share(heard)


class InnerLoss(TorchFunctionMode):
    """Hears which loss function a model that computes its own loss calls, so that it can be asked again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Tensor, Callable[[Tensor], Tensor], Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _CLASSES or name in _ODDS or name in _NUMBERS:
            given, rest = dict(kwargs or {}), args[1:]
            output = args[0] if args else given.pop("input", None)
            if isinstance(output, Tensor) and isinstance(made, Tensor) and made.numel() == 1:
                self._calls.append((output, lambda guess: func(guess, *rest, **given), made))
        return made

    def heard(self, loss: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """Return what the loss function that gave the loss took, and the function of that alone.

        None if the loss is more than what one of them gave.
        """
        for output, function, made in reversed(self._calls):
            if made is loss or torch.equal(made.detach(), loss.detach()):
                return output, function
        return None


def _known(values: Iterator[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _share(heard: _Heard) -> float:
    x, target = heard.output, heard.target
    wide = wide_dtype(x.device)
    if heard.name in _CLASSES:
        pair = _of_classes(heard, x, target)
    elif heard.name in _ODDS:
        pair = _of_odds(heard.name, x.to(wide), target.to(wide))
    elif x.shape == target.shape and x.dim() and len(x) > 1:
        size, rows = _NUMBERS[heard.name], target.to(wide)
        pair = size(x.to(wide) - rows).mean(), size(rows - rows.mean(0)).mean()
    else:
        return math.nan
    loss, ignorant = float(pair[0]), float(pair[1])
    return loss / ignorant if ignorant > 0 else math.nan


def _of_classes(heard: _Heard, x: Tensor, target: Tensor) -> tuple[Any, Any]:
    """Return the mean loss of a choice among classes, and that of the targets' own shares."""
    if target.is_floating_point():  # shares of the classes themselves
        shares = target.movedim(1, -1).flatten(0, -2) if target.dim() > 1 else target[None]
        mean = shares.mean(0)
        return F.cross_entropy(x, target), torch.special.entr(mean / mean.sum()).sum()
    loss = getattr(F, heard.name)(x, target, ignore_index=heard.ignored)
    number = x.shape[1] if x.dim() > 1 else x.shape[0]
    real = target[target != heard.ignored].flatten()
    if len(real) < _FEW * number:
        return loss, math.log(max(number, 1))
    counts = torch.bincount(real.clamp(0, number - 1), minlength=number)
    return loss, torch.special.entr(counts / counts.sum()).sum()


def _of_odds(name: str, x: Tensor, target: Tensor) -> tuple[Any, Any]:
    """Return the mean loss of a yes or no, and that of the targets' mean by output."""
    if x.shape != target.shape or not x.dim():
        return math.nan, math.nan
    mean = target.mean(0, keepdim=True) if len(target) > 1 else target.mean()
    ignorant = F.binary_cross_entropy(mean.expand_as(target).clamp(0, 1), target)
    return getattr(F, name)(x, target), ignorant
