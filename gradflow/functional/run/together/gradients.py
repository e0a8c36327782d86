"""The gradients of a step, averaged over the processes that split the batch, as the trainer averages them.

NOTE [One exchange a step]
A step exchanges what training exchanges, in as many all-reduces: the gradients, packed in buckets. With them go a
few numbers: whether a number of this step is not finite on any process, so that all or none look at it again;
the loss, for schedulers that ask for it; and at which parameters a path has led anywhere. All else that a step
measures stays where it is until the run is over.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from gradflow.functional.run.run import Run
from gradflow.functional.run.step import Outcome
from gradflow.functional.tap.probes import magnitude


@attrs.frozen(eq=False)
class Shared:
    """What all processes know of a step.

    Args:
        outcome: with the averaged gradients.
        broken: whether a number is not finite on any of them.
        loss: the mean of theirs.
    """

    outcome: Outcome
    broken: bool
    loss: Tensor


def averaged(run: Run, outcome: Outcome) -> Shared:
    """Return a step with the mean of the gradients over the processes; see NOTE [One exchange a step].

    Args:
        run: the run.
        outcome: of the step, on this process.
    """
    line = run.line
    if line.alone:
        return Shared(outcome, False, outcome.loss)
    trainable, gradients = run.program.state.trainable, outcome.gradients
    known, names = gradients.parameters, list(trainable)
    wholes = run.wholes.exchanged(gradients.wholes, outcome.recorder, first=not run.history.rows)
    given = [_dense(known.get(name), trainable[name]) for name in names]
    there = [known.get(name) is not None for name in names]
    thin = [(g := known.get(name)) is not None and g.layout is not torch.strided for name in names]
    flags = torch.tensor([*there, *thin], device=given[0].device).to(given[0].dtype)
    numbers = torch.stack([_is_broken(outcome).to(flags), outcome.loss.detach().to(flags)])
    exchanged = [numbers, flags, *given, *(whole.to(flags.device) for whole in wholes.values())]
    for axis in line.processes.batch_axes:
        exchanged = line.mean(exchanged, axis)
    numbers, flags, *means = exchanged
    broken, *flagged = (torch.cat([numbers[:1], flags]) != 0).tolist()
    found: dict[str, Tensor | None] = {
        name: None if not led else mean.to_sparse(1) if flat else mean
        for name, mean, led, flat in zip(names, means, flagged, flagged[len(names) :], strict=False)
    }
    sizes = {key: magnitude(mean, exact=True) for key, mean in zip(wholes, means[len(names) :], strict=True)}
    outputs = list(gradients.outputs)
    for position, site in enumerate(outcome.recorder.sites):
        size = sizes.get((outcome.recorder.calls[site.call].name, site.index))
        if size is not None:
            outputs[position] = size
    gradients = attrs.evolve(gradients, parameters={**known, **found}, outputs=outputs, wholes={})
    return Shared(attrs.evolve(outcome, gradients=gradients), bool(broken), numbers[1])


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Return a gradient that may be written to; zeros where there is none."""
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False)
    return gradient.to_dense() if gradient.layout is not torch.strided else gradient


def _is_broken(outcome: Outcome) -> Tensor:
    """Return whether the loss or a gradient of a step is not finite, as a scalar on the device of the loss."""
    loss = outcome.loss.detach()
    parts = [torch.isfinite(loss)]
    parts += [torch.isfinite(size.detach()).to(loss.device) for size in outcome.gradients.outputs if size is not None]
    return ~torch.stack([part.reshape(()) for part in parts]).all()
