"""The gradients of a step, averaged over the processes that split the batch, as the trainer averages them.

NOTE [One exchange a step]
A step exchanges what training exchanges, in as many all-reduces: the gradients, packed in buckets. With them
go a few numbers: whether a number of this step is not finite on any process, so that all or none look at it
again; the loss, for schedulers that ask for it; and at which parameters a path has led anywhere. All else
that a step measures stays where it is until the run is over.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.processes.line import Line
from gradflow.functional.processes.shards import like_parts, local
from gradflow.functional.run.run import Run
from gradflow.functional.run.step import Outcome
from gradflow.functional.run.together.flows import combined_flows
from gradflow.functional.tap.sums import magnitude
from gradflow.functional.torch_private import in_reverse_pass


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

    Where they have stages of a pipeline, the loss is that of the last.

    Args:
        run: the run.
        outcome: of the step, on this process.
    """
    shared = _averaged(run, outcome)
    if run.stages.alone:
        return shared
    broken = shared.broken or bool(_broken(run, outcome))
    own, mean, found = run.stages.from_last(float(outcome.loss), float(shared.loss), also=float(broken))
    like = shared.loss
    outcome = attrs.evolve(shared.outcome, loss=torch.full_like(like, own))
    return Shared(outcome, bool(found), torch.full_like(like, mean))


def _averaged(run: Run, outcome: Outcome) -> Shared:
    line, gradients = run.line, outcome.gradients
    if line.alone:
        return Shared(outcome, False, outcome.loss)
    wholes = run.wholes.exchanged(gradients.wholes, outcome.recorder, first=not run.history.rows)
    mean = mean_gradients(
        line, run.program.state.trainable, gradients.kept, outcome.loss, broken=_broken(run, outcome),
        wholes=list(wholes.values()),
    )  # fmt: skip
    run.facts.note_reach(mean.some)
    sizes = {key: magnitude(whole, exact=True) for key, whole in zip(wholes, mean.wholes, strict=True)}
    outputs = list(gradients.outputs)
    for position, site in enumerate(outcome.recorder.sites):
        size = sizes.get((outcome.recorder.calls[site.call].name, site.index))
        if size is not None:
            outputs[position] = size
    flows = combined_flows(line, gradients.flows, outcome.structure)
    gradients = attrs.evolve(gradients, parameters=mean.parameters, outputs=outputs, wholes={}, flows=flows)
    return Shared(attrs.evolve(outcome, gradients=gradients), mean.broken, mean.loss)


@attrs.frozen(eq=False)
class Mean:
    """The mean of gradients over processes.

    Args:
        parameters: by name; None where no path led on any of them.
        loss: the mean of their losses.
        broken: whether any of them has said that something of it is not as it should be.
        wholes: the means of other gradients.
        some: parameters to which a path has led on some of them alone, and whether on this one.
    """

    parameters: dict[str, Tensor | None]
    loss: Tensor
    broken: bool
    wholes: list[Tensor]
    some: Mapping[str, bool]


def mean_gradients(
    line: Line,
    trainable: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor | None],
    loss: Tensor,
    *,
    broken: Tensor,
    wholes: Sequence[Tensor] = (),
) -> Mean:
    """Return the mean of gradients over the processes that split the batch; see NOTE [One exchange a step].

    Args:
        line: to the processes.
        trainable: the trainable parameters by name.
        parameters: their gradients by name; None where no path leads.
        loss: of this process.
        broken: whether something of it is not as it should be.
        wholes: other gradients; of the same shapes on all processes.
    """
    names = [name for name in trainable if name not in line.processes.reduced]  # which the model has averaged
    given = [_dense(parameters.get(name), trainable[name]) for name in names]
    there = [parameters.get(name) is not None for name in names]
    thin = [(g := parameters.get(name)) is not None and g.layout is not torch.strided for name in names]
    device = local(next(iter(trainable.values()))).device
    flags = torch.tensor([*there, *thin], device=device, dtype=loss.dtype)
    numbers = torch.stack([broken.to(flags), loss.detach().to(flags)])
    exchanged = [numbers, flags, *given, *(whole.to(device) for whole in wholes)]
    for axis in line.processes.batch_axes:
        exchanged = line.mean(exchanged, axis)
    for axis in line.processes.model_axes:
        exchanged[:2] = line.mean(exchanged[:2], axis)
    numbers, flags, *means = exchanged
    any_broken, *shares = torch.cat([numbers[:1], flags]).tolist()
    flagged = [share != 0 for share in shares]
    some = {name: own for name, own, share in zip(names, there, shares, strict=False) if 0 < share < 0.9999}
    found: dict[str, Tensor | None] = {
        name: None if not led else mean.to_sparse(1) if sparse else like_parts(mean, trainable[name])
        for name, mean, led, sparse in zip(names, means, flagged, flagged[len(names) :], strict=False)
    }
    return Mean({**parameters, **found}, numbers[1], bool(any_broken), means[len(names) :], some)


@contextlib.contextmanager
def averaged_backward(line: Line, trainable: Mapping[str, Tensor]) -> Iterator[None]:
    """Average what accumulates in the `.grad` of some parameters after every reverse pass, for the context.

    What was averaged before is the same everywhere, and so is its mean.

    Args:
        line: to the processes.
        trainable: the parameters by name.
    """
    plain = torch.autograd.backward

    @functools.wraps(plain)
    def backward(*args: Any, **kwargs: Any) -> None:
        inner = in_reverse_pass()
        plain(*args, **kwargs)
        if not inner:
            found = {name: p.grad for name, p in trainable.items()}
            zero = torch.zeros(())
            mean = mean_gradients(line, trainable, found, zero, broken=zero)
            for name, parameter in trainable.items():
                if name not in line.processes.reduced:
                    parameter.grad = mean.parameters[name]

    if not line.alone:
        torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = plain


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Return a gradient that may be written to; zeros where there is none."""
    if gradient is None:
        return torch.zeros_like(local(parameter), requires_grad=False)
    gradient = local(gradient)
    return gradient.to_dense() if gradient.layout is not torch.strided else gradient


def _broken(run: Run, outcome: Outcome) -> Tensor:
    """Return whether a number of a step is not finite; of a stage also one of its own parameters."""
    found = _is_broken(outcome)
    return found if run.stages.alone else found | (not outcome.gradients.finite)


def _is_broken(outcome: Outcome) -> Tensor:
    """Return whether the loss or a gradient of a step is not finite, on the device of the loss."""
    loss = outcome.loss.detach()
    parts = [torch.isfinite(loss)]
    parts += [
        torch.isfinite(size.detach()).to(loss.device)
        for size in outcome.gradients.outputs
        if size is not None
    ]
    return ~torch.stack([part.reshape(()) for part in parts]).all()
