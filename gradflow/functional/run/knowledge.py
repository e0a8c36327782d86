"""What the last outputs of a run are worth: the loss is asked once more, of guesses made of them.

NOTE [Guesses]
A guess has everything of an output but the knowledge which sample it belongs to. `shuffled` gives each
sample the output of another one, so it is as sure, as large and as varied as the model is; `averaged` gives
all the mean; `silent` gives zeros. Where the loss is below zero, it is asked as well of outputs that are
four times as large; above zero there may be probabilities among them, which would be none, and some losses
refuse those. Several outputs (two views, an image and its text) are shuffled each in its own way. The rows
are samples where there are enough of them, else samples and positions together. The order is drawn from a
generator of its own, so that no random state of the user's moves. A loss that needs the graph of its
outputs (a gradient penalty, a residual of a differential equation) cannot be asked, nor one that the model
computes. While it is asked, the targets of binary cross entropies are looked at: those are probabilities by
their meaning, and nothing in PyTorch checks that.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradflow.functional.model.trees import iter_tensors, map_floats, private_copy
from gradflow.functional.run.program import Before, Program
from gradflow.functional.run.step import Request
from gradflow.records import KnowledgeRecord

_LOUDER = 4.0
_FEW = 8  # samples below which positions are shuffled as well
_OF_ODDS = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_LOG = logging.getLogger(__name__)


def knowledge(program: Program, request: Request, output: Any, loss: float) -> KnowledgeRecord | None:
    """Return what the outputs of a step are worth, or None where that cannot be told.

    Args:
        program: what the step ran on.
        request: the step.
        output: the model's, detached; None if it was not kept.
        loss: of the step.
    """
    rows = _Rows.of(output)
    if rows is None or rows.number < 2:
        return None
    generator = torch.Generator().manual_seed(rows.number)

    def shuffled(flat: Tensor) -> Tensor:
        return flat[_derangement(rows.number, generator).to(flat.device)]

    def averaged(flat: Tensor) -> Tensor:
        return flat.mean(0, keepdim=True).expand_as(flat)

    def loss_of(change: Callable[[Tensor], Tensor]) -> float:
        before.restore(program)
        guess = map_floats(lambda _, tensor: rows.changed(tensor, change), private_copy(Tensor.clone, output))
        return float(given.loss_of(guess, request.batch))

    given, before = program.given, Before.of(program)
    held, odds = program.module_state(), _Odds()
    try:
        with torch.no_grad(), program.state.swapped(), before.again(program), warnings.catch_warnings(), odds:
            warnings.simplefilter("ignore")
            guesses = [loss_of(change) for change in (shuffled, averaged, torch.zeros_like)]
            louder = loss_of(lambda flat: _LOUDER * flat) if loss < 0 else math.nan
    except Exception as error:  # a loss that takes nothing but the model's own outputs
        _LOG.debug("the loss cannot be asked of guesses: %r", error)
        return None
    finally:
        held.restore()
    parts = [t for t in iter_tensors(output) if t.dtype.is_floating_point and rows.fit(t)]
    return KnowledgeRecord(
        step=request.step,
        loss=loss,
        shuffled=guesses[0],
        averaged=guesses[1],
        silent=guesses[2],
        louder=louder,
        num_samples=rows.number,
        shapes=[tuple(part.shape) for part in parts],
        variations=[_variation(part.reshape(rows.number, -1)) for part in parts],
        scales=[float(part.double().square().mean().sqrt()) for part in parts],
        odds=odds.seen,
    )


class _Odds(TorchFunctionMode):
    """Hears of the targets of binary cross entropies: the smallest and the largest, once there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[float, ...] = ()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {**dict(zip(("input", "target"), args, strict=False)), **(kwargs or {})}
        target = given.get("target")
        if getattr(func, "__name__", "") in _OF_ODDS and isinstance(target, Tensor) and target.numel():
            low, high = target.detach().aminmax()
            self.seen = (min([*self.seen[:1], float(low)]), max([*self.seen[1:], float(high)]))
        return func(*args, **(kwargs or {}))


@attrs.frozen
class _Rows:
    """What the rows of an output are: over how many leading axes they run, and their number."""

    axes: int
    number: int

    @classmethod
    def of(cls, output: Any) -> _Rows | None:
        """Return the rows of an output; None where it holds no floating-point tensor with any."""
        first = next((t for t in iter_tensors(output) if t.dtype.is_floating_point and t.dim()), None)
        if first is None:
            return None
        axes = 2 if first.shape[0] < _FEW and first.dim() == 3 else 1
        return cls(axes, first.shape[:axes].numel())

    def fit(self, tensor: Tensor) -> bool:
        """Whether a tensor has these rows; an auxiliary scalar has not."""
        return tensor.dim() >= self.axes and tensor.shape[: self.axes].numel() == self.number

    def changed(self, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a tensor with its rows changed, or as it is where it has others."""
        if not self.fit(tensor):
            return tensor
        return change(tensor.reshape(self.number, *tensor.shape[self.axes :])).reshape(tensor.shape)


def _variation(rows: Tensor) -> float:
    """The part of a matrix (rows × features) that differs between its rows; NaN where it is zero."""
    wide = rows.double()
    size = float(wide.norm())
    return float((wide - wide.mean(0)).norm()) / size if size > 0 else math.nan


def _derangement(number: int, generator: torch.Generator) -> Tensor:
    """Return an order in which no row keeps its place: along a random ring, each takes the next one's."""
    ring = torch.randperm(number, generator=generator)
    order = torch.empty_like(ring)
    order[ring] = ring.roll(1)
    return order
