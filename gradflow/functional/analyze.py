"""`analyze`: measure how the gradient flows through a model, purely."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.errors import ModelInputError
from gradflow.functional.measurement import Measurement
from gradflow.functional.model.batches import Source, invoke, make_objective, no_batches, prepared
from gradflow.functional.model.closures import modules_in, stateful_in
from gradflow.functional.model.supported import check_module
from gradflow.functional.model.trees import named_tensors, same_device
from gradflow.functional.parts.chance import chance
from gradflow.functional.parts.measurement import parts
from gradflow.functional.parts.sight import sight
from gradflow.functional.processes.group import is_told
from gradflow.functional.processes.stages import Stages
from gradflow.functional.run.measure import measure
from gradflow.functional.run.program import Given
from gradflow.functional.run.run import Plan, Progress
from gradflow.functional.run.training.options import Loop, StepFunction
from gradflow.functional.tap.watch import source_calls
from gradflow.records import FlowRecord, GraphRecord

Mode = Literal["train", "eval", "keep"]
Detail = Literal["cheap", "full"]
Transform = Literal["auto", "fused", "vjp"]
Staged = Any  # a `PipelineStage`, or a schedule of it; the module is imported by who uses it
Optimizers = Optimizer | Mapping[str, Optimizer] | Sequence[Optimizer]


def analyze(
    model: nn.Module | Staged,
    batches: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    steps: int = 20,
    optimizer: Optimizers | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    scheduler: Any = None,
    scaler: Any = None,
    step_fn: StepFunction | None = None,
    seed: int | None = None,
    mode: Mode = "train",
    detail: Detail = "cheap",
    transform: Transform = "auto",
    processes: Any = "auto",
    progress: Progress | None = None,
    deepen: Callable[[FlowRecord], bool] | None = None,
    measurements: Iterable[Measurement] = (),
) -> FlowRecord:
    """Return what a few steps on real batches show of a model's gradient flow; measurements only.

    Pure: the model, its buffers, `.grad`, modes, attributes, the optimizer and every random state are
    afterwards what they were, bit for bit, also when it raises. Each step draws one batch, calls the model
    once and the loss once, in that order and never ahead; after the last step the loss is asked of three
    guesses made of its outputs (`FlowRecord.knowledge`). A loss without a graph is measured as it is: no
    parameter is reached, and the graph tells what was cut off and where. Threads that analyse wait for one
    another, and no other thread may use the model meanwhile. An exception of the model or the loss is raised
    as it is, with a note that tells the step and the batch's shapes.

    Args:
        model: the model; or, on the process of each, a stage of a pipeline (a `PipelineStage` of
            `torch.distributed.pipelining`) or the schedule that runs it. Then the first stage takes the
            inputs of a batch, and the last its target and the loss.
        batches: a function of no arguments that returns the next batch, or an iterable of batches (a
            DataLoader, a list). A batch is a tensor, called as `model(x)`, a tuple or list, `model(*x)`,
            or a mapping, `model(**x)`. For a loss of two arguments it is the pair (inputs, target).
        loss_fn: output → scalar, or (output, target) → scalar, or None for the loss that the model
            computes itself (a scalar output, or its `.loss`).
        steps: how many steps; fewer are run if the batches end, and the record says so.
        optimizer: if given, a copy of it steps copies of the parameters after each step, so that the
            record covers the first steps of real training. Without one the parameters stay as they are.
            Several, in a mapping or a list, all step on the same loss.
        clip: if given, the norm that the gradients of the model are clipped to before each update, as
            `torch.nn.utils.clip_grad_norm_(model.parameters(), clip)` does in a training loop. What is
            recorded are the gradients before that.
        accumulate: how many batches there are to an update, which is made with their mean gradient.
        scheduler: a scheduler of the optimizer's rates, or several in a list, of which copies step after each
            update. Leave out one that steps by epochs: a run is shorter than that.
        scaler: a `torch.amp.GradScaler`. A copy of it scales the loss for the reverse pass, leaves out
            updates whose gradients overflow, and changes its scale. Recorded are the gradients unscaled.
        step_fn: what none of these can say: (model, batch, optimizer) → anything, one whole step of your
            loop, from the forward pass to `optimizer.step()`. It is run on each batch, after it was measured,
            with the model's parameters swapped for copies and with a copy of the optimizer, in the form
            given. Under `analyze_custom` it gets the number of the step in place of a batch, and of a
            pipeline what was passed as the model: `schedule.step(...)` runs its passes.
        seed: seeds torch, numpy and Python for the run; None goes on from the present states.
        mode: `train` or `eval` switches the model over if it is not in that mode (a model that is keeps
            the modes of its parts); `keep` changes nothing.
        detail: `cheap` probes layer outputs; `full` measures the gradient on every edge of the graph too.
        transform: `fused` (`torch.autograd.grad`), `vjp` (`torch.func.vjp`), or `auto`. `vjp` takes fewer
            models, and other kernels for some layers, so that dropout inside attention drops other elements.
        processes: which split the batch: `auto` for those that a `DistributedDataParallel` in the model
            averages gradients over, a process group, or `alone` for this process. Where there are several,
            each must call it, with its own part of every batch; all get the record of the joined batch. Of a
            stage, they are those that have the same stage. With `gradflow.OnRank(0)` one of them gets the
            record, and the others None.
        progress: called as `progress(done, steps)` after every step.
        deepen: if it returns True for the cheap record, the last step is run again in full detail.
        measurements: what else to measure, such as `attention()`; see `gradflow.functional.measurement`.

    Returns:
        The record; its arrays have one entry per step. None where another process is to have it.

    Raises:
        ModelInputError: if the model, batches, a batch or the loss cannot be used as such.
        EmptyBatchesError: if there is no batch.
        LossError: if the loss is no scalar, or only sums what a stage hands on.
        NoTrainableParametersError: if no parameter requires a gradient.
        ModelNotCalledError: if the first step calls no module of the model.
        OptimizerMismatchError: if the optimizer is none, or holds none of the model's parameters.
        MeasurementError: if two measurements declare the same name, or one a field of the record.
        NotRestoredError: if something of the user's could not be put back.
        ProcessError: if another process raised, died, or never called it.
        ValueError: if `steps`, `clip`, `accumulate`, `seed`, `mode`, `detail` or `transform` is none of those
            above, or what tells of updates is given without an optimizer.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> batch = torch.randn(16, 4), torch.randint(0, 2, (16,))
    >>> record = analyze(model, [batch] * 3, nn.CrossEntropyLoss())
    >>> record.steps, [layer.name for layer in record]
    (3, ['0', '1', '2'])
    """
    loop = Loop(
        optimizer=optimizer, clip=clip, accumulate=accumulate, scheduler=scheduler, scaler=scaler,
        step_fn=step_fn,
    )  # fmt: skip
    plan = Plan(
        steps=steps, loop=loop, seed=seed, mode=mode, detail=detail, transform=transform,
        processes=processes, progress=progress, deepen=deepen, measurements=measurements,
    )  # fmt: skip
    return _told(analyzed(model, batches, loss_fn, plan), plan)


def analyze_custom(
    model: nn.Module,
    forward_fn: Callable[[nn.Module, int], Any],
    loss_fn: Callable[[Any], Tensor] | None = None,
    *,
    steps: int = 20,
    optimizer: Optimizers | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    scheduler: Any = None,
    scaler: Any = None,
    step_fn: StepFunction | None = None,
    seed: int | None = None,
    mode: Mode = "train",
    detail: Detail = "cheap",
    transform: Transform = "auto",
    processes: Any = "auto",
    progress: Progress | None = None,
    deepen: Callable[[FlowRecord], bool] | None = None,
    measurements: Iterable[Measurement] = (),
) -> FlowRecord:
    """Like `analyze`, for forwards that need more than `model(x)`.

    Args:
        model: the model.
        forward_fn: (model, step) → output; draws its own data.
        loss_fn: output → scalar; None where the output is the loss or holds it.
        steps, optimizer, clip, accumulate, scheduler, scaler, step_fn, seed, mode, detail, transform,
            processes, progress, deepen, measurements: as for `analyze`.

    Raises:
        GradflowError: those that `analyze` raises.
        ModelNotCalledError: if `forward_fn` calls no module of `model`.

    >>> import torch
    >>> model, x = nn.Linear(2, 1), torch.ones(3, 2)
    >>> record = analyze_custom(model, lambda m, step: m(x) + m(2 * x), lambda y: y.mean(), steps=2)
    >>> [layer.name or "(model)" for layer in record]
    ['(model)', '@1']
    """
    loop = Loop(
        optimizer=optimizer, clip=clip, accumulate=accumulate, scheduler=scheduler, scaler=scaler,
        step_fn=step_fn,
    )  # fmt: skip
    plan = Plan(
        steps=steps, loop=loop, seed=seed, mode=mode, detail=detail, transform=transform,
        processes=processes, progress=progress, deepen=deepen, measurements=measurements,
    )  # fmt: skip
    return _told(analyzed_custom(model, forward_fn, loss_fn, plan), plan)


def _told(record: FlowRecord, plan: Plan) -> FlowRecord:
    """Return a record; None where another process is to have it, which only who asks for that is handed."""
    return record if is_told(plan.processes) else None  # type: ignore[return-value]


def analyzed(
    model: nn.Module | Staged, batches: Any, loss_fn: Callable[..., Any] | None, plan: Plan
) -> FlowRecord:
    """Return what a plan shows of a model; see `analyze`.

    Where another process is to have the record, it is that of this process's part.
    """
    stages = Stages.of(model)
    if not stages.alone:
        return _analyzed_stage(stages, model, batches, loss_fn, plan)
    check_module(model)
    objective = make_objective(loss_fn)
    source = Source(batches)
    device = same_device(model)

    def draw(step: int) -> Any:
        batch = source.draw()
        if batch is None and step == 0:
            raise no_batches(batches)
        return None if batch is None else prepared(batch, device)

    def forward(batch: Any, step: int) -> Any:
        return invoke(model, objective.inputs(batch))

    def inputs_of(batch: Any) -> dict[str, Tensor]:
        return dict(named_tensors(objective.inputs(batch), "input"))

    functions = (*_held(loss_fn), *_held(plan.loop.step_fn))
    given = Given(
        model, _module(loss_fn), forward, objective.loss, inputs_of, functions, own_loss=loss_fn is None
    )
    with contextlib.closing(source):
        return measure(given, draw, attrs.evolve(_with_standing(plan), num_batches=source.length))


def _analyzed_stage(
    stages: Stages, handed: Staged, batches: Any, loss_fn: Callable[..., Any] | None, plan: Plan
) -> FlowRecord:
    """Return what a plan shows of a pipeline, called on the process of each of its stages.

    The first takes the inputs of a batch, and the last its target; those between need none.
    """
    stage = stages.stage
    assert stage is not None
    model = stage.module
    loss_fn = stage.loss_fn if loss_fn is None else loss_fn
    objective = make_objective(loss_fn)
    draws = stages.is_first or (stages.is_last and objective.takes_target) or batches is not None
    source = Source(batches if draws else itertools.repeat(()))
    device = same_device(model)

    def draw(step: int) -> Any:
        batch = source.draw()
        if batch is None and step == 0:
            raise no_batches(batches)
        return None if batch is None else prepared(batch, device)

    def forward(batch: Any, step: int) -> Any:
        if stages.is_first:
            output = invoke(model, objective.inputs(batch))
        else:
            output = model(*stages.entering())
        return output if stages.is_last else stages.hand_on(output, source_calls)

    def loss_of(output: Any, batch: Any) -> Any:
        if not stages.is_last:
            return stages.behind(output)
        loss = objective.loss(output, batch)
        return stages.note(loss if stage.averages else loss * stage.microbatches)

    def inputs_of(batch: Any) -> dict[str, Tensor]:
        if stages.is_first:
            return dict(named_tensors(objective.inputs(batch), "input"))
        return stages.named()

    functions = (*_held(loss_fn), *_held(plan.loop.step_fn))
    given = Given(
        model, _module(loss_fn) if stages.is_last else None, forward, loss_of, inputs_of, functions,
        own_loss=loss_fn is None or not stages.is_last, stages=stages, handed=handed,
    )  # fmt: skip
    with contextlib.closing(source):
        return measure(given, draw, attrs.evolve(_with_standing(plan), num_batches=source.length))


def analyzed_custom(
    model: nn.Module,
    forward_fn: Callable[[nn.Module, int], Any],
    loss_fn: Callable[[Any], Tensor] | None,
    plan: Plan,
) -> FlowRecord:
    """Return what a plan shows of a model that is run by a function; see `analyze_custom`."""
    check_module(model)
    if not callable(forward_fn):
        raise ModelInputError(
            f"forward_fn is a {type(forward_fn).__name__}; pass a function of (model, step) that returns the "
            "output: `lambda model, step: model(x)`."
        )
    objective = make_objective(loss_fn)
    if objective.takes_target:
        raise ModelInputError(
            "with a custom forward the loss takes the output alone; bind the target in it: "
            "`lambda output: F.cross_entropy(output, y)`."
        )

    def forward(batch: Any, step: int) -> Any:
        return forward_fn(model, step)

    def loss_of(output: Any, batch: Any) -> Any:
        return objective.loss(output, None)

    functions = (*_held(loss_fn), *_held(plan.loop.step_fn))
    given = Given(
        model, _module(loss_fn), forward, loss_of, lambda batch: {}, functions, own_loss=loss_fn is None,
        draws_itself=True,
    )  # fmt: skip
    return measure(given, lambda step: (), _with_standing(plan))


def _with_standing(plan: Plan) -> Plan:
    """Return a plan with the measurements that every run takes which looks closely."""
    if not plan.closely:
        return plan
    return attrs.evolve(plan, measurements=(parts(), sight(), chance(), *plan.measurements))


def graph_of(
    model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None = None, *, detail: Detail = "full"
) -> GraphRecord:
    """Return the graph's plain data for one batch; `gradflow.layer_graph` gives it its queries."""
    record = analyze(model, [batch], loss_fn, steps=1, detail=detail)
    assert record.graph_record is not None
    return record.graph_record


def _held(function: Any) -> tuple[Any, ...]:
    """Return what a function holds that running it may change: itself, modules, and what else has a state to
    save, such as optimizers, schedulers and scalers."""
    return (function, *modules_in(function), *stateful_in(function))


def _module(loss_fn: Any) -> nn.Module | None:
    return loss_fn if isinstance(loss_fn, nn.Module) else None
