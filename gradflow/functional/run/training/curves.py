"""How the loss of a run bends along its updates: measured when the run is over, at its start and its end.

NOTE [One update more]
At the end, the last batch has had no update yet: the optimizer's copy makes it, and the loss of that very
batch is followed along it, with the same random state and buffers. The first update is made again from what
the user gave, which is as it was. Where updates are made of several batches, this one is of one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor

from gradflow.errors import ProcessError
from gradflow.functional.run.run import Run
from gradflow.functional.run.step import Request, evaluated
from gradflow.functional.run.together.gradients import mean_gradients
from gradflow.functional.run.together.merging import merged
from gradflow.functional.run.training.spread import spread_curve
from gradflow.functional.run.training.stepper import Stepper
from gradflow.functional.updates.curvature import curvature_along
from gradflow.records import CurvatureRecord, FlowRecord

logger = logging.getLogger("gradflow")


@attrs.frozen(eq=False)
class Ends:
    """The two ends of a run that updates its parameters.

    Args:
        first: its first step.
        last: its last one.
        stepper: as the run has left it.
        fresh: makes one like it was at the start.
    """

    first: Request
    last: Request
    stepper: Stepper
    fresh: Callable[[], Stepper]


def bent(run: Run, ends: Ends, record: FlowRecord) -> FlowRecord:
    """Return the record with how the loss bends along the last update and the first.

    The working parameters are those of the start afterwards.
    """
    curves, why = [], ""
    try:
        with run.stages.trying():
            end = _curve(run, ends.last, ends.stepper, float(record.losses[-1]))
            _back_to_start(run, ends.first)
            start = _curve(run, ends.first, ends.fresh(), float(record.losses[0]))
        curves = [curve for curve in (start, end) if curve is not None]
        if len(curves) < 2:
            why = "model or loss give another loss when they are run again, or one that is not finite"
    except ProcessError:
        raise
    except Exception as error:  # the user's code cannot run the step a second time
        why = f"{type(error).__name__}: {error}"[:200]
        logger.debug("the curvature along the update could not be taken: %s", error)
    if not run.everyone.alone:
        every = run.everyone.gathered((curves, why), run.plan.teller)
        if not every:  # another process has the record
            return record
        whole = all(len(found) == len(curves) for found, _ in every)
        curves = list(merged([tuple(found) for found, _ in every])) if whole else []
        why = next((said for _, said in every if said), "")
    assert record.updates is not None
    provenance = record.provenance
    if why:
        notes = (*provenance.notes, f"How the loss bends along an update could not be measured: {why}.")
        provenance = attrs.evolve(provenance, notes=notes)
    return attrs.evolve(record, updates=attrs.evolve(record.updates, curves=curves), provenance=provenance)


def _back_to_start(run: Run, first: Request) -> None:
    given, state = run.program.given, run.program.state
    theirs = {state.originals[id(p)]: p for module in given.modules for p in module.parameters()}
    first.before.restore(run.program)
    with torch.no_grad():
        for name, parameter in state.every_parameter.items():
            if name not in state.shards.gathered:
                parameter.copy_(theirs[name])
    state.shards.reset()


def _curve(run: Run, request: Request, stepper: Stepper, loss: float) -> CurvatureRecord | None:
    """Return how the loss of a step bends along the update that follows it; None if it is another loss."""
    program = run.program
    state = program.state
    if state.shards or not run.stages.alone:
        return spread_curve(run, request, stepper, loss)
    before = {name: p.detach().clone() for name, p in state.trainable.items()}

    def loss_of(parameters: Mapping[str, Tensor]) -> Tensor:
        with request.before.again(program), torch.enable_grad(), state.swapped(dict(parameters)):
            return evaluated(program.given, request)[0]

    failed: Exception | None = None
    found: dict[str, Tensor | None] = dict.fromkeys(before)
    again = torch.tensor(math.nan)
    try:
        again = loss_of(state.trainable)
        gradients = torch.autograd.grad(again, list(state.trainable.values()), allow_unused=True)
        found.update(zip(before, gradients, strict=True))
        again = again.detach()
    except Exception as error:
        failed = error
    if not run.line.alone:
        mean = mean_gradients(
            run.line, state.trainable, found, again, broken=torch.tensor(failed is not None)
        )
        found, again = mean.parameters, mean.loss
        if mean.broken and failed is None:
            return None
    if failed is not None:
        raise failed
    if not torch.isfinite(again) or abs(float(again) - loss) > 1e-3 * abs(loss):
        return None
    with request.before.again(program):
        stepper.make(program, request, found, again)
    after = {name: p.detach().clone() for name, p in state.trainable.items()}
    with torch.no_grad():
        for name, parameter in state.trainable.items():
            parameter.copy_(before[name])
    return curvature_along(loss_of, before, after, step=request.step)
