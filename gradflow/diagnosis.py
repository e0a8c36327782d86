"""The calls that join several parts: `diagnose` measures, judges, explains; `layer_graph` gives a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
from torch import nn

from gradflow.detect import Detector, asks_for_curves, check_detectors, detect, explain, needs_depth
from gradflow.functional.analyze import (
    Detail,
    Mode,
    Optimizers,
    Staged,
    Transform,
    analyze,
    analyzed,
    analyzed_custom,
)
from gradflow.functional.processes.group import is_told
from gradflow.functional.run.run import Plan
from gradflow.functional.run.training.options import Loop, StepFunction
from gradflow.graph import LayerGraph
from gradflow.pipelines import Pipeline, automatic
from gradflow.records import FlowRecord, Issue
from gradflow.report import Report


def diagnose(
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
    pipeline: Any = None,
    detail: Detail = "cheap",
    transform: Transform = "auto",
    processes: Any = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Return what is wrong with a model's training, where it starts, and what to change.

    This is `analyze`, then `detect` and `explain` on its record. Where the cheap measurements leave a
    verdict undecided, the last step is run again in full detail. The model, the optimizer and the random
    state are afterwards what they were.

    Args:
        model: the model; or, on the process of each, a stage of a pipeline (`PipelineStage`) or its schedule;
            see `analyze`.
        batches: a zero-argument function that returns the next batch, or an iterable of batches. A batch is
            called as `model(x)` for a tensor, `model(*x)` for a tuple or list, `model(**x)` for a mapping.
        loss_fn: from the model's output to a scalar; one that takes two arguments gets (output, target) from
            (inputs, target) batches. None takes the model's own loss.
        steps: how many batches to run at most; 20 are enough to tell a trend from noise.
        optimizer: steps *copies* of the parameters, to cover the first steps of real training. None
            holds the parameters fixed. Several, in a mapping or a list, all step on the same loss.
        clip: the norm that your loop clips gradients to before each update, as `clip_grad_norm_` does; None
            steps with them as they are.
        accumulate: how many batches there are to an update, which is made with their mean gradient.
        scheduler: of the optimizer's rates, or several; copies step after each update.
        scaler: a `torch.amp.GradScaler`; a copy of it scales the loss, and leaves out steps that overflow.
        step_fn: (model, batch, optimizer) → anything: one whole step of your loop, on copies, for what these
            options cannot say; see `analyze`.
        seed: makes dropout and the like repeatable; None draws from the global random state.
        mode: `train`, `eval`, or `keep` for the mode that each submodule is in.
        pipeline: a pipeline, a detector or several. None is `automatic()`: the base, `flow()`, and what the
            model turns out to need in the first step: attention, recurrent layers, a policy.
        detail: `cheap`, or `full` to measure the flow along every edge of the layer graph; `full` also where
            the pipeline needs it.
        transform: the reverse pass: `auto`, `fused` or `vjp`.
        processes: those that split the batch, of which each must call it: `auto`, a process group, or
            `alone`; `OnRank(0)` has the report on that process alone; see `analyze`.
        progress: called with (steps done, steps) after every step.

    Returns:
        A `Report`; `print(report)` tells it in words, `report.ok` in one. None where another process is to
        have it.

    Raises:
        GradflowError: those that `analyze` raises, where the model cannot be run as it was passed; what
            the model or the loss raises comes through as it is.
        PipelineError: if `pipeline` cannot be used as one; raised before the model is run.
        ValueError: if an option is not as `analyze` takes it.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    >>> report = diagnose(model, lambda: torch.randn(64, 8), lambda y: y.square().mean(), steps=5)
    >>> report.ok, [layer.name for layer in report.record]
    (True, ['0', '1', '2'])
    """
    judge = Judge(detectors_of(pipeline, "diagnose"))
    loop = Loop(
        optimizer=optimizer, clip=clip, accumulate=accumulate, scheduler=scheduler, scaler=scaler,
        step_fn=step_fn,
    )  # fmt: skip
    plan = Plan(
        steps=steps, loop=loop, seed=seed, mode=mode, transform=transform, processes=processes,
        progress=progress,         **wanted(judge, detail),
    )  # fmt: skip
    record = analyzed(model, batches, loss_fn, plan)
    return _told(record, judge, plan)


