"""How the loss bends along an update of parameters that are spread over processes; see `curvature_along`.

NOTE [Along an update of slices]
The model gathers its parameters by itself, from where they are, so a point along the update is taken by
writing it there; at the end all are as they were. A derivative of a derivative would need the gathered ones
to outlive their pass: so the bend is the central difference of the slope, for which the model runs forward
and backward as in any step. Losses are the means over the batch's parts, slopes the sums over the slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gradflow.errors import ProcessError
from gradflow.functional.processes.shards import local
from gradflow.functional.processes.stages import PassVoid
from gradflow.functional.run.run import Run
from gradflow.functional.run.step import Request, evaluated, run_step
from gradflow.functional.run.together.gradients import averaged
from gradflow.functional.run.training.stepper import Stepper
from gradflow.functional.updates.curvature import FACTORS, SHARE, is_coarse
from gradflow.records import CurvatureRecord

Gradients = dict[str, Tensor | None]
_WHY = "its parameters are spread over processes"
_OF_STAGES = "its stages are spread over processes"


@attrs.frozen(eq=False)
class Line:
    """The line along an update, on which the model can be run.

    Args:
        run: the run.
        request: the step, as it is run at a point.
        start: what this process holds of the parameters at the beginning.
        update: the difference to what the optimizer made of them.
    """

    run: Run
    request: Request
    start: Mapping[str, Tensor]
    update: Mapping[str, Tensor]

    def go(self, factor: float) -> None:
        """Write the parameters of a point, in units of the update."""
        with torch.no_grad():
            for name, parameter in self.run.program.state.trainable.items():
                moved = factor * self.update[name] if factor else 0.0  # an update may not be finite
                local(parameter).copy_(self.start[name] + moved)

    def loss_at(self, factor: float) -> float:
        """Return the loss at a point."""
        self.go(factor)
        program, line = self.run.program, self.run.line
        with self.request.before.again(program):
            self.run.everyone.go_on()
            loss = _loss_of(self.run, self.request)
            program.state.shards.rest()
        for axis in line.processes.batch_axes:
            loss = float(line.reduced(np.array([loss]), axis)[0]) / axis.size
        return loss

    def slope_at(self, factor: float) -> float:
        """Return the derivative of the loss along the update at a point."""
        self.go(factor)
        return self.slope(gradients_of(self.run, self.request)[0])

    def slope(self, gradients: Mapping[str, Tensor | None]) -> float:
        """Return the product of gradients and the update, over all slices."""
        total, axes = 0.0, self.run.line.processes.axes
        for name, gradient in gradients.items():
            if gradient is not None and name in self.update:
                alike = [a.size for a in axes if a not in self.run.line.processes.parameter_axes(name)]
                total += float((local(gradient) * self.update[name]).double().sum()) / float(np.prod(alike))
        found = np.array([total])
        for axis in axes:
            found = self.run.line.reduced(found, axis, dist.ReduceOp.SUM)
        return self.run.stages.added(float(found[0]))


def _loss_of(run: Run, request: Request) -> float:
    """Return the loss of a step by a forward pass alone, where the parameters are now."""
    stages, failure = run.stages, None
    stages.begin(returns=False)
    try:
        with torch.no_grad(), run.program.state.swapped():
            loss = evaluated(run.program.given, request)[0]
    except ProcessError:
        raise
    except Exception as error:
        failure, loss = error, torch.tensor(0.0)
        if stages.alone:
            raise
    if stages.end(int(failure is not None)):
        raise failure or PassVoid("another stage of the pipeline could not run the pass")
    return stages.from_last(float(loss))[0]


def gradients_of(run: Run, request: Request) -> tuple[Gradients, Any]:
    """Return the gradients of a step, and its loss, where the parameters are now."""
    program = run.program
    with request.before.again(program):
        run.everyone.go_on()
        plainly = attrs.evolve(
            request, first=False, structural=False, look=False, full=False, ranks=False, keep=False,
            listeners=(), keep_output=False, scale=1.0,
        )  # fmt: skip
        shared = averaged(run, run_step(program, plainly))
    return shared.outcome.gradients.kept, shared.loss


def spread_curve(run: Run, request: Request, stepper: Stepper, loss: float) -> CurvatureRecord | None:
    """Return how the loss of a step bends along the update that follows it; None if it is another loss.

    Args:
        run: the run; its parameters are where the step began, and will be there again.
        request: the step.
        stepper: makes the update.
        loss: of the step.
    """
    state = run.program.state
    start = {name: local(p).detach().clone() for name, p in state.trainable.items()}
    gradients, again = gradients_of(run, request)
    if not torch.isfinite(again) or abs(float(again) - loss) > 1e-3 * abs(loss):
        return None
    given = {name: None if g is None else g.clone() for name, g in gradients.items()}
    with request.before.again(run.program):
        stepper.make(run.program, request, given, again)
    moved = {name: local(p).detach() - start[name] for name, p in state.trainable.items()}
    line, reach = Line(run, request, start, moved), 1.0 if is_coarse(start) else SHARE
    try:
        slopes = [line.slope_at(side) for side in (reach, -reach)]
        return CurvatureRecord(
            step=request.step, how="central difference", why=_WHY if run.stages.alone else _OF_STAGES,
            loss=float(again),
            slope=line.slope(gradients), bend=(slopes[0] - slopes[1]) / (2 * reach),
            actual=line.loss_at(1.0) - float(again), factors=FACTORS,
            changes=[line.loss_at(factor) - float(again) for factor in FACTORS],
        )  # fmt: skip
    finally:
        line.go(0.0)
