"""Precision where it matters: what `gradflow.automatic` measures of short formats, and of slow numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.measurement import Session
from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.precision.measurement import PrecisionSession
from gradflow.functional.precision.passes import NARROW, listening
from gradflow.functional.precision.subnormal import ENTRIES, Tally, graph_nodes, sample
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.recorder import Recorder

_SHORT = NARROW | {torch.bfloat16}


@attrs.frozen
class AutomaticPrecision:
    """Like `precision()`, where the first step shows that it matters, at the first and the last step.

    It matters where parameters or outputs of layers are in float16, bfloat16 or shorter; where a loss scale
    is in use; and where one of the operations that are sampled in the first reverse pass is handed subnormal
    numbers (then at the last step alone).

    Args:
        loss_scale: what the training multiplies the loss by; None where nothing is known.
    """

    loss_scale: float | None = None

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return _AutomaticSession(model, modules, self.loss_scale)


class _AutomaticSession(PrecisionSession):
    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], loss_scale: float | None) -> None:
        super().__init__(model, modules, 1.0 if loss_scale is None else loss_scale)
        self._why = "" if loss_scale is None else f"the loss is scaled by {loss_scale:g}"
        self._sampled = contextlib.ExitStack()
        self._some = Tally(())

    def listens(self, *, end: bool) -> bool:
        return end and bool(self._why)

    def begin(self, step: int, recorder: Recorder) -> None:
        super().begin(step, recorder)
        self._sampled.close()
        short = [p.dtype for p in self._model.parameters() if p.dtype in _SHORT]
        if short and not self._why:
            self._why = f"parameters are {_name(short[0])}"

    def left(self, call: Call, output: Any) -> None:
        if call.is_layer and not self._why:
            short = next((y.dtype for y in iter_tensors(output) if y.dtype in _SHORT), None)
            if short is not None:
                self._why = f"{call.name or 'the model'} computes in {_name(short)}"
        super().left(call, output)

    def _counts_activations(self) -> bool:
        return bool(self._why)

    def differentiate(self, loss: Tensor) -> None:
        if self._why:
            super().differentiate(loss)
        elif loss.is_cpu:  # the step's own pass, which comes next, shows whether numbers come near the end
            self._some = Tally(sample(graph_nodes(loss)), most=ENTRIES)
            self._sampled.enter_context(listening(self._some.places()))
        self._outputs = []  # they hold the graph

    def end(self) -> None:
        self._sampled.close()
        if self._why:
            super().end()
        elif self._some.any:
            self._why = "the reverse pass comes to subnormal numbers"
        self._some = Tally(())

    def fields(self) -> Mapping[str, Any]:
        return super().fields() if self._looks else {}

    def notes(self) -> Sequence[str]:
        return super().notes() if self._looks else ()

    def found(self) -> Sequence[str]:
        if not self._looks:
            return ()
        when = "the first and the last step" if self._steps[0] == 0 else "the last step"
        return (f"precision, since {self._why}; at {when}",)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