def diagnose_custom(
    model: nn.Module,
    forward_fn: Callable[[nn.Module, int], Any],
    loss_fn: Callable[[Any], Any] | None = None,
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
    pipeline: Any = None,
    detail: Detail = "cheap",
    transform: Transform = "auto",
    processes: Any = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Like `diagnose`, for forwards that need more than `model(x)`.

    Args:
        model: the model.
        forward_fn: (model, step) → output; draws its own data.
        loss_fn: output → scalar; None where the output is the loss or holds it.
        steps, optimizer, clip, accumulate, scheduler, scaler, step_fn, seed, mode, pipeline, detail,
            transform, processes, progress: as for `diagnose`.

    Raises:
        GradflowError: those that `analyze_custom` raises.
        PipelineError: if `pipeline` cannot be used as one; raised before the model is run.
        ValueError: if an option is not as `analyze` takes it.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(32, 4)
    >>> diagnose_custom(model, lambda m, step: m(x) - m(-x), lambda y: y.square().mean(), steps=3).ok
    True
    """
    judge = Judge(detectors_of(pipeline, "diagnose_custom"))
    loop = Loop(
        optimizer=optimizer, clip=clip, accumulate=accumulate, scheduler=scheduler, scaler=scaler,
        step_fn=step_fn,
    )  # fmt: skip
    plan = Plan(
        steps=steps, loop=loop, seed=seed, mode=mode, transform=transform, processes=processes,
        progress=progress,         **wanted(judge, detail),
    )  # fmt: skip
    record = analyzed_custom(model, forward_fn, loss_fn, plan)
    return _told(record, judge, plan)


def detectors_of(pipeline: Any, call: str) -> tuple[Detector, ...]:
    """Return the detectors of what a call was given as its pipeline; None is `automatic()`."""
    return (automatic(),) if pipeline is None else check_detectors(pipeline, call)


@attrs.define(eq=False)
class Judge:
    """Detectors, and what they last saw: a record that is judged twice, in and after its run, is judged once.

    Args:
        detectors: pure functions.
    """

    detectors: Sequence[Detector]
    _last: tuple[FlowRecord, tuple[Issue, ...]] | None = None

    def issues(self, record: FlowRecord) -> tuple[Issue, ...]:
        """Return what the detectors see in a record."""
        if self._last is None or self._last[0] is not record:
            self._last = record, detect(record, self.detectors)
        return self._last[1]


def wanted(detectors: Sequence[Detector] | Judge, detail: Detail) -> dict[str, Any]:
    """Return what detectors need measured, as options of the plan."""
    judge = detectors if isinstance(detectors, Judge) else Judge(detectors)
    pipelines = [part for part in judge.detectors if isinstance(part, Pipeline)]
    return {
        "detail": "full" if any(part.detail == "full" for part in pipelines) else detail,
        "bend": asks_for_curves,
        "deepen": lambda record: needs_depth(record, judge.issues(record)),
        "measurements": [m for part in pipelines for m in part.measurements],
    }


def judged(record: FlowRecord, detectors: Sequence[Detector] | Judge) -> Report:
    """Return what detectors and their rules see in a record, as a report."""
    judge = detectors if isinstance(detectors, Judge) else Judge(detectors)
    found, known = judge.issues(record), judge.detectors
    return report_of(record, found, known, lines=summaries(record, known))


def _told(record: FlowRecord, judge: Judge, plan: Plan) -> Report:
    """Return a record as a report; None where another process is to have it, as who calls has asked for."""
    return judged(record, judge) if is_told(plan.processes) else None  # type: ignore[return-value]


def summaries(record: FlowRecord, detectors: Sequence[Detector]) -> tuple[str, ...]:
    """Return what the pipelines among some detectors tell of a record."""
    return tuple(line for part in detectors if isinstance(part, Pipeline) for line in part.lines(record))


def report_of(
    record: FlowRecord, issues: Iterable[Issue], detectors: Sequence[Detector], *, lines: Sequence[str] = ()
) -> Report:
    """Return issues with what explains them, as a report.

    Args:
        record: what they were seen in.
        issues: in any order.
        detectors: those of which pipelines know rules.
        lines: to be told as well.
    """
    rules = [rule for part in detectors if isinstance(part, Pipeline) for rule in part.rules]
    issues, causes = explain(record, tuple(issues), rules=rules)
    causes_first = sorted(
        issues, key=lambda issue: (-issue.severity.rank, issue.evidence.explained_by is not None)
    )
    return Report(record=record, issues=tuple(causes_first), causes=causes, lines=lines)


def layer_graph(model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None = None) -> LayerGraph:
    """Return the model's graph as the gradient sees it, with the flow along every edge, from one batch.

    Args:
        model: the model; it is left as it is.
        batch: one batch, as `diagnose` takes them.
        loss_fn: as for `diagnose`.

    Raises:
        GradflowError: as `diagnose` does.

    >>> import torch
    >>> from torch import nn
    >>> graph = layer_graph(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.ones(2, 4), lambda y: y.sum())
    >>> list(graph.nx)
    ['input', '0', '1', 'sum', 'loss']
    """
    return analyze(model, [batch], loss_fn, steps=1, detail="full").graph
