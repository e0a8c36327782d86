"""One look at a training: a batch, or a few, measured on copies of the model as it stands, and judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradflow.detect import Detector, detect
from gradflow.diagnosis import summaries, wanted
from gradflow.functional.analyze import analyzed, analyzed_custom
from gradflow.functional.attention.automatic import AutomaticAttention
from gradflow.functional.jacobian.sample_losses import sample_losses
from gradflow.functional.model.trees import map_tensors
from gradflow.functional.policy.automatic import AutomaticPolicy
from gradflow.functional.processes.line import Line
from gradflow.functional.processes.shards import processes_with
from gradflow.functional.recurrent.automatic import AutomaticRecurrence
from gradflow.functional.recurrent.measurement import Recurrence
from gradflow.functional.run.run import Plan
from gradflow.records import Floats, FlowRecord, Issue
from gradflow.watching.staged import is_staged

_LONG = (AutomaticRecurrence, Recurrence)
_CARRIED = 0.8  # of what a loss has in excess: samples that have so much together carry it
_FEW = 0.1  # of a batch's samples: where it takes more of them, it is the batch


@attrs.frozen(eq=False)
class Seen:
    """What a call of the training loop hands over.

    Args:
        model: as it is trained, or a stage of a pipeline; never changed.
        loss_fn: as for `gradflow.diagnose`.
        step: of the training.
        forward_fn: as for `gradflow.observer`.
        processes: the same.
    """

    model: Any
    loss_fn: Callable[..., Any] | None
    step: int
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    processes: Any = "alone"


@attrs.frozen(eq=False)
class Look:
    """What was measured, and what detectors see in it.

    Args:
        record: the measurements.
        issues: the verdicts, not explained yet.
        lines: what the pipeline's summaries tell.
    """

    record: FlowRecord
    issues: tuple[Issue, ...]
    lines: tuple[str, ...]


def quick_look(
    seen: Seen, batch: Any, detectors: Sequence[Detector], *, closely: bool, absent: frozenset[type]
) -> Look:
    """Return what one batch shows: one forward and one backward pass on copies.

    Args:
        seen: what the loop handed over.
        batch: of the step.
        detectors: that judge it.
        closely: whether to ask what takes longer than the pass itself: where gradient did not arrive and why,
            the model's parts, what recurrent layers do over time, and what is `absent`.
        absent: measurements of which the last close look has found nothing; see `absent_in`.
    """
    options = {**wanted(detectors, "cheap"), "deepen": None, "detail": "cheap"}
    if not closely:
        left_out = (*_LONG, *absent)
        options["measurements"] = [m for m in options["measurements"] if not isinstance(m, left_out)]
    plan = Plan(steps=1, mode="keep", closely=closely, processes=seen.processes, **options)
    return _judged(seen, [batch], plan, detectors)


def absent_in(record: FlowRecord) -> frozenset[type]:
    """Return which automatic measurements have found nothing of theirs in the model.

    Attention and heads of a policy are parts of a model, that do not come up from one look to the next.
    Numbers too small for their format do: precision is asked for at each.
    """
    found = {AutomaticAttention: record.transformer.attention, AutomaticPolicy: record.policy}
    return frozenset(kind for kind, there in found.items() if not there)


def closer_look(seen: Seen, batches: Sequence[Any], detectors: Sequence[Detector]) -> Look:
    """Return what `diagnose` says of several batches at the present weights."""
    plan = Plan(steps=len(batches), mode="keep", processes=seen.processes, **wanted(detectors, "cheap"))
    return _judged(seen, list(batches), plan, detectors)


def _judged(seen: Seen, batches: list[Any], plan: Plan, detectors: Sequence[Detector]) -> Look:
    forward = seen.forward_fn
    if is_staged(seen.model) and all(batch is None for batch in batches):
        record = analyzed(seen.model, None, seen.loss_fn, plan)  # neither its inputs nor its target
    elif forward is None:
        record = analyzed(seen.model, batches, seen.loss_fn, plan)
    else:
        record = analyzed_custom(seen.model, lambda m, step: forward(m, batches[step]), seen.loss_fn, plan)
    return Look(record, detect(record, detectors), summaries(record, detectors))


def copied(batch: Any) -> Any:
    """Return a copy of a batch, which may be looked at after the loop has filled its tensors anew."""
    return map_tensors(_copy, batch)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def no_record(note: str) -> FlowRecord:
    """Return the record of a look that failed."""
    empty = FlowRecord(steps=0, losses=np.empty(0), layers=(), parameters=())
    return attrs.evolve(empty, provenance=attrs.evolve(empty.provenance, notes=[note]))


def carriers(seen: Seen, batch: Any) -> str:
    """Return in words which samples of a batch carry its loss; "" where that cannot be told.

    Of several processes it is that of the joined batch, in the order of their ranks.
    """
    if is_staged(seen.model):  # no process has a sample's way to its loss
        return ""
    losses = _sample_losses(seen, batch)
    line = Line(processes_with(seen.processes, seen.model))
    if not line.alone:
        with line.opened():
            every = line.gathered(losses)
        losses = np.concatenate(every) if all(map(len, every)) else np.empty(0)
    if len(losses) < 2:
        return ""
    if lost := np.flatnonzero(~np.isfinite(losses)).tolist():
        return f"The loss of {_numbered(lost)} of the batch is not finite."
    excess = np.maximum(losses - np.median(losses), 0.0)
    order = np.argsort(-excess)
    total = float(excess.sum())
    if total <= 0:
        return ""
    needed = int(np.searchsorted(np.cumsum(excess[order]), _CARRIED * total)) + 1
    if needed > max(1, math.floor(_FEW * len(losses))):
        return "No few samples of the batch carry it."
    share = float(excess[order[:needed]].sum()) / total
    named = _numbered(sorted(order[:needed].tolist())).capitalize()
    carry = "carries" if needed == 1 else "carry"
    return f"{named} of the batch's {len(losses)} {carry} {share:.0%} of what its loss has in excess."


def _sample_losses(seen: Seen, batch: Any) -> Floats:
    """Return the loss of every sample of this process's batch; none where they cannot be had."""
    if seen.forward_fn is not None:
        return np.empty(0)
    model = seen.model  # without the wrapper, which would wait for other processes at every sample
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    try:
        return sample_losses(inner, batch, seen.loss_fn)
    except Exception:  # a model or loss that takes no single sample, or needs the others
        return np.empty(0)


def _numbered(samples: Sequence[int]) -> str:
    shown = ", ".join(str(sample) for sample in samples[:8])
    more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
    return f"sample {shown}" if len(samples) == 1 else f"samples {shown}{more}"
