"""What the last outputs of a run are worth: the loss is asked once more, of guesses made of them.

NOTE [Guesses]
A guess has everything of an output but the knowledge which sample it belongs to. `shuffled` gives each sample
the output of another one, so it is as sure, as large and as varied as the model is; `averaged` gives all
the mean. Several outputs (two views, an image and its text) are shuffled each in its own way. The rows are
samples where there are enough of them, else samples and positions together. The order is drawn from a
generator of its own, so that no random state of the user's moves. A loss that needs the graph of its outputs
(a gradient penalty, a residual of a differential equation) cannot be asked, nor one that the model computes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradflow.functional.model.purity import ModuleState
from gradflow.functional.model.trees import iter_tensors, map_floats, private_copy
from gradflow.functional.run.program import Before, Program
from gradflow.functional.run.step import Request
from gradflow.records import KnowledgeRecord

_FEW = 8  # samples below which positions are shuffled as well
_LOG = logging.getLogger(__name__)


def knowledge(program: Program, request: Request, output: Any, loss: float) -> KnowledgeRecord | None:
    """Return what the outputs of a step are worth, or None where that cannot be told.

    Args:
        program: what the step ran on.
        request: the step.
        output: the model's, detached; None if it was not kept.
        loss: of the step.
    """
    rows = _rows(output)
    if rows is None or rows[1] < 2:
        return None
    axes, number = rows
    generator = torch.Generator().manual_seed(number)

    def shuffled(position: int, tensor: Tensor) -> Tensor:
        return _by_rows(tensor, axes, number, lambda flat: flat[_derangement(number, generator, flat.device)])

    def averaged(position: int, tensor: Tensor) -> Tensor:
        return _by_rows(tensor, axes, number, lambda flat: flat.mean(0, keepdim=True).expand_as(flat))

    def loss_of(change: Callable[[int, Tensor], Tensor]) -> float:
        with Before.of(program).again(program):
            return float(given.loss_of(map_floats(change, private_copy(Tensor.clone, output)), request.batch))

    given, held = program.given, ModuleState(program.given.modules, program.given.functions)
    try:
        with torch.no_grad(), program.state.swapped(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guessed, level = loss_of(shuffled), loss_of(averaged)
    except Exception as error:  # a loss that takes nothing but the model's own outputs
        _LOG.debug("the loss cannot be asked of guesses: %r", error)
        return None
    finally:
        held.restore()
    return KnowledgeRecord(step=request.step, loss=loss, shuffled=guessed, averaged=level, num_samples=number)


def _rows(output: Any) -> tuple[int, int] | None:
    """Return over how many leading axes rows run, and their number; None where there are no outputs."""
    first = next((t for t in iter_tensors(output) if t.dtype.is_floating_point and t.dim()), None)
    if first is None:
        return None
    if first.shape[0] < _FEW and first.dim() == 3:
        return 2, first.shape[0] * first.shape[1]
    return 1, first.shape[0]


def _by_rows(tensor: Tensor, axes: int, number: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor changed row by row, or as it is if its rows are others (an auxiliary scalar)."""
    if tensor.dim() < axes or tensor.shape[:axes].numel() != number:
        return tensor
    return change(tensor.reshape(number, *tensor.shape[axes:])).reshape(tensor.shape)


def _derangement(number: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return an order in which no row keeps its place: along a random ring, each takes the next one's."""
    ring = torch.randperm(number, generator=generator)
    order = torch.empty_like(ring)
    order[ring] = ring.roll(1)
    return order.to(device)
